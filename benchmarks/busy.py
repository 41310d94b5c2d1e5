"""Other work on the machine while something is timed: processes that each keep one core busy, and read no memory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen]]:
    """Keeps so many cores busy until the block ends; yields the processes that do."""
    others = [
        subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
        for _ in range(processes)
    ]
    try:
        for one in others:
            one.stdout.readline()  # it runs
        yield others
    finally:
        for one in others:
            one.kill()
            one.communicate()
