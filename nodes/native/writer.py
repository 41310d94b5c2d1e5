"""Thoughts and answers for the nodes."""

from __future__ import annotations

from ...internvl_u.prompt import Thought, drawing_system
from ...internvl_u.writing import Writing
from .mllm import NativeMLLM
from .pictures import rgb_pictures
from .text import LiveText, show


def think(mllm: NativeMLLM, text: str, system: str | None, images: list, hidden, **how) -> Thought:
    """Returns the thought as far as the official code draws from it, and shows it on the node while it is written."""
    system = system or drawing_system(sum(image is not None for image in images))
    thought = mllm.encoder.tokenizer.thought_of(_write(mllm, text, system, images, hidden, **how))
    show(hidden, thought)
    return thought


def answer(mllm: NativeMLLM, text: str, system: str, images: list, hidden, **how) -> str:
    """Returns the answer, and shows it on the node while it is written."""
    result = mllm.encoder.tokenizer.decode(_write(mllm, text, system, images, hidden, **how))
    show(hidden, result)
    return result


def _write(mllm, text, system, images, hidden, *, max_new_tokens, how, temperature, top_p, beams, seed) -> list[int]:
    writing = Writing(
        max_new_tokens,
        beams=beams if how == "beams" else 1,
        temperature=temperature if how == "sampling" else 0.0,
        top_p=top_p if how == "sampling" else 1.0,
        seed=seed,
    )
    pictures = rgb_pictures(images, mllm.encoder.sizes)
    live = LiveText(hidden, max_new_tokens, mllm.encoder.tokenizer.decode)
    return mllm.write(text, system=system, images=pictures, writing=writing, on_token=live)
