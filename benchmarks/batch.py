"""`python -m internvl_u batch`: how much faster two workers are than one, and what memory its driver takes.

python -m benchmarks.batch --workers 2 --repeats 4
python -m benchmarks.batch --memory 10000
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_u.batch.driver import Run
from internvl_u.batch.jobs import Job
from internvl_u.batch.manifest import MADE
from internvl_u.batch.settings import BatchSettings
from internvl_u.batch.storage import Store
from internvl_u.batch.worker import Worker
from internvl_u.pipeline import Pipeline

from .report import make_parser, show

if TYPE_CHECKING:
    from internvl_u.batch.ray_pool import Pool

WARM_UP = 2
"""Pictures of each worker that are not counted."""


class Trivial(Worker):
    """Writes a short text in place of each result: the driver does what it always does."""

    def open(self) -> Pipeline:
        """Returns a model of which nothing is loaded."""
        return self.settings.pipeline()

    def _rows(self, jobs: list[Job], attempt: int) -> list[dict]:
        rows = []
        for job in jobs:
            data = f"{job.name}\n".encode()
            self.settings.out.write(job.file, data, lasting=False)
            digest = job.digest(self.settings.digest, [])
            row = {"name": job.name, "kind": job.kind, "row": job.row, "status": MADE, "file": job.file}
            rows.append(row | {"bytes": len(data), "digest": digest, "run": self.settings.run, "worker": self.name})
        return rows


def main() -> None:
    """Prints what was measured."""
    parser = make_parser(__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("nano"), help="what draws")
    parser.add_argument("--workers", type=int, default=2, help="workers that are held against one, a thread each")
    parser.add_argument("--pictures", type=int, default=64, help="pictures that are timed")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--batch", type=int, default=1, help="pictures drawn at once")
    parser.add_argument("--repeats", type=int, default=4, help="turns")
    parser.add_argument(
        "--memory", type=int, metavar="N", help="measure the driver's memory over N jobs that cost nothing instead"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = _memory(options, Path(folder)) if options.memory else _speed(options, Path(folder))
    show(rows, options.json)


def _speed(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Returns pictures a second of one worker and of several, which take turns."""
    from internvl_u.batch.ray_pool import pool

    counts = (1, options.workers)
    times: dict[int, list[float]] = {count: [] for count in counts}
    most = _settings(options, folder, "none", options.workers)
    with pool(most) as workers:
        for turn in range(options.repeats):
            for count in counts if turn % 2 == 0 else counts[::-1]:
                _write(folder, options.pictures + 32 * count, options.size, options.steps)
                given = _settings(options, folder, f"{turn}-{count}", count)
                Run(given, _taking(dataclasses.replace(workers, least=count, most=count)), print).make()
                times[count].append(_rate(Store.of(given.out), count, options.pictures))
    ratios = [several / one for one, several in zip(*times.values(), strict=True)]
    rows = [_row(f"{count} workers, pictures a second", rates) for count, rates in times.items()]
    return [*rows, _row("ratio", ratios)]


def _memory(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Returns the resident memory of the driver when a tenth, two tenths ... of many jobs are made."""
    from internvl_u.batch.ray_pool import pool

    _write(folder, options.memory, 16, 1)
    given, rows = _settings(options, folder, "out", options.workers), []

    def note(done: int, total: int) -> None:
        if done * 10 >= total * (len(rows) + 1):
            rows.append({"jobs made": done, "driver's memory, MiB": _resident()})

    before = {"jobs made": 0, "driver's memory, MiB": _resident()}
    with pool(given) as workers:
        Run(given, _taking(workers), print, note, Trivial).make()
    return [before, *rows, {"jobs made": "gathered", "driver's memory, MiB": _resident()}]


def _taking(workers: Pool) -> Callable[[BatchSettings], AbstractContextManager[Pool]]:
    return lambda settings: nullcontext(workers)


def _settings(options: argparse.Namespace, folder: Path, name: str, workers: int) -> BatchSettings:
    return BatchSettings(
        str(folder / "jobs.jsonl"),
        options.model,
        str(folder / name),
        device="cpu",
        workers=workers,
        cpus=1.0,
        batch=options.batch,
    )


def _write(folder: Path, count: int, size: int, steps: int) -> None:
    shapes = ("circle", "square", "triangle", "star", "cross", "ring")
    jobs = (
        {"prompt": f"a red {shapes[i % 6]}", "seed": i, "width": size, "height": size, "steps": steps}
        for i in range(count)
    )
    with (folder / "jobs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(job) + "\n" for job in jobs)


def _rate(out: Store, workers: int, pictures: int) -> float:
    """Returns pictures a second, from when every worker is warm: of the first `pictures` that are made from then on."""
    from pyarrow import parquet

    ends: dict[str, list[float]] = {}
    table = parquet.read_table(out.path("manifest.parquet"), columns=["worker", "started", "seconds"])
    for row in table.to_pylist():
        ends.setdefault(row["worker"], []).append(row["started"].timestamp() + row["seconds"])
    if len(ends) != workers:
        raise RuntimeError(f"{len(ends)} workers have made pictures, {workers} expected: give more --pictures")
    warm = max(sorted(some)[WARM_UP - 1] for some in ends.values())
    after = sorted(end for some in ends.values() for end in some if end > warm)[:pictures]
    if len(after) < pictures:
        raise RuntimeError(f"{len(after)} pictures made by warm workers, {pictures} expected: give more --pictures")
    return len(after) / (after[-1] - warm)


def _resident() -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.partition("VmRSS:")[2].split()[0]) // 1024


def _row(what: str, values: list[float]) -> dict:
    middle = statistics.median(values)
    return {"what": what, "median": middle, "least": min(values), "most": max(values), "turns": len(values)}


if __name__ == "__main__":
    main()
