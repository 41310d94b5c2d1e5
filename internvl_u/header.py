"""The header of a safetensors file: what it says is data of strangers, and is checked before it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .files import describe

LARGEST_HEADER = 100 << 20
"""Bytes; what the safetensors library accepts."""


def read_header(file: Path) -> tuple[dict, int]:
    """Returns a safetensors file's header and where its data begins, in bytes.

    Entries have a dtype, a shape of whole numbers from 0 and offsets within the file; metadata are texts.

    Raises:
        RuntimeError: the file cannot be read, or is no safetensors file; says what it is.
    """
    try:
        text, start, size = header_bytes(file)
        header = json.loads(text)
        _check_header(header, size - start)
    except (OSError, ValueError, RecursionError) as error:
        raise RuntimeError(describe_weights(file, error)) from error
    return header, start


def check_header(file: Path) -> None:
    """Lets the safetensors library read a file's header: shapes, dtypes and offsets fit each other and the file.

    Raises:
        SafetensorError, OSError: they do not, or it cannot be read.
    """
    with safe_open(file, framework="pt"):
        pass


def metadata_of(file: Path) -> dict[str, str]:
    """Returns the metadata in a safetensors file's header, through the safetensors library.

    Raises:
        RuntimeError: the file cannot be read, or is no safetensors file; says what it is.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeError(describe_weights(file, error)) from error


def describe_weights(file: Path, error: BaseException) -> str:
    """Returns a sentence on why a safetensors file is not readable; tells a file that is too short from a wrong one."""
    try:
        with file.open("rb") as source:
            start, size = source.read(9), os.fstat(source.fileno()).st_size
            stated = 8 + int.from_bytes(start[:8], "little")
            if start[8:] == b"{" and stated <= size:
                stated += max(_ends(json.loads(b"{" + source.read(stated - 9))))
        if start[8:] == b"{" and size < stated:
            return (
                f"{file} is shorter than its header says ({size} bytes found, {stated} expected): it may still "
                "be being written, or have been cut off. Wait until it is whole, or go on with its download."
            )
    except (OSError, ValueError, RecursionError):
        pass  # it has no such header
    return describe(file, "safetensors", error)


def header_bytes(file: Path) -> tuple[bytes, int, int]:
    """Returns the header's bytes as they stand, where the data begins, and the file's size.

    Raises:
        OSError, ValueError: the file cannot be read, or is too short for what it says.
    """
    with file.open("rb") as source:
        length, size = int.from_bytes(source.read(8), "little"), os.fstat(source.fileno()).st_size
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes found in a file of {size}")
        return source.read(length), 8 + length, size


def _check_header(header: object, size: int) -> None:
    if not isinstance(header, dict):
        raise ValueError(f"a header that is a {type(header).__name__} found, an object expected")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata found that are no texts by name")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError(f"{name[:100]!r} has no dtype")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not isinstance(offsets, list) or not _whole_numbers(shape) or not _whole_numbers(offsets):
            raise ValueError(f"{name[:100]!r} has no shape and offsets of whole numbers")
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
            raise ValueError(f"{name[:100]!r} is at {offsets} of {size} bytes")


def _ends(header: object) -> Iterator[int]:
    entries = header.values() if isinstance(header, dict) else ()
    for entry in entries:
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and _whole_numbers(offsets):
            yield from offsets


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
