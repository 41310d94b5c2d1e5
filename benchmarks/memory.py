"""This process's memory, as Linux counts it. What is mapped from files is part of the resident set."""

from __future__ import annotations

from pathlib import Path

MIB = 2**20
_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(field: str) -> float:
    """Returns a field of /proc/self/status in MiB: VmRSS, VmHWM (the most since the start or `reset_peak`), RssAnon.

    Raises:
        RuntimeError: this is not Linux.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024 / MIB
    raise RuntimeError(f"no {field} in {_STATUS}: this benchmark needs Linux")


def reset_peak() -> None:
    """Makes VmHWM count from now on."""
    _REFERENCES.write_text("5", encoding="ascii")
