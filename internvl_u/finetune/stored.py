"""Samples in files: what is learned from, read when it is needed."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from ..prompt import TokenizedPrompt
from ..results import replacing
from ..rope import Grid, Layout, Span
from ..weights import save_weights
from .examples import Example

Branch = tuple[torch.Tensor, Layout]
"""A context [tokens, width] and its layout."""
CONDITIONAL, PARTIAL, UNCONDITIONAL = "conditional", "partial", "unconditional"
_LAYOUTS = "layouts"
Value = TypeVar("Value")
_logger = logging.getLogger("internvl_u")


@dataclass(frozen=True)
class Sample:
    """What the transformer learns from, on the CPU: latents fp32, contexts as they were computed."""

    latent: torch.Tensor  # [16, h, w]
    references: tuple[torch.Tensor, ...]
    conditional: Branch
    partial: Branch | None
    unconditional: Branch


@dataclass(frozen=True)
class TextSample:
    """What the language model learns from: it writes `prompt.ids[target_start:]`, the last of which ends it.

    `features` [1, tokens, width] are what it sees in each of the prompt's images.
    """

    prompt: TokenizedPrompt
    target_start: int
    features: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class SampleFiles:
    """Where what belongs to a sample lies, and the (rows, columns) of its latent and of its references' latents."""

    latent: Path
    references: tuple[Path, ...]
    contexts: Path
    unconditional: Path
    shape: tuple[Grid, ...]


class Stored(Sequence[Value]):
    """What is read from disk when it is needed, one by one or a slice of it."""

    def __init__(self, examples: Sequence[Example], files: Sequence[Any]):
        self.examples, self.files = list(examples), list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        """Returns a sample, or of a slice a list.

        Raises:
            RuntimeError: a file of the cache was damaged or taken away.
        """
        return [self.read(i) for i in range(len(self))[index]] if isinstance(index, slice) else self.read(index)

    @abstractmethod
    def read(self, index: int) -> Value:
        """Returns a sample."""


class Samples(Stored[Sample]):
    """Samples that are read from disk when they are needed; `shapes` tells which can be learned from together."""

    def __init__(self, examples: Sequence[Example], files: Sequence[SampleFiles]):
        super().__init__(examples, files)
        self.shapes = [one.shape for one in files]

    def read(self, index: int) -> Sample:
        files = self.files[index]
        contexts = read_contexts(files.contexts)
        return Sample(
            read(files.latent)["latent"],
            tuple(read(file)["latent"] for file in files.references),
            contexts[CONDITIONAL],
            contexts.get(PARTIAL),
            read_contexts(files.unconditional)[UNCONDITIONAL],
        )


class TextSamples(Stored[TextSample]):
    """Samples for the language model, the features of their images read when they are needed."""

    def __init__(self, examples: Sequence[Example], samples: Sequence[TextSample], files: Sequence[Sequence[Path]]):
        super().__init__(examples, files)
        self.samples = list(samples)

    def read(self, index: int) -> TextSample:
        return replace(self.samples[index], features=tuple(read(file)["features"] for file in self.files[index]))


def save(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    with replacing(file) as partial:
        try:
            copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            save_weights(partial, copies, metadata)
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{file} not written ({error})") from error


def save_contexts(file: Path, branches: Mapping[str, Branch]) -> None:
    """Writes contexts with their layouts, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    layouts = {name: [list(span) for span in layout] for name, (_, layout) in branches.items()}
    save(file, {name: context for name, (context, _) in branches.items()}, {_LAYOUTS: json.dumps(layouts)})


def read(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file.

    Raises:
        RuntimeError: it is damaged or not there.
    """
    return _read(file)[0]


def read_contexts(file: Path) -> dict[str, Branch]:
    """Returns the contexts of a file with their layouts.

    Raises:
        RuntimeError: it is damaged or not there.
    """
    tensors, metadata = _read(file)
    layouts = json.loads(metadata[_LAYOUTS])
    return {name: (context, tuple(Span(*span) for span in layouts[name])) for name, context in tensors.items()}


def is_whole(file: Path) -> bool:
    """Returns whether a file of the cache is there. One that is damaged is told of, and counts as not there."""
    if not file.exists():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            whole = len(opened.keys()) > 0
    except (SafetensorError, OSError, ValueError) as error:
        _logger.warning("InternVL-U: %s of the cache is damaged (%s) and is made anew", file, error)
        return False
    return whole


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeError(
            f"{file} of the cache was damaged or taken away ({error}): run again, and it is made anew"
        ) from error
