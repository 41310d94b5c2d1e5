"""Thoughts and answers for the nodes, shown on them while they are generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..internvl_u.generation import GenerationConfig, cut_warning, ended
from ..internvl_u.prompt import drawing_system
from ..internvl_u.tokenizer import Thought
from .images import to_pil_images
from .mllm import NativeMLLM
from .progress import LiveText, show

if TYPE_CHECKING:
    from comfy_api.latest._io import HiddenHolder

_logger = logging.getLogger("internvl_u")
Images = Sequence[torch.Tensor | None]
"""IMAGE inputs, those that are connected and those that are not."""


def think(
    mllm: NativeMLLM, text: str, system: str | None, images: Images, config: GenerationConfig, hidden: HiddenHolder
) -> Thought:
    """Returns the thought as far as the official code draws from it."""
    system = system or drawing_system(sum(image is not None for image in images))
    thought = mllm.encoder.tokenizer.decode_thought(_generate(mllm, text, system, images, config, hidden))
    show(hidden, thought)
    return thought


def answer(
    mllm: NativeMLLM, text: str, system: str, images: Images, config: GenerationConfig, hidden: HiddenHolder
) -> str:
    """Returns the answer to a question about images."""
    result = mllm.encoder.tokenizer.decode(_generate(mllm, text, system, images, config, hidden))
    show(hidden, result)
    return result


def _generate(
    mllm: NativeMLLM, text: str, system: str, images: Images, config: GenerationConfig, hidden: HiddenHolder
) -> list[int]:
    pil_images = to_pil_images(images, mllm.encoder.sizes)
    tokenizer = mllm.encoder.tokenizer
    live = LiveText(hidden, config.max_new_tokens, tokenizer.decode)
    written = mllm.generate(text, system=system, images=pil_images, config=config, on_token=live)
    if not ended(written, tokenizer.stops):
        _logger.warning("InternVL-U, node %s: %s", hidden.unique_id, cut_warning(len(written)))
    return written
