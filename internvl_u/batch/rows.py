"""The rows of a list of jobs as they stand in JSON lines, CSV or Parquet, read one after the other."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

from ..files import in_short, shown
from .storage import Store

ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Of lists; .gz and the like may follow those of text."""
LARGEST_LINE = 8 << 20
"""Bytes."""
_PACKED = (".gz", ".bz2", ".zst", ".lz4")
_DELIMITERS = ",;\t"
_AT_ONCE = 1024


class Row(NamedTuple):
    """A row: its number, its cells, or why it has none. In `loose` ones all cells are texts."""

    number: int
    cells: dict[str, Any]
    error: str = ""
    loose: bool = False


def read_rows(file: Store) -> Iterator[Row]:
    """Yields the rows of a list, numbered as its lines are (Parquet: from 1 on); what is broken is a row too.

    Raises:
        ValueError: it is no list of a kind that is known.
        OSError: it cannot be read.
    """
    name = file.root.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    if name.endswith((".jsonl", ".ndjson")):
        yield from _json_lines(file)
    elif name.endswith((".csv", ".tsv")):
        yield from _csv_rows(file)
    elif name.endswith(".parquet"):
        yield from _parquet_rows(file)
    else:
        raise ValueError(f"{file.root} found, a list of jobs ending in {', '.join(ENDINGS)} expected")


def _stream(file: Store) -> io.BufferedReader:
    return io.BufferedReader(file.filesystem.open_input_stream(file.root), 1 << 20)


def _json_lines(file: Store) -> Iterator[Row]:
    number = 0
    with _stream(file) as lines:
        while line := lines.readline(LARGEST_LINE + 1):
            number += 1
            if len(line) > LARGEST_LINE:
                yield Row(number, {}, f"more than {LARGEST_LINE:,} bytes found, one job a line expected")
                while line and not line.endswith(b"\n"):
                    line = lines.readline(LARGEST_LINE)
            elif line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield _json_row(number, line)


def _json_row(number: int, line: bytes) -> Row:
    try:
        cells = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(number, {}, f"the byte {line[error.start]:#04x} found, UTF-8 expected: save the list as UTF-8")
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f'no JSON found ({in_short(error)}), an object such as {{"prompt": ...}} expected')
    if not isinstance(cells, dict):
        return Row(number, {}, f'{shown(cells)} found, an object such as {{"prompt": ...}} expected')
    return Row(number, cells)


def _csv_rows(file: Store) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_LINE)
    with io.TextIOWrapper(_stream(file), "utf-8-sig", "surrogateescape", newline="") as lines:
        first = lines.readline(LARGEST_LINE)
        delimiter = max(_DELIMITERS, key=first.count)
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        reader = csv.reader(lines, delimiter=delimiter)
        while True:
            number = reader.line_num + 2
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(number, {}, f"no row of CSV found ({error}): put texts with quotes or commas into quotes")
                continue
            if any(cell.strip() for cell in cells):
                yield _csv_row(number, cells, header)


def _csv_row(number: int, cells: list[str], header: list[str]) -> Row:
    if len(cells) > len(header):
        return Row(
            number,
            {},
            f"{len(cells)} cells found, {len(header)} expected ({', '.join(header)}): put texts that hold a comma into "
            "double quotes",
        )
    for cell in cells:
        try:
            cell.encode()
        except UnicodeEncodeError:
            return Row(number, {}, f"{ascii(cell[:80])} found, UTF-8 expected: save the list as UTF-8")
    return Row(number, dict(zip(header, cells)), loose=True)


def _parquet_rows(file: Store) -> Iterator[Row]:
    number = 0
    try:
        with file.filesystem.open_input_file(file.root) as opened:
            for batch in parquet.ParquetFile(opened).iter_batches(_AT_ONCE):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(number, {name: _plain(value) for name, value in cells.items()})
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{file.root} is not readable as Parquet ({in_short(error)}), a list of jobs expected"
        ) from error


def _plain(value: Any) -> Any:
    """Returns a cell as JSON would have it: tables keep whole numbers with gaps as floating-point ones."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value
