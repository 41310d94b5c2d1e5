"""What is said of the small world: captions, edits, questions with answers, riddles, thoughts. English, some Chinese.

Everything is chosen with a `random.Random`, so a seed gives the same words. A caption never says what is not so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import scenes
from .scenes import Scene, Thing

CHINESE_SHARE = 0.12
"""Share of captions, edits and questions that are in Chinese."""

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star", "star", "five-pointed star"),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
    "heart": ("heart",),
}
COLOUR_WORDS = {name: (name,) for name in scenes.COLOURS} | {
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
}
BACKGROUND_WORDS = {name: (name,) for name in scenes.BACKGROUNDS} | {
    "grey": ("grey", "gray"),
    "navy": ("navy", "navy", "dark blue"),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "medium": ("medium-sized",), "large": ("large", "big")}
PLACE_WORDS = {
    "top left": ("in the top left corner", "at the top left"),
    "top": ("at the top",),
    "top right": ("in the top right corner", "at the top right"),
    "left": ("on the left",),
    "centre": ("in the centre", "in the middle", "in the center"),
    "right": ("on the right",),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom": ("at the bottom",),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
RELATION_WORDS = {
    "left": ("to the left of", "to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "to the right of", "right of", "on the right side of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "inside": ("inside", "inside", "in", "within"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
NUMBERS = {1: "one", 2: "two", 3: "three"}

ZH_SHAPE = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星星",
    "cross": "十字",
    "ring": "圆环",
    "heart": "心形",
}
ZH_COLOUR = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "orange": "橙色",
    "purple": "紫色",
    "pink": "粉色",
    "cyan": "青色",
}
ZH_BACKGROUND = {"white": "白色", "black": "黑色", "grey": "灰色", "brown": "棕色", "navy": "深蓝色", "beige": "米色"}
ZH_SIZE = {"small": "小", "medium": "中等大小的", "large": "大"}
ZH_RELATION = {"left": "左边", "right": "右边", "above": "上面", "below": "下面", "inside": "里面"}
ZH_NUMBER = {1: "一个", 2: "两个", 3: "三个"}
ZH_PLACE = {
    "top left": "左上角",
    "top": "上方",
    "top right": "右上角",
    "left": "左边",
    "centre": "中间",
    "right": "右边",
    "bottom left": "左下角",
    "bottom": "下方",
    "bottom right": "右下角",
}


def with_article(words: str) -> str:
    """Returns the words with their article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def random_name(rng: random.Random, thing: Thing, size: float = 0.4) -> str:
    """Returns what a thing is called, without an article; with its size at the chance `size`."""
    words = [rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])]
    if rng.random() < (size if thing.size != "medium" else size / 4):
        words.insert(0, rng.choice(SIZE_WORDS[thing.size]))
    return " ".join(words)


def plain_name(thing: Thing) -> str:
    """Returns the plain name of a thing with its article."""
    return with_article(thing.name)


def describe(scene: Scene, background: bool = True) -> str:
    """Returns the plain sentence for a scene, without its full stop: what thoughts and descriptions end in.

    Related things are named the inner, left or upper one first, others from left to right.
    """
    things = sorted(scene.things, key=lambda thing: thing.x)
    ending = f" on {with_article(scene.background)} background" if background else ""
    if len(things) > 1 and len({thing.name for thing in things}) == 1:
        return f"{NUMBERS[len(things)]} {plural(things[0].name)}{ending}"
    if len(things) == 2:
        one, other, how = ordered_pair(scene)
        if how:
            return f"{plain_name(one)} {RELATION_WORDS[how][0]} {plain_name(other)}{ending}"
    return _join_names([plain_name(thing) for thing in things]) + ending


def ordered_pair(scene: Scene) -> tuple[Thing, Thing, str | None]:
    """Returns the two things of a scene and their relation, the inner, left or upper one first."""
    one, other = scene.things
    how = scenes.relation(scene, one, other)
    if how in ("right", "below") or (how is None and scenes.is_inside(scene, other, one)):
        one, other = other, one
        how = scenes.relation(scene, one, other)
    return one, other, how


def _join_names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(name: str) -> str:
    """Returns the plural of a name that ends in a shape."""
    return name + ("es" if name.endswith("s") else "s")


# Captions


def caption(rng: random.Random, scene: Scene, with_relation: bool = False) -> str:
    """Returns a prompt that the scene fulfils; with `with_relation` it says how two related things lie."""
    if rng.random() < CHINESE_SHARE:
        return _caption_zh(rng, scene)
    background = rng.choice(BACKGROUND_WORDS[scene.background])
    what = _describe_randomly(rng, scene, with_relation)
    if scene.background == "white" and rng.random() < 0.5:
        return rng.choice(("{}", "{}", "{}", "draw {}", "a picture of {}", "please draw {}", "show me {}")).format(what)
    template = rng.choice(
        (
            "{what} on {a_ground} background",
            "{what} on {a_ground} background",
            "{what} on {a_ground} background",
            "{what}, {ground} background",
            "{what} in front of {a_ground} background",
            "{what} on {ground}",
            "draw {what} on {a_ground} background",
            "a picture of {what} on {a_ground} background",
            "please paint {what}. The background is {ground}",
            "{a_ground} background with {what}",
            "on {a_ground} background: {what}",
        )
    )
    return template.format(what=what, ground=background, a_ground=with_article(background))


