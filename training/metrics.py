"""The CSV file of a training stage's progress."""

from __future__ import annotations

import csv
import os
from pathlib import Path


class MetricsLog:
    """A CSV file with a fixed set of columns, one row at a time."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        """Opens the log, which may hold rows already, and writes its heading where it is new."""
        self.path, self.columns = path, columns
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._write([])

    def append(self, **row: float) -> None:
        """Adds a row; numbers are kept to six digits."""
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([_short(row.get(column, "")) for column in self.columns])

    def rows(self) -> list[dict[str, str]]:
        """Returns all rows, each by column."""
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def truncate(self, step: int) -> None:
        """Drops the rows after `step`: those that a run wrote after the state from which it now goes on."""
        self._write([row for row in self.rows() if int(row["step"]) <= step])

    def _write(self, rows: list[dict[str, str]]) -> None:
        draft = self.path.with_suffix(".draft")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.path)


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
