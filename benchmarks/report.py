"""What every benchmark says: machine, versions, command line and a table of results; with --json also as a file."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from internvl_u import __version__

LIBRARIES = ("torch", "transformers", "diffusers")
Row = Mapping[str, object]


def make_parser(description: str, *, measures: bool = True) -> argparse.ArgumentParser:
    """Returns a command line, with the option that all share that measure."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    if measures:
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device and --dtype; `resolve_dtype` reads the latter."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic; None: float32 on a CPU, else bf16"
    )


def resolve_dtype(arguments: argparse.Namespace) -> torch.dtype:
    """Returns the wished dtype, or the device's usual one."""
    return getattr(torch, arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16"))


def describe() -> dict:
    """Returns the date, the machine, the versions and the command line of this process."""
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "ram_gib": _ram_gib(), "system": platform.system()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"internvl_u": __version__, "python": platform.python_version()}
    versions |= {name: version_of(name) for name in LIBRARIES}
    date = datetime.date.today().isoformat()
    return {
        "date": date,
        "machine": machine,
        "versions": versions,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def show(rows: Sequence[Row], file: Path | None = None, **settings) -> None:
    """Prints where and how the rows were measured, then the rows as a table; with `file` also writes all of it."""
    said = describe() | ({"settings": settings} if settings else {})
    for key, value in said.items():
        print(f"{key}: {_joined(value)}")
    print()
    print(format_table(rows))
    if file is not None:
        file.write_text(json.dumps(said | {"results": list(rows)}, indent=1) + "\n", encoding="utf-8")


def format_table(rows: Sequence[Row]) -> str:
    """Returns the rows as a table in plain text, a column for each key in the order of its first use."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *[[_cell(row.get(key, "")) for key in keys] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _joined(value) -> str:
    return ", ".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, dict) else str(value)


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def version_of(name: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
