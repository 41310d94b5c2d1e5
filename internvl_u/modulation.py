"""Modulation of a whole schedule at once: it depends on the noise level alone, and so on nothing that sampling makes.

The layers that it comes from hold almost a third of the transformer's weights. Computed for all noise levels before the
first step, they are read once in a run instead of at each call, and need not be where the other weights are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .mmdit import MMDiT

LEVELS = 64
"""Noise levels of a schedule that are kept at a time: at the released size 0.7 MiB each in bfloat16."""
OTHERS = 4
"""Calls at noise levels outside the schedule that are kept: each is for the branches of one moment."""


class BlockModulation(NamedTuple):
    """What one block is modulated by, of R samples, or in one row for all of them."""

    level: torch.Tensor  # [R, D], what the others are made of
    image: torch.Tensor  # [R, 6 D]
    text: torch.Tensor  # [R, 6 D]


@dataclass
class StepModulation:
    """What the transformer is modulated by at R noise levels: those of a call's samples, or of many calls."""

    level: torch.Tensor  # [R, D], what all the rest is made of
    blocks: Sequence[tuple[torch.Tensor, torch.Tensor]]  # image and text of each block, [R, 6 D]
    out: torch.Tensor | None  # [R, 2 D], of the last norm; where it is None it is made of `level`

    def rows(self, rows: Sequence[int]) -> StepModulation:
        """Returns the modulation of samples at the given rows, in one row where all of them share it."""
        if len(set(rows)) == 1:
            where = slice(rows[0], rows[0] + 1)
        else:
            where = torch.tensor(rows, device=self.level.device)
        out = None if self.out is None else self.out[where]
        return StepModulation(self.level[where], [(image[where], text[where]) for image, text in self.blocks], out)

    def block(self, index: int) -> BlockModulation:
        """Returns what one block is modulated by."""
        return BlockModulation(self.level, *self.blocks[index])


class Modulations:
    """The modulation of one sampling run, kept by noise level. It is for one model, whose weights do not change in it.

    At the first call the whole schedule is computed, or as much of a long one as is kept; noise levels outside it, for
    which some samplers ask, when they are met.
    """

    def __init__(self, schedule: torch.Tensor):
        """Begins a run at the noise levels whose sinusoids are `schedule` [n, 256]."""
        places = {key: i for i, key in reversed(list(enumerate(_keys(schedule))))}
        self._schedule = schedule[sorted(places.values())]  # each level once, in the order in which it is met
        self._scheduled = _keys(self._schedule)
        self._tables: deque[_Table] = deque(maxlen=OTHERS)
        self._window: _Table | None = None

    def at(self, model: MMDiT, time: torch.Tensor, dtype: torch.dtype) -> StepModulation:
        """Returns the modulation of samples at the noise levels of `time` [B, 256], in one row where they share one.

        All calls of a run are for one `model` and `dtype`. What is returned is not to be changed.
        """
        keys = _keys(time)
        for table in (self._window, *self._tables):
            if table is not None and all(key in table.places for key in keys):
                break
        else:
            table = self._make(model, time, keys, dtype)
        return table.modulation.rows([table.places[key] for key in keys])

    def clear(self) -> None:
        """Lets go of all that is kept."""
        self._window = None
        self._tables.clear()

    def _make(self, model: MMDiT, time: torch.Tensor, keys: Sequence[bytes], dtype: torch.dtype) -> _Table:
        if set(keys) <= set(self._scheduled):
            first = min(self._scheduled.index(key) for key in keys)
            some = slice(first, first + LEVELS)
            if set(keys) <= set(self._scheduled[some]):
                self._window = None  # before the next is made: they need not fit beside each other
                levels = self._schedule[some].to(time.device)
                self._window = _Table(self._scheduled[some], model.modulation(levels, dtype))
                return self._window
        different = list(dict.fromkeys(keys))
        levels = time[[keys.index(key) for key in different]]
        self._tables.append(_Table(different, model.modulation(levels, dtype)))
        return self._tables[-1]


class _Table:
    """The modulation of some noise levels, and which row is which level's."""

    def __init__(self, keys: Sequence[bytes], modulation: StepModulation):
        self.places, self.modulation = {key: i for i, key in enumerate(keys)}, modulation


def _keys(time: torch.Tensor) -> list[bytes]:
    """Returns what tells noise levels apart: the bytes of their sinusoids [n, 256]."""
    return [row.tobytes() for row in time.detach().to("cpu", torch.float32).numpy()]
