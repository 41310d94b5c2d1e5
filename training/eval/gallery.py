"""Draws docs/nano.png, what the nano model draws, edits and thinks, and the images that its workflows begin with.

python -m training.eval.gallery [--model FOLDER]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from internvl_u.pipeline import ImageRequest, Pipeline

from ..data import scenes
from ..data.scenes import Scene, Thing
from .score import MODEL, ROOT

SEED = 1234
SHOWN = 256  # pixels per side of the images that workflows begin with
SIDE, GAP, COLUMNS, LINE = 128, 18, 5, 14  # pixels, but for COLUMNS

BEFORE = Scene(
    64, 64, "white", (Thing("circle", "red", "medium", 0.25, 0.5), Thing("square", "blue", "medium", 0.75, 0.5))
)
AFTER = Scene(64, 64, "white", (Thing("circle", "green", "medium", 0.25, 0.5), BEFORE.things[1]))
DRAWN = (
    "a red circle to the left of a blue square",
    "a yellow star above a purple ring on a navy background",
    "three pink triangles on a brown background",
    "a small cyan cross inside a large orange circle, grey background",
    "a large green square on a beige background",
)
EDITED = (
    "make the circle green",
    "replace the square with a star",
    "remove the circle",
    "move the circle to the bottom",
    "make the background navy",
)
RIDDLES = (
    "a shape with three sides in the colour of grass",
    "what shines in the night sky, coloured like a lemon, the background like coal",
    "what one wears on a finger in the colour of the sky at noon, as many as a bicycle has wheels",
)


def gallery(pipeline: Pipeline) -> Image.Image:
    """Returns all images in rows, each over what was asked for."""
    cells = [(pipeline.draw(ImageRequest(text, seed=SEED)), text) for text in DRAWN]
    before = scenes.render(BEFORE)
    cells += [(pipeline.draw(ImageRequest(text, images=(before,), seed=SEED)), f"> {text}") for text in EDITED]
    for text in RIDDLES:
        thought = pipeline.think(ImageRequest(text, seed=SEED))
        cells.append((pipeline.draw(ImageRequest(text, seed=SEED, thought=thought)), f"{text} ({thought})"))
    cells = [(image, textwrap.fill(text, 24)) for image, text in cells]
    rows = [cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)]
    heights = [SIDE + GAP + LINE * max(1 + text.count("\n") for _, text in row) for row in rows]
    sheet = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), GAP + sum(heights)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, row in enumerate(rows):
        y = GAP + sum(heights[:i])
        for j, (image, text) in enumerate(row):
            x = GAP + j * (SIDE + GAP)
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
            pen.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline="#cccccc")
            pen.multiline_text((x, y + SIDE + 3), text, fill="black", font=font)
    return sheet


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    options = parser.parse_args()
    inputs = ROOT / "demo" / "input"
    inputs.mkdir(exist_ok=True)
    for name, scene in (("before", BEFORE), ("after", AFTER)):
        scenes.render(scene, SHOWN, SHOWN).save(inputs / f"nano_{name}.png", optimize=True)
    gallery(Pipeline(options.model)).save(ROOT / "docs" / "nano.png", optimize=True)


if __name__ == "__main__":
    main()
