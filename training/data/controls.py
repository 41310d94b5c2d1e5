"""Pictures to learn control from: one thing each, on the grid, with a caption that does not say where.

    python -m training.data.controls --out FOLDER [--count 1000] [--seed 0]
    python -m internvl_u pairs FOLDER --out PAIRS --kind canny --low 0.05 --high 0.1

The second makes edge maps of them. Where a thing lies is then told by its edges alone.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from internvl_u.finetune.maps import LUMA, Thresholds

from . import scenes
from .captioned import SIZE, without_a_place, write_captioned
from .scenes import Scene

THRESHOLDS = Thresholds(0.05, 0.1)
"""Of the edge maps: without noise there is no need for more."""
LEAST_CONTRAST = 10
"""Levels of luma between a thing and its background: blue on brown and yellow on beige have no edges for Canny."""


def control_scene(rng: random.Random) -> Scene:
    """Returns a scene of one thing on the grid whose edges can be seen."""
    while True:
        scene = scenes.random_scene(rng, 1, SIZE)
        pair = scenes.COLOURS[scene.things[0].colour], scenes.BACKGROUNDS[scene.background]
        thing, ground = (sum(level * part for level, part in zip(colour, LUMA, strict=True)) for colour in pair)
        if abs(thing - ground) >= LEAST_CONTRAST:
            return scene


def main() -> None:
    """Writes the folder and says how many pictures are in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--count", type=int, default=1000, help="pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(f"controls {options.seed}")
    pairs = ((scene, without_a_place(rng, scene)) for scene in (control_scene(rng) for _ in range(options.count)))
    print(f"{len(write_captioned(options.out, pairs, 'scene'))} pictures with captions in {options.out}")


if __name__ == "__main__":
    main()
