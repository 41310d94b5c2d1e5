"""What the language model learns from: questions, thoughts and answers, packed so that a picture is read once.

A lesson is a shared beginning (system turn and pictures) and several endings, each a question with its answer. All
lie in one row; the attention mask keeps the endings from seeing each other, and each ending's positions go on from
the shared beginning, so that every ending is read exactly as if it stood alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from internvl_u import prompt
from internvl_u.images import vision_pixels
from internvl_u.prompt import TokenizedPrompt
from internvl_u.tokenizer import IM_END, Tokenizer, TokenRange

from . import edits, questions, riddles, words, world
from .world import Scene

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOTHING = -1
ENDINGS = 9


@dataclass(frozen=True)
class Ending:
    """What follows a shared beginning: the rest of the prompt, the ids to be written, and what kind of task it is."""

    rest: tuple[int, ...]
    target: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Lesson:
    """A shared beginning with its scenes' pictures, and its endings."""

    shared: tuple[int, ...]
    places: tuple[TokenRange, ...]
    scenes: tuple[Scene, ...]
    endings: tuple[Ending, ...]


class Teacher:
    """Makes lessons from a seed."""

    def __init__(self, tokenizer: Tokenizer, grid: int):
        self.tokenizer, self.grid = tokenizer, grid

    def lesson(self, rng: random.Random) -> Lesson:
        """Returns a lesson of a random kind."""
        return rng.choices((self.look, self.compare, self.edit, self.think, self.know), (42, 32, 10, 12, 4))[0](rng)

    def look(self, rng: random.Random) -> Lesson:
        """Returns questions about one picture."""
        scene = world.any_scene(rng)
        asked = [(q.text, q.answer, q.kind) for q in questions.questions(rng, scene)[:ENDINGS]]
        return self._lesson(prompt.SYSTEM_ANSWER, (scene,), asked)

    def compare(self, rng: random.Random) -> Lesson:
        """Returns questions about two pictures."""
        one, other, found = questions.pair(rng)
        return self._lesson(prompt.SYSTEM_ANSWER, (one, other), [(q.text, q.answer, f"two: {q.kind}") for q in found])

    def edit(self, rng: random.Random) -> Lesson:
        """Returns thoughts before edits of one picture."""
        scene = world.any_scene(rng)
        said = [(edit.instruction, edits.thought(edit), "edit thought") for edit in edits.edits_of(rng, scene)[:3]]
        return self._lesson(prompt.SYSTEM_EDIT, (scene,), said)

    def think(self, rng: random.Random) -> Lesson:
        """Returns thoughts before drawing: of captions, and of riddles."""
        said = []
        for _ in range(2):
            scene = world.any_scene(rng)
            said.append((words.caption(rng, scene), words.plain_scene(scene).capitalize() + ".", "draw thought"))
            riddle = riddles.random_riddle(rng)
            said.append((riddle.text, riddle.thought, "riddle"))
        return self._lesson(prompt.SYSTEM_DRAW, (), said)

    def know(self, rng: random.Random) -> Lesson:
        """Returns questions without a picture."""
        found = [questions.knowledge(rng) for _ in range(ENDINGS)]
        return self._lesson(prompt.SYSTEM_ANSWER, (), [(q.text, q.answer, q.kind) for q in found])

    def _lesson(self, system: str, scenes: tuple[Scene, ...], said: Sequence[tuple[str, str, str]]) -> Lesson:
        opened = [self._opening(text, system, len(scenes)) for text, _, _ in said]
        first = opened[0]
        cut = first.images[-1].stop + 1 if scenes else first.user_start
        endings = tuple(
            Ending(one.ids[cut:], (*self.tokenizer.encode([target])[0], self.tokenizer.special[IM_END]), kind)
            for one, (_, target, kind) in zip(opened, said, strict=True)
        )
        return Lesson(first.ids[:cut], first.images, scenes, endings)

    def _opening(self, text: str, system: str, pictures: int) -> TokenizedPrompt:
        return prompt.generation_prompt(self.tokenizer, text, system=system, images=pictures, grid=self.grid)


