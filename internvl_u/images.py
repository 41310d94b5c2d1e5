"""Sizes and pixels of the images that the model draws and reads."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional

from .defaults import LARGEST, SMALLEST
from .numbers import check_whole
from .schema import ProcessorConfig, checked

STRIDE = 16
"""Width and height of what is drawn are multiples of this many pixels (VAE 8 x patch 2)."""
LATENT_STRIDE = 8
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def drawn_size(width: int, height: int) -> tuple[int, int]:
    """Returns the (width, height) in pixels that is drawn for a wished size: each rounded down to 16.

    Raises:
        ValueError: a side is below 16 or above 4096 pixels.
    """
    check_whole("width", width, SMALLEST, LARGEST, "pixels")
    check_whole("height", height, SMALLEST, LARGEST, "pixels")
    return width // STRIDE * STRIDE, height // STRIDE * STRIDE


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Returns the latent's (rows, columns) for a drawn size in pixels."""
    return height // LATENT_STRIDE, width // LATENT_STRIDE


def noise(width: int, height: int, seed: int, channels: int = 16) -> torch.Tensor:
    """Returns the start noise [1, channels, height / 8, width / 8], fp32, always from a CPU generator.

    So a seed means the same noise on a CPU and a GPU, here and in ComfyUI.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, *latent_size(width, height), generator=generator)


def to_unit(decoded: torch.Tensor) -> torch.Tensor:
    """Returns decoded values in [-1, 1] as the official pipeline hands them out: [0, 1], half a level brighter."""
    return ((127.5 * decoded + 128.0) / 255.0).clamp(0.0, 1.0)


def to_image(decoded: torch.Tensor) -> Image.Image:
    """Returns one decoded image [3, height, width] in [-1, 1] as 8 bits a channel."""
    values = to_unit(decoded.float()).movedim(0, -1).cpu().numpy()  # CHW -> HWC
    return Image.fromarray((values * 255).astype(numpy.uint8))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Returns the image at a size in pixels, with the Lanczos filter of the official pipeline."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class ReferenceSizes:
    """The range of sizes, in pixels, that reference images are brought into."""

    smallest_area: int = 4096 * 64
    largest_area: int = 16384 * 64
    longest_side: int | None = 1024

    @classmethod
    def from_config(cls, config: Mapping, source: str = "processor_config.json") -> ReferenceSizes:
        """Returns the range that a checkpoint's `processor_config.json` states.

        Raises:
            RuntimeError: it states none; `source` is named.
        """
        stated = checked(ProcessorConfig, config, source).image_gen_processor_kwargs
        area = stated.vae_downsample_factor**2
        return cls(stated.min_dynamic_patch * area, stated.max_dynamic_patch * area, stated.max_length)

    def limited(self, side: int | None) -> ReferenceSizes:
        """Returns a range of at most `side` x `side` pixels of area; None and what is larger change nothing.

        Raises:
            ValueError: `side` is no whole number from 16 to 4096.
        """
        if side is None:
            return self
        check_whole("reference_size", side, SMALLEST, LARGEST, "pixels")
        area = side**2
        return replace(self, smallest_area=min(self.smallest_area, area), largest_area=min(self.largest_area, area))

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Returns the (width, height) for an image: multiples of 16, aspect kept as nearly as the range allows."""
        sides, longest = (height, width), self.longest_side or sys.maxsize
        if max(sides) > longest:
            sides = tuple(max(1, int(side * (longest / max(sides)))) for side in sides)
        fitted = tuple(round(side / STRIDE) * STRIDE for side in sides)
        area = sides[0] * sides[1]
        if fitted[0] * fitted[1] > self.largest_area:
            scale = math.sqrt(area / self.largest_area)
            fitted = tuple(math.floor(side / scale / STRIDE) * STRIDE for side in sides)
        elif fitted[0] * fitted[1] < self.smallest_area:
            scale = math.sqrt(self.smallest_area / area)
            fitted = tuple(math.ceil(side * scale / STRIDE) * STRIDE for side in sides)
        if max(fitted) > longest:
            scale = longest / max(fitted)
            fitted = tuple(math.floor(side * scale / STRIDE) * STRIDE for side in fitted)
        # The official rule fails for images thinner than 16 pixels; one patch is the least that can be drawn.
        height, width = (max(side, STRIDE) for side in fitted)
        return width, height


