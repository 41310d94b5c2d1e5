"""Scores the nano model on scenes that training never saw, through the shipped inference at its defaults.

    python -m training.eval.score [--model FOLDER] [--count 200] [--only TASK]... [--workers N] [--out FILE.csv]
        [--lora FILE] [--speed PRESET] [--steps N] [--unguided]

Images are judged by `detector` from their pixels alone, answers must be exact. Each task has seeds of its own, so
that a score is the same however many workers there are.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from internvl_u.defaults import STEPS
from internvl_u.pipeline import ImageRequest, Pipeline
from internvl_u.speed import QUALITY, SPEEDS

from ..data import captions, edits, questions, riddles, scenes
from ..data.scenes import Scene
from . import detector

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo" / "internvl-u-nano"


@dataclass(frozen=True)
class Outcome:
    """One case: whether it was right, and what was asked, wanted and found."""

    correct: bool
    asked: str
    wanted: str
    found: str


Task = Callable[[Pipeline, random.Random], Outcome]


def draw_one(pipeline: Pipeline, rng: random.Random) -> Outcome:
    """An image of one thing: shape, colour and background must be right."""
    scene = scenes.random_scene(rng, 1)
    return _drawn(pipeline, rng, scene, captions.caption(rng, scene))


def draw_two(pipeline: Pipeline, rng: random.Random) -> Outcome:
    """An image of two things: both, their relation and the background must be right."""
    scene = scenes.related_scene(rng)
    return _drawn(pipeline, rng, scene, captions.caption(rng, scene, with_relation=True))


def draw_three(pipeline: Pipeline, rng: random.Random) -> Outcome:
    """An image of three different things: all and the background must be right."""
    scene = scenes.random_scene(rng, 3)
    return _drawn(pipeline, rng, scene, captions.caption(rng, scene), related=False)


def draw_count(pipeline: Pipeline, rng: random.Random) -> Outcome:
    """An image of two or three equal things: their number, what they are and the background must be right."""
    scene = scenes.counted_scene(rng)
    return _drawn(pipeline, rng, scene, captions.caption(rng, scene), related=False)


def edit(pipeline: Pipeline, rng: random.Random) -> Outcome:
    """An edit: what was asked must have happened, and all the rest must still be as it was."""
    wanted = edits.random_edit(rng)
    before = scenes.render(wanted.before)
    image = pipeline.draw(ImageRequest(wanted.instruction, images=(before,), seed=rng.randrange(1 << 30)))
    found = detector.detect(image)
    return Outcome(_edited(found, wanted), wanted.instruction, _describe_wanted(wanted.after), _describe_found(found))


def ask_one(pipeline: Pipeline, rng: random.Random) -> Outcome:
    """A question about one image; the answer must be exact. Descriptions are no short answers and do not count."""
    scene = rng.choice((scenes.random_scene, scenes.related_scene, scenes.counted_scene))(rng)
    question = next(q for q in questions.questions(rng, scene) if q.kind != "describe")
    return _answered(pipeline, question, [scenes.render(scene)])


def ask_two(pipeline: Pipeline, rng: random.Random) -> Outcome:
    """A question about two images; the answer must be exact."""
    one, other, found = questions.image_pair(rng)
    return _answered(pipeline, rng.choice(found), [scenes.render(one), scenes.render(other)])


def riddle(pipeline: Pipeline, rng: random.Random, think: bool = True) -> Outcome:
    """A riddle, thought over first: the image must show what was meant."""
    asked = riddles.random_riddle(rng)
    request = ImageRequest(asked.text, seed=rng.randrange(1 << 30))
    thought = pipeline.think(request) if think else ""
    image = pipeline.draw(ImageRequest(asked.text, seed=request.seed, thought=thought))
    found = detector.detect(image)
    return Outcome(
        _shown(found, asked.scene), asked.text, _describe_wanted(asked.scene), f"{_describe_found(found)} <- {thought}"
    )


def riddle_alone(pipeline: Pipeline, rng: random.Random) -> Outcome:
    """The same riddle, drawn without a thought."""
    return riddle(pipeline, rng, think=False)


TASKS: dict[str, tuple[Task, float | None]] = {
    "one thing": (draw_one, 0.95),
    "two things, related": (draw_two, 0.85),
    "three things": (draw_three, None),
    "equal things, counted": (draw_count, None),
    "edit": (edit, 0.90),
    "question, one picture": (ask_one, 0.97),
    "question, two pictures": (ask_two, 0.90),
    "riddle, thinking": (riddle, 0.85),
    "riddle, not thinking": (riddle_alone, None),
}
"""What is scored, and the share that is the goal."""


def _drawn(pipeline: Pipeline, rng: random.Random, scene: Scene, caption: str, related: bool = True) -> Outcome:
    found = detector.detect(pipeline.draw(ImageRequest(caption, seed=rng.randrange(1 << 30))))
    return Outcome(_shown(found, scene, related), caption, _describe_wanted(scene), _describe_found(found))


def _shown(found: detector.DetectedScene, scene: Scene, related: bool = True) -> bool:
    """Returns whether an image shows the scene: background, things, and how two different things lie."""
    if not detector.matches_scene(found, scene):
        return False
    if not related or len(scene.things) != 2 or scene.things[0].name == scene.things[1].name:
        return True
    wanted = scenes.relation(scene, *scene.things) or scenes.relation(scene, *scene.things[::-1])
    if wanted is None:
        return True
    seen = {thing.name: thing for thing in found.things}
    one, other = (seen[thing.name] for thing in scene.things)
    if scenes.relation(scene, *scene.things) is None:
        one, other = other, one
    return detector.relation(one, other) == wanted


def _edited(found: detector.DetectedScene, wanted: edits.Edit) -> bool:
    """Returns whether an image is the edit's outcome, every thing where and as large as it should be."""
    if not detector.matches_scene(found, wanted.after):
        return False
    left = list(found.things)
    for thing in wanted.after.things:
        at = [seen for seen in left if seen.name == thing.name and _near(seen, thing, wanted)]
        if not at:
            return False
        left.remove(at[0])
    return True


