"""Sizes and pixels of the pictures that the model draws."""

from __future__ import annotations

import numpy
import torch
from PIL import Image

STRIDE = 16
"""Width and height of what is drawn are multiples of this many pixels (VAE 8 x patch 2)."""
SMALLEST, LARGEST = 16, 4096
LATENT_STRIDE = 8


def drawn_size(width: int, height: int) -> tuple[int, int]:
    """Returns the (width, height) in pixels that is drawn for a wished size: each rounded down to 16.

    Raises:
        ValueError: a side is below 16 or above 4096 pixels.
    """
    for name, value in (("width", width), ("height", height)):
        if not SMALLEST <= value <= LARGEST:
            raise ValueError(f"{name} {value} found, {SMALLEST} to {LARGEST} pixels expected")
    return width // STRIDE * STRIDE, height // STRIDE * STRIDE


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Returns the latent's (rows, columns) for a drawn size in pixels."""
    return height // LATENT_STRIDE, width // LATENT_STRIDE


def noise(width: int, height: int, seed: int, channels: int = 16) -> torch.Tensor:
    """Returns the start noise [1, channels, height / 8, width / 8], fp32, always from a CPU generator.

    So a seed means the same picture on every device, here and in ComfyUI.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, *latent_size(width, height), generator=generator)


def to_unit(decoded: torch.Tensor) -> torch.Tensor:
    """Returns decoded values in [-1, 1] as the official pipeline hands them out: [0, 1], half a level brighter."""
    return ((127.5 * decoded + 128.0) / 255.0).clamp(0.0, 1.0)


def to_image(decoded: torch.Tensor) -> Image.Image:
    """Returns one decoded picture [3, height, width] in [-1, 1] as an 8-bit image."""
    values = to_unit(decoded.float()).movedim(0, -1).cpu().numpy()  # CHW -> HWC
    return Image.fromarray((values * 255).astype(numpy.uint8))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Returns the image at a size in pixels, with the Lanczos filter of the official pipeline."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
