"""Examples out of tables: JSON lines, CSV, and Hugging Face datasets on disk, with the columns that people use."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..files import in_short, shown
from .examples import (
    TABLES,
    Example,
    check_inside,
    checked_text,
    collect,
    not_utf8,
    picture_file,
    with_trigger,
)
from .pictures import Picture

TEXT = ("text", "prompt", "caption", "instruction", "edit_prompt")
IMAGE = ("file_name", "image", "target", "after", "edited_image")
REFERENCES = (
    "references",
    "source",
    "before",
    "images",
    "input_image",
    "original_image",
    "control",
    "conditioning_image",
)
THOUGHT, QUESTION, ANSWER = ("thought",), ("question",), ("answer",)
COLUMNS = (TEXT, IMAGE, REFERENCES, THOUGHT, QUESTION, ANSWER)
"""Names of the columns that mean the same; all others are left alone."""
MOST_ROWS = 1_000_000
LARGEST_LINE = 8 << 20
"""Bytes."""
_DELIMITERS = ",;\t"
OpenPicture = Callable[[object, str], Picture]
"""(what a cell holds, place) -> picture."""


ReadRow = tuple[str, Callable[[], Mapping[str, Any]]]
"""A row's place, and what reads its cells."""


class Row(NamedTuple):
    """A row, where it is, and how its pictures are opened."""

    place: str
    cells: Mapping[str, Any]
    picture: OpenPicture


def read_table(file: Path, trigger: str) -> list[Example]:
    """Returns the examples of a .jsonl or .csv file; pictures are named from its folder on.

    Raises:
        ValueError: a row is not as it should be, or there are too many.
        FileNotFoundError: there is none.
    """
    readers = {".jsonl": json_lines, ".csv": _csv_rows}
    if file.suffix.lower() not in readers:
        raise ValueError(f"{file} found, a folder or a file ending in {' or '.join(readers)} expected")
    opener = FileOpener(file.parent)
    try:
        rows = readers[file.suffix.lower()](file)
        named = ((place, lambda place=place, cells=cells: Row(place, cells(), opener)) for place, cells in rows)
        return _examples(named, trigger, str(file))
    except PermissionError as error:
        raise ValueError(f"{file} may not be read by this user: change its rights") from error


def read_dataset(folder: Path, trigger: str) -> list[Example]:
    """Returns the examples of a dataset that `datasets` has saved to disk, of several splits those of `train`.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: a row is not as it should be, or it cannot be read.
    """
    try:
        from datasets import load_from_disk  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{folder} is a dataset of Hugging Face's `datasets`, which is not installed: run `pip install datasets`, "
            f"or write pictures and {TABLES[0]} into a folder"
        ) from error
    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # whatever the library and Arrow behind it raise
        raise ValueError(f"{folder} is not readable as a dataset ({in_short(error)}): save it anew") from error
    if isinstance(dataset, Mapping):
        if "train" not in dataset:
            raise ValueError(f"{folder} has the splits {', '.join(dataset)}, train expected: give one split's folder")
        dataset = dataset["train"]
    # As Arrow has them: pictures stay bytes.
    stored = dataset.with_format("arrow")

    def rows() -> Iterator[tuple[str, Callable[[], Row]]]:
        for number in range(len(stored)):
            yield f"row {number}", partial(_stored_row, stored, number, folder)

    return _examples(rows(), trigger, str(folder))


def _examples(rows: Iterable[tuple[str, Callable[[], Row]]], trigger: str, source: str) -> list[Example]:
    def each() -> Iterator[tuple[str, Callable[[], Example]]]:
        for count, (place, row) in enumerate(rows):
            if count == MOST_ROWS:
                raise ValueError(f"{source} has more than {MOST_ROWS:,} rows, {MOST_ROWS:,} expected at most: split it")
            yield place.partition(" of ")[0], lambda row=row: _example(row(), trigger)

    examples = collect(each())
    if not examples:
        raise FileNotFoundError(f"{source} has no rows, one for each example expected")
    return examples


def _stored_row(stored: Any, number: int, folder: Path) -> Row:
    (cells,) = stored[number : number + 1].to_pylist()
    return Row(f"row {number} of {folder}", cells, partial(_stored_picture, stored, number, cells))


def _example(row: Row, trigger: str) -> Example:
    text, image, references, thought, question, answer = (cell(row, names) for names in COLUMNS)
    pictures = pictures_of(row, references)
    if answer is not None or question is not None:
        return _question(row, {TEXT[0]: text, THOUGHT[0]: thought}, image, pictures, question, answer)
    if image is None:
        raise ValueError(
            f"{row.place}: neither a picture to draw ({IMAGE[0]}) nor {QUESTION[0]} and {ANSWER[0]} found, but "
            f"{', '.join(map(str, row.cells)) or 'nothing'}"
        )
    words = "" if text is None else checked_text(text, row.place, "the text")
    words = with_trigger(words, trigger, row.place)
    if not words:
        raise ValueError(
            f"{row.place}: no text found, one of {', '.join(TEXT)} expected: write what the picture shows, or give "
            "--trigger WORD"
        )
    thought = "" if thought is None else checked_text(thought, row.place, "the thought")
    return Example(row.place, words, row.picture(image, row.place), pictures, thought)


