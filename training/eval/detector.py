"""Detects the things in an image of the synthetic world: what it shows, from its pixels alone.

The image may come from a model: colours a little off, soft or wobbly edges, specks and noise are forgiven; a shape
or a colour that is none of the world's is "unknown". Nothing here knows what the image should show.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy
from PIL import Image
from scipy import ndimage

from ..data import scenes

UNKNOWN = "unknown"
PALETTE = {**scenes.COLOURS, **scenes.BACKGROUNDS}
NAMES = (*PALETTE, UNKNOWN)

# Pixels that an image is brought to, so that an edge is a few pixels wide whatever the size was. None of the world's
# own sizes: resampling takes the edge off noise.
SHORT_SIDE = 112
MAX_CONTRAST = 40  # most levels between neighbours on one surface; an edge has more
MIN_PATCH = 6  # least pixels of a flat patch that counts as a surface
MIN_AREA = 0.004  # of the image: less is no thing, and no hole in one
MIN_AREA_PIXELS = 12  # of the image as it came
MAX_DISTANCE = 75  # levels from a colour of the palette; 35 in each channel are 61
MIN_HOLE = 0.04  # of the filled outline: less is no hole
TEMPLATE_CELLS = 48  # along a side of the templates
TEMPLATE_REACH = 3.0  # of the templates to each side of the centre, in standard deviations of the shape
MAX_STRETCH = 1.22  # most that width by height may differ from the shape's
# Least overlap with the template. The longer a shape's outline, the more the same wobble takes away. Pentagons,
# parallelograms and four-pointed stars come close to these; tests/unit/test_scenes.py has the shapes on both sides.
MIN_OVERLAP = {
    "circle": 0.90,
    "square": 0.88,
    "triangle": 0.77,
    "star": 0.71,
    "cross": 0.78,
    "ring": 0.75,
    "heart": 0.84,
}
MIN_DENT = 0.025  # of a heart's height; drawn ones have a quarter, small ones that the nano VAE has decoded a fortieth
MIN_LEAD = 0.02  # of the best overlap over the next


@dataclass(frozen=True)
class Detection:
    """A thing found in an image; shape or colour is "unknown" where it is none of the world's.

    `x`, `y` is the centre of its box; `box` its left, top, right and bottom, all in fractions of the image's width
    and height. `area` is a fraction of the image: what lies on the thing counts, the hole of a ring does not.
    `ratio` is the image's width by its height.
    """

    shape: str
    colour: str
    x: float
    y: float
    area: float
    box: tuple[float, float, float, float]
    ratio: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def lengths(self, across: float, down: float) -> tuple[float, float]:
        """Returns fractions of the image's width and height as fractions of its shorter side."""
        return across * max(self.ratio, 1), down * max(1 / self.ratio, 1)


@dataclass(frozen=True)
class DetectedScene:
    """What an image shows: the colour that most of its border has, and its things, larger ones first."""

    background: str
    things: tuple[Detection, ...]


def detect(image: Image.Image) -> DetectedScene:
    """Returns what an image of any size shows; one that is not of the small world gives unknown things or none."""
    scale = SHORT_SIDE / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    pixels = numpy.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    least = max(MIN_AREA * width * height, MIN_AREA_PIXELS * scale**2)
    labels = _absorb_specks(_label(pixels), least)
    border = numpy.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    background = int(numpy.bincount(border).argmax())
    things = [_describe(pixels, own, whole) for own, whole in _regions(labels, background)]
    return DetectedScene(NAMES[background], tuple(sorted(things, key=lambda thing: -thing.area)))


