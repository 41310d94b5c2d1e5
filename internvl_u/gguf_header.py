"""The header of a GGUF file: what it says is data of strangers, and is checked against the file before it is used.

Nothing is made or gone through that the file's own size does not bear out, and a file of another model is left at the
first thing that tells so. The form: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .dequantize import FORMATS, row_bytes
from .files import describe, in_short, shown

ARCHITECTURE = "internvl_u"
"""What our files say in `general.architecture`."""
DESCRIPTION = "internvl_u.description"
"""Key of what the checkpoint folder's JSON files say, as JSON."""
MAGIC = b"GGUF"
VERSIONS = (2, 3)
PLAIN = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""Bytes of a value of the dtypes that are no blocks."""
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"}
TYPES |= {13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"}
TYPES |= {22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 30: "BF16"}
"""ggml's numbers of dtypes, so that one that we do not read is called by its name."""
_LARGEST_HEADER = 100 << 20
_MOST = 100_000
_AXES = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_SHORTEST_ENTRY, _SHORTEST_TENSOR = 13, 32
"""Bytes of an entry of the metadata, and of a tensor's, with an empty name."""


class StoredTensor(NamedTuple):
    """A tensor of the file: its dtype or block format, its shape, and where its bytes begin and how many there are."""

    form: str
    shape: tuple[int, ...]
    start: int
    size: int


class Header(NamedTuple):
    """What a GGUF file says of itself: its architecture, our description of it (None in others' files), its tensors.

    Of another architecture the rest of the header is not read.
    """

    architecture: str
    description: str | None
    tensors: dict[str, StoredTensor]


def read_header(file: Path) -> Header:
    """Returns a GGUF file's header; its tensors lie inside the file.

    Raises:
        RuntimeError: the file cannot be read, is no GGUF file, or is not whole; says what it is.
    """
    try:
        with file.open("rb") as source:
            return _read(_Reader(source, os.fstat(source.fileno()).st_size))
    except _TooShort as error:
        raise RuntimeError(
            f"{file} is shorter than its header says ({error}): it may still be being written, or have been cut off. "
            "Wait until it is whole, or go on with its download."
        ) from error
    except _Malformed as error:
        raise RuntimeError(f"{file} is not readable as GGUF ({in_short(error)})") from error
    except (OSError, ValueError) as error:
        raise RuntimeError(describe(file, "GGUF", error)) from error


class _Malformed(ValueError):
    """A header that begins as one of GGUF and contradicts itself."""


class _TooShort(ValueError):
    """A file that ends before what it says."""


class _Reader:
    """Reads numbers and texts, and knows how much is left."""

    def __init__(self, source: BinaryIO, size: int):
        self.source, self.size = source, size
        self.place = 0

    def take(self, count: int) -> bytes:
        self.reserve(count)
        self.place += count
        data = self.source.read(count)
        if len(data) < count:
            raise _TooShort(f"it has become shorter than {self.size} bytes")
        return data

    def skip(self, count: int) -> None:
        self.reserve(count)
        self.place += count
        self.source.seek(self.place)

    def reserve(self, count: int) -> None:
        """Makes sure that so many bytes are left."""
        if count > self.size - self.place:
            raise _TooShort(f"{self.size} bytes found, {shown(self.place + count)} expected at least")
        if self.place + count > _LARGEST_HEADER:
            raise _Malformed(f"a header of more than {_LARGEST_HEADER} bytes")

    def number(self, code: str = "Q") -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Malformed(f"a text that is no UTF-8: {error}") from error

    def skip_value(self, kind: int) -> None:
        if kind in _SCALARS:
            self.skip(struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _TEXT:
            self.skip(self.number())
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number()
            if inner in _SCALARS:
                self.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            elif inner == _TEXT:
                self.reserve(8 * count)
                if count > 10 * _MOST:
                    raise _Malformed(f"an array of {count} texts")
                for _ in range(count):
                    self.skip(self.number())
            else:
                raise _Malformed(f"an array of values of kind {inner}")
        else:
            raise _Malformed(f"a value of kind {kind}")


def _read(reader: _Reader) -> Header:
    if reader.source.read(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    reader.place = len(MAGIC)
    version = reader.number("I")
    if version not in VERSIONS:
        raise _Malformed(f"version {version} found, {' or '.join(map(str, VERSIONS))} expected")
    tensors, entries = reader.number(), reader.number()
    reader.reserve(_SHORTEST_TENSOR * tensors + _SHORTEST_ENTRY * entries)
    if max(tensors, entries) > _MOST:
        raise _Malformed(f"{tensors} tensors and {entries} entries found, {_MOST} expected at most")
    texts: dict[str, str] = {}
    alignment = 32
    for _ in range(entries):
        key, kind = reader.text(), reader.number("I")
        if kind == _TEXT and key in ("general.architecture", DESCRIPTION):
            texts[key] = reader.text()
            if texts.get("general.architecture", ARCHITECTURE) != ARCHITECTURE:
                return Header(texts["general.architecture"], None, {})
        elif key == "general.alignment" and _SCALARS.get(kind) == "I":
            alignment = reader.number("I")
        else:
            reader.skip_value(kind)
    if not 1 <= alignment <= 1 << 20:
        raise _Malformed(f"an alignment of {alignment} bytes")
    return Header(
        texts.get("general.architecture", ""), texts.get(DESCRIPTION), _read_tensors(reader, tensors, alignment)
    )


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, StoredTensor]:
    stated: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(count):
        name, axes = reader.text(), reader.number("I")
        if name in stated or axes > _AXES:
            raise _Malformed(f"{name[:100]!r} stands there twice" if name in stated else f"{name[:100]!r}: {axes} axes")
        shape = tuple(reader.number() for _ in range(axes))[::-1]  # the fastest axis comes first in the file
        kind = reader.number("I")
        stated[name] = (TYPES.get(kind, f"dtype {kind}"), shape, reader.number())
    data = -(-reader.place // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, (form, shape, offset) in stated.items():
        size = _stored_bytes(name, form, shape)
        if offset % min(alignment, 8):  # what numbers are read from must lie at a multiple of their size
            raise _Malformed(f"{name[:100]!r} at {offset}, a multiple of {alignment} expected")
        tensors[name] = StoredTensor(form, shape, data + offset, size)
    end = max((one.start + one.size for one in tensors.values()), default=data)
    if end > reader.size:
        raise _TooShort(f"{reader.size} bytes found, {shown(end)} expected")
    return tensors


def _stored_bytes(name: str, form: str, shape: tuple[int, ...]) -> int:
    if form in PLAIN:
        return math.prod(shape) * PLAIN[form]
    if form not in FORMATS:
        return 0  # refused by its name when the tensors are opened
    try:
        return math.prod(shape[:-1]) * row_bytes(shape[-1] if shape else 1, form)
    except RuntimeError as error:
        raise _Malformed(f"{name[:100]!r}: {error}") from error
