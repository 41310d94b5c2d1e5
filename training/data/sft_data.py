"""Data for supervised fine-tuning: questions, thoughts and answers, packed so that an image is read once.

A packed example is a shared prefix (system turn and images) and several turns, each a question with its answer. All
lie in one row; the attention mask keeps the turns from seeing each other, and each turn's positions go on from the
prefix, so that every turn is read exactly as if it stood alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from internvl_u import prompt
from internvl_u.images import vision_pixels
from internvl_u.prompt import TokenizedPrompt
from internvl_u.tokenizer import IM_END, Tokenizer, TokenRange

from . import captions, edits, questions, riddles
from .scenes import Scene, any_scene, render

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING = -1
"""Segment of the positions of a row that hold nothing."""
MAX_TURNS = 9
ROW_LENGTH = 288
KIND_WEIGHTS = (42, 32, 10, 12, 4)
"""How often each kind of example comes, in the order of `ExampleBuilder.example`."""


@dataclass(frozen=True)
class Turn:
    """What follows a prefix: the rest of the prompt, the ids to be written, and what kind of task it is."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class PackedExample:
    """A shared prefix with its scenes' images, and the turns that follow it."""

    prefix: tuple[int, ...]
    image_ranges: tuple[TokenRange, ...]
    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]


class ExampleBuilder:
    """Builds packed examples from a seed."""

    def __init__(self, tokenizer: Tokenizer, grid: int):
        self.tokenizer, self.grid = tokenizer, grid

    def example(self, rng: random.Random) -> PackedExample:
        """Returns an example of a random kind."""
        kinds = (self.visual_questions, self.comparisons, self.edit_thoughts, self.drawing_thoughts, self.knowledge)
        return rng.choices(kinds, KIND_WEIGHTS)[0](rng)

    def visual_questions(self, rng: random.Random) -> PackedExample:
        """Returns questions about one image."""
        scene = any_scene(rng)
        asked = [(q.text, q.answer, q.kind) for q in questions.questions(rng, scene)[:MAX_TURNS]]
        return self._pack(prompt.SYSTEM_ANSWER, (scene,), asked)

    def comparisons(self, rng: random.Random) -> PackedExample:
        """Returns questions about two images."""
        one, other, found = questions.image_pair(rng)
        return self._pack(prompt.SYSTEM_ANSWER, (one, other), [(q.text, q.answer, f"two: {q.kind}") for q in found])

    def edit_thoughts(self, rng: random.Random) -> PackedExample:
        """Returns thoughts before edits of one image."""
        scene = any_scene(rng)
        pairs = [(edit.instruction, edits.thought(edit), "edit thought") for edit in edits.edits_of(rng, scene)[:3]]
        return self._pack(prompt.SYSTEM_EDIT, (scene,), pairs)

    def drawing_thoughts(self, rng: random.Random) -> PackedExample:
        """Returns thoughts before drawing: of captions, and of riddles."""
        pairs = []
        for _ in range(2):
            scene = any_scene(rng)
            pairs.append((captions.caption(rng, scene), captions.describe(scene).capitalize() + ".", "draw thought"))
            riddle = riddles.random_riddle(rng)
            pairs.append((riddle.text, riddle.thought, "riddle"))
        return self._pack(prompt.SYSTEM_DRAW, (), pairs)

    def knowledge(self, rng: random.Random) -> PackedExample:
        """Returns questions without a image."""
        found = [questions.knowledge(rng) for _ in range(MAX_TURNS)]
        return self._pack(prompt.SYSTEM_ANSWER, (), [(q.text, q.answer, q.kind) for q in found])

    def _pack(self, system: str, scenes: tuple[Scene, ...], pairs: Sequence[tuple[str, str, str]]) -> PackedExample:
        prompts = [self._prompt(text, system, len(scenes)) for text, _, _ in pairs]
        first = prompts[0]
        cut = first.images[-1].stop + 1 if scenes else first.user_start
        turns = tuple(
            Turn(one.ids[cut:], (*self.tokenizer.encode([target])[0], self.tokenizer.special[IM_END]), kind)
            for one, (_, target, kind) in zip(prompts, pairs, strict=True)
        )
        return PackedExample(first.ids[:cut], first.images, scenes, turns)

    def _prompt(self, text: str, system: str, images: int) -> TokenizedPrompt:
        return prompt.generation_prompt(self.tokenizer, text, system=system, images=images, grid=self.grid)


