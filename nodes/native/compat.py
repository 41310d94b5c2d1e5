"""What differs between the ComfyUI versions that the pack runs on (0.3.75 to 0.33), in one place."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch


def make_patcher(model: torch.nn.Module, load_device: torch.device, offload_device: torch.device, dynamic: bool = True):
    """Returns ComfyUI's patcher over `model`: the one that streams weights where there is one and `dynamic` allows."""
    # Looked up at call time: recent versions rebind the name when they start with dynamic VRAM.
    cls = getattr(comfy.model_patcher, "CoreModelPatcher", None) if dynamic else None
    cls = cls or comfy.model_patcher.ModelPatcher
    return cls(model, load_device=load_device, offload_device=offload_device)


def reload_with(patcher, factory: Callable, *arguments) -> None:
    """Tells ComfyUI how to make the patcher again (`factory(*arguments, disable_dynamic=...)`)."""
    patcher.cached_patcher_init = (factory, arguments)


def set_dtypes(config, storage: torch.dtype, compute: torch.dtype | None, device: torch.device) -> None:
    """Sets a model configuration's storage dtype and, where it differs, the dtype of the arithmetic."""
    if "device" in inspect.signature(config.set_inference_dtype).parameters:
        config.set_inference_dtype(storage, compute, device=device)
    else:
        config.set_inference_dtype(storage, compute)


def quantize(config, scales: dict[str, torch.Tensor], formats: dict[str, dict]) -> dict[str, torch.Tensor]:
    """Tells a model configuration which layers are scaled fp8; returns the tensors that loading them takes."""
    extra = {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    if "quant_config" not in vars(comfy.supported_models_base.BASE):
        config.layer_quant_config = formats
        return extra
    config.quant_config = {"mixed_ops": True}
    for layer, form in formats.items():
        extra[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
    return extra


def remember_dtypes(model: torch.nn.Module) -> None:
    """Lets ComfyUI note the stored dtype of each weight, where it wants to."""
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive is not None:
        archive(model)


def device_context(device: torch.device) -> contextlib.AbstractContextManager:
    """Returns the context to work on `device` in, where there are several GPUs."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return contextlib.nullcontext() if context is None else context(device)


def open_weights(file: Path) -> dict[str, torch.Tensor]:
    """Returns a file's tensors, mapped by ComfyUI so that it can stream them later."""
    return comfy.utils.load_torch_file(str(file), safe_load=True)
