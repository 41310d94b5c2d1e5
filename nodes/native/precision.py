"""How weights are kept, and in which dtype is computed."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.cli_args
import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch

PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def stored(weights: Mapping[str, torch.Tensor], precision: torch.dtype | None, scales: Mapping) -> dict:
    """Returns the weights as they are kept; None leaves them as they are.

    In fp8 only matrices shrink: norms, biases and embeddings are small and suffer most.

    Raises:
        ValueError: the file is scaled fp8, which has its precision already.
    """
    if precision is None:
        return dict(weights)
    if scales:
        raise ValueError(f"precision {precision} found for a file of scaled fp8, auto expected")
    if precision not in _FP8:
        return {name: tensor.to(precision) for name, tensor in weights.items()}
    return {
        name: tensor.to(precision) if tensor.ndim == 2 and "embed" not in name else tensor
        for name, tensor in weights.items()
    }


def storage_dtype(weights: Mapping[str, torch.Tensor], kept: torch.dtype | None, supported: list) -> torch.dtype:
    """Returns the dtype that ComfyUI would keep the transformer's weights in, but never a wider one than the file's.

    Where bf16 arithmetic is missing, ComfyUI would keep bf16 and fp8 weights as fp32, which is two and four times the
    memory; they are cast when they are used instead.
    """
    chosen = mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights), supported_dtypes=list(supported), weight_dtype=kept
    )
    if chosen == torch.float32 and kept is not None and not comfy.cli_args.args.fp32_unet:
        return kept
    return chosen


def arithmetic(weights: Mapping[str, torch.Tensor], device: torch.device) -> torch.dtype:
    """Returns the dtype to compute in: fp32 for fp32 weights and where bf16 is slow or missing, else bf16."""
    if all(tensor.dtype == torch.float32 for tensor in weights.values()) or not mm.should_use_bf16(device):
        return torch.float32
    return torch.bfloat16


def operations(weights: Mapping[str, torch.Tensor], compute: torch.dtype):
    """Returns ComfyUI's operations: those that cast weights at use only where any weight needs it."""
    if all(tensor.dtype == compute for tensor in weights.values()):
        return comfy.ops.disable_weight_init
    return comfy.ops.manual_cast
