"""What a training run is told, checked before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..numbers import check_real, check_whole
from .adapter import KINDS, AdapterSettings
from .objective import Dropout

LEARNING = {"transformer": ("transformer",), "language": ("language",), "both": ("transformer", "language")}
"""Values of `--train`, and the parts that learn."""
OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("constant", "cosine")
LEARNING_RATE = 1e-4
MOST_STEPS = 1_000_000
MOST_REPEATS = 10_000
_OF_THE_RESULT = (
    "out",
    "work",
    "data",
    "sample_prompts",
    "sample_every",
    "save_every",
    "log_every",
    "device",
)
"""Settings that change nothing that is learnt, or are in the data's fingerprint."""


@dataclass(frozen=True)
class TrainSettings:
    """A run. Every field is an option of `python -m internvl_u train`; see there."""

    model: Path
    data: tuple[Path, ...]
    out: Path
    train: str = "transformer"
    adapter: AdapterSettings = AdapterSettings()
    steps: int = 1000
    batch: int = 1
    accumulate: int = 1
    lr: float = LEARNING_RATE
    warmup: int = 20
    schedule: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    dtype: str = "bfloat16"
    checkpointing: bool = False
    seed: int = 0
    trigger: str = ""
    resolution: int | None = None
    repeats: tuple[int, ...] = ()
    dropout: Dropout = Dropout()
    text_weight: float = 1.0
    validation: float = 0.0
    validate_every: int = 100
    save_every: int = 100
    log_every: int = 10
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    device: str = "cpu"
    work: Path | None = field(default=None)

    def __post_init__(self):
        if not self.data:
            raise ValueError("no --data found, a folder to learn from expected")
        if len(self.repeats) not in (0, len(self.data)):
            raise ValueError(
                f"{len(self.repeats)} of --repeats found for {len(self.data)} of --data, one each expected"
            )
        for count in self.repeats:
            check_whole("--repeats", count, 1, MOST_REPEATS)
        for name, given, known in (
            ("train", self.train, tuple(LEARNING)),
            ("adapter", self.adapter.kind, KINDS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if given not in known:
                raise ValueError(f"--{name} {given} found, one of {', '.join(known)} expected")
        for name, value, highest in (
            ("steps", self.steps, MOST_STEPS),
            ("batch", self.batch, 4096),
            ("accumulate", self.accumulate, 4096),
            ("rank", self.adapter.rank, 4096),
            ("validate_every", self.validate_every, MOST_STEPS),
            ("save_every", self.save_every, MOST_STEPS),
            ("log_every", self.log_every, MOST_STEPS),
        ):
            check_whole(f"--{name.replace('_', '-')}", value, 1, highest)
        check_whole("--warmup", self.warmup, 0, MOST_STEPS)
        check_whole("--sample-every", self.sample_every, 0, MOST_STEPS)
        check_whole("--seed", self.seed, -(2**63), 2**63 - 1)
        for name, value, lowest, highest in (
            ("lr", self.lr, 0.0, 10.0),
            ("weight-decay", self.weight_decay, 0.0, 1.0),
            ("prompt-dropout", self.dropout.prompt, 0.0, 1.0),
            ("reference-dropout", self.dropout.reference, 0.0, 1.0 - self.dropout.prompt),
            ("text-weight", self.text_weight, 0.0, 1000.0),
            ("validation", self.validation, 0.0, 0.5),
        ):
            check_real(f"--{name}", value)
            if not lowest <= value <= highest:
                raise ValueError(f"--{name} {value} found, {lowest:g} to {highest:g} expected")
        if self.adapter.kind == "lokr" and self.adapter.scale != self.adapter.rank:
            raise ValueError(
                "--alpha with lokr found, none expected: matrices that LoKr does not factor have no rank to divide by, "
                "so that the file would mean one thing to PEFT and another to ComfyUI"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that learn."""
        return LEARNING[self.train]

    @property
    def folder(self) -> Path:
        """Where the log, the states, the contact sheets and the cache are."""
        return self.out.with_name(f"{self.out.stem}-training") if self.work is None else self.work

    def fingerprint(self, dataset: str) -> str:
        """Returns what a state must agree in to be gone on from: settings that change what is learnt, and the data."""
        told = {key: value for key, value in dataclasses.asdict(self).items() if key not in _OF_THE_RESULT}
        told |= {"model": str(self.model), "dataset": dataset}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        share = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine":
            share *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * share
