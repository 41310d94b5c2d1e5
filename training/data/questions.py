"""Questions about one image, about two, and about no image, each with its one right answer."""

from __future__ import annotations

import random
from collections import Counter

from . import captions, scenes
from .captions import NO, YES, Question, colour_words, make_question, plain_name, shape_words
from .edits import random_edit
from .riddles import COLOUR_CLUES, SHAPE_CLUES
from .scenes import Scene, Thing

SIDES = {"left": "To the left", "right": "To the right", "above": "Above", "below": "Below", "inside": "Inside"}
COUNTS = {number: (str(number), str(number)) for number in range(4)}


def questions(rng: random.Random, scene: Scene) -> list[Question]:
    """Returns questions of each kind that fits the scene, in random order."""
    found = [question for make in _ONE for question in make(rng, scene)]
    rng.shuffle(found)
    return found


def _only(scene: Scene, key: str) -> list[Thing]:
    counts = Counter(getattr(thing, key) for thing in scene.things)
    return [thing for thing in scene.things if counts[getattr(thing, key)] == 1]


def _about_colour(rng: random.Random, scene: Scene) -> list[Question]:
    found = []
    for thing in _only(scene, "shape"):
        found.append(
            make_question(
                rng,
                "colour",
                (thing.colour.capitalize(), captions.ZH_COLOUR[thing.colour]),
                ("what colour is the {s}?", "what color is the {s}?", "which colour does the {s} have?"),
                ("{s}是什么颜色？",),
                s=shape_words(rng, thing.shape),
            )
        )
    found.append(
        make_question(
            rng,
            "background",
            (scene.background.capitalize(), captions.ZH_BACKGROUND[scene.background]),
            ("what colour is the background?", "which colour is the background?", "what is the background colour?"),
            ("背景是什么颜色？",),
        )
    )
    return found


def _about_shape(rng: random.Random, scene: Scene) -> list[Question]:
    alone = _only(scene, "colour")
    if not alone:
        return []
    thing = rng.choice(alone)
    answer = (thing.shape.capitalize(), captions.ZH_SHAPE[thing.shape])
    if len(scene.things) == 1 and rng.random() < 0.5:
        wordings = ("what shape is it?", "which shape is in the picture?", "what shape do you see?")
        return [make_question(rng, "shape", answer, wordings, ("图中是什么形状？",))]
    wordings = ("which shape is {c}?", "what shape is {c}?", "what is the {c} shape?")
    return [make_question(rng, "shape", answer, wordings, ("{c}的是什么形状？",), c=colour_words(rng, thing.colour))]


def _about_count(rng: random.Random, scene: Scene) -> list[Question]:
    total = make_question(
        rng,
        "count",
        COUNTS[len(scene.things)],
        ("how many shapes are there?", "how many shapes do you see?", "how many things are in the picture?"),
        ("图中有几个形状？",),
    )
    shape = rng.choice((rng.choice(scene.things).shape, rng.choice(scenes.SHAPES)))
    number = sum(thing.shape == shape for thing in scene.things)
    plural = (captions.plural(rng.choice(captions.SHAPE_WORDS[shape])), captions.ZH_SHAPE[shape])
    some = make_question(
        rng,
        "count",
        COUNTS[number],
        ("how many {s} are there?", "how many {s} do you see?"),
        ("有几个{s}？",),
        s=plural,
    )
    return [total, some]


def _about_place(rng: random.Random, scene: Scene) -> list[Question]:
    found = []
    for thing in _only(scene, "shape"):
        if where := scenes.region_of(thing):
            answer = (where.capitalize(), captions.ZH_PLACE[where])
            wordings = ("where is the {s}?", "where in the picture is the {s}?")
            found.append(
                make_question(rng, "where", answer, wordings, ("{s}在哪里？",), s=shape_words(rng, thing.shape))
            )
    return found


def _about_size(rng: random.Random, scene: Scene) -> list[Question]:
    if len({thing.name for thing in scene.things}) < 2:
        return []
    one, other = rng.sample(scene.things, 2)
    sizes = tuple(scenes.SIZES)
    difference = sizes.index(one.size) - sizes.index(other.size)
    if difference == 0 or one.name == other.name:
        return []
    greater = rng.random() < 0.7
    answer = one if (difference > 0) == greater else other
    kind = "larger" if greater else "smaller"
    text = f"which is {kind}, the {one.name} or the {other.name}?"
    return [Question("larger", text, f"The {answer.name}")]