@dataclass(frozen=True)
class Batch:
    """Lessons side by side: B rows of T tokens, N pictures, M tokens to be written."""

    ids: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, 1, T, T], True where a token may look
    pixels: torch.Tensor  # [N, 3, size, size]
    pictures: torch.Tensor  # [N, 2]: row, and the first of its tokens
    sources: torch.Tensor  # [M]: the flat positions that predict
    targets: torch.Tensor  # [M]
    owners: torch.Tensor  # [M]: the number of the ending that each belongs to
    weights: torch.Tensor  # [M]: what each counts
    kinds: tuple[str, ...]  # one an ending
    scenes: tuple[Scene, ...]  # one a picture

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its tensors on a device."""
        fields = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: value.to(device) for name, value in fields.items()})


def batch(lessons: Sequence[Lesson], size: int, rng: random.Random, longest: int = 288, clean: bool = False) -> Batch:
    """Returns lessons as one batch of rows of `longest` tokens; endings that do not fit any more are left out.

    With `clean` the pictures are exactly as they are seen when the model is used.
    """
    ids = torch.zeros(len(lessons), longest, dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, NOTHING)
    sources, targets, owners, weights, kinds, pictures, scenes = [], [], [], [], [], [], []
    for row, one in enumerate(lessons):
        at = len(one.shared)
        ids[row, :at] = torch.tensor(one.shared)
        positions[row, :at] = torch.arange(at)
        segments[row, :at] = 0
        pictures += [(row, place.start) for place in one.places]
        scenes += one.scenes
        for number, ending in enumerate(one.endings, 1):
            whole = (*ending.rest, *ending.target)
            if at + len(whole) > longest:
                break
            ids[row, at : at + len(whole)] = torch.tensor(whole)
            positions[row, at : at + len(whole)] = torch.arange(len(one.shared), len(one.shared) + len(whole))
            segments[row, at : at + len(whole)] = number
            start = row * longest + at + len(ending.rest) - 1
            sources += range(start, start + len(ending.target))
            targets += ending.target
            owners += [len(kinds)] * len(ending.target)
            # A short answer must not drown among long thoughts.
            weights += [max(len(ending.target), 1) ** -0.5] * len(ending.target)
            kinds.append(ending.kind)
            at += len(whole)
    images = [pixels_of(world.draw(scene), size, None if clean else rng) for scene in scenes]
    return Batch(
        ids,
        positions,
        _mask(segments),
        torch.cat(images) if images else torch.empty(0, 3, size, size),
        torch.tensor(pictures, dtype=torch.long).reshape(-1, 2),
        torch.tensor(sources),
        torch.tensor(targets),
        torch.tensor(owners),
        torch.tensor(weights),
        tuple(kinds),
        tuple(scenes),
    )


def _mask(segments: torch.Tensor) -> torch.Tensor:
    length = segments.shape[1]
    own, other = segments[:, :, None], segments[:, None, :]
    seen = ((other == 0) | (other == own)) & torch.ones(length, length, dtype=torch.bool).tril()
    seen &= other != NOTHING
    # A row of nothing but False has no softmax: what only fills up looks at itself.
    return (seen | torch.eye(length, dtype=torch.bool))[:, None]


def pixels_of(image: Image.Image, size: int, rng: random.Random | None) -> torch.Tensor:
    """Returns what the vision tower sees of a picture [1, 3, size, size], at times a little off in colour and noisy."""
    pixels = vision_pixels(image, size, *IMAGENET)
    if rng is not None and rng.random() < 0.5:
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        gain = 1 + 0.06 * torch.randn(1, 3, 1, 1, generator=generator)
        noise = torch.randn(pixels.shape, generator=generator) * rng.uniform(0, 0.12)
        pixels = pixels * gain + 0.05 * torch.randn(1, 3, 1, 1, generator=generator) + noise
    return pixels
