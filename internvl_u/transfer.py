"""One file from a server: gone on with where it broke off, patient with a busy server, and checked.

The HTTP client is the one that huggingface_hub has, with its proxies, certificates and HF_HUB_OFFLINE. Its own
downloads compare no hashes, and in version 2 they begin a file of gigabytes anew after an interruption: this is why
files come through here.

Nothing here runs unless `download` is called.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .files import in_short

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts that bring nothing new; after the last one a server counts as not reachable."""
LONGEST_WAIT = 300.0
"""Seconds that a server may ask for."""
LARGEST_LIST = 16 << 20
"""Bytes of a list of files."""
_CHUNK = 1 << 15
_RESUMED, _NOTHING_LEFT = 206, 416
_LATER = {408, 425, 429}
_Result = TypeVar("_Result")


class Unavailable(RuntimeError):
    """A server does not answer now, or broke off; `wait` is after how many seconds it asks to be asked again."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class Answer(NamedTuple):
    """What a server sends."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


def patiently(
    action: Callable[[], _Result], pause: Callable[[], object], reached: Callable[[], int] = lambda: 0
) -> _Result:
    """Returns what `action` returns, which is tried again while the server is unavailable.

    `pause` is called while it waits and may raise to end that. The waits begin anew where `reached` has grown.

    Raises:
        Unavailable: it was so too often, or asks for too long a wait.
    """
    waits, before = iter(WAITS), reached()
    while True:
        try:
            return action()
        except Unavailable as error:
            if reached() > before:
                waits, before = iter(WAITS), reached()
            wait = next(waits, None)
            if wait is None or (error.wait or 0) > LONGEST_WAIT:
                advice = "Look at the connection, try again later, or take another source"
                raise Unavailable(f"{error}. {advice}", error.wait) from error
            until = time.monotonic() + (wait if error.wait is None else error.wait)
        while (left := until - time.monotonic()) > 0:
            pause()
            time.sleep(min(left, 0.1))


def fetch(url: str, headers: Mapping[str, str], part: Path, size: int, report: Callable[[int], object]) -> None:
    """Writes a file of `size` bytes to `part`, from where that ends.

    `report` is called with the bytes that are there, and may raise to end it; `part` stays.

    Raises:
        RuntimeError: the server has no such file, or one of another size. Unavailable: it does not answer.
        OSError: `part` cannot be written.
    """
    part.touch()

    def attempt() -> None:
        there = part.stat().st_size
        if there > size:
            os.truncate(part, there := 0)
        if there < size:
            with opened(url, {**headers, **({"Range": f"bytes={there}-"} if there else {})}) as answer:
                _write(answer, url, part, size, report)

    patiently(attempt, lambda: report(part.stat().st_size), lambda: part.stat().st_size)


def _write(answer: Answer, url: str, part: Path, size: int, report: Callable[[int], object]) -> None:
    if answer.status == _NOTHING_LEFT:
        os.truncate(part, 0)
        raise Unavailable(f"{url} ends before {size} bytes, which its list states")
    with part.open("ab") as target:
        if answer.status != _RESUMED:
            target.truncate(0)
            target.seek(0)
        _check_answer(answer, url, size - target.tell())
        for chunk in answer.chunks:
            if target.tell() + len(chunk) > size:
                raise RuntimeError(f"{url} sends more than the {size} bytes that its list states: run again, or later")
            target.write(chunk)
            report(target.tell())
        target.flush()
        os.fsync(target.fileno())
        if target.tell() < size:
            raise Unavailable(f"{url} broke off after {target.tell()} of {size} bytes")


def _check_answer(answer: Answer, url: str, expected: int) -> None:
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise RuntimeError(f"{url} is answered with a web page, a file expected: the network may want you to log in")
    length = answer.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) != expected and "Content-Encoding" not in answer.headers:
        raise RuntimeError(f"{url}: {length} bytes found, {expected} expected by its list: run again, or later")


def read(url: str, pause: Callable[[], object]) -> str:
    """Returns a text of at most `LARGEST_LIST` bytes. `pause` is called while it waits.

    Raises:
        RuntimeError: it is not there, is no UTF-8 or too long. Unavailable: the server does not answer.
    """

    def attempt() -> str:
        text = bytearray()
        with opened(url, {}) as answer:
            for chunk in answer.chunks:
                pause()
                text += chunk
                if len(text) > LARGEST_LIST:
                    raise RuntimeError(f"{url} is longer than {LARGEST_LIST} bytes, a list of files expected")
        return text.decode("utf-8", "replace")

    return patiently(attempt, pause)


@contextlib.contextmanager
def opened(url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
    """Asks for a URL; redirects are followed, and what `headers` hold of a login goes to no other host.

    Raises:
        RuntimeError: the server refuses. Unavailable: it does not answer.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    headers, timeout = {"Accept-Encoding": "identity", **headers}, constants.HF_HUB_DOWNLOAD_TIMEOUT
    with contextlib.ExitStack() as stack:
        with translated(url):
            client: Any = get_session()
            if callable(getattr(client, "stream", None)):  # httpx, of huggingface_hub 1 and newer
                response = stack.enter_context(client.stream("GET", url, headers=headers, timeout=timeout))
                chunks = response.iter_bytes()
            else:
                response = stack.enter_context(client.get(url, headers=headers, timeout=timeout, stream=True))
                chunks = response.iter_content(_CHUNK)
        _check_status(response.status_code, response.headers, url)
        yield Answer(response.status_code, response.headers, _translated(chunks, url))


def _translated(chunks: Iterator[bytes], url: str) -> Iterator[bytes]:
    while True:
        with translated(url):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Makes our errors of those of any HTTP client.

    Raises:
        RuntimeError: the server refuses, or its answer is of another kind. Unavailable: it does not answer.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise RuntimeError("HF_HUB_OFFLINE is set, which forbids every download: unset it") from error
    except Exception as error:
        response = getattr(error, "response", None)
        if response is not None:
            _check_status(response.status_code, response.headers, url)
        if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
            raise RuntimeError(f"{url} gives no usable answer ({in_short(error)}): is it what it should be?") from error
        raise Unavailable(f"{url} cannot be reached ({type(error).__name__}: {in_short(error)})") from error


def _check_status(status: int, headers: Mapping[str, str], url: str) -> None:
    if status in {200, _RESUMED, _NOTHING_LEFT}:
        return
    if status in {401, 403}:
        raise RuntimeError(
            f"{url} refuses ({status}): the model may be private, or its terms not yet accepted. Accept them on its "
            "page and log in with `hf auth login`, or take another source"
        )
    if status in {404, 410}:
        raise RuntimeError(f"{url} is not there ({status}): look at the revision, or take another source")
    if status in _LATER or status >= 500:
        wait = headers.get("Retry-After", "")
        raise Unavailable(f"{url} answers {status}: it is busy", float(wait) if wait.isdecimal() else None)
    raise RuntimeError(f"{url} answers {status}, 200 expected: take another source")
