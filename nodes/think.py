"""InternVL-U Think and InternVL-U Answer."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..internvl_u.defaults import ANSWER_TOKENS, THOUGHT_TOKENS
from ..internvl_u.prompt import SYSTEM_ANSWER
from ..internvl_u.tasks import AS_WRITTEN, TASKS, question_for
from ..native import compat, generate
from ..native.mllm import NativeMLLM
from .inputs import (
    CUSTOM,
    IMAGES,
    LATER,
    budget_input,
    checked,
    chosen_tokens,
    generation_config,
    generation_inputs,
    history_input,
    history_output,
    image_inputs,
    system_input,
)
from .load import MLLM


class WriteThought(io.ComfyNode):
    """What the model thinks before it draws, as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_WriteThought",
            display_name="InternVL-U Think",
            category="InternVL-U",
            description="Lets the model think about what to draw or edit and gives its chain of thought as text. "
            "Read it, change it, or hand it as it is to the thought input of InternVL-U Encode.",
            inputs=[
                MLLM.Input("mllm", lazy=True, tooltip="From Load InternVL-U. Not loaded while think is off."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    placeholder="what to draw, or what to change",
                    tooltip="The same prompt as in InternVL-U Encode.",
                ),
                *generation_inputs(THOUGHT_TOKENS),
                system_input("drawing or editing"),
                *image_inputs(),
                *image_inputs(LATER),
                io.Boolean.Input(
                    "think",
                    default=True,
                    optional=True,
                    tooltip="Off: the thought is empty, no time is spent on it, and the same graph draws plainly.",
                ),
                budget_input(),
                history_input("The conversation before this thought, as far as it fits."),
            ],
            outputs=[
                io.String.Output(
                    display_name="thought",
                    tooltip="The chain of thought, for InternVL-U Encode. Empty where think is off.",
                ),
                history_output("The same conversation, for InternVL-U Encode, which adds the prompt to it."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            is_output_node=True,
            **compat.search_aliases(
                "chain of thought",
                "cot",
                "reasoning",
                "think",
                "thinking",
                "prompt enhancer",
                "prompt rewriting",
                "rewrite prompt",
                "expand prompt",
                "llm",
                "mllm",
                "vlm",
            ),
        )

    @classmethod
    def check_lazy_status(cls, mllm: NativeMLLM | None = None, think: bool | None = True, **_: object) -> list[str]:
        return ["mllm"] if mllm is None and think is not False else []

    @classmethod
    @checked
    def execute(
        cls,
        mllm: NativeMLLM,
        prompt: str,
        max_new_tokens: int,
        how: str,
        temperature: float,
        top_p: float,
        beams: int,
        seed: int,
        system_prompt: str = "",
        think: bool = True,
        budget: str = CUSTOM,
        history: Any = None,
        **images: io.Image.Type,
    ) -> io.NodeOutput:
        if not think:
            thought = generate.no_thought(cls.hidden)
            return io.NodeOutput(thought.text, ui=thought.ui())
        tokens = chosen_tokens(budget, max_new_tokens, cls.hidden)
        config = generation_config(tokens, how, temperature, top_p, beams, seed)
        given = [images.get(name) for name in IMAGES]
        thought = generate.think(mllm, prompt, system_prompt or None, given, config, cls.hidden, history)
        return io.NodeOutput(thought.text, thought.history, ui=thought.ui())


class AnswerQuestion(io.ComfyNode):
    """An answer to a question about any number of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_AnswerQuestion",
            display_name="InternVL-U Answer",
            category="InternVL-U",
            description="Answers a question about up to eight pictures (batches count as several, 64 at most), or "
            "chats without any. Without a history each question stands for itself: the model does not remember the "
            "last one.",
            inputs=[
                MLLM.Input("mllm", tooltip="From Load InternVL-U."),
                io.String.Input(
                    "question",
                    multiline=True,
                    placeholder="what to ask",
                    tooltip="What to ask, in English or Chinese. A full stop is added if the text does not end in one.",
                ),
                *generation_inputs(ANSWER_TOKENS),
                system_input("answering"),
                *image_inputs(),
                *image_inputs(LATER),
                io.Combo.Input(
                    "task",
                    options=list(TASKS),
                    default=AS_WRITTEN,
                    optional=True,
                    tooltip="A ready question. What is written above is added to it: what a caption is to mention, "
                    "or the idea that becomes a better prompt. as written: your question alone.",
                ),
                history_input("The conversation before this question, as far as it fits."),
            ],
            outputs=[
                io.String.Output(display_name="answer", tooltip="What the model says, as text."),
                history_output("The conversation with this question and its answer."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            is_output_node=True,
            **compat.search_aliases(
                "ask",
                "question",
                "vqa",
                "caption",
                "captioning",
                "describe",
                "describe image",
                "image to text",
                "interrogate",
                "tag",
                "ocr",
                "read text",
                "chat",
                "llm",
                "mllm",
                "vlm",
                "vision language model",
                "compare",
            ),
        )

    @classmethod
    @checked
    def execute(
        cls,
        mllm: NativeMLLM,
        question: str,
        max_new_tokens: int,
        how: str,
        temperature: float,
        top_p: float,
        beams: int,
        seed: int,
        system_prompt: str = "",
        task: str = AS_WRITTEN,
        history: Any = None,
        **images: io.Image.Type,
    ) -> io.NodeOutput:
        config = generation_config(max_new_tokens, how, temperature, top_p, beams, seed)
        given = [images.get(name) for name in IMAGES]
        question = question_for(task, question)
        text = generate.answer(mllm, question, system_prompt or SYSTEM_ANSWER, given, config, cls.hidden, history)
        return io.NodeOutput(text.text, text.history, ui=text.ui())
