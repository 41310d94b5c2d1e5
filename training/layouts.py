"""Where things lie, as targets for the helper heads of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pack.training import world
from pack.training.world import Scene

SHAPES, COLOURS, GROUNDS = tuple(world.SHAPES), tuple(world.COLOURS), tuple(world.BACKGROUNDS)
THINGS = len(SHAPES) + len(COLOURS)


def shares(scenes: Sequence[Scene], rows: int, columns: int) -> torch.Tensor:
    """Returns how much of each field the boxes of things cover [N, rows * columns, shapes + colours], in 0..1."""
    wanted = torch.zeros(len(scenes), rows, columns, THINGS)
    left_edges, top_edges = torch.arange(columns, dtype=torch.float32), torch.arange(rows, dtype=torch.float32)
    for i, scene in enumerate(scenes):
        short = min(scene.width, scene.height)
        across, down = columns * short / scene.width, rows * short / scene.height
        for thing in scene.things:
            left, top, right, bottom = scene.box(thing)
            beside = (left_edges + 1).clamp(max=right * across) - left_edges.clamp(min=left * across)
            under = (top_edges + 1).clamp(max=bottom * down) - top_edges.clamp(min=top * down)
            covered = under.clamp(min=0)[:, None] * beside.clamp(min=0)
            wanted[i, ..., SHAPES.index(thing.shape)] += covered
            wanted[i, ..., len(SHAPES) + COLOURS.index(thing.colour)] += covered
    return wanted.clamp(max=1).flatten(1, 2)


def grounds(scenes: Sequence[Scene]) -> torch.Tensor:
    """Returns the number of each scene's background [N]."""
    return torch.tensor([GROUNDS.index(scene.background) for scene in scenes])
