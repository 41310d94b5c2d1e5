"""Inputs that several nodes share."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from comfy_api.latest import io

from ..internvl_u.defaults import THOUGHT_TOKENS
from ..internvl_u.files import shown
from ..internvl_u.generation import GenerationConfig
from ..internvl_u.numbers import is_finite
from ..native import compat
from ..native.progress import show_note

IMAGES = tuple(f"image{i}" for i in range(1, 9))
FIRST, LATER = IMAGES[:4], IMAGES[4:]
"""The later four came after other inputs, whose order in saved workflows stays."""
HISTORY = io.Custom("INTERNVL_U_HISTORY")
HOW = ("greedy", "sampling", "beams")
SCALES = AUTOMATIC, AS_TYPED = ("automatic", "as typed")
"""Whether guidance takes the official scales by itself, or the numbers as they are."""
CUSTOM = "custom"
BUDGETS = {"official: 200": 200, "long: 1024": 1024}
"""Ready limits of a thought, in tokens."""


def checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Returns a node's `execute` that first looks at its numbers and texts.

    ComfyUI looks at those on the node alone; over a link comes whatever another node gives.
    """

    @functools.wraps(execute)
    def run(cls: type[io.ComfyNode], **values: Any) -> io.NodeOutput:
        for one in cls.define_schema().inputs:
            if one.id not in values:
                continue
            if values[one.id] is None and one.optional:
                del values[one.id]  # as if nothing were connected
            else:
                values[one.id] = check_value(one, values[one.id])
        return execute(cls, **values)

    return run


def check_value(one: io.Input, value: Any) -> Any:
    """Returns the value of an input that is a number, a switch or a text; others are left alone.

    Raises:
        ValueError: it is something else, or out of range.
    """
    if isinstance(one, io.String.Input | io.Combo.Input):
        if not isinstance(value, str):
            raise ValueError(f"{one.id}: {_described(value)} found, a text expected")
        return value
    if isinstance(one, io.Boolean.Input):
        if not (isinstance(value, bool) or (is_finite(value) and value in (0, 1))):
            raise ValueError(f"{one.id}: {_described(value)} found, true or false expected")
        return bool(value)
    if not isinstance(one, io.Int.Input | io.Float.Input):
        return value
    value = int(value) if isinstance(value, bool) else value  # ComfyUI's BOOLEAN counts as 0 or 1
    whole = isinstance(one, io.Int.Input)
    lowest, highest = one.min, one.max
    expected = f"a {'whole ' if whole else ''}number from {lowest} to {highest} expected"
    if not is_finite(value) or (whole and value != int(value)):
        raise ValueError(f"{one.id}: {_described(value)} found, {expected}")
    if not lowest <= value <= highest:
        raise ValueError(f"{one.id}: {shown(value)} found, {expected}")
    return int(value) if whole else float(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Makes sure that a text is one of those that a list offers.

    Raises:
        ValueError: it is another one.
    """
    if value not in choices:
        raise ValueError(f"{name} {shown(value)} found, one of {', '.join(choices)} expected")


def _described(value: object) -> str:
    return shown(value) if isinstance(value, numbers.Number) else f"a value of type {type(value).__name__}"


def image_inputs(names: Sequence[str] = FIRST) -> list[io.Image.Input]:
    """Returns optional image inputs: core's growing list has another name in each version of ComfyUI."""
    tip = "A picture, or a batch that counts as several, up to 64 in all. <image> in the prompt marks its place in the "
    return [io.Image.Input(name, optional=True, tooltip=f"{tip}text.") for name in names]


def generation_inputs(max_new_tokens: int) -> list[io.Input]:
    """Returns the inputs that say how text is generated."""
    whole, real = compat.advanced(io.Int.Input), compat.advanced(io.Float.Input)
    return [
        io.Int.Input(
            "max_new_tokens",
            default=max_new_tokens,
            min=1,
            max=8192,
            tooltip="The longest text in tokens, about three quarters of a word each. Longer takes more time.",
        ),
        io.Combo.Input(
            "how",
            options=list(HOW),
            display_name="decoding",
            default="greedy",
            tooltip="How each token is chosen. greedy: the likeliest one each time, the same text on the same machine. "
            "sampling: chance "
            "by seed, temperature and top_p. beams: looks for the likeliest text as a whole, slower.",
        ),
        io.Float.Input(
            "temperature",
            default=0.7,
            min=0.01,
            max=2.0,
            step=0.05,
            tooltip="For sampling. Higher: more varied and less sure.",
            **real,
        ),
        io.Float.Input(
            "top_p",
            default=0.9,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="For sampling. Takes from the likeliest tokens that add up to this probability. 1: from all.",
            **real,
        ),
        io.Int.Input(
            "beams",
            default=3,
            min=2,
            max=16,
            tooltip="For beams: how many texts are followed. More: slower.",
            **whole,
        ),
        seed_input("For sampling only: the same seed gives the same text on the same machine."),
    ]


def generation_config(
    max_new_tokens: int, how: str, temperature: float, top_p: float, beams: int, seed: int
) -> GenerationConfig:
    """Returns what the values of `generation_inputs` mean.

    Raises:
        ValueError: a value is out of range.
    """
    check_choice("how", how, HOW)
    sampling = how == "sampling"
    return GenerationConfig(
        max_new_tokens,
        beams=beams if how == "beams" else 1,
        temperature=temperature if sampling else 0.0,
        top_p=top_p if sampling else 1.0,
        seed=seed,
    )


def scale_input(name: str, default: float, tooltip: str, **more: Any) -> io.Float.Input:
    """Returns one of the two guidance strengths."""
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip, **more)


def seed_input(tooltip: str) -> io.Int.Input:
    """Returns a seed with ComfyUI's control of what it becomes after a run."""
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def system_input(what: str) -> io.String.Input:
    """Returns the optional system prompt."""
    return io.String.Input(
        "system_prompt",
        default="",
        multiline=True,
        optional=True,
        tooltip=f"Replaces the model's system message for {what}. Empty: the one it was trained with.",
        **compat.advanced(io.String.Input),
    )


def budget_input() -> io.Combo.Input:
    """Returns the optional choice of a ready limit of new tokens."""
    return io.Combo.Input(
        "budget",
        options=[CUSTOM, *BUDGETS],
        default=CUSTOM,
        optional=True,
        tooltip="A ready max_new_tokens: official is the 200 of the official code, long leaves room for 1024. custom "
        "takes the number of max_new_tokens.",
    )


def chosen_tokens(budget: str, max_new_tokens: int, hidden: Any) -> int:
    """Returns the limit that a budget stands for, or with custom `max_new_tokens`; the node says what does not count.

    Raises:
        ValueError: there is no such budget.
    """
    if budget not in (CUSTOM, *BUDGETS):
        raise ValueError(f"budget {budget!r} found, one of {', '.join((CUSTOM, *BUDGETS))} expected")
    if budget == CUSTOM:
        return max_new_tokens
    if max_new_tokens not in (BUDGETS[budget], THOUGHT_TOKENS):
        told = f"budget {budget!r} counts, max_new_tokens {max_new_tokens} does not: choose custom for it"
        show_note(hidden, told, log=True)
    return BUDGETS[budget]


def history_input(tooltip: str) -> io.Input:
    """Returns the optional conversation before."""
    return HISTORY.Input("history", optional=True, tooltip=tooltip)


def history_output(tooltip: str) -> io.Output:
    """Returns the conversation after."""
    return HISTORY.Output(display_name="history", tooltip=tooltip)
