"""Measures the tables of docs/performance.md anew, each in a process of its own; writes them and the plots there.

First --prepare, which writes the models that take long to write and measures nothing; then without it, on a machine
that does nothing else. What a machine lacks is left out: without --official and --comfyui their contestants. A table
that fails is named at the end, and stays as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from . import page, plots
from .models import converted, nano_model, random_model
from .random_weights import LANGUAGE, write_checkpoint
from .report import make_parser

ROOT = Path(__file__).resolve().parent.parent
LAYERS = LANGUAGE["num_hidden_layers"]
OVERHEAD = ["text", "--layers", str(LAYERS), "--width", "256"]
RELEASED = ["text", "--layers", str(LAYERS), "--dtype", "bfloat16"]
FEW = ["text", "--layers", "4", "--dtype", "bfloat16", "--contexts", "64"]
PICTURE = ["--steps", "2", "--repeats", "1", "--dtype", "bfloat16", "--sizes", "512"]
NANO = ["picture", "demo/internvl-u-nano", "--sizes", "128"]
QUICK: dict[str, list[str]] = {
    "limits": ["limits"],
    "text_nano": ["text", "--nano", "--contexts", "64", "1024", "--tokens", "64", "--repeats", "5"],
    "text_overhead": [*OVERHEAD, "--contexts", "64", "1024", "--tokens", "32", "--repeats", "3"],
    "text_one_thread": [*OVERHEAD, "--contexts", "64", "--tokens", "32", "--threads", "1"],
    "text_busy": [*OVERHEAD, "--contexts", "64", "--tokens", "32", "--busy", "1"],
    "text_released": [*RELEASED, "--contexts", "64", "--tokens", "16", "--repeats", "3"],
    "products": ["products"],
    "attention": ["attention"],
    "text_formats": [*FEW, "--formats", "int8", "Q8_0", "--tokens", "8", "--repeats", "2"],
    "step": ["step", "--layers", "4", "--sizes", "512", "--dtype", "float32", "--repeats", "3"],
    "modulation": ["modulation", "--sizes", "256", "--steps", "8", "--repeats", "3"],
    "vae": ["vae", "--sizes", "512", "--repeats", "3"],
    "picture_nano": [*NANO, "--steps", "20", "--repeats", "3"],
    "together_nano": ["together", "demo/internvl-u-nano", "--repeats", "5"],
}
FULL: dict[str, list[str]] = {
    "text_contexts": [*FEW[:-1], "64", "1024", "4096", "--tokens", "16", "--repeats", "3"],
    "text_overhead_long": [*OVERHEAD, "--contexts", "4096", "--tokens", "32", "--repeats", "3"],
    "picture": ["picture", "{released}", *PICTURE],
    "memory": ["picture", "{released}", *PICTURE, "--memory", "--only", "ours"],
    "load": ["load", "{released}"],
}
COMFYUI, OFFICIAL = ("text", "load", "vae"), ("step", "picture")


def command(name: str, arguments: argparse.Namespace) -> list[str]:
    """Returns the command line of a table, from the name of the script on."""
    script, *rest = {**QUICK, **FULL}[name]
    line = [one.format(released=arguments.work / "released") for one in rest]
    if script == "text":
        line += ["--work", str(arguments.work), *_limits(arguments.out / "limits.json", line)]
    if arguments.comfyui and script in COMFYUI:
        line += ["--comfyui", str(arguments.comfyui)]
    if arguments.official and script in OFFICIAL and "{released}" not in rest:
        line += ["--official", str(arguments.official)]
    return [script, *line]


def _limits(file: Path, line: list[str]) -> list[str]:
    """Returns what tells text.py the machine's arithmetic, as it was measured before; nothing if it was not."""
    if not file.is_file():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))["results"]
    dtype = line[line.index("--dtype") + 1] if "--dtype" in line else "float32"
    speed = max(row["TFLOP/s"] for row in rows if row["limit"].startswith(dtype))
    return ["--arithmetic", f"{speed:.3f}"]


def prepare(arguments: argparse.Namespace, names: list[str]) -> None:
    """Writes the models that the tables need, where they are not there yet."""
    nano_model(arguments.work)
    random_model(arguments.work, LAYERS, 256, "float32")
    random_model(arguments.work, LAYERS)
    few = random_model(arguments.work, 4)
    for form in ("int8", "Q8_0"):
        converted(few, arguments.work, form)
    released = arguments.work / "released"
    if any("{released}" in FULL.get(name, ()) for name in names) and not released.exists():
        write_checkpoint(released)


def measure(name: str, arguments: argparse.Namespace) -> bool:
    """Measures a table in a process of its own and tells whether it is there."""
    script, *rest = command(name, arguments)
    line = [sys.executable, "-m", f"benchmarks.{script}", *rest, "--json", str(arguments.out / f"{name}.json")]
    environment = dict(os.environ)
    if script in OFFICIAL and arguments.official_packages:
        environment["PYTHONPATH"] = str(arguments.official_packages)
    start = time.perf_counter()
    done = subprocess.run(line, cwd=ROOT, env=environment)
    print(f"== {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = make_parser(__doc__, measures=False)
    parser.add_argument("--quick", action="store_true", help="what ten minutes are enough for")
    parser.add_argument("--tables", nargs="+", choices=[*QUICK, *FULL], metavar="NAME", help="these alone")
    parser.add_argument("--prepare", action="store_true", help="write the models and measure nothing")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for the models: 10 GB, or 20")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results; None: a folder below --work")
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help="ComfyUI's folder")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="a checkout of OpenGVLab/InternVL-U")
    parser.add_argument("--official-packages", type=Path, metavar="FOLDER", help="the older packages that it needs")
    parser.add_argument("--page", type=Path, default=page.PAGE, help="what the tables are written into")
    arguments = parser.parse_args()
    arguments.out = arguments.out or arguments.work / "results"
    for name in ("work", "out", "comfyui", "official", "official_packages"):
        given = getattr(arguments, name)
        setattr(arguments, name, given.resolve() if given else None)
    names = arguments.tables or [*QUICK, *({} if arguments.quick else FULL)]
    prepare(arguments, names)
    if arguments.prepare:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not measure(name, arguments)]
    plots.write(arguments.out, arguments.page.parent / plots.PICTURES.name)
    page.write(arguments.page, arguments.out)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
