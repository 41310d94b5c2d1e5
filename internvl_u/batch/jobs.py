"""One job of a list: a picture or a text, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from ..defaults import ANSWER_TOKENS, IMAGES, THOUGHT_TOKENS
from ..files import shown
from ..generation import GenerationConfig
from ..images import ReferenceSizes, drawn_size
from ..request import ImageRequest
from ..tasks import AS_WRITTEN, question_for
from ..together import Question
from .rows import Row

PICTURE, TEXT = "picture", "text"
NAMES, IMAGE_COLUMNS = ("id", "name"), ("images", "image")
LONGEST_NAME = 120
"""Bytes: a file's name must take an ending and a sign that it is not whole."""
_FORBIDDEN = set('/\\<>:"|?*') | set(map(chr, range(32)))
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")
Check = Callable[[str, object, bool], object]


@dataclass(frozen=True)
class Job:
    """What one row asks for. `settings` has what the row states and nothing else; `images` are names of files."""

    name: str
    row: int
    kind: str
    settings: Mapping[str, Any]
    images: tuple[str, ...] = ()

    def digest(self, model: str, inputs: Sequence[str]) -> str:
        """Returns the SHA-256, in hex digits, of all that the result depends on: the model and the images by theirs."""
        told = {"kind": self.kind, "settings": dict(self.settings), "model": model, "inputs": list(inputs)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def shard(self) -> str:
        """The folder among 256 that its file lies in, so that none holds too many."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:2]

    @property
    def file(self) -> str:
        """The name of its file, from the folder of results on."""
        folder, ending = ("pictures", "png") if self.kind == PICTURE else ("texts", "txt")
        return f"{folder}/{self.shard}/{self.name}.{ending}"

    @property
    def thinks(self) -> bool:
        """Whether a thought is to be written before the picture is drawn."""
        return bool(self.settings.get("think"))

    @property
    def config(self) -> GenerationConfig:
        """How its text is written: the answer, or the thought."""
        tokens = ANSWER_TOKENS if self.kind == TEXT else THOUGHT_TOKENS
        return GenerationConfig(self.settings.get("max_new_tokens", tokens), beams=self.settings.get("beams", 1))

    def request(self, images: tuple[Image.Image, ...] = ()) -> ImageRequest:
        """Returns what to draw; `images` are the opened ones."""
        given = {name: value for name, value in self.settings.items() if name in _OF_REQUEST}
        return ImageRequest(**given, images=images)

    def question(self, images: tuple[Image.Image, ...] = ()) -> Question:
        """Returns what to answer; `images` are the opened ones."""
        asked = question_for(self.settings.get("task", AS_WRITTEN), self.settings.get("question", ""))
        return Question(asked, images, self.settings.get("system"), self.config)

    def packed(self) -> dict[str, Any]:
        """Returns the job as JSON has it; `Job(**packed)` is the same one."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def read_job(row: Row) -> Job:
    """Returns the job of a row.

    Raises:
        ValueError: it is none; the sentence says what was found and what is expected.
    """
    cells, name = _filled(row), job_name(row)
    kind = _kind(cells)
    known = _PICTURE if kind == PICTURE else _TEXT
    settings = {}
    for column, value in cells.items():
        if column in known:
            settings[column] = known[column](column, value, row.loose)
        elif column in _PICTURE or column in _TEXT:
            raise ValueError(f"{column} found in the row of a {kind}, none expected: it does not belong there")
    job = Job(name, row.number, kind, settings, _images(cells))
    _check(job)
    return job


def job_name(row: Row) -> str:
    """Returns the name of a row's job, which is that of its file: the one in the row, or one of the row's number.

    Raises:
        ValueError: the row cannot be read, or its name is none for a file.
    """
    cells = _filled(row)
    given = [cells[name] for name in NAMES if name in cells]
    if len(given) > 1:
        raise ValueError("id and name found, one of them expected: they mean the same")
    if not given:
        return f"row-{row.number:08d}"
    if isinstance(given[0], bool) or not isinstance(given[0], (str, int)):
        raise ValueError(f"id {shown(given[0])} found, a text expected")
    name = str(given[0])
    if len(_utf8("id", name)) > LONGEST_NAME:
        raise ValueError(f"an id of {len(name.encode())} bytes found, {LONGEST_NAME} expected at most")
    if wrong := sorted(_FORBIDDEN & set(name)):
        raise ValueError(f"id {shown(name)} found, one without {' '.join(map(ascii, wrong))} expected: it names a file")
    if name[0] in ".#" or name != name.strip() or name.endswith("."):
        raise ValueError(
            f"id {shown(name)} found, one that begins with neither . nor # and ends with neither a full stop nor a "
            "space expected: it names a file"
        )
    return name


def unknown_columns(cells: Mapping[str, Any]) -> set[str]:
    """Returns the columns that no job knows."""
    return {str(name) for name in cells} - {*_PICTURE, *_TEXT, *NAMES, *IMAGE_COLUMNS}


def _filled(row: Row) -> dict[str, Any]:
    if row.error:
        raise ValueError(row.error)
    return {name: value for name, value in row.cells.items() if value not in (None, "", [])}


def _kind(cells: Mapping[str, Any]) -> str:
    asked = [name for name in ("question", "task") if name in cells]
    if asked and "prompt" in cells:
        raise ValueError(f"prompt and {asked[0]} found, one of them expected: make two rows of it")
    if not asked and "prompt" not in cells:
        raise ValueError(f"neither prompt nor question found, but {', '.join(map(str, cells)) or 'nothing'}")
    return TEXT if asked else PICTURE


def _check(job: Job) -> None:
    if job.kind == TEXT:
        job.question()
        return
    request = job.request()
    drawn_size(*(16 if side is None else side for side in (request.width, request.height)))
    ReferenceSizes().limited(request.reference_size)
    if job.thinks and request.thought:
        raise ValueError("think and thought found, one of them expected")
    _ = job.config


def _images(cells: Mapping[str, Any]) -> tuple[str, ...]:
    given = [cells[name] for name in IMAGE_COLUMNS if name in cells]
    if len(given) > 1:
        raise ValueError("images and image found, one of them expected: they mean the same")
    if not given:
        return ()
    names = given[0]
    if isinstance(names, str) and names.lstrip().startswith("["):  # a list in a CSV file
        try:
            names = json.loads(names)
        except (ValueError, RecursionError):
            raise ValueError(f'images {shown(names)} found, a list such as ["a.png", "b.png"] expected') from None
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"images with {shown(name)} found, names of files expected")
        _utf8("images", name)
    if len(names) > IMAGES:
        raise ValueError(f"{len(names)} images found, {IMAGES} expected at most")
    return tuple(names)


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {ascii(text[:80])} found, UTF-8 expected: it holds half a character") from None


