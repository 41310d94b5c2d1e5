"""Several processes that train one model together, each on a core of its own: faster than one with several threads."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn

Work = Callable[[argparse.Namespace, int], None]


def start(work: Work, options: argparse.Namespace) -> None:
    """Runs `work(options, rank)` in `options.workers` processes that can average gradients, and waits for all."""
    if options.workers == 1:
        torch.set_num_threads(options.threads)
        return work(options, 0)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_join, (work, options, Path(folder) / "meeting"), options.workers)


def _join(rank: int, work: Work, options: argparse.Namespace, meeting: Path) -> None:
    torch.set_num_threads(max(1, options.threads // options.workers))
    if hasattr(os, "sched_setaffinity") and options.threads == options.workers:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=options.workers)
    try:
        work(options, rank)
    finally:
        distributed.destroy_process_group()


def average_gradients(model: nn.Module) -> None:
    """Gives each process the mean of all processes' gradients; alone, leaves them as they are."""
    if not distributed.is_initialized():
        return
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
