"""The inputs of less work for a picture, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io

from ..internvl_u.defaults import STEPS
from ..internvl_u.speed import NEVER, QUALITY, SPEEDS, TURBO, GuidanceIntervals, Interval, Speed
from ..native import compat
from ..native.distilled import evaluations_on
from .inputs import check_choice

NO_SPEED = f"{QUALITY} (official)"
_PRESETS = {NO_SPEED if name == QUALITY else name: name for name in SPEEDS}
SPEED_TIP = (
    "quality: all as typed. balanced: 12 steps, guidance in the first 60 % of the schedule, half of the work of 20 "
    "steps. fast: 8 steps, guidance in the first half, 30 % of the work. What is left at its default (20 steps, 0 and "
    "1) is set, and the node says so. Price in 800 scenes of the nano model, 64 pixels: 0.1 and 0.4 points fewer right "
    "pictures, +- 0.5; with the released model it is not measured. Pictures of a seed differ in detail. turbo: with a "
    "LoRA of `python -m internvl_u distill` on the MODEL, one branch without guidance in as few steps as it is for."
)
_SCALES = {"all_cfg": "prompt cfg", "part_cfg": "picture cfg"}


def interval_inputs() -> list[io.Input]:
    """Returns the optional starts and ends of the two scales' intervals."""
    return [_share(name, shown, end) for name, shown in _SCALES.items() for end in ("start", "end")]


def _share(name: str, shown: str, end: str) -> io.Float.Input:
    default = getattr(Interval(), end)
    tip = {
        "start": f"Share of the schedule at which {shown} begins to work. Before it the scale is 1.",
        "end": f"Share of the schedule at which {shown} stops working. After it the scale is 1, and steps are cheaper: "
        "where neither works, half as much for a picture from text, and less for an edit.",
    }[end]
    return io.Float.Input(
        f"{name}_{end}",
        display_name=f"{shown} {end}",
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        round=0.001,
        optional=True,
        tooltip=tip,
        **compat.advanced(io.Float.Input),
    )


def speed_input() -> io.Combo.Input:
    """Returns the optional choice of a preset."""
    return io.Combo.Input(
        "speed",
        options=list(_PRESETS),
        default=NO_SPEED,
        optional=True,
        tooltip=SPEED_TIP,
        **compat.advanced(io.Combo.Input),
    )


def chosen_speed(
    speed: str,
    model: io.Model.Type | None,
    limits: Sequence[float] = (0.0, 1.0, 0.0, 1.0),
    steps: int = STEPS,
) -> tuple[Speed, str]:
    """Returns the steps and intervals to draw with, and a sentence where they are not the typed ones.

    Raises:
        ValueError: there is no such preset, it is `turbo` and the model was not distilled, or an interval ends before
            its start.
    """
    check_choice("speed", speed, list(_PRESETS))
    typed = Speed(steps, GuidanceIntervals(Interval(*limits[:2]), Interval(*limits[2:])))
    typed.intervals.check()
    way = typed.filled(_PRESETS[speed], evaluations_on(model) if _PRESETS[speed] == TURBO else None)
    return way, f"speed {speed}: {_described(typed, way)}" if way != typed else ""


def _described(typed: Speed, way: Speed) -> str:
    taken = [f"{way.steps} steps"] if way.steps != typed.steps else []
    if way.intervals == NEVER != typed.intervals:
        return f"{', '.join([*taken, 'one branch without guidance'])} taken"
    for shown, before, after in zip(_SCALES.values(), typed.intervals, way.intervals, strict=True):
        if before != after:
            taken.append(f"{shown} from {after.start:g} to {after.end:g} of the schedule")
    return f"{', '.join(taken)} taken"
