"""Values that are kept in memory while there is room, so that they are read or made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by number, made when they are first asked for; those beyond `room` bytes are made each time."""

    def __init__(self, make: Callable[[int], Value], tensors: Callable[[Value], Iterable[torch.Tensor]], room: int):
        """`tensors` tells what a value holds, whose bytes are counted."""
        self._make, self._tensors, self._room = make, tensors, room
        self._values: dict[int, Value] = {}

    def __getitem__(self, number: int) -> Value:
        if number in self._values:
            return self._values[number]
        value = self._make(number)
        size = sum(tensor.nbytes for tensor in self._tensors(value))
        if size <= self._room:
            self._values[number], self._room = value, self._room - size
        return value
