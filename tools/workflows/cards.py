"""The cards of the template browser: a square picture that shows what one gets, from a real run of the nano graph.

The nano model draws flat shapes, and each card says that it did. When the released model's pictures are there, they
take its place.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..comfyui import Server
from . import graphs, nano_graphs

ROOT = Path(__file__).resolve().parents[2]
SIDE = 512  # pixels; the template browser shows some 160 to 240 of them
BAND, HEAD = 104, 62  # height of the title's band below; above, newer frontends put a badge into the left corner
PAPER, INK, SOFT, DARK = (246, 244, 238), (32, 34, 40), (106, 108, 116), (28, 34, 58)
ACCENTS = {"draw": (236, 98, 62), "edit": (40, 140, 122), "think": (120, 84, 190), "ask": (38, 104, 196)}
CREDIT, ANSWERED = "drawn by the nano model in the box", "answered by the nano model in the box"


TAUGHT = "taught to the nano model in the box"


@dataclass(frozen=True)
class Card:
    """What is on a card: big words, and parts of the run, by name of a node or as texts.

    `parts` are shown in reading order. "node" is the picture that a node saved or loads, "=text" words, "node:text"
    what a node wrote, ">" an arrow and "+" a plus between two pictures. "node#2" is the second picture that it saved.
    """

    words: str
    kind: str
    parts: tuple[str, ...]
    credit: str = CREDIT
    run: str = ""
    """The graph whose run is shown, where it is not the card's own."""
    prompt: str = ""
    """What is drawn, where it is not what the nano graph says."""


STARS = "three pink stars on a navy background"


def quoted(text: str) -> str:
    return f"=“{text}”"


CARDS = {
    "first_steps_with_nano": Card(
        "First steps: nano",
        "draw",
        ("save", "=in seconds, nothing to download"),
        prompt="a purple ring on a beige background",
    ),
    "text_to_image": Card("Text to image", "draw", ("save", quoted(STARS)), prompt=STARS),
    "text_to_image_custom_sampling": Card(
        "Custom sampling",
        "draw",
        ("save", "=guider, solver, scheduler, noise: a node each"),
        prompt="a large cyan ring on a black background",
    ),
    "text_to_image_ksampler": Card(
        "KSampler", "draw", ("save", "=ComfyUI's own sampler"), prompt="a large green square on a beige background"
    ),
    "edit": Card("Edit a picture", "edit", ("image", ">", "save", quoted("make the circle green"))),
    "edit_two_references": Card(
        "Two pictures in one", "edit", ("image1", "+", "image2", quoted("let the cat stand on the jetty")), ""
    ),
    "think_then_draw": Card(
        "Think, then draw", "think", (quoted("three sides, the colour of grass"), "think:text", "save")
    ),
    "edit_the_thought_then_draw": Card("Edit the thought", "think", ("thought:text", ">", "save")),
    "think_then_edit": Card("Think, then edit", "think", ("image", ">", "save", "think:text")),
    "ask_about_a_picture": Card("Ask", "ask", ("image", quoted("describe the picture."), "answer:text"), ANSWERED),
    "compare_two_pictures": Card(
        "Compare", "ask", ("image1", "+", "image2", quoted("what changed?"), "answer:text"), ANSWERED
    ),
    "masked_edit": Card("Only what you paint", "edit", ("image", ">", "save", quoted("make the circle green"))),
    "draw_ask_draw_again": Card("Draw, ask, draw", "think", ("save", ">", "save2", "answer:text")),
    "chat": Card(
        "Chat", "ask", ("image", quoted("which shape is red?"), "chat:text", "=draws and edits, too"), ANSWERED
    ),
    "draw_judge_draw_again": Card(
        "Draw, judge, draw", "think", ("save", quoted("is there a red circle?"), "=no? It is drawn again")
    ),
    "story_in_three_pictures": Card(
        "Story in pictures",
        "think",
        ("save", ">", "save2", ">", "save3", quoted("make the circle green, the background black")),
    ),
    "batch_of_prompts": Card(
        "Batch of prompts", "draw", ("save", "save#2", "save#3", "=one prompt a line, a file for each")
    ),
    "grid_of_scales": Card("Grid of scales", "edit", ("save", "=all_cfg, part_cfg: compared")),
    "regions": Card("Regions", "draw", ("save", "=a prompt for each part")),
    "picture_to_picture": Card(
        "Image to image", "draw", ("image", ">", "save", quoted("a green circle, an orange square"))
    ),
    "hires_second_pass": Card(
        "Hires, two passes", "draw", ("save", ">", "save2"), prompt="a large orange cross on a navy background"
    ),
    "upscale_with_a_model": Card(
        "Upscale",
        "draw",
        ("save", "=with any upscale model"),
        CREDIT,
        "text_to_image",
        "a large yellow star on a navy background",
    ),
    "with_a_lora": Card(
        "LoRA",
        "draw",
        ("save", "=your style on both models"),
        CREDIT,
        "text_to_image",
        "a large pink circle on a brown background",
    ),
    "train_a_lora": Card("Train a LoRA", "think", ("save", quoted("heart"), "=learnt from 20 pictures, here"), TAUGHT),
    "load_a_trained_lora": Card(
        "What you trained",
        "draw",
        ("save", "=with ComfyUI's own loader"),
        CREDIT,
        "first_steps_with_nano",
        "a large orange star on a black background",
    ),
    "control_with_edges": Card(
        "Control with edges", "edit", ("edges", ">", "save", quoted("a red star on white"), "=where the edges are")
    ),
    "controlnet_of_another_model": Card(
        "ControlNet", "edit", ("save", ">", "lines", "=its lines lead another model"), CREDIT, "text_to_image"
    ),
    "two_gpus": Card(
        "Two GPUs",
        "draw",
        ("save", "=both at work on each step"),
        CREDIT,
        "text_to_image",
        "a large blue cross on a grey background",
    ),
    "captions_for_a_folder": Card(
        "Captions",
        "ask",
        ("image", "answer:text", "=one .txt for each picture of a folder"),
        ANSWERED,
        "ask_about_a_picture",
    ),
}


