"""Matrices in int8: one scale per row or per matrix, with or without a rotation of the columns (ConvRot).

The spelling is ComfyUI's `int8_tensorwise` (comfy-kitchen's TensorWiseINT8Layout). ConvRot multiplies each group of
columns with a regular Hadamard matrix before rounding, which spreads outliers over the group; the inputs of the layer
are rotated likewise, which changes no product. The matrix is symmetric and its own inverse.
"""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
from torch import nn
from torch.nn import functional

FORMAT = "int8_tensorwise"
LARGEST = 127
GROUPS = (256, 64, 16, 4)
"""Columns that are rotated together: powers of 4, for which the regular Hadamard matrices exist."""


def group_for(columns: int) -> int:
    """Returns the largest group that divides a number of columns; 0: none does."""
    return next((group for group in GROUPS if columns % group == 0), 0)


def rotate(values: torch.Tensor, group: int) -> torch.Tensor:
    """Returns values [..., columns] with each `group` of columns rotated; the same once more gives them back."""
    matrix = hadamard(group).to(values.device, values.dtype)
    return (values.unflatten(-1, (-1, group)) @ matrix).flatten(-2)


@functools.cache
def hadamard(size: int) -> torch.Tensor:
    """Returns the regular Hadamard matrix [size, size], fp32, of a power of 4, divided by its norm."""
    one = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = one
    while len(matrix) < size:
        matrix = torch.kron(matrix, one)
    return matrix / math.sqrt(size)


def scale_of(rows: torch.Tensor, group: int = 0) -> torch.Tensor:
    """Returns the scales [rows, 1], fp32, of rows [rows, columns] that are rotated by `group` first (0: not)."""
    rows = rotate(rows.float(), group) if group else rows.float()
    return (rows.abs().amax(1, keepdim=True) / LARGEST).clamp(min=1e-30)


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, group: int = 0) -> torch.Tensor:
    """Returns the matrix [rows, columns], fp32, that int8 values and scales ([rows, 1], [rows] or one) stand for."""
    values = quantized.float() * scale.float().reshape(-1, 1)
    return rotate(values, group) if group else values


class Int8Linear(nn.Linear):
    """A linear layer whose matrix stays as it is stored; layers become it by a change of class."""

    scale: torch.Tensor
    group: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rotated = rotate(input, self.group) if self.group else input
        product = functional.linear(rotated, self.weight.to(input.dtype)).float()
        product = (product * self.scale.to(input.device)).to(input.dtype)
        return product if self.bias is None else product + self.bias


def keep_packed(layer: nn.Module, scale: torch.Tensor, group: int) -> None:
    """Makes a linear layer take its matrix in int8, with a scale for each row or one for all."""
    layer.__class__ = Int8Linear
    packed = cast(Int8Linear, layer)
    packed.scale, packed.group = scale.float().flatten(), group
