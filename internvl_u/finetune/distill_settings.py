"""What a run of `distill` is told, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..defaults import STEPS
from ..numbers import check_real, check_whole
from .adapter import AdapterSettings
from .run import MOST_AT_ONCE, RunSettings, cosine, warmed_up

WARMUP = 30
"""Steps until the whole learning rate, which then falls along a cosine to a fiftieth."""
LOWEST_RATE = 0.02


@dataclass(frozen=True)
class DistillSettings(RunSettings):
    """A run. Every field is an option of `python -m internvl_u distill`; see there."""

    evaluations: int = 8
    teacher_steps: int = STEPS
    rank: int = 64
    batch: int = 16
    edits: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, value, highest in (
            ("evaluations", self.evaluations, 50),
            ("teacher-steps", self.teacher_steps, 1000),
            ("rank", self.rank, MOST_AT_ONCE),
        ):
            check_whole(f"--{name}", value, 1, highest)
        if not self.lr:
            raise ValueError(f"--lr {self.lr} found, more than 0 expected")
        if self.edits is not None:
            check_real("--edits", self.edits, 0.0, 1.0)

    @property
    def substeps(self) -> int:
        """The teacher's guided steps for one of the student's."""
        return math.ceil(self.teacher_steps / self.evaluations)

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return self.lr * (warmed_up(step, WARMUP) * cosine(step, self.steps, LOWEST_RATE))

    def fingerprint(self, prompts: str, processes: int = 1) -> str:
        """Returns what a state must agree in to be gone on from; each process has prompts of its own on their way."""
        shared = {"processes": processes} if processes > 1 else {}
        return self.digest(("checkpointing",), {"prompts": prompts, **shared})


def adapter_settings(settings: DistillSettings, blocks: int) -> AdapterSettings:
    """Returns what learns of a transformer of so many blocks: all layers but those whose output nothing reads."""
    unread = rf"transformer_blocks\.{blocks - 1}\.(txt_mlp\..*|attn\.(add_q_proj|to_add_out))"
    return AdapterSettings(rank=settings.rank, layers=rf"(?!{unread}$).*")
