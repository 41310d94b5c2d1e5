"""Draws quality over counted work: the nano model's judged scenes with fewer steps, guidance intervals and step caches.

Each point is a way to draw, on the same scenes and seeds as all others, so that differences are paired. Work is the
operations of the released transformer at 512 px for the branch evaluations that were counted, as a share of 20 full
steps. The judge looks at pixels alone; PSNR and SSIM are against the pictures of 20 full steps. Results are kept in
--out after each point and task, and a second run goes on there.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image

from internvl_u import images as image_module
from internvl_u import sampling
from internvl_u.defaults import STEPS
from internvl_u.load import load_mmdit
from internvl_u.mmdit import MMDiT
from internvl_u.pipeline import ImageRequest, Pipeline
from internvl_u.rope import grid_of
from internvl_u.sampling import Denoiser, DrawingContexts
from internvl_u.speed import (
    EVERY_BRANCH,
    QUALITY,
    SPEEDS,
    TURBO,
    Branches,
    GuidanceIntervals,
    Interval,
    Speed,
)

from .curve_caches import CachedDrawer
from .curve_plot import plot
from .operations import count_branches
from .quality import ssim
from .report import make_parser, show

TASKS = ("one thing", "two things, related", "edit", "riddle, thinking")
PIXELS = 512
BATCH = 25
PLAIN, INTERVAL, PRESET, CACHE = "fewer steps", "guidance in the first half", "preset", "step cache"
FULL = f"{STEPS} steps"


class Point(NamedTuple):
    """A way to draw, and the curve that it belongs to; `cache` is a node of core and its threshold."""

    name: str
    curve: str
    speed: Speed
    cache: tuple[str, float] | None = None


class Scene(NamedTuple):
    """What is drawn for a case of a task, by its number, and what the transformer draws it from."""

    number: int
    request: ImageRequest
    contexts: DrawingContexts


def until(share: float, steps: int = STEPS) -> Speed:
    """Returns a way to draw with guidance up to a share of the schedule."""
    return Speed(steps, GuidanceIntervals(Interval(0.0, share), Interval(0.0, share)))


def points() -> list[Point]:
    """Returns all points; the first is what others are held to."""
    found = [Point(f"{steps} steps", PLAIN, Speed(steps)) for steps in (20, 15, 12, 10, 8, 6, 4)]
    found += [Point(f"{steps} steps, guided to 0.5", INTERVAL, until(0.5, steps)) for steps in (20, 12, 10, 8, 6, 4)]
    found += [Point(name, PRESET, speed) for name, speed in SPEEDS.items() if name not in (QUALITY, TURBO)]
    for threshold in (0.1, 0.2, 0.3):
        found += [
            Point(f"{name} {threshold}", CACHE, Speed(), (name, threshold)) for name in ("EasyCache", "LazyCache")
        ]
    return found


class BatchDenoiser(Denoiser):
    """The pipeline's denoiser for several scenes of one size at once; counts the branches that it evaluates."""

    def __init__(self, model: MMDiT, scenes: list[Scene], size: tuple[int, int], intervals: GuidanceIntervals):
        contexts = [scene.contexts for scene in scenes]
        super().__init__(model, contexts, size, scenes[0].request.guidance, torch.float32, intervals)
        self.counts = Counter()

    def velocities(self, latent: torch.Tensor, timestep: torch.Tensor, wanted: Branches = EVERY_BRANCH):
        """Returns the velocities [B, 16, h, w] of the branches; see `Denoiser.velocities`."""
        partial = len(self.groups) > 1 and wanted.partial
        evaluated = {"conditional": True, "partial": partial, "unconditional": wanted.unconditional}
        self.counts.update(name for name, counts in evaluated.items() if counts)
        return super().velocities(latent, timestep, wanted)


