"""InternVL-U Think and InternVL-U Answer."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.prompt import SYSTEM_ANSWER
from .load import MLLM
from .text import PICTURES, picture_inputs, system_input, writing_inputs


class WriteThought(io.ComfyNode):
    """What the model thinks before it draws, as text."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InternVLU_WriteThought",
            display_name="InternVL-U Think",
            category="InternVL-U",
            description="Lets the model think about what to draw or edit and gives its chain of thought as text. "
            "Read it, change it, or hand it as it is to the thought input of InternVL-U Encode.",
            inputs=[
                MLLM.Input("mllm"),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    placeholder="what to draw, or what to change",
                    dynamic_prompts=True,
                    tooltip="The same prompt as in InternVL-U Encode.",
                ),
                *writing_inputs(200),
                system_input("drawing or editing"),
                *picture_inputs(),
            ],
            outputs=[io.String.Output(display_name="thought")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, mllm, prompt, system_prompt="", **inputs) -> io.NodeOutput:
        from .native.writer import think

        images = [inputs.pop(name, None) for name in PICTURES]
        thought = think(mllm, prompt, system_prompt or None, images, cls.hidden, **inputs)
        return io.NodeOutput(thought, ui={"text": [str(thought)]})


class AnswerQuestion(io.ComfyNode):
    """An answer to a question about any number of pictures."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InternVLU_AnswerQuestion",
            display_name="InternVL-U Answer",
            category="InternVL-U",
            description="Answers a question about up to four pictures (batches count as several), or chats without "
            "any. Each question stands for itself: the model does not remember the last one.",
            inputs=[
                MLLM.Input("mllm"),
                io.String.Input(
                    "question",
                    multiline=True,
                    placeholder="what to ask",
                    dynamic_prompts=True,
                    tooltip="What to ask, in English or Chinese. A full stop is added if the text does not end in one.",
                ),
                *writing_inputs(512),
                system_input("answering"),
                *picture_inputs(),
            ],
            outputs=[io.String.Output(display_name="answer")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, mllm, question, system_prompt="", **inputs) -> io.NodeOutput:
        from .native.writer import answer

        images = [inputs.pop(name, None) for name in PICTURES]
        text = answer(mllm, question, system_prompt or SYSTEM_ANSWER, images, cls.hidden, **inputs)
        return io.NodeOutput(text, ui={"text": [text]})
