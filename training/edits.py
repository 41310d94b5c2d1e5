"""Edits of scenes: recolour, replace, remove, add, move, and another background."""

from __future__ import annotations

import random
from dataclasses import replace

from . import words, world
from .words import COLOUR_WORDS, Edit, a, named, plain, reference, reference_zh, say
from .world import Scene, Thing

KINDS = ("recolour", "replace", "remove", "add", "move", "background")
HARD = {"add": 1 / 4, "move": 1 / 3}
"""Exponents of a random number by which kinds are ordered; those that are not named have 1."""
GOALS = {"top": (None, 0), "bottom": (None, 1), "left": (0, None), "right": (1, None), "centre": (0.5, 0.5)}
"""Where a thing can be moved or added: 0 is one edge, 1 the other, None leaves that axis as it is."""


def random_edit(
    rng: random.Random, kind: str | None = None, picture: tuple[int, int] | None = None, count: int | None = None
) -> Edit:
    """Returns an edit of a random scene of one to three things (one less where one is added)."""
    kind = kind or rng.choice(KINDS)
    while True:
        things = count or rng.choice((1, 2, 2, 3) if kind != "add" else (1, 1, 2))
        if kind == "remove":
            things = max(things, 2)
        scene = world.related_scene(rng, None, picture) if things == 2 and rng.random() < 0.3 else None
        scene = scene or world.random_scene(rng, things, picture)
        edit = _EDITS[kind](rng, scene)
        if edit is not None:
            return edit


def edits_of(rng: random.Random, scene: Scene) -> list[Edit]:
    """Returns one edit of each kind that the scene allows, in random order, the harder ones mostly first."""
    kinds = [kind for kind in KINDS if (kind != "remove" or len(scene.things) > 1)]
    kinds.sort(key=lambda kind: rng.random() ** HARD.get(kind, 1), reverse=True)
    found = (_EDITS[kind](rng, scene) for kind in kinds if kind != "add" or len(scene.things) < 3)
    return [edit for edit in found if edit is not None]


def _swap(scene: Scene, old: Thing, new: Thing) -> Scene | None:
    """Returns the scene with one thing in place of another, or None where it does not fit or is there already."""
    if any(new.name == other.name for other in scene.things if other is not old):
        return None
    changed = replace(scene, things=tuple(new if thing is old else thing for thing in scene.things))
    return changed if world.fits(changed) else None


def _target(rng: random.Random, scene: Scene) -> tuple[Thing, tuple[str, str]]:
    thing = rng.choice(scene.things)
    if len(scene.things) == 1 and rng.random() < 0.15:
        return thing, ("it", "它")
    return thing, (reference(rng, scene, thing), reference_zh(rng, scene, thing))


def _recolour(rng: random.Random, scene: Scene) -> Edit | None:
    thing, target = _target(rng, scene)
    colour = rng.choice([name for name in world.COLOURS if name != thing.colour])
    after = _swap(scene, thing, replace(thing, colour=colour))
    # A thing must not take the colour of what it lies on or holds: it could not be told apart.
    if after is None or any(other.colour == colour and _touching(scene, thing, other) for other in scene.things):
        return None
    text = say(
        rng,
        ("make {t} {c}", "change {t} to {c}", "paint {t} {c}", "turn {t} {c}", "change the colour of {t} to {c}"),
        ("把{t}变成{c}", "把{t}改成{c}"),
        t=target,
        c=(rng.choice(COLOUR_WORDS[colour]), words.ZH_COLOUR[colour]),
    )
    return Edit("recolour", scene, after, text, f"The {thing.name} became {colour}")


def _touching(scene: Scene, one: Thing, other: Thing) -> bool:
    return one is not other and not world.apart(scene, one, other, 0.0)


