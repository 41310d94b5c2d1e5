"""Lists of prompts and of guidance scales out of a text that people type or export from a table."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .defaults import Guidance
from .files import shown

PROMPT, NAME, SEED = COLUMNS = ("prompt", "name", "seed")
"""Columns of a table, and keys of a JSON object, that are read; only the first must be there."""
LONGEST_NAME = 60
LARGEST_SCALE, MOST_SCALES, MOST_PROMPTS, LARGEST_SEED = 100.0, 400, 10_000, 2**64 - 1
_DELIMITERS = ",;\t"
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
"""What Windows takes for devices, with any ending."""


class Prompt(NamedTuple):
    """A prompt, a file's name without ending for what is drawn of it, and a seed."""

    prompt: str
    name: str
    seed: int


def read_prompts(text: str) -> list[Prompt]:
    """Returns the prompts of a text: one a line, CSV with a column `prompt`, or a JSON list of texts or objects.

    A `name` that is not given is made of the prompt. Names are safe in every file system, and no two are equal, in
    capitals or not. A `seed` that is not given is the prompt's place in the list, from 0.

    Raises:
        ValueError: there are none, or too many, or one is not as it should be; says which line or entry.
    """
    text = text.lstrip("\ufeff").strip()
    if text.startswith(("[", "{")):
        rows = list(_json_rows(text))
    else:
        header = _header(text)
        rows = _table_rows(text, *header) if header else list(_line_rows(text))
    if not 1 <= len(rows) <= MOST_PROMPTS:
        raise ValueError(f"{len(rows)} prompts found, 1 to {MOST_PROMPTS} expected: write one a line")
    seeds = [_seed(row, place, i) for i, (place, row) in enumerate(rows)]
    names = _unique(file_name(row.get(NAME) or row[PROMPT]) for _, row in rows)
    return [Prompt(row[PROMPT], name, seed) for (_, row), name, seed in zip(rows, names, seeds, strict=True)]


def read_scales(text: str, name: str) -> list[float]:
    """Returns the numbers of a text, with commas, semicolons, blanks or line ends between them.

    Raises:
        ValueError: there are none, or one is no number from 0 to 100.
    """
    found = []
    for part in re.split(r"[,;\s]+", text.strip()):
        try:
            scale = float(part)
        except ValueError:
            scale = math.nan
        if not 0 <= scale <= LARGEST_SCALE:
            raise ValueError(f"{name}: {shown(part)} found, numbers from 0 to 100 such as 4.5, 3.5, 2 expected")
        found.append(scale)
    return found


def scale_grid(all_cfg: Sequence[float], part_cfg: Sequence[float]) -> list[Guidance]:
    """Returns each pair of scales, in the order of a grid: a row for each `part_cfg`, a column for each `all_cfg`.

    Raises:
        ValueError: there are more than 400.
    """
    grid = [Guidance(words, pictures) for pictures in part_cfg for words in all_cfg]
    if len(grid) > MOST_SCALES:
        raise ValueError(f"{len(grid)} pairs of scales found, {MOST_SCALES} expected at most: each draws a picture")
    return grid


def file_name(text: str) -> str:
    """Returns a file's name, without ending, made of the first words of a text; letters of any script stay."""
    name = re.sub(r"[^\w-]+", "_", text)[: LONGEST_NAME + 1]
    if len(name) > LONGEST_NAME:
        name = name[:LONGEST_NAME].rpartition("_")[0] or name[:LONGEST_NAME]
    name = name.strip("_-")
    return f"{name}_" if name.lower() in _RESERVED else name or "picture"


def _unique(names: Iterable[str]) -> list[str]:
    taken: set[str] = set()
    result = []
    for name in names:
        count, free = 2, name
        while free.lower() in taken:
            count, free = count + 1, f"{name}_{count}"
        taken.add(free.lower())
        result.append(free)
    return result


def _seed(row: dict[str, str], place: str, index: int) -> int:
    text = row.get(SEED) or str(index)
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST_SEED)) and int(text) <= LARGEST_SEED):
        raise ValueError(f"{place}: seed {shown(text)} found, a whole number from 0 to {LARGEST_SEED} expected")
    return int(text)


Rows = Iterable[tuple[str, dict[str, str]]]
"""Each row with its place, such as "line 3"."""


def _line_rows(text: str) -> Rows:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"line {number}", {PROMPT: line.strip()}


def _header(text: str) -> tuple[list[str], str] | None:
    """Returns a table's columns and what stands between them; None for a text whose first line names no `prompt`."""
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    columns = [cell.strip().strip('"').lower() for cell in first.split(delimiter)]
    return (columns, delimiter) if PROMPT in columns and all(re.fullmatch(r"\w*", one) for one in columns) else None


def _table_rows(text: str, header: list[str], delimiter: str) -> list[tuple[str, dict[str, str]]]:
    rows = []
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        for number, cells in enumerate(reader):
            if number and any(cell.strip() for cell in cells):
                place = f"line {reader.line_num}"
                if len(cells) > len(header):
                    raise ValueError(
                        f"{place}: {len(cells)} columns found, {len(header)} expected ({', '.join(header)}): put texts "
                        "that hold a comma into double quotes"
                    )
                row = {key: cell.strip() for key, cell in zip(header, cells, strict=False) if key in COLUMNS}
                rows.append((place, _with_prompt(place, row)))
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num}: {error}, a table with columns {', '.join(header)} expected"
        ) from error
    return rows


def _json_rows(text: str) -> Rows:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{where}no JSON found ({error}), a list of texts or of objects expected") from error
    if not isinstance(entries, list):
        raise ValueError(f"JSON of {type(entries).__name__} found, a list of texts or of objects expected")
    for number, entry in enumerate(entries, 1):
        place = f"entry {number}"
        if isinstance(entry, str):
            entry = {PROMPT: entry}
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: {type(entry).__name__} found, a text or an object with a prompt expected")
        row = {}
        for key in COLUMNS:
            value = entry.get(key)
            if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
                raise ValueError(f"{place}: {key} of type {type(value).__name__} found, a text expected")
            row[key] = "" if value is None else str(value).strip()
        yield place, _with_prompt(place, row)


def _with_prompt(place: str, row: dict[str, str]) -> dict[str, str]:
    if not row.get(PROMPT):
        raise ValueError(f"{place}: no prompt found, one expected in each row of a table and each entry of a list")
    return row
