"""Timing: contestants take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns how long one call takes, in seconds, with what it left running on a GPU."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


@torch.inference_mode()
def take_turns(
    contestants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Returns the seconds of each call of each contestant; the calls to warm up are not among them."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(warm_up + repeats):
        for name, run in contestants.items():
            taken = seconds(run, device)
            if i >= warm_up:
                times[name].append(taken)
    return times


def median(times: list[float]) -> float:
    """Returns the median."""
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
