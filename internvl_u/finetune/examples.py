"""What is learned from: pictures with captions, edits, questions with answers, thoughts, in the forms that people have.

A folder of pictures with a text beside each; a folder with `before` and `after`; `metadata.jsonl` or `metadata.csv`; a
Hugging Face dataset that was saved to disk. Whatever is wrong with one is found here, before the first step.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..defaults import IMAGES
from ..files import shown
from ..folder import ENDINGS, pictures_in
from .pictures import Picture

LARGEST_TEXT = 100_000
"""Characters of a text; the released model reads 40,960 tokens."""
BEFORE, AFTER = ("before", "source", "control", "input"), ("after", "target", "output")
"""Names of the folders of edits."""
TABLES = ("metadata.jsonl", "metadata.csv")
_PLACE_OF_TRIGGER = "[trigger]"
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")
_logger = logging.getLogger("internvl_u")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Example:
    """One thing to learn: a picture to draw from a text, or an answer to write.

    `name` says where it came from. `text` is a caption, an instruction or a question, with the trigger in it;
    `references` are the pictures that come with it; `thought` is one before drawing.
    """

    name: str
    text: str
    image: Picture | None = None
    references: tuple[Picture, ...] = ()
    thought: str = ""
    answer: str | None = None

    def __post_init__(self):
        if (self.image is None) == (self.answer is None):
            found = "neither" if self.image is None else "both"
            raise ValueError(f"{self.name}: {found} of a picture to draw and an answer found, one of them expected")
        if self.thought and self.answer is not None:
            raise ValueError(
                f"{self.name}: a thought with an answer found: put it into the answer, or give a picture to draw"
            )
        if len(self.references) > IMAGES:
            raise ValueError(f"{self.name}: {len(self.references)} pictures found, {IMAGES} expected at most")


def read_examples(source: Path, trigger: str = "") -> list[Example]:
    """Returns the examples of a folder or a table, in the order of their names or rows.

    `trigger` is put before captions and instructions that do not have it, or in the place of their `[trigger]`;
    questions are left as they are. Pictures are looked at (readable, not animated), not decoded.

    Raises:
        FileNotFoundError: there is no such folder or file, or nothing to learn from in it.
        ValueError: an example is not as it should be; says which file or row, what was found and what is expected.
        ImportError: a Hugging Face dataset, and the library `datasets` is not installed.
    """
    from .tables import read_dataset, read_table

    trigger = checked_text(trigger, "--trigger", "the trigger")
    if source.is_file():
        return read_table(source, trigger)
    if not source.is_dir():
        raise FileNotFoundError(f"no folder or file {source} found: give one with pictures and their texts")
    tables = [source / name for name in TABLES if (source / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{source} has {' and '.join(TABLES)}, one of them expected: take the other out")
    if tables:
        return read_table(tables[0], trigger)
    if any((source / name).is_file() for name in _SAVED_DATASET):
        return read_dataset(source, trigger)
    before, after = (_one_of(source, names) for names in (BEFORE, AFTER))
    if before and after:
        return _edits(source, before, after, trigger)
    half = before or after
    if half:
        raise FileNotFoundError(
            f"{source} has {half.name} and none of {', '.join(AFTER if before else BEFORE)}: an edit "
            "wants the picture before and the one after, under the same name"
        )
    return _captioned(source, trigger)


def checked_text(text: object, place: str, what: str) -> str:
    """Returns a text without blanks at its ends, its lines ended as everywhere.

    Raises:
        ValueError: it is none, too long, or has characters that no text has; `place` and `what` are named.
    """
    if not isinstance(text, str):
        raise ValueError(f"{place}: {what} {shown(text)} found, a text expected")
    if len(text) > LARGEST_TEXT:
        raise ValueError(
            f"{place}: {what} has {len(text):,} characters, {LARGEST_TEXT:,} expected at most: is it another file?"
        )
    wrong = re.search("[\0\ud800-\udfff]", text)
    if wrong:
        raise ValueError(
            f"{place}: {what} has {wrong[0]!r} at character {wrong.start()}, which no text has: write it anew"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def with_trigger(text: str, trigger: str, place: str) -> str:
    """Returns a text with the trigger: in the place of `[trigger]`, or before it where it is not in it.

    Raises:
        ValueError: the text has `[trigger]`, and there is none.
    """
    if not trigger:
        if _PLACE_OF_TRIGGER in text:
            raise ValueError(f"{place}: {_PLACE_OF_TRIGGER} found, and no trigger: give one with --trigger WORD")
        return text
    if _PLACE_OF_TRIGGER in text:
        return text.replace(_PLACE_OF_TRIGGER, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        return text
    return f"{trigger}, {text}" if text else trigger


def picture_file(file: Path, folder: Path) -> Picture:
    """Returns a file's picture, looked at.

    Raises:
        ValueError: it lies outside the folder, or is no picture to learn from.
    """
    check_inside(file, folder, str(file))
    picture = Picture(str(file), file)
    _ = picture.size
    return picture


def check_inside(file: Path, folder: Path, place: str) -> None:
    """Makes sure that a file lies in a folder, links followed.

    Raises:
        ValueError: it does not.
    """
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{place} leads out of {folder}, a file inside it expected: copy the file into the folder")


def collect(items: Iterable[tuple[str, Callable[[], Made]]]) -> list[Made]:
    """Returns what is made of each item, which is a place and a function.

    Raises:
        ValueError: some could not be made: the first error, and the places of the others.
    """
    made, faults = [], []
    for place, make in items:
        try:
            made.append(make())
        except ValueError as error:
            faults.append((place, str(error)))
    if faults:
        (_, first), *others = faults
        raise ValueError(
            first + (f". {len(others)} more are wrong ({_some(place for place, _ in others)})" if others else "")
        )
    return made


def _captioned(folder: Path, trigger: str) -> list[Example]:
    files = _pictures(folder)
    texts = _texts(folder, files, trigger)
    _tell_of_others(folder, files)

    def example(file: Path) -> Example:
        text = _caption(texts[file], folder, trigger) if file in texts else trigger
        return Example(str(file), text, picture_file(file, folder))

    return collect((file.name, lambda file=file: example(file)) for file in files)


def _edits(folder: Path, before: Path, after: Path, trigger: str) -> list[Example]:
    sources, targets = _pictures(before), _pictures(after)
    by_stem = {file.stem: file for file in sources}
    for some, others, lacking in ((sources, targets, after), (targets, sources, before)):
        stems = {file.stem for file in others}
        alone = [file.name for file in some if file.stem not in stems]
        if alone:
            raise ValueError(
                f"{len(alone)} of {len(some)} pictures in {some[0].parent} have none of the same name in {lacking} "
                f"({_some(alone)}): each picture before wants one after"
            )
    texts = _texts(after, targets, "")
    _tell_of_others(after, targets)

    def example(file: Path) -> Example:
        text = _caption(texts[file], folder, trigger)
        return Example(str(file), text, picture_file(file, folder), (picture_file(by_stem[file.stem], folder),))

    return collect((file.name, lambda file=file: example(file)) for file in targets)


def _one_of(folder: Path, names: Sequence[str]) -> Path | None:
    found = [folder / name for name in names if (folder / name).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{folder} has {' and '.join(one.name for one in found)}, one of them expected: rename one")
    return found[0] if found else None


def _pictures(folder: Path) -> list[Path]:
    """Returns a folder's pictures, no two of one name."""
    try:
        files = pictures_in(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Put pictures with a .txt beside each into it, or {' and '.join((BEFORE[0], AFTER[0]))} for "
            f"edits, or {' or '.join(TABLES)}"
        ) from error
    owners: dict[str, Path] = {}
    twice = [(owners[file.stem], file) for file in files if owners.setdefault(file.stem, file) != file]
    if twice:
        first, second = twice[0]
        raise ValueError(
            f"{len(twice)} pictures in {folder} share their name with another ({first.name} and {second.name}), and so "
            "the text beside it: rename one of the two"
        )
    return files


