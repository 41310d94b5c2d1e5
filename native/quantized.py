"""Quantised layers with our own arithmetic: where ComfyUI does not know their format, and in transformers' modules.

A matrix stays as it is stored and is cast when it is used; its scale is applied to what goes in or comes out. ComfyUI's
patches (LoRA) are for values as they are, hence `convert_weight` and `set_weight`, which it calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import comfy.ops
import torch
from torch import nn
from torch.nn import functional

from ..internvl_u import int8
from ..internvl_u.quantization import OURS, QuantizedLayer
from . import compat


class Quantized(nn.Module):
    """A layer whose matrix was rotated in groups of columns (0: not) and divided by `scale`: one, or [rows]."""

    weight: torch.Tensor
    scale: torch.Tensor
    group: int

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_: object) -> torch.Tensor:
        """Returns the matrix, fp32, that a stored one stands for: what a patch is added to."""
        return int8.dequantize(weight, self.scale.to(weight.device), self.group)

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_: object,
    ) -> torch.Tensor | None:
        """Takes a patched matrix, which is kept in bf16 and not rounded to few bits again; or returns it as stored."""
        stored = int8.rotate(weight.float(), self.group) if self.group else weight.float()
        stored = stored / self.scale.to(weight.device).reshape(-1, 1)
        if return_weight:
            return stored
        self.weight = nn.Parameter(stored.to(torch.bfloat16), requires_grad=False)
        return None


class QuantizedLinear(Quantized, comfy.ops.manual_cast.Linear):
    """A linear layer: its matrix stays as it is stored, what goes in and comes out is rotated and scaled."""

    def forward_comfy_cast_weights(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias, stream = compat.cast_weight(self, hidden)
        if self.group:
            hidden = int8.rotate(hidden, self.group)
        if self.scale.numel() == 1:
            result = functional.linear(hidden * float(self.scale), weight, bias)
        else:
            result = functional.linear(hidden, weight) * self.scale.to(hidden.device, hidden.dtype)
            result = result if bias is None else result + bias
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result


class QuantizedEmbedding(Quantized, comfy.ops.manual_cast.Embedding):
    """An embedding: rows are looked up where the table lies, and only they are made numbers of."""

    bias = None
    out_dtype: torch.dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        comfy.ops.run_every_op()
        table, where = self.weight, ids.to(self.weight.device)
        for patch in self.weight_function:
            table = patch(table.float())
        rows = functional.embedding(where, table.view(torch.uint8) if table.dtype.itemsize == 1 else table)
        rows = rows.view(table.dtype) if table.dtype.itemsize == 1 else rows
        scale = self.scale.to(where.device)
        rows = rows.float() * (scale if scale.numel() == 1 else scale[where].unsqueeze(-1))
        return (int8.rotate(rows, self.group) if self.group else rows).to(ids.device, self.out_dtype)


def check_formats(layers: Mapping[str, QuantizedLayer], source: object) -> bool:
    """Returns whether ComfyUI knows the formats of all layers; else they need our arithmetic.

    Raises:
        RuntimeError: neither ComfyUI nor we know one.
    """
    known = compat.known_formats()
    for name, one in layers.items():
        if one.format not in (*OURS, *known):
            raise RuntimeError(
                f"{source}: {name} is in {one.format}, which this ComfyUI does not know (it knows "
                f"{', '.join(sorted(known))}): update ComfyUI, or convert the released folder to int8 or fp8_scaled"
            )
    return all(one.format in known for one in layers.values())


def quantize_layers(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], compute: torch.dtype, source: object
) -> None:
    """Gives a model's quantised layers our arithmetic; embeddings give `compute`. `source` is named in errors.

    Raises:
        RuntimeError: a layer is in a format, or of a kind, that we cannot compute with.
    """
    for name, one in layers.items():
        layer = model.get_submodule(name)
        kind = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedEmbedding
        if one.format not in OURS or not isinstance(layer, nn.Linear | nn.Embedding):
            raise RuntimeError(
                f"{source}: {name} is a {type(layer).__name__} in {one.format}, linear layers and embeddings in "
                f"{' or '.join(OURS)} expected here. `convert` makes such files of the released folder."
            )
        cast(Any, layer).__class__ = kind
        quantized = cast(QuantizedEmbedding, layer)
        quantized.scale, quantized.group, quantized.out_dtype = one.scale.float().reshape(-1), one.group, compute