def _describe_randomly(rng: random.Random, scene: Scene, with_relation: bool) -> str:
    things = list(scene.things)
    if len(things) > 1 and len({thing.name for thing in things}) == 1:
        return f"{NUMBERS[len(things)]} {plural(random_name(rng, things[0], 0.2))}"
    if len(things) == 1:
        where = scenes.region_of(things[0])
        name = with_article(random_name(rng, things[0]))
        return f"{name} {rng.choice(PLACE_WORDS[where])}" if where and rng.random() < 0.3 else name
    if len(things) == 2:
        one, other, how = ordered_pair(scene)
        if how and (rng.random() < 0.85 or with_relation):
            if how != "inside" and rng.random() < 0.5:
                one, other, how = other, one, OPPOSITE[how]
            first, second = with_article(random_name(rng, one, 0.2)), with_article(random_name(rng, other, 0.2))
            if how == "inside" and rng.random() < 0.25:
                return f"{second} with {first} inside it"
            return f"{first} {rng.choice(RELATION_WORDS[how])} {second}"
        if rng.random() < 0.3 and all(scenes.region_of(thing) for thing in things):
            places = (PLACE_WORDS[scenes.region_of(thing)] for thing in things)
            named = (f"{with_article(random_name(rng, t, 0.2))} {rng.choice(p)}" for t, p in zip(things, places))
            return " and ".join(named)
    rng.shuffle(things)
    return _join_names([with_article(random_name(rng, thing, 0.2)) for thing in things])


def random_name_zh(rng: random.Random, thing: Thing, size: float = 0.3, number: str = "一个") -> str:
    """Returns what a thing is called in Chinese, with how many there are."""
    grown = ZH_SIZE[thing.size] if rng.random() < (size if thing.size != "medium" else size / 4) else ""
    return f"{number}{grown}{ZH_COLOUR[thing.colour]}的{ZH_SHAPE[thing.shape]}"


def _caption_zh(rng: random.Random, scene: Scene) -> str:
    things = list(scene.things)
    ground = f"{ZH_BACKGROUND[scene.background]}背景"
    if len(things) > 1 and len({thing.name for thing in things}) == 1:
        what = random_name_zh(rng, things[0], 0.0, ZH_NUMBER[len(things)])
    elif len(things) == 2 and ordered_pair(scene)[2]:
        one, other, how = ordered_pair(scene)
        what = f"{random_name_zh(rng, one)}在{random_name_zh(rng, other)}的{ZH_RELATION[how]}"
    else:
        what = "和".join(random_name_zh(rng, thing) for thing in things)
        where = scenes.region_of(things[0])
        if len(things) == 1 and where and rng.random() < 0.3:
            what = f"{ZH_PLACE[where]}有{what}"
    if scene.background == "white" and rng.random() < 0.5:
        return rng.choice(("{}", "画{}")).format(what)
    return rng.choice(("{g}上的{w}", "{g}，{w}", "{w}，{g}", "画{w}，{g}")).format(g=ground, w=what)


# Edits


@dataclass(frozen=True)
class Edit:
    """One change of a scene: `kind`, the scenes before and after, the instruction, and what is said to have changed."""

    kind: str
    before: Scene
    after: Scene
    instruction: str
    change: str


def referring_expression(rng: random.Random, scene: Scene, thing: Thing, short: float = 0.6) -> str:
    """Returns words that mean this one thing of the scene: its shape or colour alone where that is enough."""
    others = [other for other in scene.things if other is not thing]
    if rng.random() < short and all(other.shape != thing.shape for other in others):
        return f"the {rng.choice(SHAPE_WORDS[thing.shape])}"
    if rng.random() < short / 3 and all(other.colour != thing.colour for other in others):
        return f"the {rng.choice(COLOUR_WORDS[thing.colour])} shape"
    return f"the {random_name(rng, thing, 0.0)}"


def referring_expression_zh(rng: random.Random, scene: Scene, thing: Thing) -> str:
    """Returns Chinese words that mean this one thing of the scene."""
    if rng.random() < 0.5 and all(other is thing or other.shape != thing.shape for other in scene.things):
        return ZH_SHAPE[thing.shape]
    return f"{ZH_COLOUR[thing.colour]}的{ZH_SHAPE[thing.shape]}"


def fill_template(
    rng: random.Random, english: tuple[str, ...], chinese: tuple[str, ...], **words: tuple[str, str]
) -> str:
    """Returns one of the sentences, its blanks filled; each word is given as (English, Chinese)."""
    if rng.random() < CHINESE_SHARE:
        return rng.choice(chinese).format(**{name: pair[1] for name, pair in words.items()})
    return rng.choice(english).format(**{name: pair[0] for name, pair in words.items()})


# Questions


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and its kind."""

    kind: str
    text: str
    answer: str


YES, NO = ("Yes", "是"), ("No", "不是")


def shape_words(rng: random.Random, name: str) -> tuple[str, str]:
    """Returns a shape in English and in Chinese."""
    return rng.choice(SHAPE_WORDS[name]), ZH_SHAPE[name]


def colour_words(rng: random.Random, name: str) -> tuple[str, str]:
    """Returns a colour in English and in Chinese."""
    return rng.choice(COLOUR_WORDS[name]), ZH_COLOUR[name]


def make_question(
    rng: random.Random,
    kind: str,
    answer: tuple[str, str],
    english: tuple[str, ...],
    chinese: tuple[str, ...] = (),
    **words: tuple[str, str],
) -> Question:
    """Returns a question in one of the wordings; the answer is in the question's language."""
    language = 1 if chinese and rng.random() < CHINESE_SHARE else 0
    filled = {name: pair[language] for name, pair in words.items()}
    return Question(kind, rng.choice((english, chinese)[language]).format(**filled), answer[language])