def _about_relation(rng: random.Random, scene: Scene) -> list[Question]:
    if len(scene.things) < 2 or len(_only(scene, "shape")) < len(scene.things):
        return []
    one, other = rng.sample(scene.things, 2)
    how = scenes.relation(scene, one, other)
    if how is None:
        return []
    text = rng.choice(("where is the {} relative to the {}?", "how does the {} lie to the {}?")).format(
        one.shape, other.shape
    )
    found = [Question("relation", text, SIDES[how])]
    for asked in (how, captions.OPPOSITE.get(how, rng.choice(tuple(captions.OPPOSITE)))):
        text = f"is the {one.shape} {rng.choice(captions.RELATION_WORDS[asked])} the {other.shape}?"
        found.append(Question("yes or no", text, (YES if asked == how else NO)[0]))
    if len(scene.things) == 2:
        text = f"what is {rng.choice(captions.RELATION_WORDS[how])} the {other.shape}?"
        found.append(Question("relation", text, f"The {one.name}"))
    return found


def _about_presence(rng: random.Random, scene: Scene) -> list[Question]:
    there = rng.choice(scene.things)
    asked = (there.shape, there.colour)
    if rng.random() < 0.5:
        asked = rng.choice(
            (
                (there.shape, rng.choice(tuple(scenes.COLOURS))),
                (rng.choice(scenes.SHAPES), there.colour),
                (rng.choice(scenes.SHAPES), rng.choice(tuple(scenes.COLOURS))),
                (rng.choice(scene.things).shape, rng.choice(scene.things).colour),
            )
        )
    present = any((thing.shape, thing.colour) == asked for thing in scene.things)
    name = captions.with_article(
        f"{rng.choice(captions.COLOUR_WORDS[asked[1]])} {rng.choice(captions.SHAPE_WORDS[asked[0]])}"
    )
    chinese = f"{captions.ZH_COLOUR[asked[1]]}的{captions.ZH_SHAPE[asked[0]]}"
    answer = ("Yes", "有") if present else ("No", "没有")
    wordings = ("is there {n}?", "is there {n} in the picture?", "do you see {n}?", "does the picture show {n}?")
    return [make_question(rng, "yes or no", answer, wordings, ("图中有{n}吗？",), n=(name, chinese))]


def _to_describe(rng: random.Random, scene: Scene) -> list[Question]:
    text = rng.choice(("describe the picture.", "what do you see?", "what is in the picture?", "describe this image."))
    if rng.random() < captions.CHINESE_SHARE:
        text = rng.choice(("描述这张图片。", "图中有什么？"))
    return [Question("describe", text, captions.describe(scene).capitalize() + ".")]


_ONE = (
    _about_colour,
    _about_shape,
    _about_count,
    _about_place,
    _about_size,
    _about_relation,
    _about_presence,
    _to_describe,
)


def image_pair(rng: random.Random, image_size: tuple[int, int] | None = None) -> tuple[Scene, Scene, list[Question]]:
    """Returns two scenes and questions about both: an edit's before and after, or two that are unrelated."""
    if rng.random() < 0.6:
        edit = random_edit(rng, image_size=image_size)
        text = rng.choice(
            ("what changed?", "what has changed?", "what is different in the second picture?", "what was changed?")
        )
        found = [Question("what changed", text, edit.change)]
        return edit.before, edit.after, found + _compare(rng, edit.before, edit.after)
    one, other = (scenes.random_scene(rng, None, image_size) for _ in range(2))
    return one, other, _compare(rng, one, other)


def _compare(rng: random.Random, one: Scene, other: Scene) -> list[Question]:
    more = len(one.things) - len(other.things)
    answer = "The first" if more > 0 else "The second" if more < 0 else "Both the same"
    found = [
        Question("which has more", rng.choice(("which picture has more shapes?", "which has more shapes?")), answer)
    ]
    text = rng.choice(("do both pictures have the same background?", "is the background the same?"))
    found.append(Question("yes or no", text, (YES if one.background == other.background else NO)[0]))
    thing = rng.choice((*one.things, *other.things))
    places = [any(thing.name == t.name for t in scene.things) for scene in (one, other)]
    answer = "In both" if all(places) else "In the first" if places[0] else "In the second"
    found.append(Question("in which", f"in which picture is {plain_name(thing)}?", answer))
    return found


def knowledge(rng: random.Random) -> Question:
    """Returns a question without an image, about what the riddles need."""
    if rng.random() < 0.5:
        shape = rng.choice(scenes.SHAPES)
        clue = rng.choice(SHAPE_CLUES[shape])
        return Question("knowledge", f"which shape is {clue}?", shape.capitalize())
    colour = rng.choice(tuple(COLOUR_CLUES))
    clue = rng.choice(COLOUR_CLUES[colour])
    return Question("knowledge", f"which colour is {clue}?", colour.capitalize())
