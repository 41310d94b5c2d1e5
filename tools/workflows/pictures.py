"""The pictures that the shipped workflows load: flat scenes drawn here, so that they are nobody else's.

They ship in web/pictures, from where the page puts one into ComfyUI's input folder when a workflow that needs it is
opened and it is not there (web/js/example_pictures.js). Those to train on, in web/hearts, are scenes of the nano
model's world.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from . import graphs, hearts

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "web" / "pictures"
SIDE, FINE = 768, 3  # pixels, and how much finer it is drawn
Colour = tuple[int, int, int]


class Canvas:
    """A square picture that is drawn on finely, in units of the finished picture's pixels."""

    def __init__(self, top: Colour, bottom: Colour):
        size = (SIDE * FINE, SIDE * FINE)
        self.picture = Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), ramp(size))
        self.draw = ImageDraw.Draw(self.picture)

    def polygon(self, colour: Colour, *points: tuple[float, float]) -> None:
        self.draw.polygon([(x * FINE, y * FINE) for x, y in points], fill=colour)

    def ellipse(self, colour: Colour, x: float, y: float, width: float, height: float) -> None:
        """Draws an ellipse around a centre, with these half axes."""
        self.draw.ellipse(
            [(x - width) * FINE, (y - height) * FINE, (x + width) * FINE, (y + height) * FINE], fill=colour
        )

    def box(self, colour: Colour, left: float, top: float, right: float, bottom: float, radius: float = 0) -> None:
        edges = [side * FINE for side in (left, top, right, bottom)]
        self.draw.rounded_rectangle(edges, radius * FINE, fill=colour)

    def line(self, colour: Colour, width: float, *points: tuple[float, float]) -> None:
        fine = [(x * FINE, y * FINE) for x, y in points]
        self.draw.line(fine, fill=colour, width=round(width * FINE), joint="curve")

    def shade(self, top: Colour, bottom: Colour, upper: float, lower: float) -> None:
        """Fills a band across the whole picture with a gradient."""
        size = (SIDE * FINE, round((lower - upper) * FINE))
        band = Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), ramp(size))
        self.picture.paste(band, (0, round(upper * FINE)))

    def hills(self, colour: Colour, height: float, swing: float, wave: float, phase: float) -> None:
        """Draws a wavy land that reaches to the picture's lower edge."""
        tops = [
            (x, height - swing * math.sin(x / wave + phase) - swing * 0.35 * math.sin(x / wave * 2.3 + phase * 2))
            for x in range(0, SIDE + 9, 8)
        ]
        self.polygon(colour, (0, SIDE), *tops, (SIDE, SIDE))

    def finished(self) -> Image.Image:
        return self.picture.resize((SIDE, SIDE), Image.LANCZOS)


def ramp(size: tuple[int, int]) -> Image.Image:
    return Image.linear_gradient("L").resize(size)


DAY = {
    "sky": ((92, 172, 226), (252, 236, 205)),
    "light": (255, 244, 190),
    "far": (133, 170, 188),
    "hill": (92, 148, 110),
    "near": (66, 122, 88),
    "water": ((124, 190, 214), (44, 116, 166)),
    "ripple": (198, 230, 238),
    "wall": ((250, 240, 222), (244, 214, 176), (226, 234, 236)),
    "roof": ((206, 78, 56), (182, 62, 50), (214, 104, 62)),
    "window": (76, 104, 128),
    "wood": (142, 98, 64),
    "sail": (246, 246, 240),
    "tree": (38, 92, 70),
}
EVENING = DAY | {
    "sky": ((30, 34, 78), (236, 132, 104)),
    "light": (250, 246, 226),
    "far": (92, 82, 124),
    "hill": (58, 70, 104),
    "near": (40, 54, 84),
    "water": ((206, 120, 116), (34, 44, 92)),
    "ripple": (244, 172, 138),
    "wall": ((150, 134, 150), (138, 118, 134), (126, 130, 154)),
    "roof": ((104, 48, 62), (92, 40, 58), (112, 60, 66)),
    "window": (255, 214, 110),
    "wood": (76, 58, 66),
    "tree": (24, 38, 60),
}


