"""What each worker does: it opens a model, makes the micro-batches that it is given, and tells what became of them."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..devices import chosen_device, chosen_dtype
from ..files import in_short
from ..pipeline import Pipeline
from .identity import model_digest
from .jobs import Job
from .making import Maker, failed_rows
from .manifest import MADE, read_part, write_part
from .plan import Plan
from .storage import Store, cannot_write

ATTEMPTS = "attempts"
MOST_ATTEMPTS = 3
"""Times that a micro-batch is begun: what has ended its worker so often is not begun again."""
LONGEST_PAUSE = 30.0
"""Seconds."""
_ERRORS_TOLD = 3
_NOTHING = {"made": 0, "failed": 0, "again": 0, "errors": "[]", "missing": "", "stop": "", "part": ""}
"""A report: numbers of jobs, how often it was begun before, errors as JSON, why nothing is made here or any more."""


@dataclass(frozen=True)
class WorkerSettings:
    """What all workers are told. `jobs` is the list's folder, `digest` that of the driver's model."""

    model: Path
    jobs: Store
    out: Store
    plan: str = ""
    run: int = 0
    digest: str = ""
    mllm: Path | None = None
    vae: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    offload: bool = False
    threads: int = 1
    drawing: bool = True
    pause: float = 1.0

    def pipeline(self) -> Pipeline:
        """Returns the model, opened, its parts not loaded.

        Raises:
            OSError, RuntimeError, ValueError: as `Pipeline` does.
        """
        device = chosen_device(self.device)
        dtype = chosen_dtype(self.dtype, device)
        files: dict[str, Any] = {"mllm": self.mllm, "vae": self.vae, "loras": self.loras}
        return Pipeline(self.model, dtype=dtype, device=device, offload=self.offload, **files)

    def found(self, pipeline: Pipeline) -> str:
        """Returns the digest of the model that a pipeline has opened."""
        return model_digest(pipeline.files, self.loras, self.dtype)


class Worker:
    """Makes micro-batches; nothing is loaded before the first one, and nothing that it meets ends it."""

    def __init__(self, settings: WorkerSettings):
        self.settings = settings
        self.name = f"{platform.node()}:{os.getpid()}"
        self._pipeline: Pipeline | None = None
        self._plan: Plan | None = None
        self._absent = 0
        self._planning, self._computing = threading.Lock(), threading.Lock()
        torch.set_num_threads(settings.threads)

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        """Returns a report for each micro-batch, which are given by their `number` in the plan.

        While one is drawn, the files of the one before are written. After one that says to stop none is begun.
        """
        missing, stopped = self._model_missing(), threading.Event()

        def report(number: int) -> dict[str, Any] | None:
            if stopped.is_set():
                return None
            found = self._report(int(number), missing)
            if found["stop"]:
                stopped.set()
            return found

        with ThreadPoolExecutor(2) as threads:
            reports = [one for one in threads.map(report, batch["number"]) if one is not None]
        reports.sort(key=lambda one: bool(one["stop"]))  # which ends what is read of them
        return {key: [report[key] for report in reports] for key in reports[0]}

    def open(self) -> Pipeline:
        """Returns the model, loaded.

        Raises:
            OSError, RuntimeError, ValueError: it is not there, damaged, or another one than the driver's.
        """
        pipeline = self.settings.pipeline()
        if (found := self.settings.found(pipeline)) != self.settings.digest:
            raise RuntimeError(
                f"{self.settings.model} holds a model {found[:12]}, that of the driver ({self.settings.digest[:12]}) "
                "expected: copy the same files to every machine"
            )
        pipeline.load(self.settings.drawing)
        return pipeline

    def _report(self, number: int, missing: str) -> dict[str, Any]:
        started, out = time.time(), self.settings.out
        report = _NOTHING | {"worker": self.name, "started": started, "ended": started}
        try:
            digest, jobs = self._planned(number)
            rows = read_part(out, digest)  # of a worker that was ended after it had written them
            if rows is None and missing:
                return report | {"missing": missing}
            if rows is None:
                report["again"] = (attempt := self._attempt(digest)) - 1
                rows = self._rows(jobs, attempt)
                write_part(out, digest, rows)
                out.remove([f"{ATTEMPTS}/{digest}"])
        except OSError as error:
            return report | {"stop": cannot_write(self.name, out, error)}
        failed = [(row["name"], row["error"]) for row in rows if row["status"] != MADE]
        report |= {"made": len(rows) - len(failed), "failed": len(failed), "ended": time.time(), "part": digest}
        return report | {"errors": json.dumps(failed[:_ERRORS_TOLD])}

    def _model_missing(self) -> str:
        """Returns why there is no model here, after a pause that grows, so that others take what is left."""
        if self._pipeline is not None:
            return ""
        try:
            self._pipeline = self.open()
            return ""
        except Exception as error:  # whatever a foreign or broken file makes a library raise
            time.sleep(min(LONGEST_PAUSE, self.settings.pause * 2**self._absent))
            self._absent += 1
            return f"{self.name}: {' '.join(in_short(error).split())}"

    def _planned(self, number: int) -> tuple[str, list[Job]]:
        with self._planning:
            if self._plan is None:
                self._plan = Plan(self.settings.out, self.settings.plan)
            return self._plan.row(number)

    def _rows(self, jobs: list[Job], attempt: int) -> list[dict[str, Any]]:
        settings = self.settings
        told = {"run": settings.run, "worker": self.name, "model": settings.digest}
        if attempt > MOST_ATTEMPTS:
            return failed_rows(
                jobs,
                f"its worker was ended {MOST_ATTEMPTS} times while it was made (killed, or out of memory): give workers"
                " more memory, or make it smaller",
                told,
            )
        assert self._pipeline is not None
        maker = Maker(self._pipeline, settings.model, settings.jobs, settings.out, told)
        return maker.make(jobs, self._computing)

    def _attempt(self, digest: str) -> int:
        """Returns how often a micro-batch has been begun, this time included, and writes it down."""
        out, name = self.settings.out, f"{ATTEMPTS}/{digest}"
        try:
            attempt = int(out.read(name)) + 1
        except (OSError, ValueError):
            attempt = 1
        out.write(name, str(attempt).encode(), lasting=False)
        return attempt
