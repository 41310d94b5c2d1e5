"""Products of one row with a matrix: what writing a token consists of.

torch's `linear` is made for many rows. One row with a matrix that no cache holds takes as long as reading the matrix,
and there the kernels of a processor differ: with two threads of an AMD EPYC, bf16 is read at 20 to 28 GB/s through
oneDNN and at 42 through torch's own kernel, fp32 at 22 through MKL and 37 through oneDNN; a plain sum reads 45.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.backends import mkldnn

from . import int8

LARGE = 4 << 20
"""Bytes of a matrix from which on it counts which kernel reads it, and not what the call costs."""
LARGE_PRODUCT = 16 * LARGE
"""Bytes of a matrix times rows from which on a second thread pays for small matrices too."""
Product = Callable[[torch.Tensor], torch.Tensor]
"""A row [columns] -> [rows]."""


def row_product(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Product | None:
    """Returns a linear layer's product with rows of a dtype on a device, without what the layer does around it.

    None where it does more: casts or moves its matrix, unpacks it, adds a bias or a patch. On a processor, rows of fp32
    are rounded to bf16 for matrices of bf16 and int8: making them fp32 would take ten times as long as the product.
    """
    matrix: Any = layer.weight
    if getattr(layer, "bias", None) is not None or matrix is None or matrix.device != device:
        return None
    scale = getattr(layer, "scale", None)
    if scale is not None:
        return _int8_product(layer, matrix, scale, dtype)
    if not matrix.dtype.is_floating_point or not matrix.is_contiguous() or matrix.is_meta:
        return None
    if matrix.dtype == dtype:
        if dtype == torch.float32 and device.type == "cpu" and matrix.nbytes >= LARGE and _has_onednn():
            return lambda row: _onednn(row, matrix)
        return lambda row: torch.mv(matrix, row)
    if device.type == "cpu" and matrix.dtype == torch.bfloat16 and dtype == torch.float32:
        return lambda row: torch.mv(matrix, row.bfloat16()).float()
    return None


def is_plain(layer: nn.Module) -> bool:
    """Returns whether a layer is nothing but its class and its weight.

    ComfyUI patches weights where they are used, moves offloaded ones, and puts a LoRA beside a layer by a `forward` of
    its own; other libraries use torch's hooks.
    """
    own = vars(layer)
    patched = own.get("weight_function") or own.get("bias_function") or own.get("comfy_cast_weights")
    return not (patched or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"])


def _int8_product(layer: nn.Module, matrix: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Product | None:
    if matrix.dtype != torch.int8 or matrix.device.type != "cpu" or getattr(matrix, "grown", None) is not None:
        return None
    if scale.numel() not in (1, len(matrix)) or not hasattr(torch, "_weight_int8pack_mm"):
        return None
    group = int(getattr(layer, "group", 0))
    ones, scales = torch.ones(len(matrix), dtype=torch.bfloat16), scale.float().flatten()
    multiply = cast(Any, torch)._weight_int8pack_mm

    def product(row: torch.Tensor) -> torch.Tensor:
        row = int8.rotate(row, group) if group else row
        whole = multiply(row.bfloat16()[None], matrix, ones)[0]
        return (whole.float() * scales).to(dtype)

    return product


def _has_onednn() -> bool:
    """Returns whether oneDNN has the product in fp32, which MKL computes on one thread."""
    return mkldnn.is_available() and torch.get_num_threads() > 1 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(row: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(row[None], matrix, None, "none", [], "")[0]


@contextlib.contextmanager
def without_onednn(device: torch.device) -> Iterator[None]:
    """Lets torch read matrices of bf16 with its own kernel. For products of one row: many rows it makes slow."""
    if device.type != "cpu" or not mkldnn.enabled:
        yield
        return
    mkldnn.enabled = False
    try:
        yield
    finally:
        mkldnn.enabled = True


@contextlib.contextmanager
def fitting_threads(matrix: torch.Tensor, rows: int = 1) -> Iterator[None]:
    """Computes on one thread where a network's matrices, of which `matrix` is one, and the rows to multiply are small.

    A second thread has nothing to gain there, and each product waits for it: where another program keeps its core busy,
    a token of the nano model took 50 ms with two threads and takes 3 ms with one.
    """
    before, large = torch.get_num_threads(), matrix.nbytes >= LARGE or matrix.nbytes * rows >= LARGE_PRODUCT
    if before == 1 or large or matrix.device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
