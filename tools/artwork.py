"""Draws the registry's icon and banner: `python -m tools.artwork` writes docs/icon.png and docs/banner.png."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).parent.parent / "docs"
NIGHT, PAPER, GREY = "#1d2440", "#f7f4ec", "#9aa3bd"
RED, BLUE, YELLOW, GREEN = "#e4572e", "#3f7cff", "#f5b82e", "#3fae6a"
ICON, BANNER = (400, 400), (1260, 540)
FINE = 4
"""Pixels that each pixel is drawn as, for smooth edges."""


class Canvas:
    """Flat shapes, in pixels of the finished picture."""

    def __init__(self, size: tuple[int, int], ground: str):
        self.size = size
        self.image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), ground)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str, radius: float = 0) -> None:
        self.draw.rounded_rectangle([FINE * side for side in (left, top, right, bottom)], FINE * radius, colour)

    def circle(self, x: float, y: float, radius: float, colour: str) -> None:
        self.draw.ellipse([FINE * side for side in (x - radius, y - radius, x + radius, y + radius)], colour)

    def shape(self, points: list[tuple[float, float]], colour: str) -> None:
        self.draw.polygon([(FINE * x, FINE * y) for x, y in points], colour)

    def star(self, x: float, y: float, radius: float, colour: str) -> None:
        turns = [(math.pi * (i / 5 - 0.5), radius * (0.42 if i % 2 else 1)) for i in range(10)]
        self.shape([(x + r * math.cos(turn), y + r * math.sin(turn)) for turn, r in turns], colour)

    def text(self, x: float, y: float, text: str, size: float, colour: str) -> None:
        self.draw.text((FINE * x, FINE * y), text, colour, ImageFont.load_default(FINE * size), "lm")

    def save(self, file: Path) -> None:
        image = self.image.resize(self.size, Image.Resampling.LANCZOS)
        image.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def letter(canvas: Canvas, x: float, y: float, side: float) -> None:
    """Draws the U that holds a circle, a square and a star, in a square of this side whose corner is at (x, y)."""
    inner, outer, middle, low = side * 0.2, side * 0.36, x + side / 2, y + side * 0.56
    canvas.circle(middle, low, outer, PAPER)
    canvas.box(middle - outer, y + side * 0.14, middle + outer, low + side * 0.05, PAPER, side * 0.05)
    canvas.circle(middle, low, inner, NIGHT)
    canvas.box(middle - inner, y + side * 0.1, middle + inner, low, NIGHT)
    canvas.circle(middle, low + side * 0.05, side * 0.115, RED)
    canvas.box(middle - side * 0.15, y + side * 0.29, middle - side * 0.01, y + side * 0.43, BLUE, side * 0.012)
    canvas.star(middle + side * 0.09, y + side * 0.21, side * 0.095, YELLOW)


def tile(canvas: Canvas, x: float, y: float, things: str = "") -> None:
    """Draws a picture, 150 pixels wide, with hills and what is named."""
    canvas.box(x, y, x + 150, y + 150, "#cfe3ff", 14)
    canvas.circle(x + 106, y + 44, 20, YELLOW if "sun" in things else PAPER)
    canvas.shape([(x + 8, y + 136), (x + 62, y + 62), (x + 116, y + 136)], GREEN)
    canvas.shape([(x + 60, y + 136), (x + 104, y + 88), (x + 142, y + 136)], "#2f8a53")
    canvas.box(x, y + 134, x + 150, y + 150, "#2f8a53", 6)
    if "house" in things:
        canvas.box(x + 34, y + 98, x + 80, y + 138, PAPER)
        canvas.shape([(x + 26, y + 100), (x + 57, y + 72), (x + 88, y + 100)], RED)


def bubble(canvas: Canvas, x: float, y: float, lines: tuple[int, ...], colour: str = PAPER) -> None:
    """Draws words, as bars of these lengths, in a bubble of 150 x 96 pixels."""
    canvas.box(x, y, x + 150, y + 96, colour, 18)
    canvas.shape([(x + 28, y + 90), (x + 58, y + 90), (x + 30, y + 118)], colour)
    for number, length in enumerate(lines):
        canvas.box(x + 20, y + 22 + 20 * number, x + 20 + length, y + 30 + 20 * number, GREY, 4)


def arrow(canvas: Canvas, x: float, y: float) -> None:
    canvas.box(x, y - 4, x + 34, y + 4, YELLOW, 2)
    canvas.shape([(x + 28, y - 14), (x + 50, y), (x + 28, y + 14)], YELLOW)


def icon() -> Canvas:
    canvas = Canvas(ICON, NIGHT)
    letter(canvas, 0, 0, ICON[0])
    return canvas


def banner() -> Canvas:
    """Words to a picture, a picture to another, and a picture to words, beside the name."""
    canvas = Canvas(BANNER, NIGHT)
    letter(canvas, 40, 60, 300)
    canvas.text(86, 400, "InternVL-U", 56, PAPER)
    canvas.text(88, 452, "draw, edit, think and answer", 25, GREY)
    for row, top in enumerate((12, 186, 360)):
        if row == 0:
            bubble(canvas, 640, top + 28, (110, 84, 60))
        else:
            tile(canvas, 640, top + 8, "sun" if row == 1 else "sun house")
        arrow(canvas, 822, top + 82)
        if row == 2:
            bubble(canvas, 906, top + 28, (70, 104), "#dfe6ff")
        else:
            tile(canvas, 906, top + 8, "sun house" if row == 1 else "sun")
    for row, word in enumerate(("draw", "edit", "answer")):
        canvas.text(1090, 94 + 174 * row, word, 30, (RED, GREEN, BLUE)[row])
    return canvas


if __name__ == "__main__":
    icon().save(DOCS / "icon.png")
    banner().save(DOCS / "banner.png")
