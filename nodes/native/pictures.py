"""ComfyUI's IMAGE to the pictures that the model reads."""

from __future__ import annotations

import logging

import numpy
import torch
from PIL import Image

from ...internvl_u.picture import ReferenceSizes, remarks, to_rgb

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
HALF_A_LEVEL = 0.5 / 255
_logger = logging.getLogger("internvl_u")


def rgb_pictures(inputs: list[torch.Tensor | None], sizes: ReferenceSizes) -> list[Image.Image]:
    """Returns the RGB pictures of IMAGE inputs [B, H, W, channels] in [0, 1]; a batch counts as several.

    Raises:
        ValueError: an image has neither 1, 3 nor 4 channels.
    """
    pictures = []
    for images in inputs:
        for image in images if images is not None else ():
            picture = _eight_bit(image)
            for remark in (*_range_remarks(image), *remarks(picture, sizes)):
                _logger.warning("InternVL-U, picture %d: %s", len(pictures) + 1, remark)
            pictures.append(to_rgb(picture))
    return pictures


def _range_remarks(image: torch.Tensor) -> list[str]:
    """Returns what a user should know of a picture whose values are out of [0, 1], as those of HDR files are."""
    said, brightest = [], float(image.nan_to_num(nan=0.0).max())
    if brightest > 1.0 + HALF_A_LEVEL:
        said.append(f"its values go up to {brightest:.3g}: what is above 1 becomes white, so tone-map it before")
    if image.isnan().any():
        said.append("some of its values are no numbers (NaN): they become black")
    return said


def _eight_bit(image: torch.Tensor) -> Image.Image:
    channels = image.shape[-1]
    if channels not in _MODES:
        raise ValueError(f"a picture of {channels} channels found, 1 (grey), 3 (RGB) or 4 (RGBA) expected")
    levels = (image.float().nan_to_num(nan=0.0) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return Image.fromarray(numpy.ascontiguousarray(levels[..., 0] if channels == 1 else levels), _MODES[channels])
