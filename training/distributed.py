"""Data-parallel training on a CPU: one process per core is faster than one process with several threads."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn

Train = Callable[[argparse.Namespace, int], None]


def launch(train: Train, options: argparse.Namespace) -> None:
    """Runs `train(options, rank)` in `options.workers` processes that can average gradients, and waits for all."""
    if options.workers == 1:
        set_up_process(options.threads)
        return train(options, 0)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run_worker, (train, options, Path(folder) / "rendezvous"), options.workers)


def set_up_process(threads: int) -> None:
    """Sets the threads that torch uses in this process, and has its progress shown."""
    torch.set_num_threads(threads)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("training").setLevel(logging.INFO)


def _run_worker(rank: int, train: Train, options: argparse.Namespace, rendezvous: Path) -> None:
    set_up_process(max(1, options.threads // options.workers))
    if hasattr(os, "sched_setaffinity") and options.threads == options.workers:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    distributed.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=options.workers)
    try:
        train(options, rank)
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