def save(comfyui: Server, name: str) -> None:
    """Runs the nano graph and writes a workflow's card."""
    card = CARDS[name]
    compose(card, parts(comfyui, card, card.run or name)).save(
        ROOT / "workflows" / f"{graphs.file_name(name)}.jpg", quality=84, optimize=True
    )


def parts(comfyui: Server, card: Card, name: str) -> list[str | Image.Image]:
    """Returns what a card shows: pictures, texts, and the signs between pictures."""
    numbers = {node: str(number) for number, (node, *_) in enumerate(graphs.nodes(name), 1)}
    graph = nano_graphs.api(name) if name in nano_graphs.TEXTS else nano_graphs.twin(name)
    if card.prompt:
        graph[numbers["encode"]]["inputs"]["prompt"] = card.prompt
    outputs: dict = {}
    if name in nano_graphs.TEXTS:
        decoded = [numbers["decode"], 0] if "decode" in numbers else None
        if "lines" in card.parts:
            graph["lines"] = {
                "class_type": "Canny",
                "inputs": {"image": decoded, "low_threshold": 0.1, "high_threshold": 0.3},
            }
            graph["shown"] = {"class_type": "SaveImage", "inputs": {"images": ["lines", 0], "filename_prefix": "lines"}}
            numbers["lines"] = "shown"
        entry = comfyui.run(graph, timeout=900)  # one of them trains
        outputs = comfyui.outputs(entry)

    def part(one: str) -> str | Image.Image:
        node, _, wanted = one.partition(":")
        node, _, place = node.partition("#")
        if one[0] in "=>+":
            return one
        number = numbers[node]
        if wanted:
            return f"={outputs[number]['text'][0] if number in outputs else graph[number]['inputs']['value']}"
        if number in outputs:
            with Image.open(comfyui.files(entry, number)[int(place or 1) - 1]) as picture:
                return picture.convert("RGB")
        with Image.open(comfyui.base / "input" / graph[number]["inputs"]["image"]) as picture:
            return striped(picture.convert("RGBA"))

    return [part(one) for one in card.parts]


