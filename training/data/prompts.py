"""Prompts of this world as a file for `python -m internvl_u distill`: captions, and edits with their pictures.

python -m training.data.prompts --out FOLDER [--texts 2000] [--edits 1500] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from . import captions, edits, scenes

FILE = "prompts.jsonl"
THOUGHTS = 0.1
"""Share of the prompts that come with a thought."""


def write_prompts(folder: Path, texts: int, edited: int, seed: int = 0) -> Path:
    """Writes prompts and the pictures that they edit into a folder; returns the file of the prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"prompts {seed}")
    rows = [*_texts(rng, texts), *_edits(rng, edited, folder)]
    file = folder / FILE
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def _texts(rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    for _ in range(count):
        make = rng.choices((scenes.random_scene, scenes.related_scene, scenes.counted_scene), (5, 4, 1))[0]
        scene = make(rng)
        yield _row(rng, captions.caption(rng, scene), captions.describe(scene).capitalize())


def _edits(rng: random.Random, count: int, folder: Path) -> Iterator[dict[str, str]]:
    for number in range(count):
        edit = edits.random_edit(rng)
        name = f"{number:05}.png"
        scenes.render(edit.before).save(folder / name)
        yield _row(rng, edit.instruction, edits.thought(edit).rstrip(".")) | {"source": name}


def _row(rng: random.Random, text: str, thought: str) -> dict[str, str]:
    return {"prompt": text} | ({"thought": thought} if rng.random() < THOUGHTS else {})


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--edits", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_prompts(options.out, options.texts, options.edits, options.seed)


if __name__ == "__main__":
    main()
