"""InternVL-U Encode."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..internvl_u.chat import Picture, Turn
from ..native.generate import check_history
from ..native.images import to_pil_images
from ..native.mllm import NativeMLLM, check_mllm
from .inputs import IMAGES, checked, history_input, history_output, image_inputs, system_input
from .load import MLLM


class EncodePrompt(io.ComfyNode):
    """A text, pictures to edit and a thought to the conditionings of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_EncodePrompt",
            display_name="InternVL-U Encode",
            category="InternVL-U",
            description="Reads the prompt with the multimodal language model. With pictures it edits them. Positive "
            "follows the prompt, negative is the model's own empty prompt: InternVL-U has no negative prompt.",
            inputs=[
                MLLM.Input("mllm"),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    placeholder="what to draw, or what to change",
                    tooltip="What to draw, or what to change in the pictures, in English or Chinese. A full stop is "
                    "added if the text does not end in one. Special tokens such as <img> "
                    "and braces {a|b} are taken as plain text.",
                ),
                system_input("drawing or editing"),
                io.Vae.Input("vae", optional=True, tooltip="Needed with pictures: from Load InternVL-U."),
                *image_inputs(),
                io.String.Input(
                    "thought",
                    optional=True,
                    force_input=True,
                    tooltip="A chain of thought to draw from: of InternVL-U Think, or any text. Then 3.5 for all_cfg "
                    "and 1.5 for part_cfg are the official values.",
                ),
                history_input("The conversation before this picture, as far as it fits; the words follow it."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Empty, of the first picture's size (within the trained range), else the model's own size.",
                ),
                history_output("The conversation with this prompt. Add the picture with InternVL-U Add to History."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        mllm: NativeMLLM,
        prompt: str,
        system_prompt: str = "",
        vae: io.Vae.Type | None = None,
        thought: str = "",
        history: Any = None,
        **images: io.Image.Type,
    ) -> io.NodeOutput:
        check_mllm(mllm)
        before = check_history(history)
        given = to_pil_images([images.get(name) for name in IMAGES], mllm.encoder.sizes)
        settings = {"system": system_prompt or None, "images": given, "vae": vae, "thought": thought}
        encoded = mllm.encode(prompt, **settings, history=before)
        return io.NodeOutput(*encoded, before.add(Turn("user", prompt, tuple(map(Picture, given)))))
