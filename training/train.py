"""Trains the nano model from nothing, stage after stage, and writes the checkpoint.

    python training/train.py [--work FOLDER] [--out FOLDER] [--only STAGE]... [--threads N]

A stage that was stopped goes on where it was, and one that is done is passed over, so run the command again after any
break. Logs (CSV) and, where matplotlib is installed, their plot are in the work folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import plot

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "demo" / "internvl-u-nano"


def commands(work: Path, out: Path, threads: int, device: str) -> dict[str, list[object]]:
    """Returns each stage's script and arguments, in order."""
    words = ("--tokenizer", out / "processor")
    common = ("--work", work, "--threads", threads, "--device", device)
    # A GPU is kept busy by one process.
    workers = ("--workers", threads if device == "cpu" else 1)
    return {
        "tokenizer": ["tokenizer.py", "--out", out / "processor"],
        "vae": ["vae.py", "--out", out / "vae", *common],
        "understand": ["understand.py", *words, *common, *workers],
        "draw": ["draw.py", *words, "--vae", out / "vae", *common, *workers],
        "export": ["export.py", "--work", work, "--out", out],
    }


def main() -> int:
    """Runs the stages; returns the exit status of the one that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".dev" / "training", help="states and logs")
    parser.add_argument("--out", type=Path, default=MODEL, help="the checkpoint folder")
    parser.add_argument("--only", action="append", help="this stage alone; may be given several times")
    parser.add_argument("--threads", type=int, default=2, help="cores to use")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    stages = commands(options.work, options.out, options.threads, options.device)
    if unknown := [name for name in options.only or () if name not in stages]:
        parser.error(f"no stage {', '.join(unknown)}: there are {', '.join(stages)}")
    for name in options.only or stages:
        script, *arguments = stages[name]
        print(f"== {name}", flush=True)
        if status := subprocess.run([sys.executable, HERE / script, *map(str, arguments)]).returncode:
            return status
        plot.plot(options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
