"""A synthetic world of flat shapes: scenes, how they are rendered, and how they are generated from a seed.

A scene is one to three things on a plain background. Lengths are fractions: positions of the image's width and
height, sizes of its shorter side, so that one scene can be drawn at any size. Things are put on a coarse grid: few
places are soon learnt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
"""What the nano model is trained on."""
TAUGHT_SHAPES = ("heart",)
"""What it is not, so that it can be taught them by a LoRA."""
ALL_SHAPES = (*SHAPES, *TAUGHT_SHAPES)
COLOURS = {
    "red": (225, 35, 45),
    "green": (30, 150, 60),
    "blue": (35, 75, 225),
    "yellow": (250, 220, 40),
    "orange": (245, 130, 25),
    "purple": (140, 50, 185),
    "pink": (250, 135, 200),
    "cyan": (35, 195, 205),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "grey": (128, 128, 128),
    "brown": (110, 70, 40),
    "navy": (25, 35, 90),
    "beige": (232, 214, 170),
}
SIZES = {"small": 0.28, "medium": 0.40, "large": 0.58}
"""Outer diameter as a fraction of the image's shorter side."""

IMAGE_SIZES = ((64, 64), (96, 96), (128, 128), (96, 64), (64, 96))
"""(width, height) in pixels of the images of this world."""

SQUARE_SIDE = 0.88  # of the diameter, so that a square looks as large as a circle
CROSS_ARM = 0.36
RING_HOLE = 0.52
STAR_WAIST = 0.42
HEART_CURVE = (13, -6, -2.5, -1)
"""Cosines of its height where its width is 32 sin ** 3: the sixth curve of mathworld.wolfram.com/HeartCurve.html with a
deeper dent, which the nano model's VAE keeps."""
HEART_POINTS = 80
MIN_GAP = 0.06  # between things, of the shorter side
MARGIN = 0.03  # between things and the image's edge
GRID_STEP = 1 / 4  # between the places that things are put on, of the shorter side
PIPS = {2: ((1, 2), (3, 2)), 3: ((2, 1), (1, 3), (3, 3))}
"""Where equal things lie: steps of the grid along the image's longer side and across it."""
RELATION_RATIO = 1.49
"""Least offset in a direction by that across it, for a relation; three steps of the grid by two are enough."""
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One shape. `x`, `y` is the centre of its bounding box, in 0..1 of the image's width and height."""

    shape: str
    colour: str
    size: str
    x: float = 0.5
    y: float = 0.5

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def extent(self) -> tuple[float, float]:
        """Width and height of the bounding box as fractions of the image's shorter side."""
        diameter = SIZES[self.size]
        if self.shape == "square":
            return diameter * SQUARE_SIDE, diameter * SQUARE_SIDE
        if self.shape == "triangle":
            return diameter, diameter * math.sqrt(3) / 2
        if self.shape == "star":
            return diameter * math.cos(math.pi / 10), diameter * (1 + math.cos(math.pi / 5)) / 2
        if self.shape == "heart":
            return diameter, diameter * HEART_HEIGHT
        return diameter, diameter


@dataclass(frozen=True)
class Scene:
    """Things on a background, in an image of `width` x `height` pixels; a later thing lies on an earlier one."""

    width: int
    height: int
    background: str
    things: tuple[Thing, ...]

    def box(self, thing: Thing) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a thing in fractions of the image's shorter side."""
        short = min(self.width, self.height)
        half_width, half_height = (side / 2 for side in thing.extent())
        x, y = thing.x * self.width / short, thing.y * self.height / short
        return x - half_width, y - half_height, x + half_width, y + half_height


def render(scene: Scene, width: int | None = None, height: int | None = None) -> Image.Image:
    """Returns the scene as an RGB image with smooth edges, at its own size or another."""
    width, height = width or scene.width, height or scene.height
    scale = SUPERSAMPLING
    image = Image.new("RGB", (width * scale, height * scale), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    unit = min(width, height) * scale
    for thing in scene.things:
        x, y = thing.x * width * scale, thing.y * height * scale
        _render_thing(canvas, thing, x, y, unit, BACKGROUNDS[scene.background])
    return image.reduce(scale)


def _render_thing(
    canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, unit: float, background: tuple
) -> None:
    colour = COLOURS[thing.colour]
    half_width, half_height = (side * unit / 2 for side in thing.extent())
    box = (x - half_width, y - half_height, x + half_width - 1, y + half_height - 1)
    if thing.shape in ("circle", "ring"):
        canvas.ellipse(box, fill=colour)
        if thing.shape == "ring":
            hole = half_width * RING_HOLE
            canvas.ellipse((x - hole, y - hole, x + hole - 1, y + hole - 1), fill=background)
    elif thing.shape == "square":
        canvas.rectangle(box, fill=colour)
    elif thing.shape == "cross":
        arm = half_width * CROSS_ARM
        canvas.rectangle((x - arm, box[1], x + arm - 1, box[3]), fill=colour)
        canvas.rectangle((box[0], y - arm, box[2], y + arm - 1), fill=colour)
    elif thing.shape == "triangle":
        canvas.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=colour)
    elif thing.shape == "heart":
        canvas.polygon([(x + across * half_width, y + down * half_width) for across, down in HEART], fill=colour)
    else:
        radius = SIZES[thing.size] * unit / 2
        middle = box[1] + radius  # the five tips lie on a circle around here
        points = []
        for i in range(10):
            reach = radius * (STAR_WAIST if i % 2 else 1)
            angle = math.pi * i / 5
            points.append((x + reach * math.sin(angle), middle - reach * math.cos(angle)))
        canvas.polygon(points, fill=colour)


