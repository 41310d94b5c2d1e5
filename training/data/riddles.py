"""Riddles: wishes for an image that must be thought out, with a written thought that ends in the plain scene."""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import scenes
from .captions import NUMBERS, RELATION_WORDS, describe, ordered_pair, with_article
from .scenes import Scene, Thing

SHAPE_CLUES = {
    "circle": ("a round shape without a hole", "the shape of a coin", "the shape of a full moon"),
    "square": ("a shape with four equal sides", "the shape of a chessboard", "the shape of a dice"),
    "triangle": ("a shape with three sides", "a shape with three corners", "the shape of a slice of pizza"),
    "star": ("a shape with five points", "what shines in the night sky", "what sits on top of a christmas tree"),
    "cross": ("the sign for adding", "what an ambulance carries as a sign", "a sign of two bars"),
    "ring": ("a round shape with a hole", "what one wears on a finger", "the shape of a doughnut"),
}
COLOUR_CLUES = {
    "red": ("blood", "a ripe tomato", "a fire engine"),
    "green": ("grass", "a frog", "what blue and yellow make"),
    "blue": ("the sky at noon", "a sapphire", "the water of the ocean"),
    "yellow": ("a lemon", "a banana", "the sun"),
    "orange": ("a carrot", "a pumpkin", "what red and yellow make"),
    "purple": ("a plum", "lavender", "what red and blue make"),
    "pink": ("a flamingo", "a piglet", "what red and white make"),
    "cyan": ("a swimming pool", "printer ink that is not black, pink or yellow", "what blue and green make"),
}
BACKGROUND_CLUES = {
    "white": ("snow", "milk"),
    "black": ("coal", "the night"),
    "grey": ("ash", "an elephant"),
    "brown": ("chocolate", "a bear"),
    "navy": ("the deep sea", "a sailor's coat"),
    "beige": ("sand", "a camel"),
}
COUNT_CLUES = {
    2: ("as many as a bicycle has wheels", "as many as you have eyes", "one more than one"),
    3: ("as many as a traffic light has lamps", "as many as a tricycle has wheels", "one less than four"),
}


@dataclass(frozen=True)
class Riddle:
    """What is asked for, the scene that is meant, and the thought that leads to it."""

    text: str
    scene: Scene
    thought: str


def random_riddle(rng: random.Random, image_size: tuple[int, int] | None = None) -> Riddle:
    """Returns a riddle about one thing, two related things, or two or three that are alike."""
    kind = rng.random()
    if kind < 0.55:
        scene = scenes.random_scene(rng, 1, image_size)
    elif kind < 0.75:
        scene = scenes.counted_scene(rng, None, image_size)
    else:
        scene = scenes.related_scene(rng, None, image_size)
    steps: list[str] = []
    things = ordered_pair(scene)[:2] if kind >= 0.75 else scene.things[:1]
    asked = [_thing_clue(rng, thing, steps) for thing in things]
    if len(things) == 2:
        text = f"{asked[0]} {rng.choice(RELATION_WORDS[ordered_pair(scene)[2]][:2])} {asked[1]}"
    elif len(scene.things) > 1:
        count = rng.choice(COUNT_CLUES[len(scene.things)])
        steps.append(f"{count} is {NUMBERS[len(scene.things)]}")
        text = f"{asked[0]}, {count}"
    else:
        text = asked[0]
    if scene.background != "white" or rng.random() < 0.3:
        clue = rng.choice(BACKGROUND_CLUES[scene.background])
        steps.append(f"{clue} is {scene.background}")
        text += rng.choice(
            (", on a ground like {}", ", and behind it the colour of {}", ", the background like {}")
        ).format(clue)
    thinking = " ".join(f"{step[0].upper()}{step[1:]}." for step in steps)
    return Riddle(text, scene, f"{thinking} So: {describe(scene)}.")


def _thing_clue(rng: random.Random, thing: Thing, steps: list[str]) -> str:
    """Returns how a riddle speaks of a thing, and adds what must be thought of it to `steps`."""
    shape = rng.choice(SHAPE_CLUES[thing.shape])
    colour = rng.choice(COLOUR_CLUES[thing.colour])
    steps += [f"{shape} is {with_article(thing.shape)}", f"{colour} is {thing.colour}"]
    other = rng.choice([name for name in scenes.COLOURS if name != thing.colour])
    wordings = (
        "{shape} in the colour of {colour}",
        "{shape}, coloured like {colour}",
        "{shape} with the colour of {colour}",
        "{shape}, not in the colour of {wrong} but of {colour}",
        "{shape} in the colour of {colour} and not of {wrong}",
    )
    return rng.choice(wordings).format(shape=shape, colour=colour, wrong=rng.choice(COLOUR_CLUES[other]))
