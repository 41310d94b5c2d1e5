"""Which model a result is of, told by what its files hold, wherever they lie and whenever they were copied."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..defaults import FOLDERS
from ..places import Found

_PIECES, _PIECE = 16, 1 << 16
"""Of each file: so many pieces of so many bytes."""


def model_digest(files: Found, loras: Sequence[tuple[Path, float]], dtype: str) -> str:
    """Returns hex digits that two models share only if they are the same, with the same LoRAs, computed alike.

    Of each file counts its name, its size and 16 pieces of 64 KiB all over it: reading it whole would take minutes,
    and two trainings differ everywhere.

    Raises:
        OSError: a file cannot be read.
    """
    found = hashlib.sha256(dtype.encode())
    for place in dict.fromkeys(files):
        for name, file in _files(place):
            found.update(b"\0" + os.fsencode(name) + _sample(file))
    for file, strength in loras:
        found.update(f"\0lora {strength!r}".encode() + _sample(file))
    return found.hexdigest()


def _files(place: Path) -> Iterator[tuple[str, Path]]:
    if place.is_file():
        yield place.name, place
        return
    for folder in FOLDERS:
        for file in sorted((place / folder).rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                yield file.relative_to(place).as_posix(), file


def _sample(file: Path) -> bytes:
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as source:
        for piece in range(_PIECES):
            source.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
            found.update(source.read(_PIECE))
    return found.digest()
