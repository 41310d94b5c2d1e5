"""What a file is that cannot be read as what it should be, and whether an opened one is still as it was."""

from __future__ import annotations

import hashlib
import os
import reprlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

JUST_NOW = 60
"""Seconds in which a file that changed may still be written."""
_HEAD = 512
_KINDS = (
    ((b"version https://git-lfs",), "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"),
    ((b"<!doctype", b"<html"), "is a web page, not the file itself: a site has answered with a page instead"),
    ((b'{"error"', b'{"message"', b"access to model", b"entry not found", b"invalid username"), "is a site's error"),
    ((b"gguf",), "is a GGUF file, .safetensors expected"),
    ((b"pk\x03\x04", b"\x80\x02", b"\x80\x04"), "is a pickle of PyTorch, which is never opened: .safetensors expected"),
)


class FileState(NamedTuple):
    """A file as it was when it was opened: its name, the file behind the name, its size and time in ns."""

    path: Path
    device: int
    inode: int
    size: int
    time: int


def state_of(path: Path) -> FileState:
    """Returns what a file is now.

    Raises:
        OSError: it is not there, or may not be looked at.
    """
    stat = path.stat()
    return FileState(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def digest_of(file: Path, algorithm: str = "sha256", pause: Callable[[], object] = lambda: None, start: int = 0) -> str:
    """Returns a file's hash as hex digits, from byte `start` on: "sha256", or git's own ("git").

    `pause` may raise to end it.
    """
    name = "sha1" if algorithm == "git" else algorithm
    found = hashlib.new(name, usedforsecurity=False)
    if algorithm == "git":
        found.update(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as source:
        source.seek(start)
        while chunk := source.read(1 << 20):
            found.update(chunk)
            pause()
    return found.hexdigest()


def check_unchanged(opened: Iterable[FileState]) -> None:
    """Makes sure that files from which weights are mapped have not been written to since they were opened.

    A file that was deleted or replaced by another of its name is no change: what is mapped is still the old one.

    Raises:
        RuntimeError: names the file.
    """
    for before in opened:
        try:
            now = state_of(before.path)
        except OSError:
            continue
        if now[1:3] == before[1:3] and now != before:
            raise RuntimeError(
                f"{before.path} has been written to since it was loaded ({now.size} bytes found, {before.size} "
                "before): its weights would be of two files. Run again when it is whole, to load it anew; put new "
                "weights in place by renaming them, not by writing over the old ones."
            )


def check_same(read: Iterable[FileState]) -> None:
    """Makes sure that files that are read by their names, more than once, are still the same ones.

    Raises:
        RuntimeError: one has been written to, replaced or removed; names it.
    """
    for before in read:
        try:
            same = state_of(before.path) == before
        except OSError:
            same = False
        if not same:
            raise RuntimeError(
                f"{before.path} has been written to, replaced or removed meanwhile: nothing is kept of what was made "
                "from it. Run again when it is whole."
            )


def describe(path: Path, expected: str, error: BaseException) -> str:
    """Returns a sentence on why a file is not readable as `expected`: what it is instead, where that can be seen."""
    if isinstance(error, PermissionError):
        return f"{path} may not be read by this user: change its rights"
    try:
        with path.open("rb") as source:
            head, size = source.read(_HEAD), os.fstat(source.fileno()).st_size
    except OSError as other:
        return f"{path} cannot be read ({other.strerror or in_short(other)})"
    return f"{path} {kind_of(head, size) or f'is not readable as {expected} ({in_short(error)})'}{_recent(path)}"


def kind_of(head: bytes, size: int) -> str | None:
    """Returns what a file is that begins with `head` and has `size` bytes, if it is one of the usual mistakes."""
    if size == 0:
        return "is empty: it may not be written yet, or its download may have failed"
    start = head.lstrip().lower()
    for beginnings, what in _KINDS:
        if start.startswith(beginnings):
            return what
    if not head.strip(b"\0"):
        return "begins with zeros: it may still be being written, or its download may have been cut off"
    return None


def _recent(path: Path) -> str:
    age = time.time() - path.stat().st_mtime
    return f". It changed {age:.0f} s ago: it may still be being written." if 0 <= age < JUST_NOW else ""


def listed(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Returns a folder's files with one of these endings, in order of their names; hidden ones are none.

    macOS puts a `._model.safetensors` beside a file that it copies.

    Raises:
        RuntimeError: the folder may not be read.
    """
    try:
        names = sorted(
            name for name in os.listdir(folder) if not name.startswith(".") and name.endswith(tuple(endings))
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RuntimeError(f"{folder} cannot be listed ({error.strerror}): change its rights") from error
    return [file for name in names if (file := folder / name).is_file()]


def in_short(error: BaseException) -> str:
    """Returns an error's text, cut: it may repeat what a file says."""
    return str(error)[:300] or type(error).__name__


def shown(value: object) -> str:
    """Returns a value as an error shows it: cut, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"of {value.bit_length()} bits"
    return reprlib.repr(value)
