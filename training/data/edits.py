"""Edits of scenes: recolour, replace, remove, add, move, and another background."""

from __future__ import annotations

import random
from dataclasses import replace

from . import captions, scenes
from .captions import (
    COLOUR_WORDS,
    Edit,
    fill_template,
    plain_name,
    random_name,
    referring_expression,
    referring_expression_zh,
    with_article,
)
from .scenes import Scene, Thing

KINDS = ("recolour", "replace", "remove", "add", "move", "background")
ORDER_EXPONENTS = {"add": 1 / 4, "move": 1 / 3}
"""Exponents of a random number by which kinds are ordered; those that are not named have 1."""
DESTINATIONS = {"top": (None, 0), "bottom": (None, 1), "left": (0, None), "right": (1, None), "centre": (0.5, 0.5)}
"""Where a thing can be moved or added: 0 is one edge, 1 the other, None leaves that axis as it is."""


def random_edit(
    rng: random.Random, kind: str | None = None, image_size: tuple[int, int] | None = None, count: int | None = None
) -> Edit:
    """Returns an edit of a random scene of one to three things (one less where one is added)."""
    kind = kind or rng.choice(KINDS)
    while True:
        things = count or rng.choice((1, 2, 2, 3) if kind != "add" else (1, 1, 2))
        if kind == "remove":
            things = max(things, 2)
        scene = scenes.related_scene(rng, None, image_size) if things == 2 and rng.random() < 0.3 else None
        scene = scene or scenes.random_scene(rng, things, image_size)
        edit = _EDITS[kind](rng, scene)
        if edit is not None:
            return edit


def edits_of(rng: random.Random, scene: Scene) -> list[Edit]:
    """Returns one edit of each kind that the scene allows, in random order, the harder ones mostly first."""
    kinds = [kind for kind in KINDS if (kind != "remove" or len(scene.things) > 1)]
    kinds.sort(key=lambda kind: rng.random() ** ORDER_EXPONENTS.get(kind, 1), reverse=True)
    found = (_EDITS[kind](rng, scene) for kind in kinds if kind != "add" or len(scene.things) < 3)
    return [edit for edit in found if edit is not None]


def _with_replaced(scene: Scene, old: Thing, new: Thing) -> Scene | None:
    """Returns the scene with one thing in place of another, or None where it does not fit or is there already."""
    if any(new.name == other.name for other in scene.things if other is not old):
        return None
    changed = replace(scene, things=tuple(new if thing is old else thing for thing in scene.things))
    return changed if scenes.fits(changed) else None


def _target(rng: random.Random, scene: Scene) -> tuple[Thing, tuple[str, str]]:
    thing = rng.choice(scene.things)
    if len(scene.things) == 1 and rng.random() < 0.15:
        return thing, ("it", "它")
    return thing, (referring_expression(rng, scene, thing), referring_expression_zh(rng, scene, thing))


def _recolour(rng: random.Random, scene: Scene) -> Edit | None:
    thing, target = _target(rng, scene)
    colour = rng.choice([name for name in scenes.COLOURS if name != thing.colour])
    after = _with_replaced(scene, thing, replace(thing, colour=colour))
    # A thing must not take the colour of what it lies on or holds: it could not be told apart.
    if after is None or any(other.colour == colour and _touch(scene, thing, other) for other in scene.things):
        return None
    text = fill_template(
        rng,
        ("make {t} {c}", "change {t} to {c}", "paint {t} {c}", "turn {t} {c}", "change the colour of {t} to {c}"),
        ("把{t}变成{c}", "把{t}改成{c}"),
        t=target,
        c=(rng.choice(COLOUR_WORDS[colour]), captions.ZH_COLOUR[colour]),
    )
    return Edit("recolour", scene, after, text, f"The {thing.name} became {colour}")


def _touch(scene: Scene, one: Thing, other: Thing) -> bool:
    return one is not other and not scenes.are_apart(scene, one, other, 0.0)


def _replace(rng: random.Random, scene: Scene) -> Edit | None:
    thing, target = _target(rng, scene)
    shape = rng.choice([name for name in scenes.SHAPES if name != thing.shape])
    colour = thing.colour if rng.random() < 0.6 else rng.choice(tuple(scenes.COLOURS))
    new = replace(thing, shape=shape, colour=colour)
    after = _with_replaced(scene, thing, new)
    if after is None or any(other.colour == colour and _touch(scene, thing, other) for other in scene.things):
        return None
    called = rng.choice(captions.SHAPE_WORDS[shape])
    english, chinese = with_article(called), f"一个{captions.ZH_SHAPE[shape]}"
    if colour != thing.colour:
        english = with_article(f"{rng.choice(COLOUR_WORDS[colour])} {called}")
        chinese = f"一个{captions.ZH_COLOUR[colour]}的{captions.ZH_SHAPE[shape]}"
    text = fill_template(
        rng,
        ("replace {t} with {n}", "turn {t} into {n}", "change {t} into {n}", "put {n} in place of {t}"),
        ("把{t}换成{n}",),
        t=target,
        n=(english, chinese),
    )
    return Edit("replace", scene, after, text, f"The {thing.name} became {plain_name(new)}")