def _texts(folder: Path, pictures: Sequence[Path], trigger: str) -> dict[Path, Path]:
    """Returns the text file of each picture: of all, or of none where a trigger stands for it."""
    texts = {file: text for file in pictures if (text := file.with_suffix(".txt")).is_file()}
    missing = [file.name for file in pictures if file not in texts]
    if not texts and trigger:
        _logger.warning("InternVL-U: %s has no texts: each picture is learned as %r", folder, trigger)
    elif missing:
        raise ValueError(
            f"{len(missing)} of {len(pictures)} pictures in {folder} have no text ({_some(missing)}): write one of the "
            f"same name beside each, such as {Path(missing[0]).stem}.txt; `ask --folder` writes them"
        )
    return texts


def _caption(file: Path, folder: Path, trigger: str) -> str:
    check_inside(file, folder, str(file))
    text = with_trigger(checked_text(read_text(file), str(file), "the text"), trigger, str(file))
    if not text:
        raise ValueError(f"{file} is empty, a text expected: write what the picture shows, or give --trigger WORD")
    return text


def read_text(file: Path) -> str:
    """Returns a small text file's text.

    Raises:
        ValueError: it is no UTF-8, or cannot be read, or is too large.
    """
    try:
        if file.stat().st_size > 4 * LARGEST_TEXT:
            raise ValueError(
                f"{file} has {file.stat().st_size:,} bytes, a text of {LARGEST_TEXT:,} characters expected at most: is "
                "it another file?"
            )
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(str(file), error) from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}): change its rights") from error


def not_utf8(place: str, error: UnicodeDecodeError) -> ValueError:
    """Returns the error of a text that is no UTF-8."""
    found = f"{error.object[error.start]:#04x}"
    return ValueError(f"{place}: byte {found} found at place {error.start}, UTF-8 expected: save it as UTF-8")


def _tell_of_others(folder: Path, pictures: Sequence[Path]) -> None:
    """Logs which files of a folder are not read."""
    stems = {file.stem for file in pictures}
    others = [
        file.name
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".")
        and file.suffix.lower() not in ENDINGS
        and not (file.suffix == ".txt" and file.stem in stems)
    ]
    if others:
        _logger.warning("InternVL-U: %d files of %s are not read (%s)", len(others), folder, _some(others))


def _some(names: Iterable[str]) -> str:
    """Returns the first five names."""
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
