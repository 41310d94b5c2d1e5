"""The curves of `curve` as an SVG picture, without a library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 62, 24, 40, 52
COLOURS = ("#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Of Okabe and Ito's palette, which most people tell apart."""
STEP, HIGHEST, LOWEST = 5.0, 5.0, -25.0
"""Points between two lines, at the upper edge, and of the lowest row that is shown."""
Row = dict[str, Any]


def plot(rows: Sequence[Row]) -> str:
    """Returns a picture of the rows' `against full` over `work %`: a line for each `curve`, names, standard errors.

    Rows below `LOWEST` are left out, so that the others can be told apart.
    """
    rows = [row for row in rows if row["against full"] >= LOWEST]
    lowest = STEP * math.floor(min(row["against full"] - row["+-"] for row in rows) / STEP)
    parts = [*_axes(lowest)]
    for number, curve in enumerate(dict.fromkeys(row["curve"] for row in rows)):
        colour, own = COLOURS[number % len(COLOURS)], [row for row in rows if row["curve"] == curve]
        places = sorted((_x(row["work %"]), _y(row["against full"], lowest)) for row in own)
        if curve not in ("preset", "step cache"):
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for row in own:
            parts += _point(row, colour, lowest)
        parts += _legend(number, curve, colour)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>"]) + "\n"


def _x(work: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * work / 100


def _y(right: float, lowest: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (HIGHEST - right) / (HIGHEST - lowest)


def _axes(lowest: float) -> list[str]:
    parts = []
    for work in range(0, 101, 10):
        parts.append(_line(_x(work), TOP, _x(work), HEIGHT - BOTTOM, "#e4e4e4"))
        parts.append(_text(_x(work), HEIGHT - BOTTOM + 18, f"{work}"))
    right = lowest
    while right <= HIGHEST:
        parts.append(_line(LEFT, _y(right, lowest), WIDTH - RIGHT, _y(right, lowest), "#e4e4e4"))
        parts.append(_text(LEFT - 8, _y(right, lowest) + 4, f"{right:g}", "end"))
        right += STEP
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "counted operations, % of 20 full steps"))
    parts.append(
        _text(
            LEFT, TOP - 20, "right pictures against 20 full steps on the same scenes, in points (nano model)", "start"
        )
    )
    return parts


def _point(row: Row, colour: str, lowest: float) -> list[str]:
    x, y, error = _x(row["work %"]), _y(row["against full"], lowest), row["+-"]
    parts = [_line(x, _y(row["against full"] - error, lowest), x, _y(row["against full"] + error, lowest), colour)]
    name = html.escape(row["point"])
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{name}</title></circle>')
    label = row["point"].removesuffix(" steps").split(" steps,")[0]
    below = row["curve"] in ("fewer steps", "step cache")
    parts.append(_text(x + 6, y + (16 if below else -7), label, "start", colour))
    return parts


def _legend(number: int, curve: str, colour: str) -> list[str]:
    y = HEIGHT - BOTTOM - 14 - 18 * number
    x = WIDTH - RIGHT - 200
    return [f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>', _text(x + 10, y, curve, "start", colour)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#222222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'
