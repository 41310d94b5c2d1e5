"""Whether a picture is right, in the model's own eyes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..internvl_u.generation import GenerationConfig
from ..internvl_u.prompt import SYSTEM_ANSWER
from .images import to_pil_images
from .mllm import NativeMLLM, check_mllm
from .progress import LiveText, show_note

if TYPE_CHECKING:
    from comfy_api.latest._io import HiddenHolder

TOKENS = 16
"""Of the answer: only its beginning counts."""
YES = ("yes", "是", "对")


def judge(mllm: NativeMLLM, question: str, images: torch.Tensor, hidden: HiddenHolder) -> tuple[bool, str]:
    """Returns whether the answer to a question about images [B, H, W, C] begins with yes, and the answer.

    It stands below the node that `hidden` tells of.

    Raises:
        ValueError: an input is of another kind, or the text does not fit the model.
    """
    check_mllm(mllm)
    tokenizer = mllm.encoder.tokenizer
    live = LiveText(hidden, TOKENS, tokenizer.decode)
    given = to_pil_images([images], mllm.encoder.sizes)
    if not given:
        raise ValueError("image: nothing found, an IMAGE expected: connect the picture to judge")
    ids = mllm.generate(question, system=SYSTEM_ANSWER, images=given, config=GenerationConfig(TOKENS), on_token=live)
    live.end()
    answer = tokenizer.decode(ids).strip()
    right = answer.lower().startswith(YES)
    show_note(hidden, f"{'right' if right else 'not right'}: {answer}")
    return right, answer
