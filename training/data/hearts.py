"""What the tutorial teaches the nano model: hearts, which it has never seen, with captions in the world's own words.

    python -m training.data.hearts --out FOLDER [--count 20] [--seed 0]
    python -m training.data.hearts --out FOLDER --others 200

The second writes pictures of what it knows, to be trained on beside the hearts, so that it forgets nothing.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

from . import captions, scenes
from .captioned import SIZE, evenly, known_scene, without_a_place, write_captioned
from .scenes import Scene, Thing

WORD = "heart"


def heart_scenes(rng: random.Random, count: int, anywhere: bool = False) -> list[Scene]:
    """Returns scenes of one heart each, colours and backgrounds evenly: large in the middle, or any size anywhere."""
    kinds = (tuple(scenes.COLOURS), tuple(scenes.SIZES) if anywhere else ("large",), tuple(scenes.BACKGROUNDS))
    found = []
    for colour, size, background in zip(*(evenly(rng, kind, count) for kind in kinds), strict=True):
        scene, thing = Scene(*SIZE, background, ()), Thing(WORD, colour, size)
        placed = scenes.add_randomly(rng, scene, thing) if anywhere else replace(scene, things=(thing,))
        assert placed is not None, "an empty scene has room"
        found.append(placed)
    return found


def heart_caption(rng: random.Random, scene: Scene, anywhere: bool = False) -> str:
    """Returns an English caption with the word in it; of a heart in the middle one without its size and place."""
    sizes = {word for words in captions.SIZE_WORDS.values() for word in words}
    while True:
        text = captions.caption(rng, scene) if anywhere else without_a_place(rng, scene)
        if WORD in text and (anywhere or not sizes & set(text.split())):
            return text


def main() -> None:
    """Writes the folder and says how many pictures are in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--count", type=int, default=20, help="hearts (default %(default)s)")
    parser.add_argument("--others", type=int, metavar="N", help="N pictures of what is known, instead of hearts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.others is None:
        rng = random.Random(f"hearts {options.seed}")
        found, say, stem = heart_scenes(rng, options.count), heart_caption, WORD
    else:
        rng = random.Random(f"others {options.seed}")
        found, say, stem = [known_scene(rng) for _ in range(options.others)], captions.caption, "known"
    written = write_captioned(options.out, ((scene, say(rng, scene)) for scene in found), stem)
    print(f"{len(written)} pictures with captions in {options.out}")


if __name__ == "__main__":
    main()