def striped(picture: Image.Image) -> Image.Image:
    """Returns a picture with what is painted over in the mask editor under stripes."""
    factor = max(1, 512 // picture.width)
    large = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    stripes = Image.new("RGB", large.size, (70, 74, 92))
    draw = ImageDraw.Draw(stripes)
    for x in range(-large.height, large.width, 28):
        draw.line([(x, large.height), (x + large.height, 0)], fill=(214, 216, 226), width=9)
    return Image.composite(large.convert("RGB"), Image.blend(large.convert("RGB"), stripes, 0.6), large.getchannel("A"))


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # it comes with Pillow, so that every machine draws the same


def compose(card: Card, given: list[str | Image.Image]) -> Image.Image:
    """Returns the card: pictures and texts, and the big words in a band below."""
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(image)
    pictures = [one for one in given if isinstance(one, Image.Image)]
    signs = [one for one in given if isinstance(one, str) and one[0] in ">+"]
    texts = [one[1:] for one in given if isinstance(one, str) and one[0] == "="]
    low = SIDE - BAND
    if len(pictures) == 2:
        side = 226
        top = HEAD if texts else (low - side) // 2 + 8
        put(image, pictures[0], 16, top, side)
        put(image, pictures[1], SIDE - 16 - side, top, side)
        sign(draw, signs[0], SIDE // 2, top + side // 2, ACCENTS[card.kind])
        write(draw, texts, (24, top + side + 8, SIDE - 24, low - 6), 27, centred=True)
    elif len(pictures) == 3:
        side, gap = 150, (SIDE - 3 * 150) // 4
        for number, picture in enumerate(pictures):
            put(image, picture, gap + number * (side + gap), HEAD + 40, side)
        for number, one in enumerate(signs, 1):
            sign(draw, one, gap // 2 + number * (side + gap), HEAD + 40 + side // 2, ACCENTS[card.kind])
        write(draw, texts, (24, HEAD + 48 + side, SIDE - 24, low - 6), 27, centred=True)
    elif sum(map(len, texts)) <= 46 and not any("\n" in one for one in texts):
        side = 270 if texts else 310
        put(image, pictures[0], (SIDE - side) // 2, 56, side)
        write(draw, texts, (24, 56 + side + 6, SIDE - 24, low - 6), 27, centred=True)
    else:
        side = 236
        put(image, pictures[0], 16, HEAD + 28, side)
        write(draw, texts, (16 + side + 18, HEAD - 2, SIDE - 14, low - 10), 27)
    draw.rectangle([0, low, SIDE, SIDE], fill=ACCENTS[card.kind])
    size = next(size for size in range(60, 20, -1) if font(size).getlength(card.words) <= SIDE - 44)
    top = low + (BAND - (26 if card.credit else 0)) // 2
    draw.text((SIDE // 2, top), card.words, "white", font(size), anchor="mm", stroke_width=1, stroke_fill="white")
    draw.text((SIDE // 2, SIDE - 18), card.credit, (255, 255, 255), font(19), anchor="mm")
    return image


def put(image: Image.Image, picture: Image.Image, left: int, top: int, side: int) -> None:
    """Puts a picture into a square with round corners and a thin edge."""
    small = picture.resize((side, side), Image.LANCZOS)
    mask = Image.new("L", (side * 4, side * 4))
    ImageDraw.Draw(mask).rounded_rectangle([0, 0, side * 4 - 1, side * 4 - 1], 56, fill=255)
    image.paste(
        (196, 194, 188), (left - 1, top - 1, left + side + 1, top + side + 1), mask.resize((side + 2, side + 2))
    )
    image.paste(small, (left, top), mask.resize((side, side), Image.LANCZOS))


def sign(draw: ImageDraw.ImageDraw, one: str, x: int, y: int, colour: tuple[int, int, int]) -> None:
    """Draws an arrow or a plus on a disc."""
    draw.ellipse([x - 25, y - 25, x + 25, y + 25], fill=colour, outline=PAPER, width=4)
    if one == ">":
        draw.line([x - 11, y, x + 6, y], fill="white", width=6)
        draw.polygon([(x + 2, y - 11), (x + 15, y), (x + 2, y + 11)], fill="white")
    else:
        draw.line([x - 12, y, x + 12, y], fill="white", width=6)
        draw.line([x, y - 12, x, y + 12], fill="white", width=6)


def write(draw: ImageDraw.ImageDraw, texts: list[str], box: tuple[int, ...], size: int, centred: bool = False) -> None:
    """Writes texts below each other into a box, in the largest size up to this that fits."""
    left, top, right, bottom = box
    for one in range(size, 9, -1):
        wide = int((right - left) / (one * 0.5))
        lines = [[row for line in text.split("\n") for row in textwrap.wrap(line, wide)] for text in texts]
        heights = [len(rows) * one * 1.22 for rows in lines]
        widest = max((font(one).getlength(row) for rows in lines for row in rows), default=0)
        if widest <= right - left and sum(heights) + one * 0.6 * (len(texts) - 1) <= bottom - top:
            break
    y = top + (bottom - top - sum(heights) - one * 0.6 * (len(texts) - 1)) / 2
    for number, rows in enumerate(lines):
        colour = SOFT if len(lines) > 1 and texts[number][0] == "“" else DARK
        for row in rows:
            x = (left + right) / 2 if centred else left
            draw.text((x, y + one * 0.6), row, colour, font(one), anchor="mm" if centred else "lm")
            y += one * 1.22
        y += one * 0.6
