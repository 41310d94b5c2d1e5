"""Matrices in blocks of few bits, as GGUF files hold them, and the layers that turn them into numbers when they run.

A row of a packed matrix is a run of blocks; each has a scale or two and its values as small whole numbers. The layouts
are those of ggml (github.com/ggml-org/ggml, ggml-common.h). Everything here is torch's own arithmetic where the matrix
lies; in fp32 the values are those of the package `gguf`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional

CHUNK, CPU_CHUNK = 8 << 20, 256 << 10
"""Values that are turned into fp32 at once, on the way to another dtype; on a processor as many as its cache holds."""
WHOLE = 32 << 20
"""Values above which a linear layer takes its matrix by pieces of rows: the released `lm_head` has 311 million."""


class BlockFormat(NamedTuple):
    """A layout of blocks: values and bytes of each, and the function from bytes [N, bytes] to fp32 [N, values]."""

    values: int
    size: int
    unpack: Callable[[torch.Tensor], torch.Tensor]


class PackedMatrix(NamedTuple):
    """How a matrix is packed: the name of its format in `FORMATS`, and the shape that it stands for."""

    format: str
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in bytes.

        Raises:
            RuntimeError: the rows are no whole number of blocks.
        """
        return (*self.shape[:-1], row_bytes(self.shape[-1], self.format))


def row_bytes(columns: int, form: str) -> int:
    """Returns the bytes of a row of so many values.

    Raises:
        RuntimeError: they are no whole number of blocks.
    """
    layout = FORMATS[form]
    if columns % layout.values:
        raise RuntimeError(f"rows of {columns} values found, a multiple of {layout.values} expected for {form}")
    return columns // layout.values * layout.size


def dequantize(packed: torch.Tensor, form: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns the values [rows, columns] of a packed matrix [rows, bytes], on its device."""
    layout = FORMATS[form]
    rows, columns = packed.shape[0], packed.shape[1] // layout.size * layout.values
    chunk = CPU_CHUNK if packed.device.type == "cpu" else CHUNK
    step = max(1, chunk // max(columns, 1))
    if rows <= step:
        return layout.unpack(packed.reshape(-1, layout.size)).reshape(rows, columns).to(dtype)
    result = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    for first in range(0, rows, step):
        piece = packed[first : first + step]
        result[first : first + step] = layout.unpack(piece.reshape(-1, layout.size)).reshape(-1, columns)
    return result


def packed_linear(
    hidden: torch.Tensor, packed: torch.Tensor, form: str, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns what a linear layer of a packed matrix [rows, bytes] makes of `hidden` [..., columns], in its dtype."""
    layout = FORMATS[form]
    step = max(1, WHOLE // (packed.shape[1] // layout.size * layout.values))
    if packed.shape[0] <= step:
        return functional.linear(hidden, dequantize(packed, form, hidden.dtype), bias)
    pieces = [functional.linear(hidden, dequantize(rows, form, hidden.dtype)) for rows in packed.split(step)]
    result = torch.cat(pieces, dim=-1)
    return result if bias is None else result + bias


class PackedLinear(nn.Linear):
    """A linear layer whose matrix is packed; layers become it by a change of class."""

    packing: PackedMatrix

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return packed_linear(input, self.weight, self.packing.format, bias)


class PackedEmbedding(nn.Embedding):
    """An embedding whose table is packed; of it only the rows that are looked up become numbers."""

    packing: PackedMatrix
    out_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return packed_rows(self.weight, input, self.packing.format, self.out_dtype)


def packed_rows(packed: torch.Tensor, ids: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns the rows [..., columns] of a packed matrix that `ids` [...] name, where `ids` lie."""
    rows = packed[ids.flatten().to(packed.device)].to(ids.device)
    return dequantize(rows, form, dtype).unflatten(0, ids.shape)


def pack_layers(
    model: nn.Module,
    packed: Mapping[str, PackedMatrix],
    dtype: torch.dtype,
    linear: type[nn.Linear] = PackedLinear,
    embedding: type[nn.Embedding] = PackedEmbedding,
) -> None:
    """Makes the layers of packed matrices, by the names of their weights, hold bytes; they are filled afterwards.

    `linear` and `embedding` are the classes that they become; an embedding gives `dtype`.

    Raises:
        RuntimeError: a tensor is packed that belongs to no linear layer and no embedding.
    """
    wrong = []
    for name, packing in packed.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight") or not isinstance(layer, (nn.Linear, nn.Embedding)):
            wrong.append(f"{name}: {packing.format}")
            continue
        one = cast(Any, layer)
        one.__class__ = embedding if isinstance(layer, nn.Embedding) else linear
        one.weight = nn.Parameter(torch.empty(packing.stored_shape, dtype=torch.uint8, device="meta"), False)
        one.packing, one.out_dtype = packing, dtype
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(packed)} packed tensors are no matrices of layers ({', '.join(wrong[:5])}): numbers "
            "expected there"
        )


def _scale(blocks: torch.Tensor, place: int) -> torch.Tensor:
    return blocks[:, place : place + 2].contiguous().view(torch.float16).float()  # [N, 1]


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """Returns the low halves, then the high halves, of bytes [..., K] as [..., 2, K]."""
    return torch.stack([data & 15, data >> 4], dim=-2)


def _bits(data: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the groups of `width` bits of bytes [..., K], the lowest first, as [..., 8 // width, K]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    return (data.unsqueeze(-2) >> shifts[:, None]) & ((1 << width) - 1)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """Returns the bits of 4 bytes [N, 4] as [N, 32], each worth 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (((data.unsqueeze(-1) >> shifts) & 1) << 4).flatten(1)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _scale(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _scale(blocks, 0) * (_nibbles(blocks[:, 2:]).flatten(1).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _scale(blocks, 0) * _nibbles(blocks[:, 4:]).flatten(1).float() + _scale(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 6:]).flatten(1) | _fifth_bits(blocks[:, 2:6])
    return _scale(blocks, 0) * (values.float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 8:]).flatten(1) | _fifth_bits(blocks[:, 4:8])
    return _scale(blocks, 0) * values.float() + _scale(blocks, 2)


def _affine(blocks: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns values [N, 8, 32] scaled and shifted: two fp16 numbers, eight scales and eight minima of 6 bits each."""
    low, middle, high = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=1).float()
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], dim=1).float()
    scale, minimum = _scale(blocks, 0) * scales, _scale(blocks, 2) * minima  # [N, 8]
    return (scale[:, :, None] * values.float() - minimum[:, :, None]).flatten(1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _affine(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).reshape(-1, 8, 32))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).reshape(-1, 8, 32)
    return _affine(blocks, low | (_bits(blocks[:, 16:48], 1) << 4))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).reshape(-1, 8, 32)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2).reshape(-1, 8, 32)
    values = (low | (high << 4)).float() - 32
    scales = _scale(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()  # [N, 16]
    return (scales[:, :, None] * values.reshape(-1, 16, 16)).flatten(1)


FORMATS = {
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q6_K": BlockFormat(256, 210, _q6_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
}
"""The formats that are read. `convert` writes the first four."""
