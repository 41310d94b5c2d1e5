"""Folders of pictures of the world, each with its caption in a text file beside it, as trainers read them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from . import captions, scenes
from .scenes import Scene

SIZE = (64, 64)
"""(width, height) in pixels: what the nano model draws."""
Value = TypeVar("Value")


def write_captioned(folder: Path, pairs: Iterable[tuple[Scene, str]], stem: str) -> list[Path]:
    """Writes STEM-001.png, STEM-001.txt and so on; returns the pictures' names.

    Raises:
        FileExistsError: there is something in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"--out {folder} holds files already: remove it or choose another folder")
    written = []
    for number, (scene, caption) in enumerate(pairs, 1):
        file = folder / f"{stem}-{number:03}.png"
        scenes.render(scene).save(file)
        file.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
        written.append(file)
    return written


def known_scene(rng: random.Random) -> Scene:
    """Returns a scene of what the nano model knows: one thing as often as several."""
    make: Callable[..., Scene] = rng.choice((scenes.random_scene, scenes.related_scene))
    return make(rng, 1, SIZE) if make is scenes.random_scene else make(rng, None, SIZE)


def without_a_place(rng: random.Random, scene: Scene) -> str:
    """Returns a caption of one thing that does not say where it lies."""
    while True:
        text = captions.caption(rng, scene)
        named = [word for words in captions.PLACE_WORDS.values() for word in words]
        if not any(word in text for word in (*named, *captions.ZH_PLACE.values())):
            return text


def evenly(rng: random.Random, values: Sequence[Value], count: int) -> list[Value]:
    """Returns `count` of the values in random order, each as often as any other, or once more."""
    found: list[Value] = []
    while len(found) < count:
        found += rng.sample(values, len(values))
    return found[:count]
