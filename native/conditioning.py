"""What a CONDITIONING must be to be ours, and what another model's sampler says of ours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NoReturn

import comfy.conds
import torch

Conditioning = list[Any]
"""ComfyUI's CONDITIONING: entries of [context [1, tokens, width], options]."""
CONTEXTS = "contexts"
"""Name of the condition that our model computes from an entry; it takes the place of the `OnlyForInternVLU` there."""


class OnlyForInternVLU(comfy.conds.CONDRegular):
    """A condition that every entry of ours brings along: it ends a run of any model but ours with a sentence."""

    def __deepcopy__(self, memo: object) -> OnlyForInternVLU:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Core's Load Training Dataset takes files of plain data only. Out of a file it no longer ends anything.
        return OrderedDict, ()

    def process_cond(self, batch_size: int, **kwargs: object) -> NoReturn:
        raise ValueError(
            "a CONDITIONING of InternVL-U Encode found at a MODEL of another kind, the MODEL of Load InternVL-U "
            "expected: connect that one, or what this MODEL's own text encoder makes of the prompt"
        )


def own_options() -> dict[str, Any]:
    """Returns the options of each of our entries by which another model's sampler tells that they are not its own.

    Models that want a pooled text would fail for want of it before they ask the condition, so there is an empty one.
    """
    return {"model_conds": {CONTEXTS: OnlyForInternVLU(None)}, "pooled_output": torch.zeros(1, 1)}


def check_conditioning(conditioning: object, name: str) -> None:
    """Makes sure that what an input `name` was given is a CONDITIONING, of whatever model.

    Raises:
        ValueError: it is something else, or has no entries.
    """
    found = type(conditioning).__name__
    if isinstance(conditioning, Sequence) and not isinstance(conditioning, str):
        if conditioning and all(_is_entry(entry) for entry in conditioning):
            return
        found = "a list of other things" if conditioning else "an empty list"
    raise ValueError(f"{name}: {found} found, a CONDITIONING expected: connect InternVL-U Encode")


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
        return False
    return isinstance(entry[0], torch.Tensor | None) and isinstance(entry[1], dict)
