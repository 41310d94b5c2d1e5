"""A whole run: planned, made in one pass or more, gathered into one manifest, and told of."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from .lock import locked
from .manifest import Manifest, merge_parts
from .plan import PLAN, Planned, Planner
from .settings import BatchSettings
from .storage import Store, cannot_write, nothing_more_fits
from .worker import ATTEMPTS, Worker, WorkerSettings

MERGED = 1024
"""Parts of the manifest that are made one while the run goes on."""
_ERRORS_TOLD = 10


class Workers(Protocol):
    """What micro-batches are given to; `ray_pool.Pool` is the one."""

    @property
    def least(self) -> int: ...

    @property
    def threads(self) -> int: ...

    def run(self, worker: type, settings: Any, batches: int) -> Iterator[dict[str, Any]]: ...


@dataclass
class Summary:
    """What a run has come to."""

    kept: int = 0
    made: int = 0
    failed: int = 0
    not_made: int = 0
    again: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    missing: dict[str, None] = field(default_factory=dict)
    busy: dict[str, tuple[float, float]] = field(default_factory=dict)
    first: float = float("inf")
    last: float = 0.0
    stop: str = ""
    cut: bool = False

    @property
    def rate(self) -> float:
        """Results a second, from the first worker's start with its model loaded to the last one's end."""
        return self.made / (self.last - self.first) if self.last > self.first else 0.0

    def add(self, report: dict[str, Any]) -> None:
        """Counts a micro-batch."""
        self.made += report["made"]
        self.failed += report["failed"]
        self.again += report["again"] > 0
        self.errors = (self.errors + [tuple(one) for one in json.loads(report["errors"])])[:_ERRORS_TOLD]
        if report["missing"]:
            self.missing[report["missing"]] = None
            return
        worker, started, ended = (report[name] for name in ("worker", "started", "ended"))
        first, last = self.busy.get(worker, (started, ended))
        self.busy[worker] = min(first, started), max(last, ended)
        self.first, self.last = min(self.first, report["started"]), max(self.last, report["ended"])
        self.stop = self.stop or report["stop"]

    def sentences(self, manifest: str) -> Iterator[str]:
        """Yields what there is to tell."""
        yield f"{self.made} made ({self.rate:.3g} a second), {self.kept} kept, {self.failed} failed"
        for worker, (first, last) in sorted(self.busy.items()):
            yield f"{worker} worked for {last - first:.1f} s"
        if self.again:
            yield f"workers ended in the middle (killed, or out of memory); {self.again} micro-batches were begun again"
        for reason in self.missing:
            yield f"a worker without the model: {reason}"
        for name, error in self.errors:
            yield f"failed: {name}: {error}"
        if self.failed > len(self.errors):
            yield f"and {self.failed - len(self.errors)} more: the rows of {manifest} with status failed"

    def trouble(self, manifest: str) -> str:
        """Returns why not all is made, in a sentence; "" where all is."""
        if self.stop:
            return self.stop
        if self.cut:
            return f"ended with the first job that failed; {self.made + self.kept} are made, see {manifest}"
        if self.not_made:
            return (
                f"{self.not_made} jobs not made, no worker left that has the model ({next(iter(self.missing))}): put "
                "it there and run the same command again"
            )
        if not self.failed:
            return ""
        total = self.failed + self.made + self.kept
        return f"{self.failed} of {total} jobs failed, see {manifest}; the others are made"


class Run:
    """A run over one list into one folder; `start(settings)` gives the workers for as long as its context lasts."""

    def __init__(
        self,
        settings: BatchSettings,
        start: Callable[[BatchSettings], AbstractContextManager[Workers]],
        say: Callable[[str], object],
        show: Callable[[int, int], object] = lambda done, total: None,
        worker: type = Worker,
        pause: float = 1.0,
    ):
        """Opens the list, the folder and the model. `show(done, total)` hears of progress.

        Raises:
            ValueError: the list, the folder or the model is not as it should be.
            OSError: one is not there.
            RuntimeError: the model is damaged.
        """
        self.settings, self.start, self.say, self.show, self.worker = settings, start, say, show, worker
        self.jobs, self.out = Store.of(settings.jobs), Store.of(settings.out)
        if self.jobs.states([""]) == [None]:
            raise FileNotFoundError(f"no list of jobs {settings.jobs} found: give the name of a file")
        same = ("mllm", "vae", "loras", "dtype", "device", "offload")
        given = {name: getattr(settings, name) for name in same}
        told = WorkerSettings(settings.model, self.jobs.beside(), self.out, pause=pause, **given)
        self.pipeline = told.pipeline()
        self.told = replace(told, digest=told.found(self.pipeline))
        self.run, self.passes, self.ignored = 0, 0, set()
        self.summary = Summary()

    def make(self) -> Summary:
        """Makes what is missing and returns what came of it.

        Raises:
            OSError: a file cannot be read or written, or a disk is full.
            ValueError: there is no room for so many workers.
            RuntimeError: another run writes into the same folder.
        """
        try:
            self.out.make_folder("")
            with locked(self.out):
                killed = self.out.has_folder(ATTEMPTS)  # which a run that ends as it should takes away
                try:
                    self._passes()
                finally:
                    self.out.remove_folder(PLAN)
                if not self.summary.stop:
                    self._gather()
                if killed or self.summary.again:
                    self.out.remove_unfinished()
        except OSError as error:
            if not nothing_more_fits(error):
                raise
            raise OSError(cannot_write("this process", self.out, error)) from error
        return self.summary

    def _gather(self) -> None:
        with Manifest(self.out) as manifest:
            manifest.compact(self.run)
            for name in manifest.broken:
                self.say(f"{name} cannot be read and counts as missing")
        self.out.remove_folder(ATTEMPTS)

    def _passes(self) -> None:
        """Plans and makes, and again while workers without the model have left something that others make."""
        planned, plan = self._plan()
        if self.ignored:
            self.say(f"columns that no job knows are ignored: {', '.join(sorted(self.ignored))}")
        if not planned.batches or self._ended():
            return
        with self.start(self.settings) as workers:
            told = replace(self.told, run=self.run, drawing=planned.pictures > 0, threads=workers.threads)
            while planned.batches:
                reports = workers.run(self.worker, replace(told, plan=plan), planned.batches)
                done = self._pass(reports, planned.jobs, workers.least)
                if self._ended() or not (done and self.summary.not_made):
                    return
                self.say(f"{self.summary.not_made} jobs came back from workers without the model and go to the others")
                planned, plan = self._plan()

    def _plan(self) -> tuple[Planned, str]:
        with Manifest(self.out) as manifest:
            self.run = self.run or max(manifest.last_run + 1, int(time.time()))
            options = {"batch": self.settings.batch, "verify": self.settings.verify, "length": self._tokens}
            planner = Planner(self.jobs, manifest, self.told.digest, self.run, **options)
            planned = planner.write(plan := f"{self.run}-{self.passes}.parquet")
        self.ignored |= planned.ignored
        if self.passes == 0:
            self.summary.kept = planned.kept
        self.summary.failed += planned.failures
        self.summary.errors = (self.summary.errors + planned.failed)[:_ERRORS_TOLD]
        self.passes += 1
        return planned, plan

    def _pass(self, reports: Iterator[dict[str, Any]], total: int, workers: int) -> int:
        """Counts what workers report, until a pass is over or as many have no model; returns the jobs it has done."""
        start, done, parts = self.summary.made + self.summary.failed, 0, []
        without: set[str] = set()
        with closing(cast(Generator, reports)):
            for report in reports:
                self.summary.add(report)
                parts += [report["part"]] if report["part"] else []
                if len(parts) == MERGED:
                    merge_parts(self.out, parts)
                    parts = []
                self.show(done := self.summary.made + self.summary.failed - start, total)
                without |= {report["worker"]} if report["missing"] else set()
                if self._ended() or (done == 0 and len(without) >= workers):
                    break
        self.summary.not_made = total - done if without else 0
        return done

    def _ended(self) -> bool:
        self.summary.cut = self.settings.fail_fast and self.summary.failed > 0
        return self.summary.cut or bool(self.summary.stop)

    def _tokens(self, text: str) -> int:
        return len(self.pipeline.encoder.tokenizer.encode([text])[0])