def harbour(tones: dict, boat: bool, moon: bool) -> Image.Image:
    """Returns a village on a lake: by day with a sailing boat, in the evening without."""
    canvas = Canvas(*tones["sky"])
    canvas.ellipse(tones["light"], 590 if moon else 170, 150 if moon else 165, *((44, 44) if moon else (62, 62)))
    if not moon:
        for x, y in ((400, 120), (610, 205)):
            for dx, dy, size in ((-46, 8, 28), (0, -4, 40), (48, 10, 26)):
                canvas.ellipse((255, 252, 244), x + dx, y + dy, size * 1.35, size * 0.62)
    peaks = ((0, 400), (96, 262), (176, 330), (300, 212), (420, 344), (520, 268), (640, 352), (768, 280), (768, 500))
    canvas.polygon(tones["far"], (0, 500), *peaks)
    canvas.hills(tones["hill"], 420, 36, 120, 0.6)
    canvas.hills(tones["near"], 474, 18, 90, 2.2)
    canvas.shade(*tones["water"], 508, SIDE)
    chance = random.Random(7)
    for _ in range(60):
        x, y = chance.uniform(10, 750), chance.uniform(524, 752)
        width = 8 + (y - 508) / 9
        canvas.line(tones["ripple"], 1.2 + (y - 508) / 190, (x - width, y), (x + width, y))
    for x, size in ((40, 1.0), (86, 0.8), (430, 0.9), (716, 1.1), (672, 0.8)):
        canvas.polygon(tones["tree"], (x - 30 * size, 510), (x, 510 - 124 * size), (x + 30 * size, 510))
        canvas.polygon(tones["tree"], (x - 23 * size, 470), (x, 510 - 150 * size), (x + 23 * size, 470))
    for i, (left, width, height) in enumerate(
        ((128, 84, 82), (222, 96, 108), (328, 74, 76), (486, 92, 96), (588, 70, 74))
    ):
        wall, roof, top = tones["wall"][i % 3], tones["roof"][i % 3], 512 - height
        canvas.box(wall, left, top, left + width, 514)
        canvas.polygon(roof, (left - 10, top + 2), (left + width / 2, top - width * 0.5), (left + width + 10, top + 2))
        canvas.box(tones["wood"], left + width * 0.40, 512 - 34, left + width * 0.60, 514)
        for part in (0.12, 0.66):
            canvas.box(tones["window"], left + width * part, top + 16, left + width * (part + 0.22), top + 38, 2)
    canvas.polygon(tones["wood"], (300, 516), (344, 516), (452, 690), (332, 690))
    for step in range(9):
        y = 522 + step * step * 2.1
        canvas.line(
            tuple(round(part * 0.72) for part in tones["wood"]),
            1 + step * 0.3,
            (300 + step * 3.6, y),
            (346 + step * 12, y),
        )
    for x, y, height in ((312, 600, 26), (396, 600, 26), (328, 690, 40), (450, 690, 40)):
        canvas.box(tuple(round(part * 0.6) for part in tones["wood"]), x - 5, y - 14, x + 5, y + height, 3)
    if boat:
        canvas.polygon((176, 52, 48), (528, 620), (700, 620), (668, 662), (560, 662))
        canvas.line((96, 70, 52), 6, (612, 622), (612, 440))
        canvas.polygon(tones["sail"], (620, 446), (620, 604), (706, 604))
        canvas.polygon((240, 190, 84), (604, 470), (604, 604), (540, 604))
    return canvas.finished()


FUR, DARK, PALE, CLOTH = (232, 146, 62), (196, 106, 38), (252, 232, 206), (204, 54, 56)


