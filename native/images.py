"""ComfyUI's IMAGE to the RGB images that the model reads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy
import torch
from PIL import Image

from ..internvl_u.images import ReferenceSizes, preprocessing_warnings, scaling_remarks, to_rgb
from ..internvl_u.prompt import check_images

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
HALF_A_LEVEL = 0.5 / 255
_logger = logging.getLogger("internvl_u")


def to_pil_images(inputs: Sequence[torch.Tensor | None], sizes: ReferenceSizes) -> list[Image.Image]:
    """Returns the RGB images of IMAGE inputs [B, H, W, channels] in [0, 1]; a batch counts as several.

    Raises:
        ValueError: it is no IMAGE, or an empty one, or one that has neither 1, 3 nor 4 channels; or there are too many.
    """
    batches = [_checked(batch) for batch in inputs if batch is not None]
    check_images(sum(len(batch) for batch in batches))
    result: list[Image.Image] = []
    for batch in batches:
        for values in batch:
            image = _eight_bit(values)
            for warning in (*_range_warnings(values), *preprocessing_warnings(image, sizes)):
                _logger.warning("InternVL-U, picture %d: %s", len(result) + 1, warning)
            for remark in scaling_remarks(image, sizes):
                _tell_once(f"picture {len(result) + 1}: {remark}")
            result.append(to_rgb(image))
    return result


def pick_frames(images: torch.Tensor, count: int) -> tuple[torch.Tensor, str]:
    """Returns `count` evenly spaced images of a batch [B, H, W, C], first and last included, and a sentence of it.

    All of a shorter batch; of several the middle one where `count` is 1.

    Raises:
        ValueError: it is no IMAGE, or an empty one.
    """
    last = len(_checked(images)) - 1
    if count > last:
        places = range(last + 1)
    else:
        places = [round(i * last / (count - 1)) for i in range(count)] if count > 1 else [round(last / 2)]
    return images[list(places)], f"{len(places)} of {last + 1} pictures"


@functools.lru_cache(maxsize=64)
def _tell_once(remark: str) -> None:
    _logger.info("InternVL-U, %s", remark)


def _checked(batch: torch.Tensor) -> torch.Tensor:
    if not isinstance(batch, torch.Tensor) or batch.ndim != 4:
        found = tuple(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise ValueError(f"an IMAGE of {found} found, [batch, height, width, channels] expected")
    if not batch.numel():
        raise ValueError(f"an empty IMAGE {tuple(batch.shape)} found, at least one picture expected")
    return batch


def _range_warnings(image: torch.Tensor) -> list[str]:
    """Returns what a user should know of an image whose values are out of [0, 1], as those of HDR files are."""
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
