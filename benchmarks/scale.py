"""A million pictures on paper: operations, hours of a card, files, and simulated runs with 10, 100 and 1000 workers.

`counted` counts operations, `cards` divides them by published peaks, `files` measures on this machine what the files
of a picture take, `runs` simulates whole runs with that. What is not measured is assumed, and named so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from . import plots
from .report import make_parser, show
from .scale_simulation import Cluster, expected, simulate
from .scale_work import count_picture, file_rows, spread, token_bytes

HOUR, MILLION = 3600, 10**6
TOKENS = 200
"""The longest thought, as the official code has it."""
UTILISATION = (0.6, 0.3)
"""Shares of a card's peak between which a transformer's products and attention usually end up; assumed."""
WORKERS = (10, 100, 1000)


class Card(NamedTuple):
    """What its maker says: dense bf16 products with fp32 sums, 1e12 operations a second; memory, 1e9 bytes a second."""

    peak: float
    memory: float
    source: str


CARDS = {
    "A100 80 GB (SXM)": Card(312, 2039, "NVIDIA A100 datasheet"),
    "H100 (SXM)": Card(989, 3350, "NVIDIA H100 datasheet, half of the sparse number"),
    "H200 (SXM)": Card(989, 4800, "NVIDIA H200 datasheet, half of the sparse number"),
    "L40S": Card(362, 864, "NVIDIA L40S datasheet"),
    "RTX 4090": Card(165, 1008, "NVIDIA Ada architecture whitepaper"),
    "RTX 5090": Card(209.5, 1792, "NVIDIA RTX Blackwell architecture whitepaper"),
}
ASSUMED = {
    "card": "H100 (SXM)",
    "utilisation": 0.4,
    "storage, GB/s": 2.0,
    "files a second": 3500,
    "s until a file is stored": 0.1,
    "GB of the model": 8.2,
    "s to begin": 20.0,
    "s until a failed worker is replaced": 300.0,
    "h between failures": 50_700,
    "h between ends of rented machines": 6.0,
}
"""3,500 PUT a second for a prefix and 100 to 200 ms for small objects are Amazon's numbers for S3. Failures: 419 in 54
days of 16,384 cards (The Llama 3 Herd of Models, 2024), one in 50,700 hours of a card. The rest is assumed."""
DISPATCH = 0.005
"""Seconds of the driver's processor for a task of Ray Data 2.60 (empty tasks to two actors), measured on AMD EPYC."""


def counted() -> list[dict]:
    """Returns the operations of a picture by kind and size, in units of 1e12, and of a million in units of 1e18."""
    rows = []
    for mode, pixels in (("t2i", 512), ("t2i", 1024), ("edit", 1024)):
        parts = count_picture(mode, pixels)
        row = {"picture": mode, "pixels": pixels} | {f"{name} TFLOP": value for name, value in parts.items()}
        rows.append(row | {"a million, EFLOP": parts["all"]})
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, "") for key in keys} for row in rows]


def cards() -> list[dict]:
    """Returns the hours of one card for a million pictures, and for as many thoughts written one by one."""
    rows = []
    for name, card in CARDS.items():
        row: dict[str, object] = {"card": name, "peak TFLOP/s": card.peak}
        for pixels in (1024, 512):
            seconds = [count_picture("t2i", pixels)["all"] / card.peak / share for share in UTILISATION]
            row[f"{pixels} px, s"] = " to ".join(f"{value:.2f}" for value in seconds)
            row[f"{pixels} px, a million, h"] = " to ".join(f"{value * MILLION / HOUR:.0f}" for value in seconds)
        row["thoughts, h, at least"] = round(TOKENS * token_bytes() / card.memory / 1e9 * MILLION / HOUR)
        rows.append(row | {"peak from": card.source})
    return rows


