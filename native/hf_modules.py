"""transformers' Qwen3 under ComfyUI's memory management.

ComfyUI casts and offloads a weight only where the module that owns it derives from its operations, so the modules that
transformers made are given ComfyUI's classes. This relies on: transformers' RMSNorm holding `weight` and
`variance_epsilon`; its models asking `device` and `dtype` of the first parameter (which may be offloaded or in fp8);
ComfyUI's `cast_bias_weight(module, input, offloadable=)`, `uncast_bias_weight` and `run_every_op`.
"""

from __future__ import annotations

from typing import cast

import comfy.ops
import torch
from torch import nn

from ..internvl_u.operations import Operations
from . import compat


class CastRMSNorm(nn.Module, comfy.ops.CastWeightBiasOp):
    """transformers' RMSNorm with ComfyUI's casting of the weight; modules become it by a change of class."""

    bias = None
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not (self.comfy_cast_weights or self.weight_function):
            return self._normed(hidden, self.weight)
        weight, bias, stream = compat.cast_weight(self, hidden)
        result = self._normed(hidden, weight)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weight * wide.to(hidden.dtype)


class CastEmbedding(comfy.ops.manual_cast.Embedding):
    """An embedding that gives the arithmetic's dtype, and looks rows up where its table lies.

    ComfyUI would bring an offloaded table, which is the largest weight, to the GPU for each token that is written.
    """

    bias = None
    out_dtype: torch.dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.weight.device == ids.device or self.weight_function:
            return super().forward(ids).to(self.out_dtype)
        comfy.ops.run_every_op()
        rows = torch.nn.functional.embedding(ids.to(self.weight.device), self.weight)
        return rows.to(ids.device, self.out_dtype)


def cast_language_model(model: nn.Module, operations: Operations, compute: torch.dtype) -> None:
    """Gives transformers' modules ComfyUI's classes, so that their weights can be cast and offloaded.

    `model.execution` is (device, dtype) to run on, and has to be set before each use.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = operations.Linear
        elif type(module) is nn.Embedding:
            module.__class__ = CastEmbedding
            cast(CastEmbedding, module).out_dtype = compute
        elif type(module).__name__.endswith("RMSNorm"):
            module.__class__ = CastRMSNorm
            module.comfy_cast_weights = operations.Linear.comfy_cast_weights
    execution = {
        "device": property(lambda self: self.execution[0]),
        "dtype": property(lambda self: self.execution[1]),
    }
    model.__class__ = type(type(model).__name__, (type(model),), execution)
