"""Measures how long a checkpoint folder takes to load and what memory that needs, each way in a process of its own.

Weights are mapped from disk: "loaded" is ready for use with hardly a byte read, "read" has touched every weight once.
Memory is the largest resident set, and of it what is the process's own at the end (without mapped files). The file
cache makes a second run faster: --repeats shows the spread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from internvl_u.load import load_mllm, load_mmdit, load_vae

from .host import pack_module, use_comfyui
from .memory import MIB, memory
from .report import make_parser, show
from .timing import median

Parts = Iterable[torch.nn.Module]


def load_library(root: Path) -> Parts:
    """Returns the three parts as the library loads them."""
    return load_mmdit(root), load_mllm(root), load_vae(root)


def make_native(folder: Path) -> Callable[[Path], Parts]:
    """Returns what loads the three parts as the nodes do."""
    use_comfyui(folder)
    native = pack_module("native.load")

    def load(root: Path) -> Parts:
        model, language, vae = native.load(root)
        return model.model.diffusion_model, language.patcher.model, vae.first_stage_model

    return load


def measure(load: Callable[[Path], Parts], root: Path) -> dict[str, float]:
    """Returns seconds and MiB of loading in this process; what was imported before counts as "before"."""
    before, own_before = memory("VmRSS"), memory("RssAnon")
    start = time.perf_counter()
    parts = load(root)
    loaded, peak, own = time.perf_counter() - start, memory("VmHWM"), memory("RssAnon")
    for part in parts:
        for tensor in part.state_dict().values():
            tensor.flatten()[:: _page(tensor)].sum()
    return {
        "loaded s": loaded,
        "read s": time.perf_counter() - start,
        "before MiB": before,
        "own before MiB": own_before,
        "peak loaded MiB": peak,
        "own loaded MiB": own,
        "peak read MiB": memory("VmHWM"),
        "own read MiB": memory("RssAnon"),
    }


def measure_apart(command: list[str], repeats: int) -> dict[str, float]:
    """Returns the medians of `measure` in fresh processes."""
    found = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.load", *command], stdout=subprocess.PIPE, check=True, text=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: round(median([one[key] for one in found]), 3) for key in found[0]}


def _page(tensor: torch.Tensor) -> int:
    return max(1, 4096 // tensor.dtype.itemsize)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a checkpoint folder, for example of random_weights")
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help="also load through the nodes, in this ComfyUI")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each way")
    parser.add_argument("--way", choices=("library", "comfyui"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        load = load_library if arguments.way == "library" else make_native(arguments.comfyui)
        print(json.dumps(measure(load, arguments.model)))
        return
    rows = []
    for way in ("library", "comfyui") if arguments.comfyui else ("library",):
        command = [str(arguments.model), "--way", way]
        command += ["--comfyui", str(arguments.comfyui)] if way == "comfyui" else []
        rows.append({"way": way, **measure_apart(command, arguments.repeats)})
    size = sum(file.stat().st_size for file in arguments.model.rglob("*.safetensors"))
    show(rows, arguments.json, files_mib=round(size / MIB))


if __name__ == "__main__":
    main()
