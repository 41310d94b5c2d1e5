"""Contact sheets: the same prompts with the same seeds, drawn again and again while a model learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from ..images import resize
from ..pipeline import ImageRequest, Pipeline
from ..results import save_image

COLUMNS, GAP, LARGEST_SIDE = 4, 4, 512
SAMPLES = 4
"""Pictures of a sheet where no prompts are given for it."""


def contact_sheet(pictures: Sequence[Image.Image], columns: int = COLUMNS) -> Image.Image:
    """Returns pictures of any sizes side by side, each in a cell of the largest one's size, at most 512 pixels."""
    width = min(LARGEST_SIDE, max(picture.width for picture in pictures))
    height = min(LARGEST_SIDE, max(picture.height for picture in pictures))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for number, picture in enumerate(pictures):
        scale = min(width / picture.width, height / picture.height, 1.0)
        fitted = resize(picture, max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        row, column = divmod(number, columns)
        sheet.paste(fitted, (column * (width + GAP), row * (height + GAP)))
    return sheet


def draw_sheet(
    pipeline: Pipeline, networks: Mapping[str, nn.Module | None], wishes: Sequence[ImageRequest], file: Path
) -> None:
    """Draws what is asked for with networks as they are now, each with its own seed, and writes it as one picture.

    Torch's own random numbers stay as they were.
    """
    with torch.random.fork_rng(devices=[]):
        pipeline.use({name: network for name, network in networks.items() if network is not None})
        save_image(contact_sheet([pipeline.draw(request) for request in wishes]), file, PngInfo())