def _heart_outline() -> list[tuple[float, float]]:
    """Returns a heart's outline around the centre of its box, from -1 to 1 across."""
    angles = [2 * math.pi * i / HEART_POINTS for i in range(HEART_POINTS)]
    heights = [sum(part * math.cos(n * angle) for n, part in enumerate(HEART_CURVE, 1)) / 16 for angle in angles]
    middle = (max(heights) + min(heights)) / 2
    return [(math.sin(angle) ** 3, middle - height) for angle, height in zip(angles, heights, strict=True)]


HEART = _heart_outline()
HEART_HEIGHT = max(down for _, down in HEART)
"""Height of a heart by its width."""


def are_apart(scene: Scene, one: Thing, other: Thing, gap: float = MIN_GAP) -> bool:
    """Returns whether the bounding boxes of two things are at least `gap` apart."""
    a, b = scene.box(one), scene.box(other)
    return a[0] - b[2] >= gap or b[0] - a[2] >= gap or a[1] - b[3] >= gap or b[1] - a[3] >= gap


def fits(scene: Scene) -> bool:
    """Returns whether all things lie in the image and clear of each other (a thing inside another is allowed)."""
    short = min(scene.width, scene.height)
    right, bottom = scene.width / short - MARGIN, scene.height / short - MARGIN
    for i, thing in enumerate(scene.things):
        box = scene.box(thing)
        if box[0] < MARGIN or box[1] < MARGIN or box[2] > right or box[3] > bottom:
            return False
        for other in scene.things[:i]:
            if not are_apart(scene, thing, other) and not is_inside(scene, thing, other):
                return False
    return True


def is_inside(scene: Scene, inner: Thing, outer: Thing) -> bool:
    """Returns whether `inner` lies within `outer`, a large circle or square."""
    if outer.size != "large" or inner.size != "small" or outer.shape not in ("circle", "square"):
        return False
    a, b = scene.box(inner), scene.box(outer)
    offset = max(abs(a[0] + a[2] - b[0] - b[2]), abs(a[1] + a[3] - b[1] - b[3])) / 2
    return offset < 0.02


def relation(scene: Scene, one: Thing, other: Thing) -> str | None:
    """Returns how `one` lies to `other`: left, right, above, below, inside; None where that is not clear."""
    if is_inside(scene, one, other):
        return "inside"
    a, b = scene.box(one), scene.box(other)
    across, down = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    if a[2] <= b[0] or b[2] <= a[0]:
        if abs(across) >= RELATION_RATIO * abs(down):
            return "left" if across < 0 else "right"
    if a[3] <= b[1] or b[3] <= a[1]:
        if abs(down) >= RELATION_RATIO * abs(across):
            return "above" if down < 0 else "below"
    return None


REGIONS = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "centre": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
"""Column and row of each named place; the image is cut into three columns and three rows."""


def region_of(thing: Thing) -> str | None:
    """Returns the named place of a thing; None where it is near the border between two."""
    cells = []
    for value in (thing.x, thing.y):
        if min(abs(value - 1 / 3), abs(value - 2 / 3)) < 0.07:
            return None
        cells.append(int(value * 3))
    return next(name for name, cell in REGIONS.items() if cell == tuple(cells))


def random_thing(
    rng: random.Random, sizes: tuple[str, ...] = ("small", "medium", "large"), shapes: tuple[str, ...] = SHAPES
) -> Thing:
    """Returns a thing of random shape, colour and size, not placed yet."""
    return Thing(rng.choice(shapes), rng.choice(tuple(COLOURS)), rng.choice(sizes))


def add_randomly(rng: random.Random, scene: Scene, thing: Thing, tries: int = 60) -> Scene | None:
    """Returns the scene with `thing` added at a random free place of the grid, or None where none was found."""
    across, down = grid_positions(scene, thing)
    return _add_at_first_free(scene, thing, ((rng.choice(across), rng.choice(down)) for _ in range(tries)))


def add_in_corner(scene: Scene, thing: Thing) -> Scene | None:
    """Returns the scene with `thing` added in its first free corner, from the top and the left; None without any."""
    across, down = grid_positions(scene, thing)
    corners = ((x, y) for y in (down[0], down[-1]) for x in (across[0], across[-1]))
    return _add_at_first_free(scene, thing, corners)


def _add_at_first_free(scene: Scene, thing: Thing, positions: Iterable[tuple[float, float]]) -> Scene | None:
    for x, y in positions:
        placed = replace(scene, things=(*scene.things, replace(thing, x=x, y=y)))
        if all(are_apart(placed, placed.things[-1], other) for other in scene.things):
            return placed
    return None


