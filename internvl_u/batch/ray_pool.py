"""Workers as actors of Ray Data, on this machine or on a cluster, which are given the plan block by block."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow
import ray
import ray.data

from ..files import in_short
from .settings import BatchSettings

_OBJECTS = 256 << 20
"""Bytes of memory for what goes between processes on this machine: rows of the plan and reports."""
_BLOCKS_A_WORKER, _LARGEST_BLOCK = 64, 32
_TASKS_AHEAD = 2


@dataclass(frozen=True)
class Pool:
    """How many workers there are, and how many CPUs and GPUs each has."""

    least: int
    most: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Threads of torch in a worker."""
        return max(1, int(self.cpus))

    def run(self, worker: type, settings: Any, batches: int) -> Iterator[dict[str, Any]]:
        """Yields the report of each micro-batch of a plan as it is made, in any order.

        The workers read the plan themselves: tasks of Ray Data that did so would want CPUs, which the workers have.

        Raises:
            ray.exceptions.RayError: Ray itself fails.
        """
        rows = max(1, min(_LARGEST_BLOCK, batches // (self.most * _BLOCKS_A_WORKER)))
        numbers = [
            pyarrow.table({"number": range(first, min(first + rows, batches))}) for first in range(0, batches, rows)
        ]
        compute = ray.data.ActorPoolStrategy(
            min_size=min(self.least, batches),
            max_size=min(self.most, batches),
            max_tasks_in_flight_per_actor=_TASKS_AHEAD,
        )
        reports = ray.data.from_arrow(numbers).map_batches(
            worker,
            fn_constructor_args=(settings,),
            batch_size=rows,
            compute=compute,
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
        yield from reports.iter_rows()


@contextmanager
def pool(settings: BatchSettings) -> Iterator[Pool]:
    """Starts Ray on this machine, or joins a cluster, and gives the workers that it has room for.

    Raises:
        ValueError: there is no room for so many.
        ConnectionError: no cluster answers there.
    """
    os.putenv("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own log files say the rest
    told: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if settings.address is None:
        told |= {"include_dashboard": False, "object_store_memory": _OBJECTS}
    with open(os.devnull, "w", encoding="utf-8") as null, redirect_stdout(null):  # stdout has the manifest's name alone
        with _silent(), _handlers_kept():
            _join(settings.address or "local", told)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            for name in ("ray", "ray.data"):
                logging.getLogger(name).setLevel(logging.ERROR)
            yield sized(settings, ray.cluster_resources())
        finally:
            ray.shutdown()


def _join(address: str, told: dict[str, Any]) -> None:
    try:
        ray.init(address, **told)
    except ConnectionError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({in_short(error)}): start one with `ray start --head`; for one that "
            "wants a token, set RAY_AUTH_MODE=token and have the token in ~/.ray/auth_token"
        ) from error


def sized(settings: BatchSettings, found: Mapping[str, float]) -> Pool:
    """Returns the workers of a run on a machine or cluster that has `found`.

    Raises:
        ValueError: there is no room for so many.
    """
    cpus, gpus = found.get("CPU", 0.0), found.get("GPU", 0.0)
    on_gpu = gpus > 0 and settings.device.partition(":")[0] in ("auto", "cuda")
    each_gpu = settings.gpus if settings.gpus is not None else float(on_gpu)
    default = max(1, int(gpus // each_gpu)) if each_gpu else 1
    most = settings.workers or default
    each_cpu = settings.cpus if settings.cpus is not None else 1.0 if each_gpu else max(1.0, float(cpus // most))
    for what, each, there in (("CPUs", each_cpu, cpus), ("GPUs", each_gpu, gpus)):
        if each * most > there + 1e-9:
            room = math.floor(there / each + 1e-9)
            raise ValueError(
                f"{most} workers with {each:g} {what} each found for {there:g} {what}, {room} expected at most: give "
                f"fewer --workers, or a smaller --{what.lower()}"
            )
    return Pool(min(settings.least_workers or most, most), most, each_cpu, each_gpu)


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps what C++ writes to stderr by its number from being shown; errors come as exceptions."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Puts this process's own handlers of signals back, which Ray replaces, also below Python's."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        with suppress(ValueError, TypeError):  # not in the main thread, or not set from Python
            signal.signal(number, handler)
