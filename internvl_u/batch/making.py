"""The jobs of a micro-batch made: images read, pictures drawn, texts written, and a row of the manifest for each."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from .. import __version__
from ..files import in_short
from ..images import open_image, preprocessing_warnings, to_rgb
from ..picture_texts import picture_texts
from ..pipeline import Pipeline
from ..request import ImageRequest
from ..together import answer_together, draw_together, shape_of, think_together
from .jobs import PICTURE, Job
from .manifest import FAILED, MADE
from .storage import Store, nothing_more_fits

Item, Made = TypeVar("Item"), TypeVar("Made")
_logger = logging.getLogger("internvl_u")


@dataclass
class Opened:
    """A job with its images, (SHA-256, bytes, time of change) of each, and the request as it is to be drawn."""

    job: Job
    images: tuple[Image.Image, ...]
    inputs: list[tuple[str, int, int]]
    notes: list[str] = field(default_factory=list)
    request: ImageRequest | None = None


@dataclass
class Result:
    """What became of a job: a picture or a text, or the error that it failed with."""

    opened: Opened
    together: int
    started: float
    seconds: float
    made: Image.Image | str | None = None
    error: str = ""


class Maker:
    """Makes jobs with one pipeline; `folder` is that of the list, from which images are named on."""

    def __init__(self, pipeline: Pipeline, model: Path, folder: Store, out: Store, told: dict[str, Any]):
        """`model` is what was asked for; `told` stands in each row: run, worker and digest of the model."""
        self.pipeline, self.model, self.folder, self.out, self.told = pipeline, model, folder, out, told

    def make(self, jobs: Sequence[Job], computing: AbstractContextManager[Any] | None = None) -> list[dict[str, Any]]:
        """Returns a row of the manifest for each job, after its file has been written.

        A job that fails does so alone. `computing` is held while the model is at work: reading images and writing files
        may go on beside another micro-batch.

        Raises:
            OSError: the disk takes nothing more.
        """
        rows, opened = [], []
        for job in jobs:
            try:
                opened.append(self._open(job))
            except Exception as error:  # whatever a broken file makes a library raise
                rows.append(self._failed(job, _sentence(error)))
        with computing or nullcontext():
            results = [*self._draw_all(opened), *self._answer_all(opened)]
        return [*rows, *map(self._row, results)]

    def _open(self, job: Job) -> Opened:
        images, inputs, notes = [], [], []
        for name in job.images:
            folder, inner = self.folder.elsewhere(name)
            try:
                data = folder.read(inner)
                (state,) = folder.states([inner])
            except (OSError, ValueError) as error:
                raise ValueError(f"the image {name} cannot be read ({in_short(error)}): put it there") from error
            image = open_image(io.BytesIO(data), f"the image {name}")
            notes += [f"{name}: {one}" for one in preprocessing_warnings(image, self.pipeline.encoder.sizes)]
            images.append(to_rgb(image))
            inputs.append((hashlib.sha256(data).hexdigest(), *(state or (len(data), 0))))
        return Opened(job, tuple(images), inputs, notes)

    def _draw_all(self, opened: Sequence[Opened]) -> Iterator[Result]:
        ready: list[Opened] = []
        for one in opened:
            if one.job.kind == PICTURE:
                one.request = one.job.request(one.images)
                ready.append(one)
        thinking = [one for one in ready if one.job.thinks]
        failed = set()
        for result in self._each(thinking, lambda one: one.job.config, self._think):
            if result.error:
                failed.add(id(result.opened))
                yield result
        drawn = [one for one in ready if id(one) not in failed]
        yield from self._each(drawn, self._shape, self._draw)

    def _answer_all(self, opened: Sequence[Opened]) -> Iterator[Result]:
        asked = [one for one in opened if one.job.kind != PICTURE]
        yield from self._each(asked, lambda one: one.job.config, self._answer)

    def _think(self, some: Sequence[Opened]) -> list[str]:
        wishes = [_wanted(one) for one in some]
        thoughts = think_together(self.pipeline, wishes, some[0].job.config)
        for one, wish, thought in zip(some, wishes, thoughts, strict=True):
            one.request = dataclasses.replace(wish, thought=thought)
        return list(thoughts)

    def _shape(self, one: Opened) -> Hashable:
        one.request = self.pipeline.settled(_wanted(one))
        return shape_of(self.pipeline, one.request)

    def _draw(self, some: Sequence[Opened]) -> list[Image.Image]:
        return draw_together(self.pipeline, [_wanted(one) for one in some])

    def _answer(self, some: Sequence[Opened]) -> list[str]:
        return answer_together(self.pipeline, [one.job.question(one.images) for one in some])

    def _each(
        self,
        some: Sequence[Opened],
        likeness: Callable[[Opened], Hashable],
        make: Callable[[Sequence[Opened]], Sequence[Image.Image | str]],
    ) -> Iterator[Result]:
        """Yields what became of each: those that are alike are made together, and one by one where that fails."""
        alike: dict[Hashable, list[Opened]] = {}
        for one in some:
            try:
                alike.setdefault(likeness(one), []).append(one)
            except Exception as error:  # whatever a job makes the library raise is the job's own
                yield Result(one, 1, time.time(), 0.0, error=_sentence(error))
        for group in alike.values():
            yield from self._made(group, make)

    def _made(
        self, group: Sequence[Opened], make: Callable[[Sequence[Opened]], Sequence[Image.Image | str]]
    ) -> Iterator[Result]:
        started, clock = time.time(), time.perf_counter()
        try:
            with _warnings() as told:
                done = make(group)
        except Exception as error:  # as above; also memory that does not suffice for all at once
            if nothing_more_fits(error):
                raise
            if len(group) == 1:
                yield Result(group[0], 1, started, time.perf_counter() - clock, error=_sentence(error))
            for one in group if len(group) > 1 else ():
                yield from self._made([one], make)
            return
        seconds = (time.perf_counter() - clock) / len(group)
        for one, made in zip(group, done, strict=True):
            one.notes += told
            yield Result(one, len(group), started, seconds, made)

    def _row(self, result: Result) -> dict[str, Any]:
        """Returns a result's row of the manifest, its file written."""
        opened, made = result.opened, result.made
        if made is None:
            return self._failed(opened.job, result.error, result.started, result.seconds)
        job, request = opened.job, opened.request
        started = time.perf_counter()
        if isinstance(made, Image.Image):
            packed = io.BytesIO()
            info = picture_texts(self.pipeline, _wanted(opened), [Path(name) for name in job.images], self.model)
            made.save(packed, format="PNG", pnginfo=info)
            data, (width, height) = packed.getvalue(), made.size
        else:
            data, (width, height) = f"{made}\n".encode(errors="backslashreplace"), (None, None)
        self.out.write(job.file, data)
        return self._stated(job) | {
            "status": MADE,
            "file": job.file,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "width": width,
            "height": height,
            "inputs": json.dumps(opened.inputs),
            "digest": job.digest(self.told["model"], [one[0] for one in opened.inputs]),
            "together": result.together,
            "seconds": result.seconds + time.perf_counter() - started,
            "started": _moment(result.started),
            "text": (request.thought or None) if request is not None else made,
            "notes": "; ".join(opened.notes) or None,
        }

    def _failed(self, job: Job, error: str, started: float | None = None, seconds: float = 0.0) -> dict[str, Any]:
        when = _moment(time.time() if started is None else started)
        return self._stated(job) | {"status": FAILED, "error": error, "started": when, "seconds": seconds}

    def _stated(self, job: Job) -> dict[str, Any]:
        settings = dict(job.settings) | ({"images": list(job.images)} if job.images else {})
        told = settings | {"dtype": str(self.pipeline.dtype)[6:]}
        seed = job.settings.get("seed", 0) if job.kind == PICTURE else None
        stated = {"name": job.name, "kind": job.kind, "row": job.row, "seed": seed, "version": __version__}
        return stated | {"settings": json.dumps(told, ensure_ascii=False)} | self.told


def failed_rows(jobs: Iterable[Job], error: str, told: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of jobs that have all failed for one reason."""
    stated = {"status": FAILED, "error": error, "version": __version__, "started": _moment(time.time())} | told
    return [{"name": job.name, "kind": job.kind, "row": job.row} | stated for job in jobs]


def _wanted(one: Opened) -> ImageRequest:
    assert one.request is not None
    return one.request


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _sentence(error: BaseException) -> str:
    if nothing_more_fits(error):
        raise error
    told = " ".join(in_short(error).split())
    usual = isinstance(error, (ValueError, RuntimeError, OSError, MemoryError))
    return told if usual else f"{type(error).__name__}: {told}"


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Gives the warnings of the library in this thread while it lasts."""
    told: list[str] = []
    handler, thread = logging.Handler(logging.WARNING), threading.get_ident()
    handler.addFilter(lambda record: record.thread == thread)
    handler.emit = lambda record: told.append(record.getMessage().removeprefix("InternVL-U: "))
    _logger.addHandler(handler)
    try:
        yield told
    finally:
        _logger.removeHandler(handler)
