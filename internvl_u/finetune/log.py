"""The log of a run: a CSV file, and its plot where matplotlib is installed."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


class CSVLog:
    """A CSV file with fixed columns, the first of which is the step."""

    def __init__(self, file: Path, columns: Sequence[str]):
        self.file, self.columns = file, ("step", *columns)

    def start(self, step: int) -> None:
        """Keeps the rows up to a step and drops those that a stopped run wrote after its last state."""
        rows = [row for row in self.rows() if int(row["step"]) <= step]
        draft = self.file.with_suffix(".part")
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.file)

    def append(self, step: int, row: Mapping[str, float]) -> None:
        """Adds a row; what it lacks stays empty."""
        values = [f"{row[column]:.6g}" if column in row else "" for column in self.columns[1:]]
        with self.file.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([step, *values])

    def rows(self) -> list[dict[str, str]]:
        """Returns the rows, each by column."""
        if not self.file.exists():
            return []
        with self.file.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]


def plot(log: CSVLog, file: Path, columns: Sequence[str]) -> bool:
    """Draws columns of a log over the steps; returns whether matplotlib is there to do so."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for column in columns:
        points = [(int(row["step"]), float(row[column])) for row in log.rows() if row.get(column)]
        if points:
            axes.plot(*zip(*points, strict=True), label=column)
    axes.set(xlabel="steps", ylabel="loss")
    axes.legend()
    figure.savefig(file, dpi=110)
    return True
