"""Thoughts and answers for the nodes, shown on them while they are generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

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
    """A text for a node, and what the node tells of it: "" for one that the model has ended itself."""

    text: str | Thought
    cut: str

    def ui(self) -> dict[str, Any]:
        """Returns what the node shows: it stays with a result from ComfyUI's cache."""
        return {"text": [str(self.text)]} | ({"cut": [self.cut]} if self.cut else {})


def no_thought(hidden: HiddenHolder) -> Written:
    """Returns the empty thought of a node whose thinking is switched off."""
    show(hidden, "")
    return Written("", "")


def think(
    mllm: NativeMLLM, text: str, system: str | None, images: Images, config: GenerationConfig, hidden: HiddenHolder
) -> Written:
    """Returns the thought as far as the official code draws from it.

    Raises:
        ValueError: an input is of another kind, or the text does not fit the model.
    """
    system = system or drawing_system(sum(image is not None for image in images))
    ids, cut = _generate(mllm, text, system, images, config, hidden)
    thought = Written(mllm.encoder.tokenizer.decode_thought(ids), cut)
    show(hidden, *thought)
    return thought


def answer(
    mllm: NativeMLLM, text: str, system: str, images: Images, config: GenerationConfig, hidden: HiddenHolder
) -> Written:
    """Returns the answer to a question about images.

    Raises:
        ValueError: an input is of another kind, or the text does not fit the model.
    """
    count = sum(len(batch) for batch in images if isinstance(batch, torch.Tensor) and batch.ndim)
    if count > MANY_IMAGES:
        show_note(
            hidden,
            f"{count} pictures go in, 64 at most: slow, and much to look at. InternVL-U Frames picks some of them.",
        )
    ids, cut = _generate(mllm, text, system, images, config, hidden)
    result = Written(mllm.encoder.tokenizer.decode(ids), cut)
    show(hidden, *result)
    return result


def _generate(
    mllm: NativeMLLM, text: str, system: str, images: Images, config: GenerationConfig, hidden: HiddenHolder
) -> tuple[list[int], str]:
    check_mllm(mllm)
    pil_images = to_pil_images(images, mllm.encoder.sizes)
    tokenizer = mllm.encoder.tokenizer
    live = LiveText(hidden, config.max_new_tokens, tokenizer.decode)
    written = mllm.generate(text, system=system, images=pil_images, config=config, on_token=live)
    live.end()
    if ended(written, tokenizer.stops):
        return written, ""
    cut = cut_warning(len(written))
    _logger.warning("InternVL-U, node %s: %s", hidden.unique_id, cut)
    return written, cut
