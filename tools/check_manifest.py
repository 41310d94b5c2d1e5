"""Checks what `batch` has written, without its code: `python -m tools.check_manifest OUT [JOBS.jsonl]`.

Every row has a name of its own; every file that a row names is there with its size and hash, opens, and has the row's
size, seed and prompt in it; every job of a list in JSON lines has a row. Needs pyarrow and Pillow alone.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from pyarrow import parquet


def wrong(out: Path, jobs: Path | None = None) -> Iterator[str]:
    """Yields a sentence for each thing that is not as the manifest says."""
    rows = parquet.read_table(out / "manifest.parquet").to_pylist()
    for name, count in collections.Counter(row["name"] for row in rows).items():
        if count > 1:
            yield f"{name}: {count} rows found, one expected"
    for row in rows:
        if row["status"] not in ("made", "failed"):
            yield f"{row['name']}: status {row['status']} found, made or failed expected"
        elif row["status"] == "failed" and not row["error"]:
            yield f"{row['name']}: failed without an error"
        elif row["status"] == "made":
            yield from (f"{row['name']}: {what}" for what in _wrong_file(out / row["file"], row))
    files = {
        path.relative_to(out).as_posix() for folder in ("pictures", "texts") for path in (out / folder).glob("*/*")
    }
    for file in sorted(files - {row["file"] for row in rows}):
        yield f"{file}: no row found for it"
    for name in ("manifest", "plan", "attempts"):
        if any((out / name).glob("*")):
            yield f"{name}: files found, none expected after a run that has ended"
    if jobs is not None:
        yield from _wrong_jobs(rows, jobs)


def _wrong_file(file: Path, row: dict) -> Iterator[str]:
    if not file.is_file():
        yield f"{row['file']} is not there"
        return
    data = file.read_bytes()
    if (len(data), hashlib.sha256(data).hexdigest()) != (row["bytes"], row["sha256"]):
        yield f"{row['file']} is not the file that was written"
        return
    settings = json.loads(row["settings"])
    if row["kind"] == "text":
        if data.decode() != row["text"] + "\n":
            yield f"{row['file']} does not hold the row's text"
        return
    with Image.open(file) as picture:
        picture.load()
        told = json.loads(picture.text["internvl_u"])
    if picture.size != (row["width"], row["height"]):
        yield f"{picture.size} pixels found, {row['width']} x {row['height']} expected"
    for name in ("prompt", "seed"):
        if told[name] != settings.get(name, 0) or (name == "seed" and told[name] != int(row["seed"])):
            yield f"{name} {told[name]!r} found in the picture, {settings.get(name, 0)!r} expected"


def _wrong_jobs(rows: list[dict], jobs: Path) -> Iterator[str]:
    of_row = collections.Counter(row["row"] for row in rows)
    lines = [number for number, line in enumerate(jobs.read_bytes().split(b"\n"), 1) if line.strip()]
    for number in lines:
        if of_row[number] != 1:
            yield f"line {number} of {jobs.name}: {of_row[number]} rows found, one expected"


def main(arguments: list[str] | None = None) -> int:
    """Prints what is wrong and returns whether anything is."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("out", type=Path, help="the folder of results")
    parser.add_argument("jobs", type=Path, nargs="?", help="the list, in JSON lines")
    options = parser.parse_args(arguments)
    found = list(wrong(options.out, options.jobs))
    print("\n".join(found) or "all as the manifest says")
    return min(1, len(found))


if __name__ == "__main__":
    sys.exit(main())