def _label(pixels: numpy.ndarray) -> numpy.ndarray:
    """Returns the palette index of each pixel [H, W].

    A pixel on the edge between two colours may look like a third. So only flat patches of one label are trusted, and
    every other pixel takes the one of the two nearest patches' colours that is more like its own.
    """
    labels = _nearest(pixels)
    trusted = _trusted(pixels, labels)
    present = numpy.flatnonzero(numpy.bincount(labels[trusted], minlength=1))
    if len(present) < 2:
        return numpy.full_like(labels, present[0]) if len(present) else labels
    patches = [trusted & (labels == name) for name in present]
    levels = numpy.array([numpy.median(pixels[patch], 0) for patch in patches])
    rest = ~trusted
    far = numpy.array([ndimage.distance_transform_cdt(~patch)[rest] for patch in patches])
    unlike = numpy.square(pixels[rest] - levels[:, None]).sum(-1)
    unlike[far > numpy.partition(far, 1, axis=0)[1]] = numpy.inf
    labels[rest] = present[unlike.argmin(0)]
    return labels


def _nearest(levels: numpy.ndarray) -> numpy.ndarray:
    """Returns the index in NAMES of the nearest colour for levels [..., 3], each taken to the middle of 4."""
    red, green, blue = numpy.moveaxis(levels.astype(numpy.uint8) >> 2, -1, 0)
    return _table()[red, green, blue]


@cache
def _table() -> numpy.ndarray:
    """Returns those indices [64, 64, 64]. In RGB: when colours shift, this palette is confused more often in Lab."""
    levels = numpy.moveaxis(numpy.indices((64, 64, 64)), 0, -1) * 4 + 1.5
    apart = numpy.array([numpy.square(levels - known).sum(-1) for known in PALETTE.values()])
    return numpy.where(apart.min(0) <= MAX_DISTANCE**2, apart.argmin(0), len(PALETTE)).astype(numpy.uint8)


def _trusted(pixels: numpy.ndarray, labels: numpy.ndarray) -> numpy.ndarray:
    """Returns which pixels [H, W] lie in the middle of 3 x 3 of one label and hardly any contrast, and not alone."""
    same = ndimage.minimum_filter(labels, 3) == ndimage.maximum_filter(labels, 3)
    planes = numpy.moveaxis(pixels, -1, 0).copy()
    contrast = ndimage.maximum_filter(planes, (1, 3, 3)) - ndimage.minimum_filter(planes, (1, 3, 3))
    patches, _ = ndimage.label(same & (contrast.max(0) <= MAX_CONTRAST))
    large = numpy.bincount(patches.ravel()) >= MIN_PATCH
    large[0] = False
    return large[patches]


def _components(labels: numpy.ndarray) -> tuple[numpy.ndarray, list[int]]:
    """Returns a number [H, W] for each connected region of one label, from 0, and the labels of the regions."""
    parts, owners = numpy.zeros(labels.shape, int), []
    for name in numpy.flatnonzero(numpy.bincount(labels.ravel())):
        mask = labels == name
        found, count = ndimage.label(mask)
        parts[mask] = found[mask] + len(owners) - 1
        owners += [int(name)] * count
    return parts, owners


def _absorb_specks(labels: numpy.ndarray, least: float) -> numpy.ndarray:
    """Returns the labels with each region of less than `least` pixels given to what is next to it."""
    parts, _ = _components(labels)
    small = (numpy.bincount(parts.ravel()) < least)[parts]
    if small.all():  # nothing but noise
        return numpy.full_like(labels, numpy.bincount(labels.ravel()).argmax())
    nearest = ndimage.distance_transform_edt(small, return_distances=False, return_indices=True)
    return labels[tuple(nearest)]


