"""How weights are kept, and in which dtype is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import comfy.cli_args
import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch

from ..internvl_u import fp8
from ..internvl_u.checkpoint import Part
from ..internvl_u.operations import Operations
from ..internvl_u.weights import Weights

PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}
PRECISIONS |= {"fp8_e5m2": torch.float8_e5m2, "fp16": torch.float16}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class WeightPlan(NamedTuple):
    """The transformer's weights as they are kept, their dtype, and that of the arithmetic (None: the same)."""

    weights: Weights
    storage: torch.dtype
    compute: torch.dtype | None


def plan_transformer(
    part: Part, precision: torch.dtype | None, supported: Sequence[torch.dtype], device: torch.device
) -> WeightPlan:
    """Returns how the transformer is kept and computed; `precision` None lets ComfyUI choose.

    Raises:
        ValueError: the file is quantised and has its precision already, or the device cannot hold it.
    """
    weights = cast_weights(part, precision)
    plain = weights if not part.packed else part.plain
    stored = None if part.layers else precision or comfy.utils.weight_dtype(plain)
    storage = precision or storage_dtype(plain, stored, supported)
    if part.packed and storage in _FP8:  # a start option, which has nothing left to shrink
        storage = stored or torch.bfloat16
    compute = mm.unet_manual_cast(None if part.layers else storage, device, list(supported))
    if not part.layers and precision is None and storage != stored:
        weights = cast_weights(part, storage)
    check_device(weights, device, part)
    return WeightPlan(weights, storage, compute)


def cast_weights(part: Part, precision: torch.dtype | None) -> Weights:
    """Returns the weights as they are kept; None leaves them as they are.

    In fp8 only matrices shrink: norms, biases and embeddings are small and suffer most. Packed matrices stay packed.

    Raises:
        ValueError: the file is quantised and has its precision already, or GGUF and fp8 is wanted.
    """
    weights = part.weights
    if precision is None:
        return dict(weights)
    if part.layers:
        kinds = ", ".join(sorted({one.format for one in part.layers.values()}))
        raise ValueError(f"precision {_name(precision)} found for a quantised file ({kinds}), auto expected")
    if part.packed and precision in _FP8:
        raise ValueError(f"precision {_name(precision)} found for a GGUF file, auto, fp32, bf16 or fp16 expected")
    if precision not in _FP8:
        kept = part.packed
        return {
            name: tensor if name in kept else _narrowed(tensor, precision, name) for name, tensor in weights.items()
        }
    return {
        name: fp8.cast(tensor, precision) if fp8.shrinks(name, tuple(tensor.shape)) else tensor
        for name, tensor in weights.items()
    }


def _name(precision: torch.dtype) -> str:
    return next(name for name, dtype in PRECISIONS.items() if dtype == precision)


def _narrowed(tensor: torch.Tensor, precision: torch.dtype, name: str) -> torch.Tensor:
    if precision == torch.float16 and tensor.dtype != precision and tensor.numel():
        largest = float(tensor.abs().amax())
        if largest > torch.finfo(precision).max:
            raise ValueError(
                f"{name} holds values up to {largest:.3g}, 65504 at most expected for fp16: choose bf16 or fp32"
            )
    return tensor.to(precision)


def check_device(weights: Mapping[str, torch.Tensor], device: torch.device, part: Part) -> None:
    """Makes sure that a device can hold weights: Apple's GPUs have no fp8.

    Raises:
        ValueError: it cannot.
    """
    stored = {tensor.dtype for tensor in weights.values()}
    if device.type == "mps" and stored & {*_FP8}:
        file = "take an int8, GGUF or bf16 file, or the released folder"
        how = file if part.layers else f"choose precision bf16 or fp16, or {file}"
        raise ValueError(f"{part.name}: fp8 weights found, which Apple's GPUs do not have: {how}")


def storage_dtype(
    weights: Mapping[str, torch.Tensor], stored: torch.dtype | None, supported: Sequence[torch.dtype]
) -> torch.dtype:
    """Returns the dtype that ComfyUI would keep the transformer's weights in, but never a wider one than the file's.

    Where bf16 arithmetic is missing, ComfyUI would keep bf16 and fp8 weights as fp32, which is two and four times the
    memory; they are cast when they are used instead.
    """
    chosen = mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights), supported_dtypes=list(supported), weight_dtype=stored
    )
    if chosen == torch.float32 and stored is not None and not comfy.cli_args.args.fp32_unet:
        return stored
    return chosen


def compute_dtype(weights: Mapping[str, torch.Tensor], device: torch.device) -> torch.dtype:
    """Returns the dtype to compute in: fp32 for fp32 weights and where bf16 is slow or missing, else bf16."""
    if all(tensor.dtype == torch.float32 for tensor in weights.values()) or not mm.should_use_bf16(device):
        return torch.float32
    return torch.bfloat16


def operations_for(weights: Mapping[str, torch.Tensor], compute: torch.dtype) -> Operations:
    """Returns ComfyUI's operations: those that cast weights at use only where any weight needs it."""
    if all(tensor.dtype == compute for tensor in weights.values()):
        return comfy.ops.disable_weight_init
    return comfy.ops.manual_cast
