"""Matrices in float8: as they are, or divided by one scale each."""

from __future__ import annotations

import torch

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of float8_e4m3fn."""
FORMAT = "float8_e4m3fn"
_KEPT = ("img_in.", "txt_in.", "proj_out.", "norm_out.", "lm_head.", "embed")


def shrinks(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a tensor is converted to 8 bits: matrices, but for embeddings and the ends of a network."""
    return name.endswith(".weight") and len(shape) == 2 and not any(kept in name for kept in _KEPT)


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns values in a dtype of float8, those beyond its range cut off: torch makes NaN or infinity of them."""
    largest = torch.finfo(dtype).max
    return values.float().clamp(-largest, largest).to(dtype)


def scale_for(largest: float) -> float:
    """Returns the scale of a matrix whose largest absolute value is `largest`, rounded to fp32."""
    return float(torch.tensor(largest / LARGEST, dtype=torch.float32)) or 1.0
