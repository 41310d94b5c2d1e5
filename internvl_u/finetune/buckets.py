"""Aspect buckets: pictures of like proportions are drawn at one size, so that they learn side by side; and batches.

Widths and heights of a bucket are what `images.drawn_size` draws. A picture is scaled until it covers its bucket, and
what sticks out is cut off evenly at both ends.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageOps

from ..defaults import LARGEST, SMALLEST
from ..images import STRIDE, ReferenceSizes, drawn_size
from ..numbers import check_whole
from .examples import Example

LONGEST_ASPECT = 3.0
"""Of a bucket: the most times that its longer side is its shorter one."""
SAME_ASPECT = 1.02
"""Proportions that differ by less are those of the same view: a picture before and after an edit."""
CUT = 0.05
"""Share of a side that is cut off, in steps of which buckets are chosen: below that the nearest area counts."""
LARGEST_BATCH = 4096
Size = tuple[int, int]
"""Width and height in pixels."""


class Placed(NamedTuple):
    """An example's pictures as they are learned from, and whether one is smaller than what it is drawn at."""

    size: Size
    cropped: tuple[bool, ...]
    """For each reference, whether it is cut to `size` as well, so that it lies under the picture to draw."""
    enlarged: bool


class Buckets:
    """The sizes to draw at: those nearest to an area, for each of the proportions that pictures have.

    An edit is drawn at the size that its input image is brought to, as the pipeline does by itself. So where the area
    is one that input images may have, edits have buckets of their own: the sizes that stay as they are as input images.
    """

    def __init__(self, size: Size, references: ReferenceSizes, limit: int | None = None):
        """`size` is the (width, height) that gives the area; `references` what input images are brought into.

        Of input images that are not cut to the bucket at most `limit` x `limit` pixels of area are seen.

        Raises:
            ValueError: it cannot be drawn.
        """
        width, height = drawn_size(*size)
        self.area, self.references = width * height, references.limited(limit)
        self.sizes = self.edited_sizes = _sizes(self.area)
        if references.smallest_area <= self.area <= references.largest_area:
            self.edited_sizes = [one for one in _all_sizes(self.area) if references.fit(*one) == one] or self.sizes

    @classmethod
    def of_resolution(cls, resolution: int | None, default: Size, references: ReferenceSizes) -> Buckets:
        """Returns the buckets of squares of `resolution` pixels; None: of the size that a checkpoint draws by itself.

        Raises:
            ValueError: `resolution` is no whole number from 16 to 4096.
        """
        if resolution is None:
            return cls(default, references)
        check_whole("resolution", resolution, SMALLEST, LARGEST, "pixels")
        return cls((resolution, resolution), references, resolution)

    def bucket(self, width: int, height: int, edited: bool = False) -> Size:
        """Returns the bucket of a picture; `edited`: of one whose input image has its proportions."""

        def distance(size: Size) -> tuple[float, int, float, Size]:
            apart = _between(size, (width, height))
            return round(apart / CUT), abs(size[0] * size[1] - self.area), apart, size

        return min(self.edited_sizes if edited else self.sizes, key=distance)

    def place(self, example: Example) -> Placed:
        """Returns how an example with a picture to draw is learned from.

        Raises:
            ValueError: a picture is unreadable.
        """
        assert example.image is not None
        own = example.image.size
        cropped = tuple(_between(own, one.size) < math.log(SAME_ASPECT) for one in example.references)
        size = self.bucket(*own, edited=any(cropped))
        seen = [own, *(one.size for one, cut in zip(example.references, cropped, strict=True) if cut)]
        return Placed(size, cropped, any(w < size[0] or h < size[1] for w, h in seen))

    def images(self, example: Example) -> tuple[Image.Image, tuple[Image.Image, ...]]:
        """Returns the picture to draw at the size of its bucket, and the references as the pipeline is given them.

        Raises:
            ValueError: one is unreadable.
        """
        assert example.image is not None
        placed = self.place(example)
        references = tuple(
            fill(one.open(), placed.size) if cut else one.open()
            for one, cut in zip(example.references, placed.cropped, strict=True)
        )
        return fill(example.image.open(), placed.size), references

    def report(self, examples: Sequence[Example]) -> str:
        """Returns a sentence on the buckets of examples with pictures to draw, and on what is enlarged for them."""
        placed = [self.place(one) for one in examples if one.image is not None]
        if not placed:
            return ""
        counts: dict[Size, int] = defaultdict(int)
        for one in placed:
            counts[one.size] += 1
        sizes = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{count} at {width} x {height}" for (width, height), count in sizes[:8])
        text = f"{len(placed)} pictures in {len(sizes)} buckets: {shown}{', ...' if len(sizes) > 8 else ''}"
        small = sum(one.enlarged for one in placed)
        return f"{text}; {small} are smaller than their bucket and are enlarged" if small else text