class Judge:
    """The calls of a Pipeline that a task makes: first noting what is asked, then handing over what was drawn."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline, self.request, self.thought = pipeline, None, ""
        self.drawn: Image.Image | None = None

    def think(self, request: ImageRequest) -> str:
        """Returns the thought, written once."""
        self.thought = self.thought or self.pipeline.think(request)
        return self.thought

    def draw(self, request: ImageRequest) -> Image.Image:
        """Notes what is to be drawn; returns what was drawn of it."""
        self.request = request
        return self.drawn or Image.new("RGB", self.pipeline.size(request))


class Bench:
    """The scenes of each task, encoded once, and the judge of them."""

    def __init__(self, first: int, count: int, comfyui: Path | None):
        from training.eval import score  # wants scipy

        self.score, self.numbers, self.comfyui = score, range(first, first + count), comfyui
        self.pipeline = Pipeline(score.MODEL)
        self.judges: dict[tuple[str, int], Judge] = {}
        self._scenes: dict[str, list[Scene]] = {}
        self._cached: CachedDrawer | None = None

    def scenes(self, task: str) -> list[Scene]:
        """Returns a task's scenes, encoded once."""
        if task not in self._scenes:
            self._scenes[task] = [self._scene(task, number) for number in self.numbers]
        return self._scenes[task]

    def _scene(self, task: str, number: int) -> Scene:
        self.judges[task, number] = judge = Judge(self.pipeline)
        self._case(task, number)
        assert judge.request is not None
        return Scene(number, judge.request, self.pipeline.encode_prompt(judge.request))

    def _case(self, task: str, number: int) -> bool:
        rng = random.Random(f"score {task.split(',')[0]} {number}")
        return self.score.TASKS[task][0](self.judges[task, number], rng).correct

    def right(self, task: str, pictures: list[Image.Image]) -> list[int]:
        """Returns 1 for each picture that is right, else 0."""
        for scene, picture in zip(self.scenes(task), pictures, strict=True):
            self.judges[task, scene.number].drawn = picture
        return [int(self._case(task, scene.number)) for scene in self.scenes(task)]

    @torch.inference_mode()
    def draw(self, task: str, point: Point) -> tuple[list[Image.Image], dict[str, float]]:
        """Returns the pictures of a task's scenes, and how often each branch was evaluated for one."""
        if point.cache is not None:
            return self._in_comfyui().draw([scene.request for scene in self.scenes(task)], *point.cache)
        pictures: dict[int, Image.Image] = {}
        counts: Counter[str] = Counter()
        for scenes in self._batches(task):
            width, height = self.pipeline.size(scenes[0].request)
            drawn = image_module.drawn_size(width, height)
            noise = torch.cat([image_module.noise(*drawn, scene.request.seed) for scene in scenes])
            denoise = BatchDenoiser(self._transformer, scenes, grid_of(noise), point.speed.intervals)
            latents = sampling.sample(denoise, noise, sampling.flow_sigmas(point.speed.steps))
            counts |= denoise.counts  # the same for each batch
            for scene, pixels in zip(scenes, self.pipeline.decode(latents)):
                pictures[scene.number] = image_module.resize(image_module.to_image(pixels), width, height)
        return [pictures[number] for number in self.numbers], dict(counts)

    def _batches(self, task: str) -> Iterator[list[Scene]]:
        groups: dict[Any, list[Scene]] = {}
        for scene in sorted(self.scenes(task), key=lambda scene: scene.contexts.conditional[0].shape[0]):
            seen = tuple(reference.shape for reference in scene.contexts.references)
            alike = (self.pipeline.size(scene.request), scene.request.guidance, seen)
            groups.setdefault(alike, []).append(scene)
        for scenes in groups.values():
            yield from (scenes[i : i + BATCH] for i in range(0, len(scenes), BATCH))

    @property
    def _transformer(self) -> MMDiT:
        return _transformer(self.pipeline.files.transformer)

    def _in_comfyui(self) -> CachedDrawer:
        if self.comfyui is None:
            raise ValueError("no --comfyui found, ComfyUI's folder expected for step caches")
        self._cached = self._cached or CachedDrawer(self.comfyui, self.score.MODEL)
        return self._cached


@cache
def _transformer(file: Path) -> MMDiT:
    return load_mmdit(file, dtype=torch.float32)