def cat(scarf: bool = True) -> Image.Image:
    """Returns a ginger cat with a red scarf, before a wall and on a rug."""
    canvas = Canvas((196, 222, 214), (226, 236, 222))
    canvas.shade((222, 190, 150), (196, 158, 116), 590, SIDE)
    canvas.box((240, 246, 244), 60, 70, 270, 330, 6)
    canvas.box((150, 204, 232), 74, 84, 256, 316, 3)
    canvas.polygon((112, 168, 116), (74, 316), (74, 262), (130, 220), (190, 270), (256, 236), (256, 316))
    canvas.box((240, 246, 244), 160, 84, 170, 316)
    canvas.box((240, 246, 244), 74, 196, 256, 206)
    canvas.box((206, 184, 150), 50, 328, 280, 346, 4)
    canvas.box((178, 96, 74), 610, 470, 720, 600, 14)
    for dx, dy in ((-40, -96), (0, -134), (42, -92), (-20, -60), (26, -52)):
        canvas.line((74, 128, 82), 8, (665, 480), (665 + dx, 470 + dy))
        canvas.ellipse((88, 152, 96), 665 + dx, 462 + dy, 24, 38)
    canvas.ellipse((146, 92, 108), 384, 690, 330, 62)
    canvas.ellipse((186, 128, 138), 384, 688, 296, 48)
    # The tail, the body, the paws.
    canvas.line(FUR, 46, (520, 664), (590, 652), (622, 596), (606, 540))
    canvas.ellipse(DARK, 605, 536, 23, 30)
    canvas.ellipse(FUR, 384, 560, 142, 138)
    canvas.ellipse(PALE, 384, 590, 78, 96)
    for x in (-1, 1):
        canvas.ellipse(FUR, 384 + x * 104, 650, 58, 46)
        canvas.box(FUR, 384 + x * 46 - 33, 560, 384 + x * 46 + 33, 690, 30)
        canvas.ellipse(PALE, 384 + x * 46, 682, 36, 24)
        for y in (520, 554, 588):
            canvas.line(DARK, 13, (384 + x * 136, y), (384 + x * 104, y + 10))
    # The head.
    for x in (-1, 1):
        canvas.polygon(FUR, (384 + x * 154, 306), (384 + x * 150, 128), (384 + x * 34, 214))
        canvas.polygon((238, 170, 150), (384 + x * 132, 270), (384 + x * 134, 166), (384 + x * 66, 216))
    canvas.ellipse(FUR, 384, 312, 166, 136)
    canvas.ellipse(PALE, 384, 372, 88, 62)
    for x, low in ((-34, 236), (0, 250), (34, 236)):
        canvas.line(DARK, 15, (384 + x, 188), (384 + x * 0.8, low))
    for x in (-1, 1):
        canvas.ellipse((255, 255, 250), 384 + x * 68, 306, 34, 38)
        canvas.ellipse((70, 132, 84), 384 + x * 66, 308, 26, 31)
        canvas.ellipse((24, 28, 30), 384 + x * 64, 308, 13, 27)
        canvas.ellipse((255, 255, 255), 384 + x * 64 + 8, 294, 7, 8)
        for dy, slope in ((0, -14), (16, 6), (32, 26)):
            canvas.line((255, 250, 240), 3, (384 + x * 84, 366 + dy * 0.6), (384 + x * 214, 356 + dy + slope))
    canvas.polygon((222, 112, 112), (364, 346), (404, 346), (384, 368))
    canvas.line((120, 70, 60), 4, (384, 366), (384, 384), (362, 396))
    canvas.line((120, 70, 60), 4, (384, 384), (406, 396))
    if scarf:
        wear(canvas, CLOTH, (236, 192, 92))
    return canvas.finished()


