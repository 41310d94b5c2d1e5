"""What every run is told, `train` and `distill` alike, checked before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..numbers import check_real, check_whole

LEARNING_RATE = 1e-4
MOST_STEPS = 1_000_000
MOST_AT_ONCE = 4096
HIGHEST_RATE = 10.0
FILE_DTYPES = ("float32", "bfloat16", "float16")
"""Of the numbers in the LoRA's files."""
_OF_THE_RESULT = (
    *("out", "work", "data", "device", "save_dtype"),
    *("sample_prompts", "sample_every", "save_every", "log_every"),
)
"""Settings that change nothing that is learnt, or are in the data's fingerprint."""


@dataclass(frozen=True)
class RunSettings:
    """A run. Every field is an option of `python -m internvl_u train` and of `distill`; see there."""

    model: Path
    data: tuple[Path, ...]
    out: Path
    steps: int = 1000
    batch: int = 1
    lr: float = LEARNING_RATE
    dtype: str = "float32"
    checkpointing: bool = False
    seed: int = 0
    resolution: int | None = None
    save_every: int = 100
    log_every: int = 10
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    save_dtype: str = FILE_DTYPES[0]
    device: str = "cpu"
    work: Path | None = None

    def __post_init__(self):
        if not self.data:
            raise ValueError("no --data found, what to learn from expected")
        for name, highest in (
            ("steps", MOST_STEPS),
            ("batch", MOST_AT_ONCE),
            ("save_every", MOST_STEPS),
            ("log_every", MOST_STEPS),
        ):
            check_whole(option(name), getattr(self, name), 1, highest)
        check_whole("--sample-every", self.sample_every, 0, MOST_STEPS)
        check_whole("--seed", self.seed, -(2**63), 2**63 - 1)
        check_choice("--save-dtype", self.save_dtype, FILE_DTYPES)
        check_real("--lr", self.lr)
        if not 0 <= self.lr <= HIGHEST_RATE:
            raise ValueError(f"--lr {self.lr} found, 0 to {HIGHEST_RATE:g} expected")

    @property
    def folder(self) -> Path:
        """Where the log, the states, the contact sheets and the cache are."""
        return self.out.with_name(f"{self.out.stem}-training") if self.work is None else self.work

    def digest(self, without: Iterable[str], more: Mapping[str, object]) -> str:
        """Returns the SHA-256 of what a state must agree in: settings that change what is learnt, and `more`."""
        left_out = {*_OF_THE_RESULT, *without}
        told = {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}
        return hashlib.sha256(json.dumps(told | dict(more), sort_keys=True, default=str).encode()).hexdigest()


def warmed_up(step: int, steps: int) -> float:
    """Returns the share of the learning rate in a step, which is whole after so many `steps`."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def cosine(step: int, steps: int, lowest: float = 0.0) -> float:
    """Returns the share of the learning rate in a step, which falls along a cosine from 1 to `lowest`."""
    return (1 - lowest) * 0.5 * (1 + math.cos(math.pi * step / steps)) + lowest


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Makes sure that a value is one of those known.

    Raises:
        ValueError: it is not.
    """
    if value not in (known := tuple(known)):
        raise ValueError(f"{name} {value} found, one of {', '.join(known)} expected")


def option(field: str) -> str:
    """Returns what a field is called on the command line."""
    return f"--{field.replace('_', '-')}"
