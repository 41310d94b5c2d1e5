"""Numbers that come from outside, checked by name and range."""

from __future__ import annotations

import math
import numbers
from typing import cast

from .files import shown


def check_whole(name: str, value: object, least: int, most: int, unit: str = "") -> None:
    """Makes sure that a value is a whole number in a range.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} {shown(value)} found, a whole number expected")
    if not least <= int(value) <= most:
        raise ValueError(f"{name} {shown(value)} found, {least} to {most}{unit and ' ' + unit} expected")


def check_real(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """Makes sure that a value is a finite number in a range.

    Raises:
        ValueError: it is not.
    """
    if not is_finite(value) or not least <= float(cast(float, value)) <= most:
        bounded = math.isfinite(least) or math.isfinite(most)
        raise ValueError(f"{name} {shown(value)} found, a number{_range(least, most) if bounded else ''} expected")


def is_finite(value: object) -> bool:
    """Returns whether a value is a number that a float can hold, and neither infinite nor NaN."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _range(least: float, most: float) -> str:
    return f" from {least:g}" + (f" to {most:g}" if math.isfinite(most) else "")