def _regions(labels: numpy.ndarray, background: int) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Returns for each region off the background: its own pixels, and those together with what lies on it.

    The second mask has a hole only where the background shows: that is what makes a ring.
    """
    parts, owners = _components(labels)
    own = [parts == i for i, owner in enumerate(owners) if owner != background]
    outlines = [_fill(mask) for mask in own]
    regions = []
    for mask, outline in zip(own, outlines):
        upon = [other for other in outlines if other is not outline and not (other & ~outline).any()]
        regions.append((mask, numpy.logical_or.reduce([mask, *upon])))
    return regions


def _fill(mask: numpy.ndarray) -> numpy.ndarray:
    """Returns the mask with its holes filled, faster than ndimage.binary_fill_holes."""
    gaps, _ = ndimage.label(~numpy.pad(mask, 1))
    return (gaps != gaps[0, 0])[1:-1, 1:-1]


def _describe(pixels: numpy.ndarray, own: numpy.ndarray, whole: numpy.ndarray) -> Detection:
    height, width = own.shape
    rows, columns = ndimage.find_objects(whole.astype(numpy.uint8))[0]
    box = (columns.start / width, rows.start / height, columns.stop / width, rows.stop / height)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    shape, colour = _shape(whole[rows, columns]), _colour(pixels, own)
    return Detection(shape, colour, x, y, float(whole.mean()), box, width / height)


def _colour(pixels: numpy.ndarray, own: numpy.ndarray) -> str:
    depth = ndimage.distance_transform_cdt(own)
    levels = numpy.median(pixels[depth > depth.max() / 2], 0)  # nearer to the edge it is mixed
    return NAMES[_nearest(levels)]


def _shape(mask: numpy.ndarray) -> str:
    """Returns the shape of a mask; "unknown" where it is not enough like one, or as much like another."""
    overlaps = sorted(((overlap, shape) for shape, overlap in _overlaps(mask).items()), reverse=True)
    overlap, shape = overlaps[0]
    return shape if overlap >= MIN_OVERLAP.get(shape, 1) and overlap - overlaps[1][0] >= MIN_LEAD else UNKNOWN


def _overlaps(mask: numpy.ndarray) -> dict[str, float]:
    """Returns intersection by union, 0..1, of a mask and each shape that its hole and its stretch allow, else 0."""
    outline = _fill(mask)
    hollow = 1 - mask.sum() / outline.sum() >= MIN_HOLE
    cells, ratio = _sample(mask if hollow else outline)
    overlaps = dict.fromkeys(scenes.ALL_SHAPES, 0.0)
    for shape, (template, proper) in _templates().items():
        possible = (shape == "ring") == hollow and (shape != "heart" or _is_dented(outline))
        if possible and 1 / MAX_STRETCH <= ratio / proper <= MAX_STRETCH:
            overlaps[shape] = float(numpy.minimum(cells, template).sum() / numpy.maximum(cells, template).sum())
    return overlaps


def _is_dented(outline: numpy.ndarray) -> bool:
    """Returns whether the middle of a cut-out outline's upper edge lies below both its sides, as a heart's does."""
    height, width = outline.shape
    tops = numpy.where(outline.any(0), outline.argmax(0), height)
    left, middle, right = tops[: width // 3], tops[width // 3 : width - width // 3], tops[width - width // 3 :]
    return min(map(len, (left, middle, right))) > 0 and middle.max() - max(left.min(), right.min()) >= MIN_DENT * height


def _sample(mask: numpy.ndarray) -> tuple[numpy.ndarray, float]:
    """Returns how much of each of CELLS x CELLS cells a mask covers, and its spread across by its spread down.

    The cells are laid by the centre of mass and the spread: a lost tip or a spur moves the box much more.
    """
    centre, spread = [], []
    for axis in (0, 1):
        weights = mask.sum(axis)
        places = numpy.arange(len(weights)) + 0.5
        centre.append((weights * places).sum() / weights.sum())
        spread.append(math.sqrt((weights * (places - centre[axis]) ** 2).sum() / weights.sum() + 1 / 12))
    margin = math.ceil(TEMPLATE_REACH * max(spread))
    image = Image.fromarray(numpy.pad(mask, margin).astype(numpy.float32))
    box = [centre[axis] + margin + side * TEMPLATE_REACH * spread[axis] for side in (-1, 1) for axis in (0, 1)]
    cells = image.resize((TEMPLATE_CELLS, TEMPLATE_CELLS), Image.Resampling.BOX, box)
    return numpy.asarray(cells), spread[0] / spread[1]


@cache
def _templates() -> dict[str, tuple[numpy.ndarray, float]]:
    """Returns the sample of each shape as the world draws it."""
    samples = {}
    for shape in scenes.ALL_SHAPES:
        scene = scenes.Scene(512, 512, "black", (scenes.Thing(shape, "red", "large"),))
        samples[shape] = _sample(numpy.asarray(scenes.render(scene))[..., 0] > 120)
    return samples


def matches_scene(reading: DetectedScene, scene: scenes.Scene) -> bool:
    """Returns whether an image has the scene's background and just its things by shape and colour, anywhere."""
    wanted = Counter(thing.name for thing in scene.things)
    return reading.background == scene.background and Counter(thing.name for thing in reading.things) == wanted


