"""How long a training step takes, timed on the device before the run, and told while it goes on."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

RUNS, PATIENCE = 5, 10.0
"""Times that a step is timed, and the seconds after which no other is begun."""
REMEMBERED = 50
"""Steps whose median is the pace."""
_UNITS = (("s", 1, 0), ("minutes", 60, 0), ("hours", 3600, 1))
"""Name, seconds, and decimals that are told."""
Range = tuple[float, float]
"""The fastest and the slowest, in seconds."""


def time_of(compute: Callable[[], object], device: torch.device, runs: int = RUNS) -> Range:
    """Returns the seconds of the fastest and of the slowest of some runs, after one that warms up."""
    begun = time.perf_counter()
    compute()
    seconds = []
    while not seconds or (len(seconds) < runs and time.perf_counter() - begun < PATIENCE):
        _wait_for(device)
        start = time.perf_counter()
        compute()
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds), max(seconds)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def scaled(times: Range, by: float) -> Range:
    """Returns both times, multiplied."""
    return times[0] * by, times[1] * by


def added(*times: Range) -> Range:
    """Returns the times of all, one after the other."""
    return sum(one[0] for one in times), sum(one[1] for one in times)


def step_time(times: Range) -> str:
    """Returns the time of a step as it is told: one number where both are written alike."""
    return f"{_between(*(f'{seconds:.2g}' for seconds in times))} s"


def duration(times: Range) -> str:
    """Returns a time as it is told, in the unit that fits the longer one: one number where both are written alike."""
    unit, size, digits = next((one for one in _UNITS[:-1] if times[1] < 120 * one[1]), _UNITS[-1])
    return f"{_between(*(f'{seconds / size:.{digits}f}' for seconds in times))} {unit}"


def _between(few: str, many: str) -> str:
    return few if few == many else f"{few} to {many}"


class Pace:
    """How fast the steps of a run go. The first one, which warms up, does not count once there are others."""

    def __init__(self):
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._first = 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Times a step."""
        start = time.perf_counter()
        yield
        if self._first:
            self._seconds.append(time.perf_counter() - start)
        else:
            self._first = time.perf_counter() - start

    def told(self, left: int) -> str:
        """Returns the median time of the latest steps, and how long so many more take."""
        usual = statistics.median(self._seconds or [self._first])
        told, rest = f"{step_time((usual, usual))} a step", usual * left
        return f"{told}, {duration((rest, rest))} left" if left else told