def measure(bench: Bench, chosen: list[Point], tasks: list[str], out: Path) -> list[dict[str, Any]]:
    """Returns a result for each point and task, taken from `out` where it is there, else measured and added to it."""
    results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    done = {(result["point"], result["task"]) for result in results}
    kept = out.with_suffix(".npz")
    references = dict(numpy.load(kept)) if kept.is_file() else {}
    for point in chosen:
        for task in tasks:
            if (point.name, task) in done:
                continue
            start = time.process_time()
            pictures, counts = bench.draw(task, point)
            if point.name == FULL:
                references |= {f"{task} {i}": numpy.asarray(picture) for i, picture in enumerate(pictures)}
                numpy.savez_compressed(kept, **references)
            against = [references[f"{task} {i}"] for i in range(len(pictures))]
            result = {"point": point.name, "curve": point.curve, "steps": point.speed.steps, "task": task}
            result |= {"first": bench.numbers.start, "right": bench.right(task, pictures), "evaluations": counts}
            result |= _likeness(pictures, against) | {"seconds": time.process_time() - start}
            results.append(result)
            out.write_text(json.dumps(results, indent=0) + "\n", encoding="utf-8")
            print(point.name, task, sum(result["right"]), counts, f"{result['seconds']:.0f} s", flush=True)
    return results


def _likeness(pictures: list[Image.Image], references: list[numpy.ndarray]) -> dict[str, float]:
    """Returns PSNR, in dB and of the mean error of all pictures, and the mean of SSIM."""
    pairs = [(_tensor(numpy.asarray(one)), _tensor(other)) for one, other in zip(pictures, references, strict=True)]
    error = sum((one - other).square().mean().item() for one, other in pairs) / len(pairs)
    return {"psnr": -10 * math.log10(max(error, 1e-10)), "ssim": sum(ssim(*pair) for pair in pairs) / len(pairs)}


def _tensor(pixels: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).movedim(-1, 0)[None].float() / 255


@cache
def _costs(task: str) -> dict[str, float]:
    return count_branches("edit" if task == "edit" else "t2i", PIXELS)


def work(result: dict[str, Any]) -> float:
    """Returns the operations of a result as a share of 20 full steps."""
    costs = _costs(result["task"])
    return sum(costs[name] * count for name, count in result["evaluations"].items()) / (STEPS * sum(costs.values()))


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each point: its work, each task's share of right pictures, and the mean against 20 steps.

    `+-` is the standard error of that difference, from the scenes that only one of the two has right.
    """
    tasks = list(dict.fromkeys(result["task"] for result in results))
    full = {result["task"]: result["right"] for result in results if result["point"] == FULL}
    rows = []
    for name in dict.fromkeys(result["point"] for result in results):
        own = {result["task"]: result for result in results if result["point"] == name}
        row: dict[str, Any] = {"point": name, "curve": next(iter(own.values()))["curve"]}
        row["work %"] = 100 * sum(map(work, own.values())) / len(own)
        row |= {task: 100 * sum(own[task]["right"]) / len(own[task]["right"]) for task in tasks if task in own}
        changes = [a - b for task in own for a, b in zip(own[task]["right"], full.get(task, ()))]
        row["right %"] = sum(row[task] for task in own) / len(own)
        if changes:
            row["against full"] = 100 * sum(changes) / len(changes)
            row["+-"] = 100 * math.sqrt(sum(change**2 for change in changes)) / len(changes)
        row |= {key: sum(one[key] for one in own.values()) / len(own) for key in ("psnr", "ssim")}
        rows.append(row)
    return rows


def main() -> None:
    names = [point.name for point in points()]
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results; pictures go beside it")
    parser.add_argument(
        "--points", nargs="*", choices=names, metavar="POINT", default=names, help="which; none: only show and draw"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which")
    parser.add_argument("--count", type=int, default=200, help="scenes of each task")
    parser.add_argument("--first", type=int, default=200, help="number of the first scene; the score's begin at 0")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder, for step caches")
    parser.add_argument("--plot", type=Path, help="SVG file to draw")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {point.name: point for point in points()}
    chosen = [known[name] for name in arguments.points]
    if arguments.comfyui is None:
        chosen = [point for point in chosen if point.cache is None]
    bench = Bench(arguments.first, arguments.count, arguments.comfyui)
    rows = summarise(measure(bench, chosen, arguments.tasks, arguments.out))
    show(rows, arguments.json, count=arguments.count, first=arguments.first, pixels=PIXELS)
    if arguments.plot is not None:
        arguments.plot.write_text(plot(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