def _near(seen: detector.Detection, thing: scenes.Thing, wanted: edits.Edit) -> bool:
    """Returns whether a thing is where it should be; one that was added or moved may lie freely on an open axis."""
    old = thing in wanted.before.things
    if wanted.kind == "add" and not old:
        return True
    slack = 0.08 if old or wanted.kind != "move" else 0.15
    return math.dist((seen.x, seen.y), (thing.x, thing.y)) < slack


def _answered(pipeline: Pipeline, question: captions.Question, images: list[Image.Image]) -> Outcome:
    answer = pipeline.answer(question.text, images)
    return Outcome(answer == question.answer, f"{question.kind}: {question.text}", question.answer, answer)


def _describe_wanted(scene: Scene) -> str:
    return captions.describe(scene)


def _describe_found(found: detector.DetectedScene) -> str:
    return f"{', '.join(thing.name for thing in found.things) or 'nothing'} on {found.background}"


# Running


class Changes(NamedTuple):
    """What is not at its default: a LoRA, the preset, steps, and whether the conditional branch is drawn alone."""

    lora: Path | None = None
    speed: str = QUALITY
    steps: int = STEPS
    unguided: bool = False


DEFAULT = Changes()


class Judged(Pipeline):
    """A model that draws with changes."""

    def __init__(self, model: Path, changes: Changes = DEFAULT):
        super().__init__(model, loras=[] if changes.lora is None else [(changes.lora, 1.0)])
        self.changes = changes

    def draw(self, request: ImageRequest, on_step: Callable[[int], object] | None = None) -> Image.Image:
        """Returns the image of a request with the changes; see `Pipeline.draw`."""
        ends = {"all_cfg_end": 0.0, "part_cfg_end": 0.0} if self.changes.unguided else {}
        return super().draw(replace(request, speed=self.changes.speed, steps=self.changes.steps, **ends), on_step)


@functools.lru_cache(maxsize=1)
def load_pipeline(model: Path, changes: Changes = DEFAULT) -> Judged:
    """Returns the model, once per process."""
    torch.set_num_threads(1)
    return Judged(model, changes)


def case(model: Path, task: str, number: int, changes: Changes = DEFAULT) -> Outcome:
    """Returns the outcome of one case of a task."""
    return TASKS[task][0](load_pipeline(model, changes), seeded(task, number))


def seeded(task: str, number: int) -> random.Random:
    """Returns the random numbers of a case. With and without thinking the riddles are the same."""
    return random.Random(f"score {task.split(',')[0]} {number}")


def score(
    model: Path, tasks: list[str], count: int, workers: int, changes: Changes = DEFAULT
) -> dict[str, list[Outcome]]:
    """Returns `count` outcomes of each task."""
    cases = [(task, number) for task in tasks for number in range(count)]
    if workers == 1:
        outcomes = [case(model, *one, changes) for one in cases]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            outcomes = list(pool.map(functools.partial(_case, model, changes), cases, chunksize=4))
    return {task: outcomes[i * count : (i + 1) * count] for i, task in enumerate(tasks)}


def _case(model: Path, changes: Changes, one: tuple[str, int]) -> Outcome:
    return case(model, *one, changes)


def accuracy(outcomes: list[Outcome]) -> float:
    """Returns the share that was right."""
    return sum(outcome.correct for outcome in outcomes) / len(outcomes)


def table(scores: dict[str, list[Outcome]]) -> str:
    """Returns the scores as a Markdown table."""
    lines = ["| task | right | of | goal |", "|---|---|---|---|"]
    for task, outcomes in scores.items():
        goal = TASKS[task][1]
        lines.append(f"| {task} | {accuracy(outcomes):.1%} | {len(outcomes)} | {f'{goal:.0%}' if goal else ''} |")
    return "\n".join(lines)


def main() -> int:
    """Prints the table; returns 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    parser.add_argument("--count", type=int, default=200, help="cases of each task (default %(default)s)")
    parser.add_argument("--only", action="append", choices=TASKS, help="this task alone; may be given several times")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default %(default)s)")
    parser.add_argument("--out", type=Path, help="CSV file of every case")
    parser.add_argument("--lora", type=Path, help="LoRA to draw with")
    parser.add_argument("--speed", choices=SPEEDS, default=QUALITY, help="preset (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps (default %(default)s)")
    parser.add_argument("--unguided", action="store_true", help="the conditional branch alone")
    options = parser.parse_args()
    started = time.monotonic()
    changes = Changes(options.lora, options.speed, options.steps, options.unguided)
    scores = score(options.model, options.only or list(TASKS), options.count, options.workers, changes)
    print(table(scores))
    print(f"{time.monotonic() - started:.0f} s")
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("task", "right", "asked", "wanted", "found"))
            for task, outcomes in scores.items():
                writer.writerows((task, int(o.correct), o.asked, o.wanted, o.found) for o in outcomes)
    missed = [task for task, outcomes in scores.items() if TASKS[task][1] and accuracy(outcomes) < TASKS[task][1]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
