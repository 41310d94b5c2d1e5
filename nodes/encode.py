"""InternVL-U Encode."""

from __future__ import annotations

from comfy_api.latest import io

from .load import MLLM


class EncodePrompt(io.ComfyNode):
    """A text to the two conditionings of a picture."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InternVLU_EncodePrompt",
            display_name="InternVL-U Encode",
            category="InternVL-U",
            description="Reads the prompt with the multimodal language model. Positive follows the prompt, negative "
            "is the model's own empty prompt: InternVL-U has no negative prompt.",
            inputs=[
                MLLM.Input("mllm", display_name="MLLM"),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to draw, in English or Chinese. A full stop is added if the text does not end in "
                    "one. Special tokens such as <img> are taken as plain text.",
                ),
                io.String.Input(
                    "system_prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Replaces the model's default system message. Empty: the default, which the model was "
                    "trained with.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, mllm, prompt, system_prompt="") -> io.NodeOutput:
        return io.NodeOutput(*mllm.encode(prompt, system=system_prompt or None))