def _text(name: str, value: object, loose: bool) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} {shown(value)} found, a text expected")
    _utf8(name, value)
    return value


def _whole(name: str, value: object, loose: bool) -> int:
    if loose and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} {shown(value)} found, a whole number expected")


def _real(name: str, value: object, loose: bool) -> float:
    if loose and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"{name} {shown(value)} found, a number expected")


def _yes(name: str, value: object, loose: bool) -> bool:
    if loose and isinstance(value, str) and value.strip().lower() in (*_YES, *_NO):
        return value.strip().lower() in _YES
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name} {shown(value)} found, true or false expected")


_INTERVALS: dict[str, Check] = {f"{scale}_cfg_{end}": _real for scale in ("all", "part") for end in ("start", "end")}
_OF_REQUEST: dict[str, Check] = {
    "prompt": _text,
    "width": _whole,
    "height": _whole,
    "steps": _whole,
    "seed": _whole,
    "all_cfg": _real,
    "part_cfg": _real,
    "system": _text,
    "thought": _text,
    "negative_prompt": _text,
    "reference_size": _whole,
    "speed": _text,
    **_INTERVALS,
}
_PICTURE: dict[str, Check] = {**_OF_REQUEST, "think": _yes, "max_new_tokens": _whole}
_TEXT: dict[str, Check] = {
    "question": _text,
    "task": _text,
    "system": _text,
    "beams": _whole,
    "max_new_tokens": _whole,
}