def wear(canvas: Canvas, cloth: Colour, stripe: Colour) -> None:
    """Draws the scarf."""
    canvas.polygon(cloth, (430, 456), (498, 450), (520, 612), (446, 620))
    canvas.polygon(stripe, (511, 566), (515, 590), (443, 598), (440, 574))
    canvas.line(cloth, 58, (252, 424), (300, 454), (384, 468), (468, 454), (516, 424))
    canvas.ellipse(cloth, 252, 424, 29, 29)
    canvas.ellipse(cloth, 516, 424, 29, 29)
    canvas.ellipse(stripe, 462, 456, 34, 34)
    canvas.ellipse(cloth, 462, 456, 26, 26)


def unpainted(picture: Image.Image, without: Image.Image, grow: int) -> Image.Image:
    """Returns the alpha that the mask editor saves when one paints over what only the first picture has.

    Painted pixels become transparent and keep their colour; the paint goes `grow` pixels beyond.
    """
    change = ImageChops.difference(picture, without).convert("L").point(lambda value: 255 * (value > 8))
    paint = change.filter(ImageFilter.MaxFilter(2 * grow + 1)).filter(ImageFilter.GaussianBlur(grow / 3))
    return paint.point(lambda value: 255 * (value <= 127))


def nano_masked(before: Image.Image) -> Image.Image:
    """Returns the nano demo's picture with its left half's thing painted over."""
    masked = before.convert("RGBA")
    alpha = Image.new("L", before.size, 255)
    width, height = before.size
    ImageDraw.Draw(alpha).ellipse([0.02 * width, 0.26 * height, 0.48 * width, 0.74 * height], fill=0)
    masked.putalpha(alpha)
    return masked


def shape() -> Image.Image:
    """Returns a scene of the nano model's world, for its edges: a yellow star, low on the right, on navy."""
    from training.data.scenes import Scene, Thing, render

    return render(Scene(64, 64, "navy", (Thing("star", "yellow", "medium", 0.75, 0.75),)))


def save_hearts(count: int = 20) -> None:
    """Writes as many hearts as pictures of known things, and the captions of both."""
    from training.data import captions
    from training.data.captioned import known_scene
    from training.data.hearts import heart_caption, heart_scenes
    from training.data.scenes import render

    hearts.FOLDER.mkdir(parents=True, exist_ok=True)
    rng, others, texts = random.Random("hearts 0"), random.Random("others 0"), {}
    kinds = {
        "heart": [(scene, heart_caption(rng, scene)) for scene in heart_scenes(rng, count)],
        "known": [(scene, captions.caption(others, scene)) for scene in (known_scene(others) for _ in range(count))],
    }
    for kind, pairs in kinds.items():
        for number, (scene, caption) in enumerate(pairs, 1):
            name = f"{kind}-{number:03}.png"
            render(scene).save(hearts.FOLDER / name, optimize=True)
            texts[name] = caption
    listed = json.dumps(texts, indent=1, ensure_ascii=False)
    (hearts.FOLDER / hearts.CAPTIONS).write_text(f"{listed}\n", encoding="utf-8")


def save_all() -> None:
    """Writes all pictures; the same again where nothing has changed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    jpeg = {"quality": 88, "optimize": True}
    harbour(DAY, boat=True, moon=False).save(FOLDER / "internvl_u_harbour.jpg", **jpeg)
    harbour(EVENING, boat=False, moon=True).save(FOLDER / "internvl_u_harbour_evening.jpg", **jpeg)
    cat().save(FOLDER / "internvl_u_cat.jpg", **jpeg)
    masked = cat().quantize(96, dither=Image.Dither.NONE).convert("RGBA")  # few colours, a small file
    masked.putalpha(unpainted(cat(), cat(scarf=False), grow=13))
    masked.save(FOLDER / "internvl_u_cat_masked.png", optimize=True)
    shape().save(FOLDER / graphs.SHAPE, optimize=True)
    demo = ROOT / "demo" / "input"
    with Image.open(demo / "nano_before.png") as before:
        nano_masked(before).save(demo / "nano_masked.png", optimize=True)
    save_hearts()


if __name__ == "__main__":
    save_all()
