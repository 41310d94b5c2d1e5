"""What stands between a console and the command line: texts in any locale, and streams that may be closed."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from typing import TextIO


def text_argument(text: str) -> str:
    """Returns an argument as text. Where the locale is not UTF-8, Python may have taken UTF-8 for loose bytes.

    Raises:
        argparse.ArgumentTypeError: it is no UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        where = error.start
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"the byte {error.object[error.start]:#04x} found at byte {error.start}"
    except UnicodeEncodeError:
        found = f"half a character (a lone surrogate, {text[where]!r}) found at character {where}"
    raise argparse.ArgumentTypeError(f"{found}, UTF-8 expected: give the text in UTF-8")


def shown_name(name: str) -> str:
    """Returns a file's name as text: UTF-8 in any locale, and bytes that are no UTF-8 written as \\xff."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")


def check_model_name(name: str, flag: str = "--model") -> None:
    """Makes sure, before any work, that the weights of a folder or file, which `flag` names, can be opened.

    Raises:
        ValueError: its path is no UTF-8.
    """
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeError:
        raise ValueError(
            f"{flag} {shown_name(name)}: a path that is no UTF-8 found, and safetensors opens none such. "
            "Rename the folder, or make a symbolic link to it"
        ) from None


def check_places(model: Path, mllm: Path | None, vae: Path | None) -> None:
    """Makes sure, before any work, that what `--model`, `--mllm` and `--vae` name can be opened.

    Raises:
        ValueError: a path is no UTF-8.
    """
    for flag, place in (("--model", model), ("--mllm", mllm), ("--vae", vae)):
        if place is not None:
            check_model_name(str(place), flag)


def check_packages(what: str, names: Sequence[str], wanted: str = "") -> None:
    """Makes sure that the packages that a command needs are installed; `wanted` is what to install, if not these.

    Raises:
        ImportError: one is not.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install {wanted or ' '.join(missing)}"
        )


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Lets stdout and stderr take any character while it lasts, and stderr any message though nobody can read it."""
    _fill_standard_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no answer is lost for what a console cannot show
    with contextlib.redirect_stderr(cast("TextIO", _Messages(sys.stderr))):
        yield


def abandon(stream: IO[str] | None) -> None:
    """Points a stream that failed at the null device, so that what it still holds does not fail at Python's end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = cast("TextIO", stream).fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def _fill_standard_files() -> None:
    """Opens the null device in place of closed standard streams: a result's file would get their number else.

    What a library writes to stderr by its number, not by its name, would then stand in the result.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


class _Messages:
    """stderr, closed or not: progress and warnings are not worth the result that they tell of."""

    def __init__(self, stream: IO[str] | None):
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            abandon(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            abandon(self._stream)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
