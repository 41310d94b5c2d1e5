"""What a run of `train` is told, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass

from ..numbers import check_real, check_whole
from .adapter import KINDS, AdapterSettings
from .objective import Dropout
from .run import MOST_AT_ONCE, MOST_STEPS, RunSettings, check_choice, cosine, option, warmed_up

LEARNING = {"transformer": ("transformer",), "language": ("language",), "both": ("transformer", "language")}
"""Values of `--train`, and the parts that learn."""
OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("constant", "cosine")
MOST_REPEATS = 10_000
VALIDATE_EVERY = 100


@dataclass(frozen=True)
class TrainSettings(RunSettings):
    """A run. Every field is an option of `python -m internvl_u train`; see there."""

    train: str = "transformer"
    adapter: AdapterSettings = AdapterSettings()
    accumulate: int = 1
    warmup: int = 20
    schedule: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    dtype: str = "bfloat16"
    trigger: str = ""
    repeats: tuple[int, ...] = ()
    dropout: Dropout = Dropout()
    text_weight: float = 1.0
    validation: float = 0.0
    validate_every: int = VALIDATE_EVERY

    def __post_init__(self):
        super().__post_init__()
        if len(self.repeats) not in (0, len(self.data)):
            raise ValueError(
                f"{len(self.repeats)} of --repeats found for {len(self.data)} of --data, one each expected"
            )
        for count in self.repeats:
            check_whole("--repeats", count, 1, MOST_REPEATS)
        check_choice("--train", self.train, LEARNING)
        check_choice("--adapter", self.adapter.kind, KINDS)
        check_choice("--optimizer", self.optimizer, OPTIMIZERS)
        check_choice("--schedule", self.schedule, SCHEDULES)
        for name, value, highest in (
            ("accumulate", self.accumulate, MOST_AT_ONCE),
            ("rank", self.adapter.rank, MOST_AT_ONCE),
            ("validate_every", self.validate_every, MOST_STEPS),
        ):
            check_whole(option(name), value, 1, highest)
        check_whole("--warmup", self.warmup, 0, MOST_STEPS)
        for name, value, highest in (
            ("weight-decay", self.weight_decay, 1.0),
            ("prompt-dropout", self.dropout.prompt, 1.0),
            ("reference-dropout", self.dropout.reference, 1.0 - self.dropout.prompt),
            ("text-weight", self.text_weight, 1000.0),
            ("validation", self.validation, 0.5),
        ):
            check_real(f"--{name}", value)
            if not 0 <= value <= highest:
                raise ValueError(f"--{name} {value} found, 0 to {highest:g} expected")
        if self.adapter.kind == "lokr" and self.adapter.scale != self.adapter.rank:
            raise ValueError(
                "--alpha with lokr found, none expected: matrices that LoKr does not factor have no rank to divide by, "
                "so that the file would mean one thing to PEFT and another to ComfyUI"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that learn."""
        return LEARNING[self.train]

    def fingerprint(self, dataset: str) -> str:
        """Returns what a state must agree in to be gone on from: settings that change what is learnt, and the data."""
        # How often is validated changes nothing; it is named as states name it that were written while it counted.
        return self.digest((), {"dataset": dataset, "validate_every": VALIDATE_EVERY})

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        falling = cosine(step, self.steps) if self.schedule == "cosine" else 1.0
        return self.lr * (warmed_up(step, self.warmup) * falling)
