"""Where things lie, as targets for the helper heads of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import world
from .world import Scene, Thing

SHAPES, COLOURS, GROUNDS = tuple(world.SHAPES), tuple(world.COLOURS), tuple(world.BACKGROUNDS)
THINGS = len(SHAPES) + len(COLOURS)


def shares(scenes: Sequence[Scene], rows: int, columns: int) -> torch.Tensor:
    """Returns how much of each field the boxes of things cover [N, rows * columns, shapes + colours], in 0..1."""
    wanted = torch.zeros(len(scenes), rows, columns, THINGS)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            covered = _covered(scene, thing, rows, columns)
            wanted[i, ..., SHAPES.index(thing.shape)] += covered
            wanted[i, ..., len(SHAPES) + COLOURS.index(thing.colour)] += covered
    return wanted.clamp(max=1).flatten(1, 2)


def centres(scenes: Sequence[Scene], rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where each field's thing has its centre, and its size, in fields, [N, rows * columns, 3].

    With it comes where that is asked, [N, rows * columns]: 1 for fields that the box of a thing covers well.
    """
    wanted, asked = torch.zeros(len(scenes), rows, columns, 3), torch.zeros(len(scenes), rows, columns)
    across, down = torch.arange(columns) + 0.5, torch.arange(rows)[:, None] + 0.5
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            here = _covered(scene, thing, rows, columns) > 0.3
            size = torch.tensor(world.SIZES[thing.size] * min(rows, columns))
            told = torch.broadcast_tensors(thing.x * columns - across, thing.y * rows - down, size)
            wanted[i][here] = torch.stack(told, -1)[here]
            asked[i][here] = 1
    return wanted.flatten(1, 2), asked.flatten(1, 2)


def _covered(scene: Scene, thing: Thing, rows: int, columns: int) -> torch.Tensor:
    """Returns how much of each field a thing's box covers [rows, columns]."""
    short = min(scene.width, scene.height)
    across, down = columns * short / scene.width, rows * short / scene.height
    left, top, right, bottom = scene.box(thing)
    edges, levels = torch.arange(columns, dtype=torch.float32), torch.arange(rows, dtype=torch.float32)
    beside = (edges + 1).clamp(max=right * across) - edges.clamp(min=left * across)
    under = (levels + 1).clamp(max=bottom * down) - levels.clamp(min=top * down)
    return under.clamp(min=0)[:, None] * beside.clamp(min=0)


def grounds(scenes: Sequence[Scene]) -> torch.Tensor:
    """Returns the number of each scene's background [N]."""
    return torch.tensor([GROUNDS.index(scene.background) for scene in scenes])
