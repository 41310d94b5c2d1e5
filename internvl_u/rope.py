"""Positions of a sample's tokens on three axes (frame, row, column) and their rotary tables.

A sample is [image, references, context]. Image and references form one block around the origin of the row and column
axes; the context follows on the diagonal, and an image inside the context spreads over a plane of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Grid = tuple[int, int]
"""Rows and columns."""


class Span(NamedTuple):
    """A run of context tokens: `count` words, or (`rows`, `columns`) of one image's features."""

    count: int
    rows: int = 0
    columns: int = 0

    @property
    def is_image(self) -> bool:
        return self.rows > 0


Layout = tuple[Span, ...]


def grid_of(latents: torch.Tensor) -> Grid:
    """Returns the (rows, columns) of latents [..., rows, columns]."""
    return latents.shape[-2], latents.shape[-1]


def position_ids(image: Grid, references: Sequence[Grid], layout: Layout, image_scale: float) -> torch.Tensor:
    """Returns the positions [tokens, 3], fp32, of image, references and context, in this order.

    `image` and `references` are (rows, columns) in tokens; `image_scale` is the position scale of an image's
    features in the context: they are spread over 1 / `image_scale` times their own range.
    """
    blocks = [_block(frame, rows, columns) for frame, (rows, columns) in enumerate([image, *references])]
    following = int(torch.cat(blocks).max()) + 1
    for span in layout:
        if span.is_image:
            block = _plane(following, _stretched(span.rows, image_scale), _stretched(span.columns, image_scale))
            following = int(block.max()) + 1
        else:
            block = torch.arange(following, following + span.count, dtype=torch.float32)[:, None].expand(-1, 3)
            following += span.count
        blocks.append(block)
    return torch.cat(blocks)


def rotary_table(positions: torch.Tensor, axes: Sequence[int], theta: float) -> torch.Tensor:
    """Returns cosine and sine [2, tokens, sum(axes) / 2], fp32, of the rotation at each position."""
    angles = []
    for axis, width in enumerate(axes):
        frequencies = 1.0 / torch.pow(theta, torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles.append(torch.outer(positions[:, axis].float(), frequencies.to(positions.device)))
    angle = torch.cat(angles, dim=1)
    return torch.stack([angle.cos(), angle.sin()])


def _block(frame: int, rows: int, columns: int) -> torch.Tensor:
    return _plane(frame, _centred(rows), _centred(columns))


def _plane(frame: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.full_like(row, frame), row, column], dim=-1).reshape(-1, 3)


def _centred(count: int) -> torch.Tensor:
    return torch.arange(-(count - count // 2), count // 2, dtype=torch.float32)


def _stretched(count: int, scale: float) -> torch.Tensor:
    below, above = count - count // 2, count // 2
    return torch.linspace(-int(below / scale), int(above / scale) - 1, count)
