"""Draws the measured results as bars, with a line where the machine's limit is: one SVG file for each table.

The files need no font and no program, and are readable on light and dark pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from .report import make_parser

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "plots"
WIDTH, LABEL, ROW, TOP = 720, 250, 22, 34
COLOURS = {"ours": "#2f81f7", "other": "#8b949e", "limit": "#d29922", "text": "#7d8590"}


class Plot(NamedTuple):
    """What a file of results shows: its title, the column of the bars, those of the labels, that of the limit."""

    title: str
    value: str
    labels: tuple[str, ...]
    limit: str = ""


TEXT = ("context", "contestant", "weights")
PLOTS = {
    "text_nano": Plot("Nano model: milliseconds a token", "ms a token", TEXT, "limit ms"),
    "text_overhead": Plot("28 layers of width 256: milliseconds a token", "ms a token", TEXT, "limit ms"),
    "text_released": Plot("Released size, bf16: milliseconds a token", "ms a token", TEXT, "limit ms"),
    "text_formats": Plot("Released width, 4 layers: milliseconds a token", "ms a token", TEXT, "limit ms"),
    "step": Plot("One denoising step, released width, 4 blocks: seconds", "seconds", ("mode", "pixels", "contestant")),
    "picture_nano": Plot("A picture, nano model: seconds", "picture s", ("mode", "pixels", "contestant")),
}


def write(results: Path, pictures: Path = PICTURES) -> list[Path]:
    """Draws what a folder of results has and returns the files."""
    pictures.mkdir(parents=True, exist_ok=True)
    files = []
    for name, plot in PLOTS.items():
        source = results / f"{name}.json"
        if source.is_file():
            rows = json.loads(source.read_text(encoding="utf-8"))["results"]
            files.append(pictures / f"{name}.svg")
            files[-1].write_text(bars(plot, rows), encoding="utf-8")
    return files


def bars(plot: Plot, rows: Sequence[Mapping]) -> str:
    """Returns an SVG picture with a bar for each row."""
    longest = max(float(row[plot.value]) for row in rows)
    scale = (WIDTH - LABEL - 70) / longest
    height = TOP + ROW * len(rows) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" fill="{COLOURS["text"]}">',
        f"<title>{escape(plot.title)}</title>",
        f'<text x="8" y="20" font-size="14">{escape(plot.title)}</text>',
    ]
    for i, row in enumerate(rows):
        lines += _bar(plot, row, TOP + ROW * i, scale)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bar(plot: Plot, row: Mapping, top: int, scale: float) -> list[str]:
    label = " · ".join(str(row[key]) for key in plot.labels)
    value, length = float(row[plot.value]), max(float(row[plot.value]) * scale, 1.0)
    colour = COLOURS["ours" if str(row["contestant"]).startswith("ours") else "other"]
    middle = top + 14
    lines = [
        f'<text x="{LABEL - 8}" y="{middle}" text-anchor="end">{escape(label)}</text>',
        f'<rect x="{LABEL}" y="{top + 3}" width="{length:.1f}" height="{ROW - 7}" fill="{colour}"/>',
        f'<text x="{LABEL + length + 6:.1f}" y="{middle}">{value:.3g}</text>',
    ]
    if plot.limit:
        place = LABEL + float(row[plot.limit]) * scale
        lines.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{top + ROW}" stroke="{COLOURS["limit"]}" '
            f'stroke-width="2"><title>limit {float(row[plot.limit]):.3g}</title></line>'
        )
    return lines


def main() -> None:
    parser = make_parser(__doc__, measures=False)
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="what was measured")
    parser.add_argument("--pictures", type=Path, default=PICTURES, metavar="FOLDER", help="where the plots go")
    arguments = parser.parse_args()
    for file in write(arguments.results, arguments.pictures):
        print(file)


if __name__ == "__main__":
    main()
