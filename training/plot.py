"""Draws the logs of all stages into one image, where matplotlib is installed.

python -m training.plot WORK [FILE.png]
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

SHOWN = {
    "vae": ("psnr", "psnr_noise"),
    "mllm": ("one image", "two images", "riddle", "edit thought"),
    "mmdit": ("loss",),
}
"""What is shown of each stage's log, over the minutes."""


def plot(work: Path, file: Path | None = None) -> Path | None:
    """Writes the plot and returns its path; None where matplotlib is missing or no stage has a log."""
    logs = {name: work / f"{name}.csv" for name in SHOWN if (work / f"{name}.csv").is_file()}
    if not logs or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(logs), 3.5), layout="constrained")
    for axes, (name, log) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
        with log.open(newline="") as source:
            rows = list(csv.DictReader(source))
        for column in SHOWN[name]:
            points = [(float(row["seconds"]) / 60, float(row[column])) for row in rows if row[column]]
            axes.plot(*zip(*points), label=column)
        axes.set(title=name, xlabel="minutes")
        axes.legend()
    file = file or work / "training.png"
    figure.savefig(file, dpi=120)
    return file


if __name__ == "__main__":
    print(plot(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
