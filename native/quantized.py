"""Quantised layers with our own arithmetic: where ComfyUI does not know their format, and in transformers' modules.

A matrix stays as it is stored and is cast when it is used; its scale is applied to what goes in or comes out. ComfyUI's
patches (LoRA) are for values as they are, hence `convert_weight` and `set_weight`, which it calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import comfy.float
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
        """Returns the matrix, fp32, that a stored one stands for: what a patch is added to.

        It is marked as such, because ComfyUI 0.33 hands offloaded matrices to patches as they are stored.
        """
        meant = int8.dequantize(weight, self.scales(weight.device), self.group)
        cast(Any, meant).is_meant = True
        return meant

    def offloaded(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the same of a matrix that is as the file has it, whatever this layer's is now.

        It may be of this layer's copy on another device: patches are shared by all.
        """
        return int8.dequantize(weight, self.scale.to(weight.device), self.group)

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_: object,
    ) -> torch.Tensor | None:
        """Takes a patched matrix, or returns it as it would be stored.

        What a row or the matrix has grown by beyond the stored dtype's range is kept with the patched parameter:
        ComfyUI puts the unpatched one back by itself.
        """
        stored = int8.rotate(weight.float(), self.group) if self.group else weight.float()
        stored = stored / self.scale.to(weight.device).reshape(-1, 1)
        if return_weight:
            return stored
        dtype = self.weight.dtype
        limit = int8.LARGEST if dtype == torch.int8 else torch.finfo(dtype).max
        peaks = stored.abs().amax(1, keepdim=True) if self.scale.numel() > 1 else stored.abs().max().reshape(1, 1)
        grown = torch.ones_like(peaks) if inplace_update else (peaks / limit).clamp(min=1.0)
        rounded = _rounded(stored / grown, dtype, seed or 0)
        if inplace_update:
            self.weight.data.copy_(rounded)
        else:
            self.weight = nn.Parameter(rounded, requires_grad=False)
            cast(Any, self.weight).grown = grown.flatten()
        return None

    def scales(self, device: torch.device) -> torch.Tensor:
        """Returns what the stored matrix is to be multiplied by: one, or [rows]."""
        scale, grown = self.scale.to(device), getattr(self.weight, "grown", None)
        return scale if grown is None else scale * grown.to(device)


def _rounded(values: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Returns values in a stored dtype, up or down by chance, so that a small patch is not lost in each of them."""
    if dtype != torch.int8:
        return comfy.float.stochastic_rounding(values, dtype, seed=seed)
    generator = torch.Generator(values.device).manual_seed(seed)
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    return (values + chance).floor().clamp(-int8.LARGEST, int8.LARGEST).to(dtype)


class QuantizedLinear(Quantized, comfy.ops.manual_cast.Linear):
    """A linear layer: its matrix stays as it is stored, what goes in and comes out is rotated and scaled."""

    def forward_comfy_cast_weights(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias, stream = compat.cast_weight(self, hidden)
        if self.group:
            hidden = int8.rotate(hidden, self.group)
        scale = self.scales(hidden.device)
        if scale.numel() == 1:
            result = functional.linear(hidden * float(scale), weight, bias)
        else:
            result = functional.linear(hidden, weight) * scale.to(hidden.dtype)
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
        scale = self.scales(where.device)
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


def check_unscaled(model: nn.Module, what: str) -> None:
    """Makes sure that no layer of a model has our own arithmetic; `what` is being done with it.

    Raises:
        ValueError: some have.
    """
    if any(isinstance(layer, Quantized) for layer in model.modules()):
        raise ValueError(
            f"{what}: a quantised model found in a format that this ComfyUI does not know, and whose scales it would "
            "leave away. Update ComfyUI, or load the released folder or a bf16 file."
        )


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
