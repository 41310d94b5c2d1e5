"""What is distilled on: prompts without pictures of what they show, and the contexts that are drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..images import drawn_size, latent_size
from ..pipeline import ImageRequest, Pipeline
from ..rope import Grid
from ..sampling import DrawingContexts
from .examples import checked_text, collect, not_utf8, read_examples
from .kept import Kept
from .pictures import Picture
from .sheet import SAMPLES
from .tables import IMAGE, REFERENCES, TEXT, THOUGHT, FileOpener, Row, cell, json_lines, pictures_of
from .trajectory import Prompt

KEPT_BYTES = 2 << 30
"""Contexts that are kept; those beyond are made again when they are asked for."""


@dataclass(frozen=True)
class Wish:
    """A prompt with the pictures that it edits and a thought, if there are any; `name` says where it came from."""

    name: str
    text: str
    references: tuple[Picture, ...] = ()
    thought: str = ""


def read_prompts(source: Path) -> list[Wish]:
    """Returns the prompts of a .txt file, one a line; of a .jsonl file; or of what `train` learns from, less answers.

    A row of the .jsonl file has a text and, of an edit, the names of its pictures; see `tables`.

    Raises:
        FileNotFoundError: there is no such file or folder, or no prompt in it.
        ValueError: a line or a row is not as it should be.
    """
    if source.is_file() and source.suffix.lower() == ".txt":
        lines = [checked_text(line, str(source), "a line") for line in _text(source).splitlines()]
        found = [Wish(f"line {number} of {source}", line) for number, line in enumerate(lines, 1) if line]
    elif source.is_file() and source.suffix.lower() == ".jsonl" and not _shows_pictures(source):
        opener = FileOpener(source.parent)
        rows = json_lines(source)
        found = collect((place, lambda place=place, row=row: _wish(place, row(), opener)) for place, row in rows)
    else:
        drawn = [example for example in read_examples(source) if example.image is not None]
        found = [Wish(example.name, example.text, example.references, example.thought) for example in drawn]
    if not found:
        raise FileNotFoundError(f"{source} has no prompts to draw from, one a line or a row expected")
    return found


def _text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(str(source), error) from error


def _shows_pictures(source: Path) -> bool:
    """Returns whether the first row names a picture to draw."""
    return any(set(IMAGE) & set(row()) for _, row in list(json_lines(source))[:1])


def _wish(place: str, cells: Mapping[str, Any], opener: FileOpener) -> Wish:
    row = Row(place, cells, opener)
    text, references, thought = (cell(row, names) for names in (TEXT, REFERENCES, THOUGHT))
    words = "" if text is None else checked_text(text, place, "the text")
    if not words:
        raise ValueError(f"{place}: no text found, one of {', '.join(TEXT)} expected: write what is to be drawn")
    thought = "" if thought is None else checked_text(thought, place, "the thought")
    return Wish(place, words, pictures_of(row, references), thought)


class PromptSource:
    """The contexts of wishes, made when they are first asked for, and kept while there is room."""

    def __init__(self, pipeline: Pipeline, wishes: Sequence[Wish], side: int | None = None):
        """Takes wishes to draw from. `side` is that of a square, in pixels, of the area drawn; None: the model's."""
        self.pipeline, self.wishes, self.side = pipeline, wishes, side
        self.sizes = pipeline.encoder.sizes.limited(side)
        self.buckets: dict[tuple[Grid, ...], list[int]] = {}
        """Numbers of the wishes by the sizes of their latents: of what is drawn, and of the references."""
        for number, wish in enumerate(wishes):
            references = [self.sizes.fit(*picture.size) for picture in wish.references]
            self.buckets.setdefault(tuple(map(_grid, [self._drawn(wish), *references])), []).append(number)
        self._prompts = Kept(lambda number: self._made(wishes[number]), _tensors, KEPT_BYTES)

    @property
    def fingerprint(self) -> str:
        """What tells one set of wishes from another: a SHA-256 as hex digits."""
        digest = hashlib.sha256(str(self.side).encode())
        for wish in self.wishes:
            told = (wish.text, wish.thought, *(picture.digest for picture in wish.references))
            digest.update("\0".join(told).encode() + b"\0\0")
        return digest.hexdigest()

    def __getitem__(self, number: int) -> Prompt:
        """Returns the contexts of a wish."""
        return self._prompts[number]

    def request(self, wish: Wish, seed: int = 0) -> ImageRequest:
        """Returns a wish as the pipeline is asked for it.

        Raises:
            ValueError: a picture is unreadable.
        """
        width, height = self._drawn(wish)
        images = tuple(picture.open() for picture in wish.references)
        given: dict[str, Any] = {"images": images, "thought": wish.thought, "reference_size": self.side}
        return ImageRequest(wish.text, width, height, seed=seed, **given)

    def samples(self, texts: Sequence[str] = ()) -> list[ImageRequest]:
        """Returns what contact sheets show: these texts, else the first prompts; each has a seed of its own."""
        given = [Wish(text, text) for text in texts]
        chosen = given or list({wish.text: wish for wish in reversed(self.wishes)}.values())[::-1][:SAMPLES]
        return [self.request(wish, seed) for seed, wish in enumerate(chosen)]

    def _made(self, wish: Wish) -> Prompt:
        request = self.request(wish)
        return Prompt(_on_cpu(self.pipeline.encode_prompt(request)), _grid(self._drawn(wish)), request.guidance)

    def _drawn(self, wish: Wish) -> tuple[int, int]:
        """Returns the (width, height) in pixels of what is drawn."""
        if wish.references:
            return self.sizes.fit(*wish.references[0].size)
        return drawn_size(*(self.pipeline.encoder.default_size if self.side is None else (self.side, self.side)))


def _grid(size: tuple[int, int]) -> Grid:
    return latent_size(*size)


def _on_cpu(contexts: DrawingContexts) -> DrawingContexts:
    """Returns contexts on the CPU that autograd may keep: those made in inference mode it may not."""
    branches = [None if one is None else (one[0].cpu().clone(), one[1]) for one in contexts[:3]]
    conditional, partial, unconditional = branches
    assert conditional is not None and unconditional is not None
    return DrawingContexts(
        conditional, partial, unconditional, tuple(reference.cpu().clone() for reference in contexts.references)
    )


def _tensors(prompt: Prompt) -> list[torch.Tensor]:
    branches = [branch[0] for branch in prompt.contexts[:3] if branch is not None]
    return [*branches, *prompt.contexts.references]
