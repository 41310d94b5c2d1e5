"""A picture of a dataset: looked at when the dataset is read, opened when it is needed."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..files import digest_of, in_short, kind_of
from ..images import to_rgb

LONG_SIDES = 20
"""The most times that a picture's longer side may be its shorter one."""
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_UNREADABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """A picture by the name that messages have for it, in a file or in bytes that are read when they are needed."""

    name: str
    source: Path | Callable[[], bytes]

    def open(self) -> Image.Image:
        """Returns the picture in 8-bit RGB, the way up that its camera says; see `images.to_rgb`.

        Raises:
            ValueError: it is not readable as a picture, or is an animation.
        """
        with self._opened() as image:
            image.load()
            return to_rgb(image)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Its width and height in pixels, the way up that its camera says. What it shows is not read for that.

        Raises:
            ValueError: it is not readable as a picture, is an animation, or is a strip.
        """
        with self._opened() as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
        if max(width, height) > LONG_SIDES * min(width, height):
            raise ValueError(
                f"{self.name} has {width} x {height} pixels, one side at most {LONG_SIDES} times the other expected: "
                "cut it or take it out"
            )
        return (height, width) if turned else (width, height)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file's bytes, as hex digits.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            if isinstance(self.source, Path):
                return digest_of(self.source)
            return hashlib.sha256(self.source()).hexdigest()
        except OSError as error:
            raise self._unreadable(error) from error

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with Image.open(self.source if isinstance(self.source, Path) else io.BytesIO(self.source())) as image:
                # Cameras put a small picture, or the one of the other eye, behind the first.
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                if frames == 1:
                    yield image
        except _UNREADABLE as error:
            raise self._unreadable(error) from error
        if frames != 1:
            raise ValueError(
                f"{self.name} has {frames} frames or pages, one expected: save the one to learn from as a picture of "
                "its own"
            )

    def _unreadable(self, error: BaseException) -> ValueError:
        head, size = b"", 1
        if isinstance(self.source, Path):
            with contextlib.suppress(OSError), self.source.open("rb") as file:
                head, size = file.read(512), self.source.stat().st_size
        what = kind_of(head, size) if head or not size else None
        return ValueError(
            f"{self.name} {what or f'is not readable as a picture ({in_short(error)})'}: mend it or take it out"
        )
