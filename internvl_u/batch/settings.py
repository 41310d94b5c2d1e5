"""What a run is told, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..numbers import check_real, check_whole

MOST_WORKERS, MOST_TOGETHER = 10_000, 1024


@dataclass(frozen=True)
class BatchSettings:
    """A run. Every field is an option of `python -m internvl_u batch`; see there."""

    jobs: str
    model: Path
    out: str
    mllm: Path | None = None
    vae: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    workers: int | None = None
    least_workers: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    batch: int = 1
    address: str | None = None
    offload: bool = False
    verify: bool = False
    fail_fast: bool = False

    def __post_init__(self):
        check_whole("--batch", self.batch, 1, MOST_TOGETHER)
        if self.workers is not None:
            check_whole("--workers", self.workers, 1, MOST_WORKERS)
        if self.least_workers is not None:
            check_whole("--least-workers", self.least_workers, 1, self.workers or MOST_WORKERS)
        if self.cpus is not None:
            check_real("--cpus", self.cpus, 0.0, 1024.0)
        if self.gpus is not None:
            check_real("--gpus", self.gpus, 0.0, 1024.0)