def _question(
    row: Row,
    others: Mapping[str, object],
    image: object,
    pictures: tuple[Picture, ...],
    question: object,
    answer: object,
) -> Example:
    """Returns a question with its answer. Its one picture may stand where otherwise the one to draw does."""
    for name, value in ((QUESTION[0], question), (ANSWER[0], answer)):
        if value is None or not checked_text(value, row.place, f"the {name}"):
            missing = {QUESTION[0]: "an answer without a question", ANSWER[0]: "a question without an answer"}[name]
            raise ValueError(f"{row.place}: {missing} found, both expected: write it into the column {name}")
    both = [name for name, value in others.items() if value is not None]
    if both:
        raise ValueError(
            f"{row.place}: {' and '.join(both)} beside a question found, either a picture to draw or an answer "
            "expected: make two rows of it"
        )
    if image is not None:
        pictures = (row.picture(image, row.place), *pictures)
    asked, said = (checked_text(one, row.place, "the text") for one in (question, answer))
    return Example(row.place, asked, None, pictures, "", said)


def cell(row: Row, names: Sequence[str]) -> Any:
    """Returns what a row has under one of the names; None where that is nothing."""
    found = {name: row.cells[name] for name in names if row.cells.get(name) not in (None, "", [])}
    if len(found) > 1:
        raise ValueError(f"{row.place}: {' and '.join(found)} found, one of them expected: they mean the same")
    return next(iter(found.values()), None)


def pictures_of(row: Row, cell: object) -> tuple[Picture, ...]:
    if cell is None:
        return ()
    if isinstance(cell, str) and cell.lstrip().startswith("["):  # a list in a CSV file
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{row.place}: no list of names found ({in_short(error)}), one expected") from error
    return tuple(row.picture(one, row.place) for one in (cell if isinstance(cell, list) else [cell]))


class FileOpener:
    """Pictures by their names from a folder on; one that several rows name is looked at once."""

    def __init__(self, folder: Path):
        self.folder, self._known = folder, {}

    def __call__(self, cell: object, place: str) -> Picture:
        if not isinstance(cell, str) or not cell or "\0" in cell:
            raise ValueError(f"{place}: {shown(cell)} found, a picture's file name expected")
        if cell not in self._known:
            self._known[cell] = self._open(cell, place)
        return self._known[cell]

    def _open(self, name: str, place: str) -> Picture:
        file = self.folder / name
        if "\\" in name and not file.is_file():  # as Windows writes it
            file = self.folder / name.replace("\\", "/")
        try:
            check_inside(file, self.folder, f"{place}: {shown(name)}")
            if not file.is_file():
                raise ValueError(
                    f"{place}: no file {shown(name)} found in {self.folder}: put it there, or take the row out"
                )
            return picture_file(file, self.folder)
        except (OSError, RuntimeError) as error:  # a name too long, links in a circle
            raise ValueError(f"{place}: {shown(name)} cannot be read ({in_short(error)})") from error


def _stored_picture(stored: Any, number: int, cells: Mapping[str, Any], cell: object, place: str) -> Picture:
    """Returns a picture that lies in a dataset's own table; it is read there again when it is needed."""
    if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
        raise ValueError(
            f"{place}: {shown(cell)} found, a picture's bytes expected: save the dataset with its pictures in it, as "
            "`datasets` does with columns of the type Image"
        )
    column = next(name for name, value in cells.items() if _holds(value, cell))
    at = cells[column].index(cell) if isinstance(cells[column], list) else None

    def read() -> bytes:
        (again,) = stored[number : number + 1].to_pylist()
        found = again[column] if at is None else again[column][at]
        return found["bytes"]

    picture = Picture(f"{place}, {column}", read)
    _ = picture.size
    return picture


def _holds(value: object, cell: object) -> bool:
    return value is cell or (isinstance(value, list) and any(one is cell for one in value))


def json_lines(file: Path) -> Iterator[ReadRow]:
    number = 0
    with file.open("rb") as lines:
        while line := lines.readline(LARGEST_LINE + 1):
            number += 1
            place = f"line {number} of {file}"
            if len(line) > LARGEST_LINE:
                raise ValueError(f"{place} has more than {LARGEST_LINE:,} bytes: is it JSON lines, one row a line?")
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield place, partial(_json_row, line, place)


def _json_row(line: bytes, place: str) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON ({in_short(error)}), an object a line expected: mend the line") from error
    if not isinstance(row, dict):
        raise ValueError(f'{place} holds a {type(row).__name__}, an object such as {{"{IMAGE[0]}": ...}} expected')
    return row


def _csv_rows(file: Path) -> Iterator[ReadRow]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            first = lines.readline(LARGEST_LINE)
            delimiter = max(_DELIMITERS, key=first.count)
            header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
            if not {*header} & {name for names in COLUMNS for name in names}:
                raise ValueError(
                    f"{file} begins with {shown(first.strip())}, the columns' names expected, such as "
                    f"{IMAGE[0]},{TEXT[0]}"
                )
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    place = f"line {reader.line_num + 1} of {file}"
                    yield place, partial(_csv_row, cells, header, place)
        except UnicodeDecodeError as error:
            raise not_utf8(str(file), error) from error
        except csv.Error as error:
            raise ValueError(
                f"{file} is no table of CSV ({error}): put texts with quotes or commas into quotes"
            ) from error


def _csv_row(cells: list[str], header: list[str], place: str) -> dict[str, str]:
    if len(cells) > len(header):
        raise ValueError(
            f"{place}: {len(cells)} columns found, {len(header)} expected ({', '.join(header)}): put texts that hold a "
            "comma into double quotes"
        )
    return dict(zip(header, cells))
