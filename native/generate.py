"""Thoughts and answers for the nodes, shown on them while they are generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from PIL import Image

from ..internvl_u.chat import History, Picture, Turn
from ..internvl_u.generation import GenerationConfig, cut_warning, ended
from ..internvl_u.prompt import drawing_system
from ..internvl_u.tokenizer import Thought
from .images import to_pil_images
from .mllm import NativeMLLM, check_mllm
from .progress import LiveText, show, show_note

if TYPE_CHECKING:
    from comfy_api.latest._io import HiddenHolder

_logger = logging.getLogger("internvl_u")
MANY_IMAGES = 16
"""More of them in a question are told of: the frames of a whole video, most likely."""
Images = Sequence[torch.Tensor | None]
"""IMAGE inputs, those that are connected and those that are not."""


class Written(NamedTuple):
    """A text for a node, what the node tells of it, and the conversation after it.

    `cut` is "" for a text that the model has ended itself.
    """

    text: str | Thought
    cut: str
    history: History = History()

    def ui(self) -> dict[str, Any]:
        """Returns what the node shows: it stays with a result from ComfyUI's cache.

        The same keys always: for a list of pictures, ComfyUI puts together what each gave by the keys of the first.
        """
        return {"text": [str(self.text)], "cut": [self.cut] if self.cut else []}


def no_thought(hidden: HiddenHolder) -> Written:
    """Returns the empty thought of a node whose thinking is switched off."""
    show(hidden, "")
    return Written("", "")


def think(
    mllm: NativeMLLM,
    text: str,
    system: str | None,
    images: Images,
    config: GenerationConfig,
    hidden: HiddenHolder,
    history: History | None = None,
) -> Written:
    """Returns the thought as far as the official code draws from it; the conversation stays as it is.

    Raises:
        ValueError: an input is of another kind, or the text does not fit the model.
    """
    before, pil_images = _checked(mllm, images, history)
    ids, cut = write(mllm, text, system or drawing_system(len(pil_images)), pil_images, config, hidden, before)
    thought = Written(mllm.encoder.tokenizer.decode_thought(ids), cut, before)
    show(hidden, thought.text, thought.cut)
    return thought


def answer(
    mllm: NativeMLLM,
    text: str,
    system: str,
    images: Images,
    config: GenerationConfig,
    hidden: HiddenHolder,
    history: History | None = None,
) -> Written:
    """Returns the answer to a question about images, and the conversation with both.

    Raises:
        ValueError: an input is of another kind, or the text does not fit the model.
    """
    count = sum(len(batch) for batch in images if isinstance(batch, torch.Tensor) and batch.ndim)
    if count > MANY_IMAGES:
        show_note(
            hidden,
            f"{count} pictures go in, 64 at most: slow, and much to look at. InternVL-U Frames picks some of them.",
        )
    before, pil_images = _checked(mllm, images, history)
    ids, cut = write(mllm, text, system, pil_images, config, hidden, before)
    said = mllm.encoder.tokenizer.decode(ids)
    asked = Turn("user", text, tuple(map(Picture, pil_images)))
    result = Written(said, cut, before.add(asked, Turn("assistant", said)))
    show(hidden, result.text, result.cut)
    return result


def check_history(history: object) -> History:
    """Returns a history; None is an empty one.

    Raises:
        ValueError: it is something else.
    """
    if history is None:
        return History()
    if not isinstance(history, History):
        raise ValueError(
            f"history: a value of type {type(history).__name__} found, a history expected: of InternVL-U Chat, Answer, "
            "Think, Encode or Add to History"
        )
    return history


def _checked(mllm: object, images: Images, history: object) -> tuple[History, list[Image.Image]]:
    check_mllm(mllm)
    return check_history(history), to_pil_images(images, cast(NativeMLLM, mllm).encoder.sizes)


def write(
    mllm: NativeMLLM,
    text: str,
    system: str,
    images: Sequence[Image.Image],
    config: GenerationConfig,
    hidden: HiddenHolder,
    history: History | None = None,
) -> tuple[list[int], str]:
    """Returns the ids that the model writes, shown on the node meanwhile, and that a limit has cut them, or "".

    Raises:
        ValueError: the text does not fit the model.
    """
    tokenizer = mllm.encoder.tokenizer
    live = LiveText(hidden, config.max_new_tokens, tokenizer.decode)

    def note(sentence: str) -> None:
        show_note(hidden, sentence)

    written = mllm.generate(
        text, system=system, images=images, config=config, on_token=live, history=history, on_note=note
    )
    live.end()
    if ended(written, tokenizer.stops):
        return written, ""
    cut = cut_warning(len(written))
    _logger.warning("InternVL-U, node %s: %s", hidden.unique_id, cut)
    return written, cut
