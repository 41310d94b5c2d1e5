"""How the contexts of a batch of samples lie beside their image tokens: one after another, unpadded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BranchInput:
    """One sample's context [tokens, context width] and its rotary table [2, all tokens, E / 2], fp32."""

    context: torch.Tensor
    rotary: torch.Tensor


@dataclass(frozen=True)
class Packing:
    """How the context tokens of a batch lie one after another: the tokens of each sample, and each token's sample."""

    lengths: tuple[int, ...]
    sample: torch.Tensor  # [T]
    rotary_image: torch.Tensor  # [2, 1, N, 1, E / 2]
    rotary_text: torch.Tensor  # [2, T, 1, E / 2]

    def groups(self) -> list[tuple[slice, slice, int]]:
        """Returns (samples, context tokens, tokens per sample) of each run of samples of equal length."""
        result, first, token = [], 0, 0
        for i, length in enumerate(self.lengths):
            if i + 1 == len(self.lengths) or self.lengths[i + 1] != length:
                end = token + (i + 1 - first) * length
                result.append((slice(first, i + 1), slice(token, end), length))
                first, token = i + 1, end
        return result


def pack(branches: Sequence[BranchInput], image: torch.Tensor) -> Packing:
    """Returns how the branches' contexts are packed beside the image tokens [B, N, D].

    Raises:
        ValueError: not one branch per sample.
    """
    if len(branches) != image.shape[0]:
        raise ValueError(f"{len(branches)} branches found for {image.shape[0]} samples, one each expected")
    tokens = image.shape[1]
    lengths = tuple(branch.context.shape[0] for branch in branches)
    sample = [torch.full((length,), i, device=image.device) for i, length in enumerate(lengths)]
    tables = [branch.rotary.to(image.device) for branch in branches]
    return Packing(
        lengths,
        torch.cat(sample),
        tables[0][:, None, :tokens, None],
        torch.cat([table[:, tokens:] for table in tables], dim=1)[:, :, None],
    )
