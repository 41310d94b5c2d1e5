"""Whether a MODEL draws in few evaluations: by the mark of a LoRA on it, whichever node has put it there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from comfy.model_patcher import ModelPatcher

from ..internvl_u.distilled import evaluations_of, marked_layer
from .guidance import check_model
from .mmdit import NativeMMDiT


def evaluations_on(model: ModelPatcher | None) -> int | None:
    """Returns how many evaluations a MODEL was distilled to, by its LoRAs or its checkpoint; None if it was not.

    Raises:
        ValueError: it is of another kind, or none is connected.
    """
    if model is None:
        raise ValueError("speed turbo found and no MODEL connected, the one with the LoRA of few steps expected")
    check_model(model)
    network = cast(NativeMMDiT, model.model.diffusion_model)
    layer = marked_layer(name for name, _ in network.named_parameters())
    found = [evaluations_of(added) for added in _added(model, f"diffusion_model.{layer}.bias")]
    return next((evaluations for evaluations in reversed(found) if evaluations), network.evaluations)


def _added(model: ModelPatcher, name: str) -> Iterator[torch.Tensor]:
    """Yields what is added to a weight as it is, in the order of its patches."""
    for _, patch, *_ in model.patches.get(name, ()):
        if isinstance(patch, tuple) and patch[0] == "diff" and isinstance(patch[1][0], torch.Tensor):
            yield patch[1][0]
