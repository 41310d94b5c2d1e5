"""InternVL-U Encode."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..internvl_u.chat import Picture, Turn
from ..internvl_u.defaults import REFERENCE_SIZES
from ..native import compat
from ..native.generate import check_history
from ..native.images import to_pil_images
from ..native.mllm import NativeMLLM, check_mllm
from ..native.workflow import tell_unheard
from .inputs import (
    IMAGES,
    LATER,
    check_choice,
    checked,
    history_input,
    history_output,
    image_inputs,
    system_input,
)
from .load import MLLM

OFFICIAL = "official"


class EncodePrompt(io.ComfyNode):
    """A text, pictures to edit and a thought to the conditionings of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_EncodePrompt",
            display_name="InternVL-U Encode",
            category="InternVL-U",
            description="Reads the prompt with the multimodal language model. With up to eight pictures (batches "
            "count as several, 64 at most) it edits them. Positive follows the prompt, negative is the model's own "
            "empty prompt.",
            inputs=[
                MLLM.Input("mllm", tooltip="From Load InternVL-U."),
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
                    tooltip="A chain of thought to draw from: of InternVL-U Think, or any text. 3.5 for all_cfg "
                    "and 1.5 for part_cfg are the official values then; the sampler takes them by itself.",
                ),
                *image_inputs(LATER),
                *_unofficial_inputs(),
                history_input("The conversation before this picture, as far as it fits; the words follow it."),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with its pictures and its thought, for the sampler."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="What guidance leads away from, for the sampler."
                ),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Empty, of the first picture's size (within the trained range), else the model's own size.",
                ),
                history_output("The conversation with this prompt. Add the picture with InternVL-U Add to History."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            **compat.search_aliases(
                "edit",
                "image edit",
                "edit image",
                "text to image",
                "t2i",
                "text encode",
                "clip text encode",
                "prompt",
                "inpaint",
                "reference",
                "image to image",
                "img2img",
                "chain of thought",
                "mllm",
            ),
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
        negative_prompt: str = "",
        reference_size: str = OFFICIAL,
        history: Any = None,
        **images: io.Image.Type,
    ) -> io.NodeOutput:
        check_mllm(mllm)
        before = check_history(history)
        tell_unheard(cls.hidden, [name for name in IMAGES if images.get(name) is None])
        check_choice("reference_size", reference_size, tuple(REFERENCE_SIZES))
        if type(thought) is str and thought.strip() == prompt.strip():
            thought = ""  # ComfyUI hands the prompt on in place of the thought of a bypassed InternVL-U Think
        given = to_pil_images([images.get(name) for name in IMAGES], mllm.encoder.sizes)
        settings = {"negative_prompt": negative_prompt, "reference_size": REFERENCE_SIZES[reference_size]}
        settings |= {"system": system_prompt or None, "images": given, "vae": vae, "thought": thought}
        encoded = mllm.encode(prompt, **settings, history=before)
        return io.NodeOutput(*encoded, before.add(Turn("user", prompt, tuple(map(Picture, given)))))


def _unofficial_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "negative_prompt",
            default="",
            multiline=True,
            optional=True,
            placeholder="nothing (official)",
            tooltip="Unofficial: what to keep away from, in place of the model's own empty prompt. The model "
            "was not trained for it. Empty: the official picture. It changes the negative output only.",
            **compat.advanced(io.String.Input),
        ),
        io.Combo.Input(
            "reference_size",
            options=list(REFERENCE_SIZES),
            default=OFFICIAL,
            optional=True,
            tooltip="The most pixels of each picture that the transformer sees. A picture of 1024 x 1024 is "
            "4096 tokens in every step, as many as the drawn one; 512 x 512 are 1024 and 256 x 256 are 256. "
            "Fewer are faster and take less memory, but lose details; 256 x 256 is below the trained range.",
            **compat.advanced(io.Combo.Input),
        ),
    ]