def open_image(file: Path | IO[bytes], name: str = "") -> Image.Image:
    """Returns a file's image in its own mode, read whole. `name` is what an error calls the file, which may be open.

    Raises:
        ValueError: it is not there, or not readable as a picture.
    """
    try:
        with Image.open(file) as image:
            getattr(image, "n_frames", 1)  # counted now: it cannot be once the file is closed
            image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name or file} is not readable as a picture ({error})") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image in 8-bit RGB, the way up that its camera says; what is transparent lies on white.

    16-bit values are brought to 8 bits, and floating-point ones are taken as 0 to 1. Of several frames the
    first counts.

    Raises:
        ValueError: the image is in a mode that has no RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES or image.mode == "F":
        image = _to_eight_bits(image)
    try:
        if _has_transparency(image):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"a picture in mode {image.mode} found, one that has RGB expected ({error})") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = numpy.asarray(image, dtype=numpy.float64)
    scale = 255.0 if image.mode == "F" else 1 / 257
    return Image.fromarray(numpy.nan_to_num(values * scale, nan=0.0).round().clip(0, 255).astype(numpy.uint8))


def _has_transparency(image: Image.Image) -> bool:
    return bool({"A", "a"} & set(image.getbands())) or "transparency" in image.info


def preprocessing_warnings(image: Image.Image, sizes: ReferenceSizes) -> list[str]:
    """Returns what a user should know of how an unusual image, still in its own mode, is taken."""
    warnings = []
    if _has_transparency(image):
        warnings.append("its transparent parts are laid on white")
    if getattr(image, "n_frames", 1) > 1:
        warnings.append(f"of its {getattr(image, 'n_frames', 1)} frames the first is taken")
    if image.mode == "F" and (brightest := float(numpy.nan_to_num(numpy.asarray(image)).max())) > 1:
        warnings.append(f"its values go up to {brightest:.3g}: what is above 1 becomes white")
    (width, height), fitted = image.size, sizes.fit(*image.size)
    stretch = fitted[0] / fitted[1] * height / width
    if not 0.8 < stretch < 1.25:
        warnings.append(f"its {width} x {height} pixels are stretched to {fitted[0]} x {fitted[1]} for the transformer")
    return warnings


def scaling_remarks(image: Image.Image, sizes: ReferenceSizes) -> list[str]:
    """Returns what a user may like to know of an image that is much larger than what the model reads of it."""
    (width, height), fitted = image.size, sizes.fit(*image.size)
    if max(width, height) <= 4 * max(fitted):
        return []
    return [f"its {width} x {height} pixels are scaled down to {fitted[0]} x {fitted[1]}"]


def vision_pixels(image: Image.Image, size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Returns what the vision tower sees [1, 3, size, size]: the whole image, its aspect not kept."""
    levels = torch.from_numpy(numpy.array(image)).movedim(-1, 0)[None]  # HWC -> BCHW
    levels = functional.interpolate(levels, size=(size, size), mode="bicubic", antialias=True)
    centre, spread = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return (levels.float() / 255 - centre) / spread


def vae_pixels(image: Image.Image) -> torch.Tensor:
    """Returns an RGB image for the VAE [1, 3, height, width] in [-1, 1], at its own size."""
    levels = torch.from_numpy(numpy.array(image)).movedim(-1, 0)[None]  # HWC -> BCHW
    return levels.float() / 255 * 2 - 1


def fit_reference(image: Image.Image, sizes: ReferenceSizes) -> Image.Image:
    """Returns a reference at the size that `sizes` gives, as the transformer sees it."""
    return image.resize(sizes.fit(*image.size), Image.Resampling.BICUBIC)


def reference_pixels(image: Image.Image, sizes: ReferenceSizes) -> torch.Tensor:
    """Returns a reference for the VAE [1, 3, height, width] in [-1, 1], at the size that `sizes` gives."""
    return vae_pixels(fit_reference(image, sizes))
