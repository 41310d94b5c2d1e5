"""One run at a time into one folder of results."""

from __future__ import annotations

import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from .storage import Store

SIGN = "running"
"""The file of a run into object storage, which is written anew again and again while it lasts."""
RENEWED = 20.0
"""Seconds."""


@contextmanager
def locked(out: Store) -> Iterator[None]:
    """Keeps other runs out of a folder while it lasts, and no longer, however its process dies.

    On a disk the system sees to that. Object storage knows no locks: a sign that is no longer renewed is one of a dead
    run, which takes half a minute to see.

    Raises:
        RuntimeError: another run is there.
    """
    if not out.local:
        with _signed(out):
            yield
        return
    try:
        with FileLock(out.path(".lock"), timeout=0):
            yield
    except Timeout as error:
        raise _taken(out) from error


@contextmanager
def _signed(out: Store) -> Iterator[None]:
    own, ended = f"{platform.node()} {uuid.uuid4().hex}", threading.Event()
    before = _sign(out)
    if before and _changes(out, before):
        raise _taken(out)
    _renew(out, own, 0)
    time.sleep(RENEWED / 20)
    if own not in _sign(out):  # two have begun at once
        raise _taken(out)

    def renew() -> None:
        count = 0
        while not ended.wait(RENEWED):
            _renew(out, own, count := count + 1)

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        out.remove([SIGN])


def _changes(out: Store, before: str) -> bool:
    end = time.monotonic() + 1.5 * RENEWED
    while time.monotonic() < end:
        time.sleep(RENEWED / 20)
        if (now := _sign(out)) != before:
            return bool(now)
    return False


def _sign(out: Store) -> str:
    try:
        return out.read(SIGN).decode(errors="replace")
    except OSError:
        return ""


def _renew(out: Store, own: str, count: int) -> None:
    try:
        out.write(SIGN, f"{own} {count}\n".encode())
    except OSError:
        return  # a storage that is away for a moment: workers and the manifest tell of one that stays away


def _taken(out: Store) -> RuntimeError:
    return RuntimeError(
        f"{out.root} is written into by another run, one at a time expected: wait for it, or give another --out"
    )