def is_thing(seen: Detection, thing: scenes.Thing, near: float | None = None) -> bool:
    """Returns whether shape and colour are the thing's; with `near`, also whether it is that close to its place.

    `near` is in fractions of the image's width and height.
    """
    close = near is None or max(abs(seen.x - thing.x), abs(seen.y - thing.y)) <= near
    return close and seen.name == thing.name


def is_inside(inner: Detection, outer: Detection, slack: float = 0.01) -> bool:
    """Returns whether `inner` lies on the middle of a larger `outer`; boxes may be off by `slack` of the image."""
    a, b = inner.box, outer.box
    contained = min(a[0] - b[0], a[1] - b[1], b[2] - a[2], b[3] - a[3]) >= -slack
    off_centre = max(abs(inner.x - outer.x) / (b[2] - b[0]), abs(inner.y - outer.y) / (b[3] - b[1]))
    return contained and off_centre <= 0.25 and inner.area < outer.area


def relation(one: Detection, other: Detection, clear: float = 1.25, least: float = 0.12) -> str | None:
    """Returns how `one` lies to `other`: left, right, above, below, inside; None where that is not clear.

    By the offset of their centres. The larger part decides; it must be `clear` times the smaller one and `least` of
    the image's shorter side.
    """
    if is_inside(one, other):
        return "inside"
    across, down = one.lengths(one.x - other.x, one.y - other.y)
    larger, smaller = max(abs(across), abs(down)), min(abs(across), abs(down))
    if is_inside(other, one) or larger < max(clear * smaller, least):
        return None
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def is_in_region(seen: Detection, region: str, slack: float = 0.05) -> bool:
    """Returns whether the centre lies in one of scenes.REGIONS, or outside it by at most `slack` of the image."""
    cell = scenes.REGIONS[region]
    return all(i / 3 - slack <= value <= (i + 1) / 3 + slack for i, value in zip(cell, (seen.x, seen.y)))


def nearest_size(seen: Detection) -> str:
    """Returns the size of scenes.SIZES that is nearest by ratio."""
    shape = seen.shape if seen.shape in scenes.ALL_SHAPES else "circle"
    left, top, right, bottom = seen.box
    length = math.hypot(*seen.lengths(right - left, bottom - top))

    def off(name: str) -> float:
        return abs(math.log(length / math.hypot(*scenes.Thing(shape, seen.colour, name).extent())))

    return min(scenes.SIZES, key=off)


def is_kept(
    before: Detection | DetectedScene, after: Detection | DetectedScene, shift: float = 0.08, growth: float = 1.6
) -> bool:
    """Returns whether each thing of `before` is still in `after`, where there may be others.

    Still: of the same shape and colour, its centre moved by at most `shift` of the image's width and height, its
    area changed by at most a factor of `growth`. Two things do not count as kept by the same one.
    """
    free = list(_things(after))
    for thing in _things(before):
        same = [
            other
            for other in free
            if other.name == thing.name
            and max(abs(other.x - thing.x), abs(other.y - thing.y)) <= shift
            and max(other.area / thing.area, thing.area / other.area) <= growth
        ]
        if not same:
            return False
        free.remove(min(same, key=lambda other: math.hypot(other.x - thing.x, other.y - thing.y)))
    return True


def _things(what: Detection | DetectedScene) -> tuple[Detection, ...]:
    return what.things if isinstance(what, DetectedScene) else (what,)