@dataclass(frozen=True)
class Batch:
    """Packed examples side by side: B rows of T tokens, N images, M target tokens."""

    ids: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, 1, T, T], True where a token may look
    pixels: torch.Tensor  # [N, 3, size, size]
    image_slots: torch.Tensor  # [N, 2]: row, and the first of its tokens
    sources: torch.Tensor  # [M]: the flat positions that predict
    targets: torch.Tensor  # [M]
    turns: torch.Tensor  # [M]: the index of the turn that each belongs to
    weights: torch.Tensor  # [M]: what each counts
    kinds: tuple[str, ...]  # one per turn
    scenes: tuple[Scene, ...]  # one per image

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its tensors on a device."""
        fields = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: value.to(device) for name, value in fields.items()})


@dataclass
class _Targets:
    """What a batch is to predict, turn after turn."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, turn: Turn, start: int) -> None:
        """Adds a turn whose target is predicted from the flat position `start` on."""
        length = len(turn.target)
        self.sources += range(start, start + length)
        self.targets += turn.target
        self.turns += [len(self.kinds)] * length
        # A short answer must not drown among long thoughts.
        self.weights += [max(length, 1) ** -0.5] * length
        self.kinds.append(turn.kind)


def collate(
    examples: Sequence[PackedExample],
    image_size: int,
    rng: random.Random,
    row_length: int = ROW_LENGTH,
    augment: bool = True,
) -> Batch:
    """Returns packed examples as one batch of rows of `row_length` tokens; turns that do not fit any more are left out.

    Without `augment` the images are exactly as they are seen when the model is used.
    """
    ids = torch.zeros(len(examples), row_length, dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, PADDING)
    found = _Targets()
    for row, example in enumerate(examples):
        _fill_row(example, row * row_length, ids[row], positions[row], segments[row], found)
    scenes = tuple(scene for example in examples for scene in example.scenes)
    slots = [(row, span.start) for row, example in enumerate(examples) for span in example.image_ranges]
    images = [vision_input(render(scene), image_size, rng if augment else None) for scene in scenes]
    return Batch(
        ids,
        positions,
        _mask(segments),
        torch.cat(images) if images else torch.empty(0, 3, image_size, image_size),
        torch.tensor(slots, dtype=torch.long).reshape(-1, 2),
        torch.tensor(found.sources),
        torch.tensor(found.targets),
        torch.tensor(found.turns),
        torch.tensor(found.weights),
        tuple(found.kinds),
        scenes,
    )


def _fill_row(
    example: PackedExample,
    offset: int,
    ids: torch.Tensor,
    positions: torch.Tensor,
    segments: torch.Tensor,
    found: _Targets,
) -> None:
    """Writes an example into a row, which begins at the flat position `offset`; segment 0 is the prefix."""
    begin = at = len(example.prefix)
    ids[:at] = torch.tensor(example.prefix)
    positions[:at] = torch.arange(at)
    segments[:at] = 0
    for number, turn in enumerate(example.turns, 1):
        whole = (*turn.prompt, *turn.target)
        end = at + len(whole)
        if end > len(ids):
            break
        ids[at:end] = torch.tensor(whole)
        positions[at:end] = torch.arange(begin, begin + len(whole))
        segments[at:end] = number
        found.add(turn, offset + at + len(turn.prompt) - 1)
        at = end


def _mask(segments: torch.Tensor) -> torch.Tensor:
    length = segments.shape[1]
    own, other = segments[:, :, None], segments[:, None, :]
    seen = ((other == 0) | (other == own)) & torch.ones(length, length, dtype=torch.bool).tril()
    seen &= other != PADDING
    # A row of nothing but False has no softmax: what only fills up looks at itself.
    return (seen | torch.eye(length, dtype=torch.bool))[:, None]


def vision_input(image: Image.Image, image_size: int, rng: random.Random | None) -> torch.Tensor:
    """Returns what the vision tower sees of an image [1, 3, size, size], at times a little off in colour and noisy."""
    pixels = vision_pixels(image, image_size, IMAGENET_MEAN, IMAGENET_STD)
    if rng is not None and rng.random() < 0.5:
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        gain = 1 + 0.06 * torch.randn(1, 3, 1, 1, generator=generator)
        noise = torch.randn(pixels.shape, generator=generator) * rng.uniform(0, 0.12)
        pixels = pixels * gain + 0.05 * torch.randn(1, 3, 1, 1, generator=generator) + noise
    return pixels
