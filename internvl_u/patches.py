"""Latents to the patches that the transformer's tokens stand for, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch.nn import functional

from .rope import Grid


def token_grid(size: Sequence[int], patch: int) -> Grid:
    """Returns (rows, columns) of the tokens of a latent of (height, width); an odd edge counts as a whole patch."""
    return math.ceil(size[0] / patch), math.ceil(size[1] / patch)


def patchify(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Returns the patches [B, rows * columns, channels * patch ** 2]; an odd edge is repeated outwards."""
    extra = (-latents.shape[-1] % patch, -latents.shape[-2] % patch)
    if any(extra):
        latents = functional.pad(latents, (0, extra[0], 0, extra[1]), mode="replicate")
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(patches: torch.Tensor, grid: Grid, patch: int) -> torch.Tensor:
    """Returns [B, channels, rows * patch, columns * patch] from patches [B, rows * columns, channels * patch ** 2]."""
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)
