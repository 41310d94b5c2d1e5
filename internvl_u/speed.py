"""Less work for a picture: guidance in a part of the schedule alone, fewer steps, and presets of both.

Outside its interval a guidance strength is 1, and a branch that then cancels out is not evaluated (arXiv 2404.07724).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .defaults import STEPS
from .files import shown
from .numbers import check_real


class Interval(NamedTuple):
    """The part of the schedule in which a guidance strength works, as shares of it in 0..1."""

    start: float = 0.0
    end: float = 1.0

    def check(self, name: str) -> None:
        """Makes sure that both are shares, the end not before the start.

        Raises:
            ValueError: they are not.
        """
        check_real(f"{name}_start", self.start, 0.0, 1.0)
        check_real(f"{name}_end", self.end, 0.0, 1.0)
        if self.end < self.start:
            raise ValueError(f"{name}_end {self.end:g} found, {name}_start ({self.start:g}) or more expected")

    def holds(self, sigma: float, to_sigma: Callable[[float], float]) -> bool:
        """Returns whether a noise level is in it, as `to_sigma` turns shares into levels; both ends are."""
        highest = math.inf if self.start <= 0.0 else to_sigma(self.start)
        lowest = -math.inf if self.end >= 1.0 else to_sigma(self.end)
        return lowest <= sigma <= highest


class Branches(NamedTuple):
    """Which branches are evaluated beside the conditional one, and whether the words are scaled."""

    partial: bool = True
    unconditional: bool = True
    words: bool = True


class GuidanceIntervals(NamedTuple):
    """Where the guidance of the words and the guidance of the references work."""

    all_cfg: Interval = Interval()
    part_cfg: Interval = Interval()

    def branches_at(self, sigma: float, to_sigma: Callable[[float], float], references: bool) -> Branches:
        """Returns the branches that count at a noise level; see `Interval.holds`."""
        words, pictures = (interval.holds(sigma, to_sigma) for interval in self)
        if not references:
            return Branches(False, words, words)
        return Branches(words or pictures, pictures, words)

    def named(self) -> dict[str, float]:
        """Returns the four numbers by the names that they have everywhere, such as all_cfg_start."""
        return {f"{name}_{end}": value for name, one in self._asdict().items() for end, value in one._asdict().items()}

    def check(self) -> None:
        """Makes sure that both are intervals.

        Raises:
            ValueError: one is not.
        """
        for name, interval in self._asdict().items():
            interval.check(name)


ALWAYS = GuidanceIntervals()
EVERY_BRANCH = Branches()


class Speed(NamedTuple):
    """How a picture is drawn: denoising steps, and where guidance works."""

    steps: int = STEPS
    intervals: GuidanceIntervals = ALWAYS

    def filled(self, speed: str, evaluations: int | None = None) -> Speed:
        """Returns the same with what a preset has in the place of what is left at its default.

        `evaluations` are those that the transformer has been distilled to, None for one that has not been.

        Raises:
            ValueError: there is no such preset, or it is `turbo` and the transformer has not been distilled.
        """
        check_speed(speed)
        preset, usual = SPEEDS[speed], Interval()
        if speed == TURBO:
            if evaluations is None:
                raise ValueError(NOT_DISTILLED)
            preset = preset._replace(steps=evaluations)
        given = zip(self.intervals, preset.intervals, strict=True)
        intervals = GuidanceIntervals(*(ready if typed == usual else typed for typed, ready in given))
        return Speed(preset.steps if self.steps == STEPS else self.steps, intervals)


QUALITY, BALANCED, FAST, TURBO = "quality", "balanced", "fast", "turbo"
NEVER = GuidanceIntervals(Interval(end=0.0), Interval(end=0.0))
"""The conditional branch alone, which is one evaluation a step."""
SPEEDS = {
    QUALITY: Speed(),
    BALANCED: Speed(12, GuidanceIntervals(Interval(end=0.6), Interval(end=0.6))),
    FAST: Speed(8, GuidanceIntervals(Interval(end=0.5), Interval(end=0.5))),
    TURBO: Speed(8, NEVER),
}
"""Presets; the first one is official. The steps of the last are those that the transformer has been distilled to."""
NOT_DISTILLED = (
    f"speed {TURBO} found for a transformer that was not distilled, one with the LoRA of `python -m internvl_u "
    f"distill` expected: load that LoRA at strength 1, or choose {FAST}"
)


def check_speed(speed: str) -> None:
    """Makes sure that there is such a preset.

    Raises:
        ValueError: there is none.
    """
    if speed not in SPEEDS:
        raise ValueError(f"speed {shown(speed)} found, one of {', '.join(SPEEDS)} expected")
