"""Packed matrices of GGUF files under ComfyUI's memory management.

ComfyUI moves and offloads the packed bytes, which are what a layer holds; a layer turns them into numbers where it
runs, one matrix at a time. Patches, such as those of a LoRA, are applied to the numbers: never to the bytes, so they
stay beside the model while it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import comfy.model_patcher
import comfy.ops
import torch
from torch import nn

from ..internvl_u.dequantize import PackedMatrix, dequantize, pack_layers, packed_linear, packed_rows
from . import compat
from .patcher import MovingPatcher


class Dequantize:
    """A packed matrix to fp32 numbers: the first of the functions that ComfyUI applies to a patched weight."""

    def __init__(self, form: str):
        self.form = form

    def __call__(self, packed: torch.Tensor) -> torch.Tensor:
        return dequantize(packed, self.form)


class CastPackedLinear(comfy.ops.manual_cast.Linear):
    """A linear layer that holds a packed matrix."""

    packing: PackedMatrix

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias, stream = compat.cast_packed(self, input.device, input.dtype)
        if weight.dtype == torch.uint8:
            result = packed_linear(input, weight, self.packing.format, bias)
        else:
            result = torch.nn.functional.linear(input, weight.to(input.dtype), bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: object) -> torch.Tensor:
        """Returns the numbers of a weight that ComfyUI has cast as if its bytes were some: for merging models."""
        return dequantize(weight.to(torch.uint8), self.packing.format)


class CastPackedEmbedding(comfy.ops.manual_cast.Embedding):
    """An embedding that holds a packed table, and unpacks the rows that are looked up, which alone leave its device."""

    bias = None
    packing: PackedMatrix
    out_dtype: torch.dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        comfy.ops.run_every_op()
        if not self.weight_function:
            return packed_rows(self.weight, ids, self.packing.format, self.out_dtype)
        weight, bias, stream = compat.cast_packed(self, ids.device, self.out_dtype)
        rows = torch.nn.functional.embedding(ids, weight).to(self.out_dtype)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return rows


class PackedPatcher(MovingPatcher):
    """ComfyUI's patcher over a model with packed layers.

    It keeps one rule: while weights are patched, a packed layer that has patches has the functions that unpack it and
    apply them, once, whether the layer is loaded or offloaded; else it has neither.
    """

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if key in self._packed_keys():
            return None  # `load` gives the layer its functions
        return super().patch_weight_to_device(key, *args, **kwargs)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load(*args, **kwargs)
        self._set_functions(True)
        return result

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        result = super().partially_unload(*args, **kwargs)
        self._set_functions(True)
        return result

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> Any:
        result = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._set_functions(False)
        return result

    def patch_hooks(self, hooks: Any) -> Any:
        wanted = self.get_combined_hook_patches(hooks) if hooks is not None else {}
        if any(key in wanted for key in self._packed_keys()):
            raise ValueError(
                "a LoRA of hooks (scheduled, or of one conditioning) found on a GGUF model, whose matrices are packed: "
                "load the LoRA with a LoRA loader, or take a safetensors file for this"
            )
        return super().patch_hooks(cast(Any, hooks))

    def _packed_layers(self) -> Iterator[tuple[str, nn.Module]]:
        for name, layer in self.model.named_modules():
            if isinstance(layer, (CastPackedLinear, CastPackedEmbedding)):
                yield f"{name}.weight", layer

    def _packed_keys(self) -> set[str]:
        return {key for key, _ in self._packed_layers()}

    def _set_functions(self, patched: bool) -> None:
        ours = (Dequantize, comfy.model_patcher.LowVramPatch)
        for key, layer in self._packed_layers():
            one = cast(CastPackedLinear, layer)
            functions = [function for function in one.weight_function if not isinstance(function, ours)]
            if patched and key in self.patches:
                functions.insert(0, cast(Any, comfy.model_patcher.LowVramPatch(key, self.patches)))
            if functions:
                functions.insert(0, Dequantize(one.packing.format))
            one.weight_function = functions


def cast_packed_layers(model: nn.Module, packed: Mapping[str, PackedMatrix], compute: torch.dtype) -> None:
    """Makes the layers of packed matrices hold bytes, in ComfyUI's classes; see `pack_layers`.

    Raises:
        RuntimeError: a tensor is packed that belongs to no linear layer and no embedding.
    """
    pack_layers(model, packed, compute, CastPackedLinear, CastPackedEmbedding)


def check_plain(model: nn.Module, what: str) -> None:
    """Makes sure that no layer of a model is packed; `what` is being done with it.

    Raises:
        ValueError: some are.
    """
    if any(isinstance(layer, (CastPackedLinear, CastPackedEmbedding)) for layer in model.modules()):
        raise ValueError(
            f"{what}: a GGUF model found, whose matrices are packed. Load a safetensors file or the released folder."
        )
