"""Auxiliary heads that are trained beside the models and not kept: they predict where things lie in a scene.

Without them the vision tower and the transformer both need many times as long to begin to learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from internvl_u.tokenizer import Tokenizer

from .data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing

SHAPE_NAMES, COLOUR_NAMES, BACKGROUND_NAMES = tuple(SHAPES), tuple(COLOURS), tuple(BACKGROUNDS)
ATTRIBUTES = len(SHAPE_NAMES) + len(COLOUR_NAMES)
CELL_WORDS = (*SHAPE_NAMES, *COLOUR_NAMES, *SIZES, "left", "right", "top", "bottom", "centre")
"""What a cell can be said to hold; each is a word."""


class VisionAuxHead(nn.Module):
    """What lies under each patch and in each cell of the vision tower, and the background.

    What lies in a cell is predicted by the likeness of its features to the embeddings of the words for it. So a cell
    becomes something like the words "small red circle top left", which the language model can already look up.
    """

    def __init__(self, patch_width: int, width: int, tokenizer: Tokenizer):
        super().__init__()
        self.coverage = nn.Linear(patch_width, ATTRIBUTES)
        self.centre = nn.Linear(width, 2)
        self.size = nn.Linear(width, len(SIZES))
        words = (*CELL_WORDS, *BACKGROUND_NAMES)
        self.scale = nn.Parameter(torch.full((len(words),), 8.0))
        self.bias = nn.Parameter(torch.full((len(words),), -2.0))
        self.word_ids = [tokenizer.encode([f" {word}"])[0][-1] for word in words]

    def losses(
        self,
        patches: torch.Tensor,
        features: torch.Tensor,
        scenes: Sequence[Scene],
        embeddings: torch.Tensor,
        positive_weight: float,
    ) -> dict[str, torch.Tensor]:
        """Returns the losses of the patches [N, patches, P] and features [N, cells, W] of the scenes' images.

        `embeddings` are the language model's [vocabulary, W]. What is there counts `positive_weight` times as much as
        what is not: most cells are empty.
        """
        patch_grid, cell_grid = (round(x.shape[1] ** 0.5) for x in (patches, features))
        covered = coverage(scenes, patch_grid, patch_grid).to(patches.device)
        coverage_loss = functional.binary_cross_entropy_with_logits(self.coverage(patches).float(), covered)
        words = functional.normalize(embeddings.detach()[self.word_ids].float(), dim=-1)
        likeness = functional.normalize(features.float(), dim=-1) @ words.T * self.scale + self.bias
        things, background = likeness.split((len(CELL_WORDS), len(BACKGROUND_NAMES)), dim=-1)
        weight = torch.full((len(CELL_WORDS),), positive_weight, device=things.device)
        wanted = cell_words(scenes, cell_grid).to(things)
        cell_loss = functional.binary_cross_entropy_with_logits(things, wanted, pos_weight=weight)
        cells, centres, sizes = (tensor.to(features.device) for tensor in cell_things(scenes, cell_grid))
        found = features[cells[:, 0], cells[:, 1]]
        offset_loss = (self.centre(found).float() - centres).abs().mean()
        size_loss = functional.cross_entropy(self.size(found).float(), sizes)
        wanted_background = background_indices(scenes).to(background.device)
        background_loss = functional.cross_entropy(background.mean(1), wanted_background)
        return {
            "coverage_loss": coverage_loss,
            "cell_loss": cell_loss,
            "background_loss": background_loss,
            "offset_loss": offset_loss,
            "size_loss": size_loss,
        }


class LayoutAuxHead(nn.Module):
    """Where a token of the transformer lies, and under it: shares of each shape and colour, and their centre."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.coverage = nn.Linear(width, ATTRIBUTES + len(BACKGROUND_NAMES))
        self.offset = nn.Linear(width, 3)
        self.position = nn.Linear(width, 2)

    def losses(self, tokens: torch.Tensor, scenes: Sequence[Scene], grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Returns the losses of the image's tokens [2, B, rows * columns, D], early and midway, for what is drawn."""
        (early, tokens), (rows, columns) = self.norm(tokens.float()), grid
        # Attention is relative; with positions of their own at hand, tokens soon find out where things are.
        positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(early)
        position_loss = (self.position(early) - positions).abs().mean()
        things, background = self.coverage(tokens).split((ATTRIBUTES, len(BACKGROUND_NAMES)), dim=-1)
        wanted = coverage(scenes, rows, columns).to(things)
        coverage_loss = functional.binary_cross_entropy_with_logits(things, wanted)
        wanted_background = background_indices(scenes).to(background.device)
        background_loss = functional.cross_entropy(background.mean(1), wanted_background)
        offsets, valid = (tensor.to(things) for tensor in centre_offsets(scenes, rows, columns))
        error = (self.offset(tokens) - offsets).abs().mean(-1)
        return {
            "coverage_loss": coverage_loss,
            "background_loss": background_loss,
            "offset_loss": (error * valid).sum() / valid.sum().clamp(min=1),
            "position_loss": position_loss,
        }


# Targets


def coverage(scenes: Sequence[Scene], rows: int, columns: int) -> torch.Tensor:
    """Returns how much of each field the boxes of things cover [N, rows * columns, shapes + colours], in 0..1."""
    wanted = torch.zeros(len(scenes), rows, columns, ATTRIBUTES)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            covered = _box_coverage(scene, thing, rows, columns)
            wanted[i, ..., SHAPE_NAMES.index(thing.shape)] += covered
            wanted[i, ..., len(SHAPE_NAMES) + COLOUR_NAMES.index(thing.colour)] += covered
    return wanted.clamp(max=1).flatten(1, 2)


def centre_offsets(scenes: Sequence[Scene], rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns from each field the way to its thing's centre, and the thing's size, in fields, [N, rows * columns, 3].

    With it comes where that is valid, [N, rows * columns]: 1 for fields that the box of a thing covers well.
    """
    wanted, valid = torch.zeros(len(scenes), rows, columns, 3), torch.zeros(len(scenes), rows, columns)
    across, down = torch.arange(columns) + 0.5, torch.arange(rows)[:, None] + 0.5
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            here = _box_coverage(scene, thing, rows, columns) > 0.3
            size = torch.tensor(SIZES[thing.size] * min(rows, columns))
            values = torch.broadcast_tensors(thing.x * columns - across, thing.y * rows - down, size)
            wanted[i][here] = torch.stack(values, -1)[here]
            valid[i][here] = 1
    return wanted.flatten(1, 2), valid.flatten(1, 2)


def background_indices(scenes: Sequence[Scene]) -> torch.Tensor:
    """Returns the index of each scene's background [N]."""
    return torch.tensor([BACKGROUND_NAMES.index(scene.background) for scene in scenes])


def cell_words(scenes: Sequence[Scene], grid: int) -> torch.Tensor:
    """Returns which words are true of each cell [N, grid * grid, CELL_WORDS], 0 or 1: of the things centred in it."""
    wanted = torch.zeros(len(scenes), grid * grid, len(CELL_WORDS))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            column, row = ((value > 1 / 3) + (value > 2 / 3) for value in (thing.x, thing.y))
            region = (
                ("centre",) if (column, row) == (1, 1) else (("left", "", "right")[column], ("top", "", "bottom")[row])
            )
            for word in (thing.shape, thing.colour, thing.size, *region):
                if word:
                    wanted[i, _cell(thing, grid), CELL_WORDS.index(word)] = 1
    return wanted


def cell_things(scenes: Sequence[Scene], grid: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the image and cell of each thing [T, 2], its centre [T, 2] in 0..1 of the image, its size's index [T]."""
    cells, centres, sizes = [], [], []
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            cells.append((i, _cell(thing, grid)))
            centres.append((thing.x, thing.y))
            sizes.append(tuple(SIZES).index(thing.size))
    return torch.tensor(cells), torch.tensor(centres), torch.tensor(sizes)


def _cell(thing: Thing, grid: int) -> int:
    return int(thing.y * grid) * grid + int(thing.x * grid)


def _box_coverage(scene: Scene, thing: Thing, rows: int, columns: int) -> torch.Tensor:
    """Returns how much of each field a thing's box covers [rows, columns]."""
    short = min(scene.width, scene.height)
    across, down = columns * short / scene.width, rows * short / scene.height
    left, top, right, bottom = scene.box(thing)
    edges, levels = torch.arange(columns, dtype=torch.float32), torch.arange(rows, dtype=torch.float32)
    beside = (edges + 1).clamp(max=right * across) - edges.clamp(min=left * across)
    under = (levels + 1).clamp(max=bottom * down) - levels.clamp(min=top * down)
    return under.clamp(min=0)[:, None] * beside.clamp(min=0)
