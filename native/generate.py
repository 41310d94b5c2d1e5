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
from .progress import LiveText, show

if TYPE_CHECKING:
    from comfy_api.latest._io import HiddenHolder

_logger = logging.getLogger("internvl_u")
Images = Sequence[torch.Tensor | None]
"""IMAGE inputs, those that are connected and those that are not."""


class Written(NamedTuple):
    """A text for a node, and what the node tells of it: "" for one that the model has ended itself."""

    text: str | Thought
    cut: str

    def ui(self) -> dict[str, Any]:
        """Returns what the node shows: it stays with a result from ComfyUI's cache.

        The same keys always: for a list of pictures, ComfyUI puts together what each gave by the keys of the first.
        """
        return {"text": [str(self.text)], "cut": [self.cut] if self.cut else []}


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
    if ended(written, tokenizer.stops):
        return written, ""
    cut = cut_warning(len(written))
    _logger.warning("InternVL-U, node %s: %s", hidden.unique_id, cut)
    return written, cut
