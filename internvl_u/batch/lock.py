"""One run at a time into one folder of results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from .storage import Store


@contextmanager
def locked(out: Store) -> Iterator[None]:
    """Keeps other runs out of a folder while it lasts; the system ends that with the process, however it dies.

    Raises:
        RuntimeError: another run is there.
    """
    if not out.local:
        yield
        return
    try:
        with FileLock(out.path(".lock"), timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(
            f"{out.root} is written into by another run, one at a time expected: wait for it, or give another --out"
        ) from error
