"""Scores the nano model with LoRAs: what they taught, and whether it still knows what it knew.

    python -m training.eval.lora [--model FOLDER] [--lora FILE[:STRENGTH]]... --task heart|old|related|edit|control|...

Drawn through the shipped inference at its defaults, from seeds that no training set uses, and read by `detector`.

- heart: one heart, in its colour, and nothing else. heart anywhere: the same in sizes and at places that it was not
  taught in.
- old, related, edit: `score`'s tasks on what the nano model was trained on, the very same cases.
- control: of an edge map and a caption that does not say where, the thing in its colour, its centre within half a step
  of the grid of where the edges are. `shown` is the share that have the thing anywhere.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from internvl_u.arguments import lora_argument
from internvl_u.finetune.maps import make_map, map_instruction
from internvl_u.pipeline import ImageRequest, Pipeline

from ..data import scenes
from ..data.captioned import without_a_place
from ..data.controls import THRESHOLDS, control_scene
from ..data.hearts import heart_caption, heart_scenes
from . import detector, score

NEAR = scenes.GRID_STEP / 2
"""How far the centre may be off, in the image's width and height."""


@dataclass(frozen=True)
class Outcome:
    """One case: whether it was right, whether the thing was shown at all, and what was asked and found."""

    correct: bool
    shown: bool
    asked: str
    found: str


Task = Callable[[Pipeline, random.Random], Outcome]
Loras = tuple[tuple[Path, float], ...]


def heart(pipeline: Pipeline, rng: random.Random, anywhere: bool = False) -> Outcome:
    """A heart: it must be the only thing, in its colour; `shown` also asks for the background."""
    (scene,) = heart_scenes(rng, 1, anywhere)
    text = heart_caption(rng, scene, anywhere)
    found = detector.detect(pipeline.draw(ImageRequest(text, seed=rng.randrange(1 << 30))))
    correct = [thing.name for thing in found.things] == [scene.things[0].name]
    return Outcome(correct, detector.matches_scene(found, scene), text, _describe(found))


def control(pipeline: Pipeline, rng: random.Random, kind: str = "canny") -> Outcome:
    """A thing where its edge map says; `shown` asks for the thing alone."""
    scene = control_scene(rng)
    text = without_a_place(rng, scene)
    control_map = make_map(scenes.render(scene), kind, THRESHOLDS)
    request = ImageRequest(map_instruction(kind, text), images=(control_map,), seed=rng.randrange(1 << 30))
    found = detector.detect(pipeline.draw(request))
    (thing,) = scene.things
    shown = [seen.name for seen in found.things] == [thing.name]
    return Outcome(shown and detector.is_thing(found.things[0], thing, NEAR), shown, request.prompt, _describe(found))


TAUGHT: dict[str, Task] = {
    "heart": heart,
    "heart anywhere": functools.partial(heart, anywhere=True),
    "control": control,
}
KNOWN = {"old": "one thing", "related": "two things, related", "edit": "edit"}
"""Tasks that are those of `score`, with the same cases."""
COUNTS = {"heart": 100, "heart anywhere": 100}
"""How many cases there are by default, where not 200."""


def _describe(found: detector.DetectedScene) -> str:
    things = ", ".join(f"{thing.name} at {thing.x:.2f} {thing.y:.2f}" for thing in found.things)
    return f"{things or 'nothing'} on {found.background}"


def case(model: Path, loras: Loras, task: str, number: int) -> Outcome:
    """Returns the outcome of one case of a task."""
    if task in KNOWN:
        outcome = score.TASKS[KNOWN[task]][0](load_pipeline(model, loras), score.seeded(KNOWN[task], number))
        return Outcome(outcome.correct, outcome.correct, outcome.asked, outcome.found)
    return TAUGHT[task](load_pipeline(model, loras), random.Random(f"lora {task} {number}"))


@functools.lru_cache(maxsize=1)
def load_pipeline(model: Path, loras: Loras) -> Pipeline:
    """Returns the model with its LoRAs, once per process."""
    torch.set_num_threads(1)
    return Pipeline(model, loras=loras)


def judge(model: Path, loras: Loras, task: str, count: int, workers: int) -> list[Outcome]:
    """Returns `count` outcomes of a task."""
    run = functools.partial(case, model, loras, task)
    if workers == 1:
        return [run(number) for number in range(count)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(run, range(count), chunksize=4))


def main() -> None:
    """Prints a line for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=score.MODEL, help="checkpoint folder")
    parser.add_argument("--lora", type=lora_argument, action="append", default=[], metavar="FILE[:STRENGTH]")
    parser.add_argument(
        "--task", action="append", choices=(*TAUGHT, *KNOWN), required=True, help="may be given several times"
    )
    parser.add_argument("--count", type=int, help="cases of each task (default: 100 hearts, 200 of the others)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print what was wrong")
    options = parser.parse_args()
    print("| task | right | shown | of | seconds |\n|---|---|---|---|---|")
    for task in options.task:
        started = time.monotonic()
        found = judge(options.model, tuple(options.lora), task, options.count or COUNTS.get(task, 200), options.workers)
        right, shown = (sum(values) / len(found) for values in zip(*((one.correct, one.shown) for one in found)))
        print(f"| {task} | {right:.1%} | {shown:.1%} | {len(found)} | {time.monotonic() - started:.0f} |", flush=True)
        for one in found if options.verbose else ():
            if not one.correct:
                print(f"  {one.asked} -> {one.found}")


if __name__ == "__main__":
    main()