def usual(files: Mapping[str, Mapping], factors: list[float], pictures: int = MILLION) -> Cluster:
    """Returns a run of pictures of 1024 px, ten workers, without failures; files by what was measured of them."""
    card = CARDS[str(ASSUMED["card"])]
    png = files["PNG, soft, level 6"]
    bandwidth = float(ASSUMED["storage, GB/s"]) * 1e9
    return Cluster(
        pictures=pictures,
        workers=10,
        draw=count_picture("t2i", 1024)["all"] / card.peak / float(ASSUMED["utilisation"]),
        batch=8,
        besides=3,  # its part of the manifest, and the note that it is begun, which comes and goes
        spread=tuple(factors),
        encode=(png["ms"] + files["sha256 of the sharp one"]["ms"]) / 1e3,
        size=png["MB"] * 1e6,
        dispatch=DISPATCH,
        bandwidth=bandwidth,
        puts=float(ASSUMED["files a second"]),
        latency=float(ASSUMED["s until a file is stored"]),
        reading=float(ASSUMED["GB of the model"]) * 1e9 / bandwidth,
        load=float(ASSUMED["s to begin"]),
        replace=float(ASSUMED["s until a failed worker is replaced"]),
    )


def variants(base: Cluster) -> dict[str, Cluster]:
    """Returns the runs that are compared. Those with a + have also what the one before has.

    The last four are the run with the model on each machine's disk, with what their name says.
    """
    beside = replace(base, beside=True)
    own = replace(beside, reading=0.0)
    return {
        "one after the other": base,
        "files beside the drawing": beside,
        "+ model on each disk": own,
        "storage of 0.2 GB/s": replace(own, bandwidth=0.2e9),
        "micro-batches of 1": replace(own, batch=1),
        "cards that fail": replace(own, mean_life=float(ASSUMED["h between failures"]) * HOUR),
        "rented machines": replace(own, mean_life=float(ASSUMED["h between ends of rented machines"]) * HOUR),
    }


def runs(base: Cluster, workers: tuple[int, ...] = WORKERS) -> list[dict]:
    """Returns a row for each variant and number of workers."""
    rows = []
    for name, cluster in variants(base).items():
        for count in workers:
            one = replace(cluster, workers=count)
            outcome = simulate(one)
            ideal = one.pictures * one.draw / count
            row = {"run": name, "workers": count, "hours": outcome.seconds / HOUR, "closed form": expected(one) / HOUR}
            row |= {
                "of ideal %": 100 * ideal / outcome.seconds,
                "driver busy %": 100 * outcome.driver / outcome.seconds,
            }
            row |= {"storage busy %": 100 * outcome.storage / outcome.seconds, "failures": outcome.failures}
            rows.append(row | {"loading, card hours": outcome.loading / HOUR, "lost, card hours": outcome.lost / HOUR})
    return rows


def measure(pixels: int, repeats: int) -> tuple[list[dict], list[float]]:
    """Returns what the files of a picture take, and the spread of 40 nano pictures."""
    return file_rows(pixels, repeats), spread(40)


def _measured(arguments: argparse.Namespace) -> tuple[list[dict], list[float]]:
    if arguments.files is None:
        return measure(1024, arguments.repeats)
    said = json.loads(arguments.files.read_text(encoding="utf-8"))
    return said["results"], said["settings"]["spread"]


def draw_plot(rows: list[dict], file: Path) -> None:
    """Draws how much of the ideal each run reaches."""
    shown = plots.Plot("Drawing, in percent of the workers' time", "of ideal %", ("run", "workers"))
    file.write_text(plots.bars(shown, [row | {"contestant": "ours"} for row in rows]), encoding="utf-8")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("table", choices=("counted", "cards", "files", "runs"), help="what to show")
    parser.add_argument("--repeats", type=int, default=15, help="of what is measured")
    parser.add_argument(
        "--files", type=Path, metavar="FILE", help="for runs: what `files --json` wrote; else it measures"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="for runs: an SVG file")
    arguments = parser.parse_args()
    if arguments.table == "files":
        rows, factors = measure(1024, arguments.repeats)
        return show(rows, arguments.json, spread=[round(one, 3) for one in factors])
    if arguments.table == "runs":
        measured, factors = _measured(arguments)
        rows = runs(usual({row["what"]: row for row in measured}, factors))
        if arguments.plot:
            draw_plot(rows, arguments.plot)
    else:
        rows = {"counted": counted, "cards": cards}[arguments.table]()
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
