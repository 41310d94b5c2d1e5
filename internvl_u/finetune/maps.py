"""Maps of a picture that say what lies where: edges, colours, scribbles. Control is learnt from them.

Edges are those of Canny (IEEE PAMI 8, 1986) with the conventions of kornia, which ComfyUI's own Canny node calls, so
that a LoRA that was trained on these maps can be used behind that node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch
from PIL import Image
from torch.nn import functional

from ..defaults import MAP_KINDS, MAP_THRESHOLDS

LUMA = (0.299, 0.587, 0.114)
SIGMA, RADIUS = 1.0, 2
"""Of the blur before edges are sought, in pixels."""
LEAST_SIDE = RADIUS + 1
"""Pixels: smaller pictures cannot be mirrored at their edges."""
COLOUR_CELLS = 16
"""Cells of a colour map along the shorter side."""
SCRIBBLE_SIDE, SCRIBBLE_PEN = 128, 1 / 64
"""A scribble has the edges of the picture at this shorter side; how wide they are drawn, by the shorter side."""


class Thresholds(NamedTuple):
    """Gradients above which a pixel is a weak and a strong edge; of levels 0 to 1, a sharp step has up to 2.6."""

    low: float = MAP_THRESHOLDS[0]
    high: float = MAP_THRESHOLDS[1]

    def check(self) -> None:
        """Makes sure that they are thresholds.

        Raises:
            ValueError: they are not.
        """
        if not (math.isfinite(self.low) and math.isfinite(self.high) and 0 < self.low <= self.high):
            raise ValueError(f"thresholds {self.low:g} and {self.high:g} found, 0 < low <= high expected")


DEFAULT = Thresholds()


def canny(pixels: torch.Tensor, thresholds: Thresholds = DEFAULT) -> torch.Tensor:
    """Returns which pixels are edges, 0 or 1 [B, 1, H, W], of RGB pixels [B, 3, H, W] in 0..1.

    Raises:
        ValueError: a side is below 3 pixels, or the thresholds are none.
    """
    thresholds.check()
    height, width = pixels.shape[-2:]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"{width} x {height} pixels found, at least {LEAST_SIDE} x {LEAST_SIDE} expected for edges")
    grey = (pixels.float() * torch.tensor(LUMA, device=pixels.device).view(3, 1, 1)).sum(1, keepdim=True)
    across, down = _gradient(_blurred(grey))
    strength = (across**2 + down**2 + 1e-6).sqrt()
    strength = strength * _is_ridge(strength, across, down)
    return _connected(strength > thresholds.low, strength > thresholds.high).to(pixels.dtype)


def _blurred(grey: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=grey.dtype, device=grey.device)
    kernel = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    grey = functional.conv2d(functional.pad(grey, (RADIUS, RADIUS, 0, 0), "reflect"), kernel.view(1, 1, 1, -1))
    return functional.conv2d(functional.pad(grey, (0, 0, RADIUS, RADIUS), "reflect"), kernel.view(1, 1, -1, 1))


def _gradient(grey: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns Sobel's differences across and down [B, 1, H, W], not divided by their weight of 8."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=grey.dtype, device=grey.device)
    found = functional.conv2d(functional.pad(grey, (1, 1, 1, 1), "replicate"), torch.stack([kernel, kernel.T])[:, None])
    return found[:, :1], found[:, 1:]


_AHEAD = ((0, 1), (1, 1), (1, 0), (1, -1))
"""(down, across) of the next pixel for gradients towards 0, 45, 90 and 135 degrees."""


def _is_ridge(strength: torch.Tensor, across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Returns where the strength is the highest along the gradient; of two equal neighbours the left or upper one."""
    sector = (torch.rad2deg(torch.atan2(down, across)) / 45).round().long() % 4
    height, width = strength.shape[-2:]
    padded = functional.pad(strength, (1, 1, 1, 1))
    ridge = (across != 0) | (down != 0)
    for number, (dy, dx) in enumerate(_AHEAD):
        ahead, behind = (
            padded[..., 1 + sign * dy : 1 + sign * dy + height, 1 + sign * dx : 1 + sign * dx + width]
            for sign in (1, -1)
        )
        straight = 0 in (dy, dx)
        highest = (strength > behind) & ((strength >= ahead) if straight else (strength > ahead))
        ridge = ridge & ((sector != number) | highest)
    return ridge


def _connected(weak: torch.Tensor, strong: torch.Tensor) -> torch.Tensor:
    """Returns the weak pixels that hang together with a strong one."""
    while True:
        grown = (functional.max_pool2d(strong.float(), 3, stride=1, padding=1) > 0) & weak
        if torch.equal(grown, strong):
            return strong
        strong = grown


def edge_map(image: Image.Image, thresholds: Thresholds) -> Image.Image:
    """Returns the edges of an RGB image, white on black, as ComfyUI's Canny gives them."""
    levels = torch.from_numpy(numpy.array(image)).movedim(-1, 0)[None].float() / 255  # HWC -> BCHW
    edges = (canny(levels, thresholds)[0, 0] * 255).byte().numpy()
    return Image.fromarray(edges).convert("RGB")


def colour_map(image: Image.Image, thresholds: Thresholds) -> Image.Image:
    """Returns the mean colours of coarse cells of an RGB image, at its size."""
    scale = COLOUR_CELLS / min(image.size)
    cells = [max(1, round(side * scale)) for side in image.size]
    return image.resize(cells, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def scribble_map(image: Image.Image, thresholds: Thresholds) -> Image.Image:
    """Returns the edges of the large things of an RGB image as with a thick pen, white on black."""
    scale = min(1.0, SCRIBBLE_SIDE / min(image.size))
    small = image.resize([max(LEAST_SIDE, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    edges = edge_map(small, thresholds).convert("L").resize(image.size, Image.Resampling.NEAREST)
    radius = max(1, round(min(image.size) * SCRIBBLE_PEN / 2))
    lines = torch.from_numpy(numpy.array(edges))[None].float()
    thick = functional.max_pool2d(lines, 2 * radius + 1, stride=1, padding=radius)[0]
    return Image.fromarray(thick.byte().numpy()).convert("RGB")


class Kind(NamedTuple):
    """A kind of map: what makes it, and what it is called in an instruction."""

    make: Callable[[Image.Image, Thresholds], Image.Image]
    called: str


KINDS = dict(
    zip(
        MAP_KINDS,
        (Kind(edge_map, "edge map"), Kind(colour_map, "colour map"), Kind(scribble_map, "scribble")),
        strict=True,
    )
)


def make_map(image: Image.Image, kind: str, thresholds: Thresholds = DEFAULT) -> Image.Image:
    """Returns the map of a kind of `KINDS`, of an RGB image and at its size.

    Raises:
        ValueError: the image is too small, or the thresholds are none.
    """
    return KINDS[kind].make(image, thresholds)


def map_instruction(kind: str, caption: str = "") -> str:
    """Returns the words that go with a map: "Draw from this edge map: a red circle"."""
    words = f"Draw from this {KINDS[kind].called}"
    return f"{words}: {caption.strip()}" if caption.strip() else words
