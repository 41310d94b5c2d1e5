"""`python -m internvl_u batch`: its options, and what it says. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..console import check_packages, check_places, text_argument

if TYPE_CHECKING:
    from .settings import BatchSettings

PACKAGES = ("ray", "pyarrow", "pandas")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `batch`, but for those of the model."""
    add = parser.add_argument
    add(
        "jobs",
        type=text_argument,
        metavar="JOBS",
        help="list of jobs, a picture or a text each: .jsonl, .csv or .parquet, a path or a URI such as s3://...",
    )
    add(
        "--out",
        type=text_argument,
        required=True,
        metavar="DIR",
        help="folder of results, a path or a URI; the same command again makes what is missing in it",
    )
    add("--workers", type=int, metavar="N", help="processes with a model each (default: one a GPU, else one)")
    add(
        "--least-workers",
        type=int,
        metavar="N",
        help="as many to begin with; more are started while there is work, up to --workers (default: all)",
    )
    add("--cpus", type=float, metavar="X", help="CPUs of a worker (default: 1 with a GPU, else all shared out)")
    add("--gpus", type=float, metavar="X", help="GPUs of a worker, also 0.5 (default: 1 where there are GPUs)")
    add(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="jobs made at once, where they are alike; with 1 pictures are those of `draw`, bit for bit (default 1)",
    )
    add("--offload", action="store_true", help="keep one part of the model on a GPU at a time (default: all of them)")
    add("--address", metavar="A", help="Ray cluster to join: auto, or HOST:PORT (default: this machine alone)")
    add("--verify", action="store_true", help="hash what is there, and make anew what has changed")
    add("--fail-fast", action="store_true", help="end with the first job that fails (default: record it and go on)")


def settings_of(options: argparse.Namespace) -> BatchSettings:
    """Returns the settings that options say.

    Raises:
        ValueError: an option is out of range.
        ImportError: a package is missing.
    """
    check_packages("batch", PACKAGES, '"ray[data]"')
    from .settings import BatchSettings

    check_places(options.model, options.mllm, options.vae)
    return BatchSettings(
        options.jobs,
        options.model,
        options.out,
        options.mllm,
        options.vae,
        tuple(options.lora),
        options.dtype,
        options.device,
        options.workers,
        options.least_workers,
        options.cpus,
        options.gpus,
        options.batch,
        options.address,
        options.offload,
        options.verify,
        options.fail_fast,
    )


def run(options: argparse.Namespace) -> str:
    """Makes a list of jobs as options say and returns the name of the manifest.

    Raises:
        RuntimeError: jobs have failed, or a disk is full; the others are made.
    """
    settings = settings_of(options)
    from tqdm import tqdm

    from .driver import Run
    from .manifest import MANIFEST
    from .ray_pool import pool

    with tqdm(unit="job", desc="batch", delay=1) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            summary = Run(settings, pool, say, show).make()
        except (KeyboardInterrupt, SystemExit):
            say("what was made is kept; the same command goes on from there")
            raise
    manifest = f"{settings.out.rstrip('/')}/{MANIFEST}"
    for sentence in summary.sentences(manifest):
        say(sentence)
    if trouble := summary.trouble(manifest):
        raise RuntimeError(trouble)
    return manifest


def say(line: str) -> None:
    """Tells what goes on, on stderr."""
    from tqdm import tqdm

    tqdm.write(f"internvl_u: {line}", file=sys.stderr)