def fill(image: Image.Image, size: Size) -> Image.Image:
    """Returns an image scaled until it covers `size`, and what sticks out cut off evenly; one of that size as it is."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


class Batches:
    """Which samples a step learns from: a function of the seed and of the step, whatever came before."""

    def __init__(self, shapes: Sequence[Hashable], batch: int, seed: int):
        buckets: dict[Hashable, list[int]] = defaultdict(list)
        for index, shape in enumerate(shapes):
            buckets[shape].append(index)
        self._buckets, self._batch, self._seed = list(buckets.values()), batch, seed
        self.epoch_steps = sum(math.ceil(len(one) / batch) for one in self._buckets)
        """Steps in which each sample comes once."""
        self._epoch = lru_cache(2)(self._shuffled)

    def __call__(self, step: int) -> list[int]:
        """Returns the indices of a step, counted from 0."""
        epoch, place = divmod(step, self.epoch_steps)
        return list(self._epoch(epoch)[place])

    def _shuffled(self, epoch: int) -> list[list[int]]:
        order = random.Random(f"{self._seed} {epoch}")
        made = []
        for bucket in self._buckets:
            mixed = order.sample(bucket, len(bucket))
            for start in range(0, len(mixed), self._batch):
                some = mixed[start : start + self._batch]
                while len(some) < self._batch:  # by those of the same bucket that came first
                    some += mixed[: self._batch - len(some)]
                made.append(some)
        order.shuffle(made)
        return made


def batches(shapes: Sequence[Hashable], batch: int, seed: int) -> Batches:
    """Returns what tells the indices of a step's samples: all of one bucket, which are those of equal shapes.

    In every epoch each sample comes once; what a bucket lacks to a whole batch is filled up from the bucket itself.

    Raises:
        ValueError: there are no samples, or `batch` is no whole number from 1 to 4096.
    """
    check_whole("batch", batch, 1, LARGEST_BATCH)
    if not shapes:
        raise ValueError("no samples found, one at least expected")
    return Batches(shapes, batch, seed)


def _between(one: Size, other: Size) -> float:
    """Returns how far two sizes' proportions are apart: the logarithm of their ratio."""
    return abs(math.log(one[0] * other[1] / (one[1] * other[0])))


def _sizes(area: int) -> list[Size]:
    """Returns sizes of at most an area: each width with the tallest height under it, and the same upright."""
    step = _step(area)
    pairs = [(width, area // width // step * step) for width in range(step, LARGEST + 1, step)]
    return _allowed([*pairs, *((height, width) for width, height in pairs)])


def _all_sizes(area: int) -> list[Size]:
    """Returns all sizes of a quarter of an area up to half as much again."""
    sides = range(_step(area), LARGEST + 1, _step(area))
    pairs = ((width, height) for width in sides for height in sides)
    return _allowed([(w, h) for w, h in pairs if area <= 4 * w * h <= 6 * area])


def _step(area: int) -> int:
    """Returns the step of widths and heights: fine enough for the area, and coarse enough for few buckets."""
    return STRIDE * max(1, math.isqrt(area) // 256)


def _allowed(sizes: Sequence[Size]) -> list[Size]:
    return sorted(
        {one for one in sizes if SMALLEST <= min(one) and max(one) <= min(LARGEST, LONGEST_ASPECT * min(one))}
    )
