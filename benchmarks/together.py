"""Times pictures and texts that are made several at once (`internvl_u.together`), and states what that changes.

Each call is for prompts that were not read before. A picture's operations are counted with its share of what several
have in common; it differs from the one that is drawn alone by at most so much in a latent, and by so many levels of 8
bits in a pixel. Of texts those are counted that are equal to the ones written alone.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from internvl_u.generation import GenerationConfig
from internvl_u.images import open_image, to_rgb
from internvl_u.pipeline import Pipeline
from internvl_u.request import ImageRequest
from internvl_u.together import Question, answer_together, draw_together, sample_together, think_together

from .report import add_device, make_parser, resolve_dtype, show
from .timing import median, take_turns

PICTURE = Path(__file__).resolve().parent.parent / "demo" / "input" / "nano_before.png"
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = ("", " above a green ring", " to the left of a blue star", " below a red cross", " and a big square")
NUMBERS = ("one", "two", "three")


class Kind(NamedTuple):
    """What is made: the next wish of a text, how several are made, and what that changes."""

    wish: Callable[[str], Any]
    make: Callable[[Sequence[Any]], Sequence[Any]]
    compare: Callable[[Sequence[Any]], dict[str, Any]]


def texts() -> Iterator[str]:
    """Yields texts of several lengths, each another one."""
    for number, place, colour, shape in itertools.product(NUMBERS, PLACES, COLOURS, SHAPES):
        yield f"{number} {colour} {shape}{place}"


def kinds(pipeline: Pipeline, arguments: argparse.Namespace) -> dict[str, Kind]:
    """Returns what is measured, by name."""
    picture = to_rgb(open_image(PICTURE))
    config = GenerationConfig(arguments.tokens)
    size = {} if arguments.pixels is None else {"width": arguments.pixels, "height": arguments.pixels}

    def drawing(text: str, images: tuple[Image.Image, ...] = ()) -> ImageRequest:
        return ImageRequest(text, steps=arguments.steps, seed=len(text), images=images, **size)

    def draw(wishes: Sequence[ImageRequest]) -> list[Image.Image]:
        return draw_together(pipeline, wishes)

    def answer(wishes: Sequence[Question]) -> list[str]:
        return answer_together(pipeline, wishes)

    def think(wishes: Sequence[ImageRequest]) -> Sequence[str]:
        return think_together(pipeline, wishes, config)

    def differences(wishes: Sequence[ImageRequest]) -> dict[str, Any]:
        with FlopCounterMode(display=False) as counter:
            draw(wishes)
        latents = [sample_together(pipeline, [wish]) for wish in wishes]
        pixels = [_pixels(one) for wish in wishes for one in draw([wish])]
        apart = (sample_together(pipeline, wishes) - torch.cat(latents)).abs().max().item()
        levels = max(int(abs(_pixels(one) - other).max()) for one, other in zip(draw(wishes), pixels, strict=True))
        operations = counter.get_total_flops() / len(wishes) / 1e9
        return {"GFLOP each": operations, "latent differs by": apart, "levels": levels}

    def equal(make: Callable[[Sequence[Any]], Sequence[str]]) -> Callable[[Sequence[Any]], dict[str, Any]]:
        def count(wishes: Sequence[Any]) -> dict[str, Any]:
            alone = [text for wish in wishes for text in make([wish])]
            return {"equal texts": sum(one == other for one, other in zip(make(wishes), alone, strict=True))}

        return count

    return {
        "picture": Kind(drawing, draw, differences),
        "edit": Kind(lambda text: drawing(text, (picture,)), draw, differences),
        "answer": Kind(lambda text: Question(f"Is there {text}?", (picture,), config=config), answer, equal(answer)),
        "thought": Kind(drawing, think, equal(think)),
    }


def _pixels(image: Image.Image) -> numpy.ndarray:
    return numpy.asarray(image).astype(int)


def measure(arguments: argparse.Namespace, name: str, kind: Kind) -> list[dict[str, Any]]:
    """Returns a row for each number of wishes."""
    unread = itertools.cycle(texts())
    contestants = {
        str(count): lambda count=count: kind.make([kind.wish(text) for text in itertools.islice(unread, count)])
        for count in arguments.together
    }
    times = take_turns(contestants, arguments.repeats, torch.device(arguments.device))
    rows = []
    for count in arguments.together:
        wishes = [kind.wish(text) for text in itertools.islice(unread, count)]
        each = [seconds / count for seconds in times[str(count)]]
        first = [seconds / arguments.together[0] for seconds in times[str(arguments.together[0])]]
        rows.append(
            {
                "kind": name,
                "together": count,
                "ms each": 1000 * median(each),
                "from": 1000 * min(each),
                "to": 1000 * max(each),
                "a second": 1 / median(each),
                f"times {arguments.together[0]}": median([a / b for a, b in zip(first, each, strict=True)]),
                **kind.compare(wishes),
            }
        )
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint's folder or single file")
    parser.add_argument("--kinds", nargs="+", default=["picture", "edit", "answer", "thought"], help="what is made")
    parser.add_argument("--together", nargs="+", type=int, default=[1, 2, 4, 8], help="how many at once")
    parser.add_argument("--pixels", type=int, help="a picture's side; None: the model's own")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--tokens", type=int, default=60, help="the most tokens of a text")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    add_device(parser)
    arguments = parser.parse_args()
    dtype = resolve_dtype(arguments)
    pipeline = Pipeline(arguments.model, dtype=dtype, device=arguments.device, offload=False)
    made = kinds(pipeline, arguments)
    rows = [row for name in arguments.kinds for row in measure(arguments, name, made[name])]
    settings = {"dtype": str(dtype), "device": arguments.device, "threads": torch.get_num_threads()}
    show(rows, arguments.json, **settings, steps=arguments.steps)


if __name__ == "__main__":
    main()
