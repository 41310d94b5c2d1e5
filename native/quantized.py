"""Quantised layers with our own arithmetic: where ComfyUI does not know their format, and in transformers' modules.

A matrix stays as it is stored and is cast when it is used; its scale is applied to what goes in or comes out. ComfyUI's
patches (LoRA) are for values as they are, hence `convert_weight` and `set_weight`, which it calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import comfy.ops
import torch
from torch import nn
from torch.nn import functional

from ..internvl_u import int8
from ..internvl_u.quantization import OURS, QuantizedLayer
from . import compat


class QuantizedLinear(comfy.ops.manual_cast.Linear):
    """A linear layer whose matrix was rotated in groups of columns (0: not) and divided by `scale`: one, or [rows]."""

    scale: torch.Tensor
    group: int

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


def quantize_layers(model: nn.Module, layers: Mapping[str, QuantizedLayer], source: object) -> None:
    """Gives a model's quantised layers our arithmetic; `source` is named in errors.

    Raises:
        RuntimeError: a layer is in a format, or of a kind, that we cannot compute with.
    """
    for name, one in layers.items():
        layer = model.get_submodule(name)
        if one.format not in OURS or not isinstance(layer, nn.Linear):
            raise RuntimeError(
                f"{source}: {name} is a {type(layer).__name__} in {one.format}, linear layers in {' or '.join(OURS)} "
                "expected here. `convert` makes such files of the released folder."
            )
        layer.__class__ = QuantizedLinear
        quantized = cast(QuantizedLinear, layer)
        quantized.scale, quantized.group = one.scale.float().reshape(-1), one.group
