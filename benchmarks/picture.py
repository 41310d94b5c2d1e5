"""Times whole pictures by size and mode: encode, steps, decode; seconds, pictures a minute, and peak memory.

Through the library, with one part on the device at a time, and with --official beside the official pipeline, in turns.
The first picture of each warms up and loads. The limit is how long the operations that ours needs take at the fastest
multiplication of matrices seen here. --memory draws in processes of their own, on Linux: the largest resident
set of each stage, weights that are mapped from files included, and of a GPU the most that torch held.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from internvl_u import images, sampling
from internvl_u.pipeline import ImageRequest, Pipeline

from . import limits
from .memory import MIB, memory, reset_peak
from .official import OfficialPipeline
from .report import add_device, make_parser, resolve_dtype, show
from .timing import median, seconds, take_turns

PROMPT = "a red fox reading a newspaper in a sunny kitchen, watercolour"
GIB = 2**30
Draw = Callable[[ImageRequest], dict[str, float]]


def draw(pipeline: Pipeline, drawing: ImageRequest, on_stage: Callable[[str], object] | None = None) -> dict:
    """Returns the seconds that one picture's stages take; `on_stage(name)` is called after each."""
    kept: dict = {}

    def encode():
        kept["conditions"] = pipeline.encode_prompt(drawing)

    def sample():
        noise = images.noise(drawing.width, drawing.height, drawing.seed)
        sigmas = sampling.flow_sigmas(drawing.steps)
        kept["latent"] = pipeline.sample(kept["conditions"], noise, sigmas, drawing.guidance)

    def decode():
        kept["picture"] = pipeline.decode(kept["latent"])

    taken = {}
    for name, stage in {"encode s": encode, "steps s": sample, "decode s": decode}.items():
        taken[name] = seconds(stage, pipeline.device)
        if on_stage is not None:
            on_stage(name.removesuffix(" s"))
    return taken


def count_operations(pipeline: Pipeline, drawing: ImageRequest) -> float:
    """Returns the operations of a picture of ours: products of matrices, attention and convolutions."""
    with FlopCounterMode(display=False) as counter:
        draw(pipeline, drawing)
    return counter.get_total_flops()


def make_contestants(arguments: argparse.Namespace, pipeline: Pipeline) -> dict[str, Draw]:
    """Returns what draws a picture and returns the seconds of its stages, by name."""
    dtype, device = resolve_dtype(arguments), arguments.device
    found: dict[str, Draw] = {}
    if "ours" in arguments.only:
        found["ours"] = lambda drawing: draw(pipeline, drawing)
    if arguments.official and "official" in arguments.only:
        found["official"] = OfficialPipeline(arguments.official, arguments.model, dtype, device).draw
    return found


def measure(contestants: dict[str, Draw], drawing: ImageRequest, repeats: int, device: torch.device) -> list[dict]:
    """Returns a row for each contestant: the medians of several pictures after one to warm up, and what follows."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    runs = {name: lambda name=name: taken[name].append(contestants[name](drawing)) for name in contestants}
    whole = take_turns(runs, repeats, device)
    rows = []
    for name, times in whole.items():
        stages = taken[name][-repeats:]
        row = {stage: median([one[stage] for one in stages]) for stage in stages[0]}
        row |= {"step s": row["steps s"] / drawing.steps, "picture s": median(times), "from": min(times)}
        rows.append({"contestant": name, **row, "to": max(times), "pictures a minute": 60 / median(times)})
        if "official" in whole:
            rows[-1]["times official"] = median(whole["official"]) / median(times)
    return rows


def measure_memory(arguments: argparse.Namespace, drawing: ImageRequest) -> dict[str, float]:
    """Returns the largest resident set of each stage of the first picture that this process draws, in MiB."""
    found = {"before MiB": memory("VmRSS")}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if "ours" in arguments.only:
        pipeline = Pipeline(arguments.model, dtype=resolve_dtype(arguments), device=arguments.device)

        def on_stage(name: str) -> None:
            found[f"{name} MiB"] = memory("VmHWM")
            found[f"{name} own MiB"] = memory("RssAnon")
            reset_peak()

        reset_peak()
        draw(pipeline, drawing, on_stage)
    else:
        official = OfficialPipeline(arguments.official, arguments.model, resolve_dtype(arguments), arguments.device)
        official.draw(drawing)
        found["own MiB"] = memory("RssAnon")
    found["peak MiB"] = max([memory("VmHWM"), *(value for name, value in found.items() if "own" not in name)])
    if torch.cuda.is_available():
        found["peak GPU MiB"] = torch.cuda.max_memory_allocated() / MIB
    return found


def measure_apart(command: list[str]) -> dict[str, float]:
    """Returns what `measure_memory` finds in a fresh process."""
    line = [sys.executable, "-m", "benchmarks.picture", *command, "--child"]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
    return {name: round(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


def make_drawing(mode: str, pixels: int, steps: int) -> ImageRequest:
    """Returns a square picture to draw, or one to edit of the same size."""
    given = (Image.new("RGB", (pixels, pixels), "orange"),) if mode == "edit" else ()
    return ImageRequest(PROMPT, pixels, pixels, steps, images=given)


def time_rows(arguments: argparse.Namespace) -> list[dict]:
    """Returns a row for each mode, size and contestant, with what our operations take at the machine's best."""
    device = torch.device(arguments.device)
    pipeline = Pipeline(arguments.model, dtype=resolve_dtype(arguments), device=device)
    contestants = make_contestants(arguments, pipeline)
    speed = limits.best_arithmetic(pipeline.dtype, device)
    rows = []
    for mode, pixels in itertools.product(arguments.modes, arguments.sizes):
        drawing = make_drawing(mode, pixels, arguments.steps)
        least = count_operations(pipeline, drawing) / speed
        for row in measure(contestants, drawing, arguments.repeats, device):
            rows.append({"mode": mode, "pixels": pixels, **row, "limit s": least})
    return rows


def memory_rows(arguments: argparse.Namespace) -> list[dict]:
    """Returns a row for each mode, size and contestant, each from a process of its own."""
    rows = []
    names = [name for name in arguments.only if name == "ours" or arguments.official]
    for mode, pixels, name in itertools.product(arguments.modes, arguments.sizes, names):
        command = [str(arguments.model), "--sizes", str(pixels), "--modes", mode, "--steps", str(arguments.steps)]
        command += ["--dtype", str(resolve_dtype(arguments))[6:], "--device", arguments.device, "--only", name]
        command += ["--official", str(arguments.official)] if name == "official" else []
        rows.append({"mode": mode, "pixels": pixels, "contestant": name, **measure_apart(command)})
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    add_device(parser)
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a checkpoint folder, for example of random_weights")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], metavar="PX", help="sides, in pixels")
    parser.add_argument("--modes", nargs="+", choices=("t2i", "edit"), default=["t2i", "edit"])
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=3, help="pictures that count")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="a checkout of OpenGVLab/InternVL-U")
    parser.add_argument("--memory", action="store_true", help="peak memory in place of times")
    parser.add_argument("--only", nargs="+", choices=("ours", "official"), default=["ours", "official"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        drawing = make_drawing(arguments.modes[0], arguments.sizes[0], arguments.steps)
        print(json.dumps(measure_memory(arguments, drawing)))
        return
    rows = memory_rows(arguments) if arguments.memory else time_rows(arguments)
    dtype = str(resolve_dtype(arguments))
    show(rows, arguments.json, dtype=dtype, device=arguments.device, steps=arguments.steps, model=arguments.model.name)


if __name__ == "__main__":
    main()