def _remove(rng: random.Random, scene: Scene) -> Edit | None:
    thing, target = _target(rng, scene)
    after = replace(scene, things=tuple(other for other in scene.things if other is not thing))
    text = fill_template(
        rng,
        ("remove {t}", "take {t} away", "delete {t}", "erase {t}", "the picture without {t}"),
        ("去掉{t}", "删除{t}"),
        t=target,
    )
    return Edit("remove", scene, after, text, f"The {thing.name} is gone")


def _at_destination(scene: Scene, thing: Thing, destination: str) -> Thing:
    """Returns the thing at a goal of the image, as near to the edge as the grid allows."""
    x, y = (
        now if wish is None else min(places, key=lambda place: abs(place - wish))
        for now, wish, places in zip(
            (thing.x, thing.y), DESTINATIONS[destination], scenes.grid_positions(scene, thing), strict=True
        )
    )
    return replace(thing, x=x, y=y)


def _add(rng: random.Random, scene: Scene) -> Edit | None:
    thing = scenes.random_thing(rng, ("small", "small", "medium"))
    if any(thing.name == other.name for other in scene.things):
        return None
    destination = rng.choice((None, *DESTINATIONS))
    if destination is None:
        after = scenes.add_in_corner(scene, thing)
    else:
        centred = _at_destination(scene, thing, "centre")
        after = replace(scene, things=(*scene.things, _at_destination(scene, centred, destination)))
    if after is None or not scenes.fits(after) or any(_touch(after, after.things[-1], o) for o in scene.things):
        return None
    text = fill_template(
        rng,
        ("add {n}{w}", "put {n}{w}", "draw {n}{w}", "also show {n}{w}")
        if destination
        else ("add {n}", "also show {n}", "add {n} to the picture"),
        ("{w}加{n}",),
        n=(with_article(random_name(rng, thing, 0.15)), captions.random_name_zh(rng, thing, 0.1)),
        w=(f" {rng.choice(captions.PLACE_WORDS[destination])}", f"在{captions.ZH_PLACE[destination]}")
        if destination
        else ("", ""),
    )
    return Edit("add", scene, after, text, f"{plain_name(thing).capitalize()} was added")


def _move(rng: random.Random, scene: Scene) -> Edit | None:
    thing, target = _target(rng, scene)
    destination = rng.choice(tuple(DESTINATIONS))
    moved = _at_destination(scene, thing, destination)
    after = _with_replaced(scene, thing, moved)
    if after is None or abs(moved.x - thing.x) + abs(moved.y - thing.y) < 0.15:
        return None
    if any(_touch(scene, thing, other) for other in scene.things):
        return None  # what lies in another thing stays there
    text = fill_template(
        rng,
        ("move {t} to the {p}", "move {t} to the {p}", "put {t} {w}", "shift {t} to the {p}"),
        ("把{t}移到{w}",),
        t=target,
        p=(rng.choice((destination, "middle")) if destination == "centre" else destination, ""),
        w=(rng.choice(captions.PLACE_WORDS[destination]), captions.ZH_PLACE[destination]),
    )
    return Edit("move", scene, after, text, f"The {thing.name} moved")


def _background(rng: random.Random, scene: Scene) -> Edit | None:
    ground = rng.choice([name for name in scenes.BACKGROUNDS if name != scene.background])
    text = fill_template(
        rng,
        (
            "make the background {g}",
            "change the background to {g}",
            "turn the background {g}",
            "put it on a {g} background",
        ),
        ("把背景变成{g}", "把背景改成{g}"),
        g=(rng.choice(captions.BACKGROUND_WORDS[ground]), captions.ZH_BACKGROUND[ground]),
    )
    return Edit("background", scene, replace(scene, background=ground), text, f"The background became {ground}")


_EDITS = {
    "recolour": _recolour,
    "replace": _replace,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "background": _background,
}


def thought(edit: Edit) -> str:
    """Returns what is thought before an edit is drawn: what is there, and what will be."""
    return f"Now: {captions.describe(edit.before)}. Then: {captions.describe(edit.after)}."
