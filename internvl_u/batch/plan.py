"""Which jobs are to be made, and which of them at once: a table of micro-batches that workers are given."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

from ..files import in_short
from .jobs import PICTURE, Job, job_name, read_job, unknown_columns
from .manifest import FAILED, MADE, Entry, Manifest, write_part
from .rows import Row, read_rows
from .storage import Store

PLAN = "plan"
WINDOW = 1024
"""Jobs that are looked up at once."""
GROUP = 256
"""Micro-batches that are written, and read by a worker, at once."""
MOST_WAITING = 8192
"""Jobs that wait for others of their shape."""
SCHEMA = pyarrow.schema([("batch", pyarrow.string()), ("jobs", pyarrow.string())])


class Planned(NamedTuple):
    """What a plan comes to: numbers of jobs and micro-batches, the first failures, and columns that are ignored."""

    jobs: int
    pictures: int
    batches: int
    kept: int
    failed: list[tuple[str, str]]
    failures: int
    ignored: set[str]


class Planner:
    """Reads a list of jobs once and writes the plan; memory does not grow with the list."""

    def __init__(
        self,
        jobs: Store,
        manifest: Manifest,
        model: str,
        run: int,
        *,
        batch: int = 1,
        verify: bool = False,
        length: Callable[[str], int] = len,
    ):
        """`model` and `run` are its digest and the number of this run, `length` counts a question's tokens."""
        self.jobs, self.manifest, self.model, self.run = jobs, manifest, model, run
        self.batch, self.verify, self.length = batch, verify, length
        self.count = self.batches = self.kept = self.failures = self.pictures = 0
        self.failed: list[tuple[str, str]] = []
        self.ignored: set[str] = set()

    def write(self, name: str) -> Planned:
        """Writes the plan, a row for each micro-batch, and a part of the manifest for rows that are no jobs.

        Raises:
            ValueError: the list cannot be read.
            OSError: the plan or a part could not be written.
        """
        store = self.manifest.store
        store.make_folder(PLAN)
        with store.filesystem.open_output_stream(store.path(f"{PLAN}/{name}")) as target:
            with parquet.ParquetWriter(target, SCHEMA) as writer:
                for some in _chunks(grouped(self._missing(), self.batch, self.length), GROUP):
                    packed = [_packed(group, self.run) for group in some]
                    writer.write_table(pyarrow.Table.from_pylist(packed, SCHEMA))
                    self.count += sum(map(len, some))
                    self.pictures += sum(job.kind == PICTURE for group in some for job in group)
                    self.batches += len(some)
        return Planned(self.count, self.pictures, self.batches, self.kept, self.failed, self.failures, self.ignored)

    def _missing(self) -> Iterator[Job]:
        for window in _chunks(read_rows(self.jobs), WINDOW):
            checked = [self._checked(row) for row in window]
            good = [job for job in checked if isinstance(job, Job)]
            broken = [row for row in checked if isinstance(row, dict)]
            known = self.manifest.find([*(job.name for job in good), *(row["name"] for row in broken)])
            self._tell([row for row in broken if not self._told(known.get(row["name"]))])
            whole = self._whole([(job, known[job.name]) for job in good if job.name in known])
            self.kept += len(whole)
            yield from (job for job in good if job.name not in whole and not self._told(known.get(job.name)))

    def _told(self, entry: Entry | None) -> bool:
        """Returns whether a job has failed in this very run."""
        return entry is not None and entry.status == FAILED and entry.run == self.run

    def _checked(self, row: Row) -> Job | dict[str, Any]:
        """Returns the job of a row, or a row of the manifest that says why there is none."""
        self.ignored |= unknown_columns(row.cells)
        name = f"#{row.number}"
        try:
            if not self.manifest.first_time(found := job_name(row)):
                raise ValueError(f"id {found} found in an earlier row too, another one expected: it names the file")
            name = found
            return read_job(row)
        except ValueError as error:
            failed = {"name": name, "status": FAILED, "error": f"row {row.number}: {in_short(error)}"}
            return failed | {"row": row.number, "run": self.run, "model": self.model}

    def _tell(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            told = hashlib.sha256(f"{self.run} {[row['name'] for row in rows]}".encode()).hexdigest()
            write_part(self.manifest.store, told, rows)
            self.failures += len(rows)
            self.failed += [(row["name"], row["error"]) for row in rows[: max(0, 10 - len(self.failed))]]

    def _whole(self, known: Sequence[tuple[Job, Entry]]) -> set[str]:
        """Returns the names of jobs whose files are there as the manifest says, of the same settings and images."""
        known = [(job, entry) for job, entry in known if entry.status == MADE]
        states = self.manifest.store.states([entry.file for _, entry in known])
        return {
            job.name
            for (job, entry), state in zip(known, states, strict=True)
            if state is not None and state[0] == entry.bytes and self._same(job, entry)
        }

    def _same(self, job: Job, entry: Entry) -> bool:
        recorded = json.loads(entry.inputs or "[]")
        if len(recorded) != len(job.images):
            return False
        try:
            inputs = [self._input(name, *one) for name, one in zip(job.images, recorded, strict=True)]
            if job.file != entry.file or job.digest(self.model, inputs) != entry.digest:
                return False
            return not self.verify or _sha256(self.manifest.store.read(entry.file)) == entry.sha256
        except (OSError, ValueError):
            return False

    def _input(self, name: str, digest: str, size: int, time: int) -> str:
        """Returns the SHA-256 of an image; one whose size and time are as they were is not read."""
        folder, inner = self.jobs.beside().elsewhere(name)
        (state,) = folder.states([inner])
        if state == (size, time) and not self.verify:
            return digest
        return _sha256(folder.read(inner))


def grouped(jobs: Iterator[Job], size: int, length: Callable[[str], int] = len) -> Iterator[list[Job]]:
    """Yields jobs in groups of at most `size` that can be made together, as far as their rows tell."""
    waiting: dict[Hashable, list[Job]] = {}
    count = 0
    for job in jobs:
        likeness = _likeness(job, length) if size > 1 else None
        group = waiting.setdefault(likeness, [])
        group.append(job)
        count += 1
        if len(group) == size:
            yield waiting.pop(likeness)
            count -= size
        elif count > MOST_WAITING:
            oldest = next(iter(waiting))
            yield (group := waiting.pop(oldest))
            count -= len(group)
    yield from waiting.values()


def _likeness(job: Job, length: Callable[[str], int]) -> Hashable:
    """Returns what jobs share that can be made together: all but words, seeds and images, whose number counts."""
    if job.kind == PICTURE:
        free = ("prompt", "seed", "system", "thought", "negative_prompt")
        has_thought = "thought" in job.settings
    else:
        free, has_thought = ("question", "system", "task"), False
    told = {name: value for name, value in job.settings.items() if name not in free}
    tokens = 0 if job.kind == PICTURE else length(job.question().text)
    return job.kind, has_thought, len(job.images), tokens, json.dumps(told, sort_keys=True)


class Plan:
    """A plan as workers read it: by numbers of micro-batches, group by group of its rows."""

    def __init__(self, store: Store, name: str):
        """Opens the plan.

        Raises:
            OSError: it is not there.
        """
        self._file = parquet.ParquetFile(store.filesystem.open_input_file(store.path(f"{PLAN}/{name}")))
        self._group, self._rows = -1, []

    def row(self, number: int) -> tuple[str, list[Job]]:
        """Returns the digest and the jobs of a micro-batch."""
        group, place = divmod(number, GROUP)
        if group != self._group:
            self._group, self._rows = group, self._file.read_row_group(group).to_pylist()
        row = self._rows[place]
        return row["batch"], unpacked(row["jobs"])


def unpacked(jobs: str) -> list[Job]:
    """Returns the jobs of a row of the plan."""
    return [Job(**{**one, "images": tuple(one["images"])}) for one in json.loads(jobs)]


def _packed(group: Sequence[Job], run: int) -> dict[str, str]:
    jobs = json.dumps([job.packed() for job in group], ensure_ascii=False)
    return {"batch": hashlib.sha256(f"{run} {jobs}".encode()).hexdigest(), "jobs": jobs}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _chunks(values: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while some := list(itertools.islice(values, size)):
        yield some