def grid_positions(scene: Scene, thing: Thing) -> tuple[list[float], list[float]]:
    """Returns the grid's places across and down at which a thing lies within the image."""
    short = min(scene.width, scene.height)
    sides = zip((scene.width, scene.height), thing.extent(), strict=True)
    across, down = (_steps_along(side / short, extent / 2 + MARGIN) for side, extent in sides)
    return across, down


def _steps_along(side: float, margin: float) -> list[float]:
    """Returns the grid's places, in 0..1, along a side at least `margin` from its ends, both of the shorter side."""
    steps = (GRID_STEP * i for i in range(round(side / GRID_STEP) + 1))
    return [step / side for step in steps if margin < step < side - margin]


def jitter(rng: random.Random, scene: Scene) -> Scene:
    """Returns the scene with its things off the grid, each by up to half a step, where they still fit."""
    short = min(scene.width, scene.height)
    together = any(
        not are_apart(scene, one, other, 0.0) for one in scene.things for other in scene.things if one != other
    )
    for _ in range(60):
        moves = [(rng.uniform(-GRID_STEP, GRID_STEP) / 2, rng.uniform(-GRID_STEP, GRID_STEP) / 2) for _ in scene.things]
        things = tuple(
            replace(thing, x=thing.x + across * short / scene.width, y=thing.y + down * short / scene.height)
            for thing, (across, down) in zip(scene.things, moves[:1] * len(moves) if together else moves, strict=True)
        )
        if fits(moved := replace(scene, things=things)):
            return moved
    return scene


def random_scene(
    rng: random.Random,
    count: int | None = None,
    image_size: tuple[int, int] | None = None,
    shapes: tuple[str, ...] = SHAPES,
) -> Scene:
    """Returns a scene of `count` things (by default one to three, no two of the same colour and shape)."""
    count = count or rng.choice((1, 1, 2, 2, 3))
    width, height = image_size or rng.choice(IMAGE_SIZES)
    while True:
        scene: Scene | None = Scene(width, height, rng.choice(tuple(BACKGROUNDS)), ())
        for _ in range(count):
            thing = random_thing(
                rng, ("small", "medium", "large") if count < 3 else ("small", "small", "medium"), shapes
            )
            if scene is None or any(thing.name == other.name for other in scene.things):
                scene = None
                break
            scene = add_randomly(rng, scene, thing)
        if scene is not None:
            return scene


def related_scene(rng: random.Random, wanted: str | None = None, image_size: tuple[int, int] | None = None) -> Scene:
    """Returns two things of which the first lies to the second as `wanted` (by default any relation)."""
    wanted = wanted or rng.choice(("left", "right", "above", "below", "inside"))
    while True:
        if wanted == "inside":
            outer = Thing(rng.choice(("circle", "square")), rng.choice(tuple(COLOURS)), "large")
            inner = random_thing(rng, ("small",))
            width, height = image_size or rng.choice(IMAGE_SIZES)
            scene = add_randomly(rng, Scene(width, height, rng.choice(tuple(BACKGROUNDS)), ()), outer)
            if scene is None or inner.colour == outer.colour:
                continue
            outer = scene.things[0]
            # The outer thing comes first in drawing; captions name the inner one first.
            return replace(scene, things=(outer, replace(inner, x=outer.x, y=outer.y)))
        scene = random_scene(rng, 2, image_size)
        if relation(scene, *scene.things) == wanted:
            return scene


def counted_scene(rng: random.Random, count: int | None = None, image_size: tuple[int, int] | None = None) -> Scene:
    """Returns two or three things that are all alike, lying as `PIPS` says."""
    count = count or rng.choice((2, 3))
    thing = random_thing(rng, ("small", "medium") if count == 2 else ("small",))
    width, height = image_size or rng.choice(IMAGE_SIZES)
    steps = [(along, beside) if width >= height else (beside, along) for along, beside in PIPS[count]]
    across, down = (GRID_STEP * min(width, height) / side for side in (width, height))
    things = tuple(replace(thing, x=x * across, y=y * down) for x, y in steps)
    return Scene(width, height, rng.choice(tuple(BACKGROUNDS)), things)


def any_scene(rng: random.Random, image_size: tuple[int, int] | None = None, jitter_chance: float = 0.5) -> Scene:
    """Returns a scene of any kind: of different things (half of all), of two that are related, or of equal things.

    `jitter_chance` is the chance that its things lie off the grid, as they do in images from elsewhere.
    """
    kind = rng.choice((None, None, related_scene, counted_scene))
    # One thing alone is soon understood.
    scene = kind(rng, None, image_size) if kind else random_scene(rng, rng.choice((1, 2, 2, 3, 3, 3)), image_size)
    return jitter(rng, scene) if rng.random() < jitter_chance else scene


def oversample_stars(rng: random.Random, make: Callable[[], Scene], chance: float = 0.4) -> Scene:
    """Returns a scene of `make`, or at this chance another one where it has no star: those are the hardest to draw."""
    scene = make()
    starless = all(thing.shape != "star" for thing in scene.things)
    return make() if starless and rng.random() < chance else scene