def _replace(rng: random.Random, scene: Scene) -> Edit | None:
    thing, target = _target(rng, scene)
    shape = rng.choice([name for name in world.SHAPES if name != thing.shape])
    colour = thing.colour if rng.random() < 0.6 else rng.choice(tuple(world.COLOURS))
    new = replace(thing, shape=shape, colour=colour)
    after = _swap(scene, thing, new)
    if after is None or any(other.colour == colour and _touching(scene, thing, other) for other in scene.things):
        return None
    called = rng.choice(words.SHAPE_WORDS[shape])
    english, chinese = a(called), f"一个{words.ZH_SHAPE[shape]}"
    if colour != thing.colour:
        english = a(f"{rng.choice(COLOUR_WORDS[colour])} {called}")
        chinese = f"一个{words.ZH_COLOUR[colour]}的{words.ZH_SHAPE[shape]}"
    text = say(
        rng,
        ("replace {t} with {n}", "turn {t} into {n}", "change {t} into {n}", "put {n} in place of {t}"),
        ("把{t}换成{n}",),
        t=target,
        n=(english, chinese),
    )
    return Edit("replace", scene, after, text, f"The {thing.name} became {plain(new)}")


def _remove(rng: random.Random, scene: Scene) -> Edit | None:
    thing, target = _target(rng, scene)
    after = replace(scene, things=tuple(other for other in scene.things if other is not thing))
    text = say(
        rng,
        ("remove {t}", "take {t} away", "delete {t}", "erase {t}", "the picture without {t}"),
        ("去掉{t}", "删除{t}"),
        t=target,
    )
    return Edit("remove", scene, after, text, f"The {thing.name} is gone")


def _placed(scene: Scene, thing: Thing, goal: str) -> Thing:
    """Returns the thing at a goal of the picture, as near to the edge as the grid allows."""
    x, y = (
        now if wish is None else min(places, key=lambda place: abs(place - wish))
        for now, wish, places in zip((thing.x, thing.y), GOALS[goal], world.places(scene, thing), strict=True)
    )
    return replace(thing, x=x, y=y)


def _add(rng: random.Random, scene: Scene) -> Edit | None:
    thing = world.random_thing(rng, ("small", "small", "medium"))
    if any(thing.name == other.name for other in scene.things):
        return None
    goal = rng.choice((None, *GOALS))
    if goal is None:
        after = world.put_in_a_corner(scene, thing)
    else:
        centred = _placed(scene, thing, "centre")
        after = replace(scene, things=(*scene.things, _placed(scene, centred, goal)))
    if after is None or not world.fits(after) or any(_touching(after, after.things[-1], o) for o in scene.things):
        return None
    text = say(
        rng,
        ("add {n}{w}", "put {n}{w}", "draw {n}{w}", "also show {n}{w}")
        if goal
        else ("add {n}", "also show {n}", "add {n} to the picture"),
        ("{w}加{n}",),
        n=(a(named(rng, thing, 0.15)), words._named_zh(rng, thing, 0.1)),
        w=(f" {rng.choice(words.PLACE_WORDS[goal])}", f"在{words.ZH_PLACE[goal]}") if goal else ("", ""),
    )
    return Edit("add", scene, after, text, f"{plain(thing).capitalize()} was added")


def _move(rng: random.Random, scene: Scene) -> Edit | None:
    thing, target = _target(rng, scene)
    goal = rng.choice(tuple(GOALS))
    moved = _placed(scene, thing, goal)
    after = _swap(scene, thing, moved)
    if after is None or abs(moved.x - thing.x) + abs(moved.y - thing.y) < 0.15:
        return None
    if any(_touching(scene, thing, other) for other in scene.things):
        return None  # what lies in another thing stays there
    place = {"top": "top", "bottom": "bottom", "left": "left", "right": "right", "centre": "centre"}[goal]
    text = say(
        rng,
        ("move {t} to the {p}", "move {t} to the {p}", "put {t} {w}", "shift {t} to the {p}"),
        ("把{t}移到{w}",),
        t=target,
        p=(rng.choice((place, "middle")) if goal == "centre" else place, ""),
        w=(rng.choice(words.PLACE_WORDS[goal]), words.ZH_PLACE[goal]),
    )
    return Edit("move", scene, after, text, f"The {thing.name} moved")


def _background(rng: random.Random, scene: Scene) -> Edit | None:
    ground = rng.choice([name for name in world.BACKGROUNDS if name != scene.background])
    text = say(
        rng,
        (
            "make the background {g}",
            "change the background to {g}",
            "turn the background {g}",
            "put it on a {g} background",
        ),
        ("把背景变成{g}", "把背景改成{g}"),
        g=(rng.choice(words.BACKGROUND_WORDS[ground]), words.ZH_BACKGROUND[ground]),
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
    return f"Now: {words.plain_scene(edit.before)}. Then: {words.plain_scene(edit.after)}."
