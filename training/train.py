"""Trains the nano model from nothing, stage after stage, and writes the checkpoint.

    python -m training.train [--work FOLDER] [--out FOLDER] [--only STAGE]... [--threads N]

A stage that was stopped goes on where it was, and one that is done is passed over, so run the command again after any
break. Logs (CSV) and, where matplotlib is installed, their plot are in the work folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .plot import plot

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "internvl-u-nano"


def commands(work: Path, out: Path, threads: int, device: str) -> dict[str, list[object]]:
    """Returns each stage's module and arguments, in order."""
    words = ("--tokenizer", out / "processor")
    common = ("--work", work, "--threads", threads, "--device", device)
    # A GPU is kept busy by one process.
    workers = ("--workers", threads if device == "cpu" else 1)
    return {
        "tokenizer": ["tokenizer", "--out", out / "processor"],
        "vae": ["vae", "--out", out / "vae", *common],
        "mllm": ["mllm", *words, *common, *workers],
        "mmdit": ["mmdit", *words, "--vae", out / "vae", *common, *workers],
        "export": ["export", "--work", work, "--out", out],
    }


def main() -> int:
    """Runs the stages; returns the exit status of the one that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".dev" / "training", help="states and logs")
    parser.add_argument("--out", type=Path, default=MODEL, help="the checkpoint folder")
    parser.add_argument("--only", action="append", help="this stage alone; may be given several times")
    parser.add_argument("--threads", type=int, default=2, help="cores to use")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    stages = commands(options.work, options.out, options.threads, options.device)
    if unknown := [name for name in options.only or () if name not in stages]:
        parser.error(f"no stage {', '.join(unknown)}: there are {', '.join(stages)}")
    for name in options.only or stages:
        module, *arguments = stages[name]
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"training.{module}", *map(str, arguments)]
        if status := subprocess.run(command).returncode:
            return status
        plot(options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
