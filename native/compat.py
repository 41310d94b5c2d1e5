"""What differs between the ComfyUI versions that the pack runs on, in one place; `host` lists what is the same."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.sample
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import BASE
from comfy_api.latest import io
from server import PromptServer

from ..internvl_u import checkpoint
from ..internvl_u.checkpoint import Part
from ..internvl_u.files import FileState
from ..internvl_u.quantization import QuantizedLayer
from .latents import latent_samples
from .patcher import Reload

LATENT_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""Keys of an empty LATENT: pixels per side, and frames, for each of its values. ComfyUI's samplers take them away."""


def advanced(kind: type[io.WidgetInput]) -> dict[str, Any]:
    """Returns the keywords that fold an input away where few users look, for a class of inputs.

    None before 0.33: there its page would hide the input behind a right click.
    """
    return {"advanced": True} if "advanced" in inspect.signature(kind.__init__).parameters else {}


def search_aliases(*words: str) -> dict[str, Any]:
    """Returns the keywords of a schema for words that the page's search finds its node by; none before 0.33."""
    return {"search_aliases": list(words)} if "search_aliases" in inspect.signature(io.Schema).parameters else {}


def make_patcher(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    load_device: torch.device,
    offload_device: torch.device,
    dynamic: bool = True,
    cls: type[ModelPatcher] | None = None,
) -> ModelPatcher:
    """Returns ComfyUI's patcher over `model`: the one that streams weights where there is one and `dynamic` allows.

    `weights` are those that the model was filled with: newer versions read them again from a fast disk when they are
    needed, instead of keeping them in memory. With `cls` it is one of that class, which streams nothing.
    """
    # Looked up at call time: recent versions rebind the name when they start with dynamic VRAM.
    cls = cls or (getattr(comfy.model_patcher, "CoreModelPatcher", None) if dynamic else None)
    cls = cls or comfy.model_patcher.ModelPatcher
    more = {}
    if "fast_disk" in inspect.signature(comfy.model_patcher.ModelPatcher).parameters:
        more["fast_disk"] = importlib.import_module("comfy.storage").state_dict_fast_disk(weights)
    return cls(model, load_device=load_device, offload_device=offload_device, **more)


def can_stream() -> bool:
    """Returns whether this ComfyUI has patchers that stream weights, and has chosen to use them."""
    plain = comfy.model_patcher.ModelPatcher
    return getattr(comfy.model_patcher, "CoreModelPatcher", plain) is not plain


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Returns whether a patcher streams its weights from disk (0.33 and newer)."""
    return getattr(patcher, "is_dynamic", bool)()


def reload_with(patcher: ModelPatcher, make: Callable[..., ModelPatcher], part: Part, *arguments: object) -> None:
    """Tells ComfyUI how to make the patcher again (`make(*arguments, disable_dynamic=...)`) while its files are there.

    0.33 does so for each further GPU, and where weights are not to be streamed.
    """
    cast(Any, patcher).cached_patcher_init = (Reload(make, part.files()), arguments)


def device_choices() -> list[str]:
    """Returns what ComfyUI's nodes that choose a device offer: "default", "cpu" and, of several GPUs, "gpu:N"."""
    offered = getattr(comfy.model_management, "get_gpu_device_options", None)
    return ["default", "cpu"] if offered is None else offered()


def chosen_device(choice: str) -> torch.device | None:
    """Returns the device of such a choice; None where this machine has none, or it is "default"."""
    resolve = getattr(comfy.model_management, "resolve_gpu_device_option", None)
    if resolve is None:
        return torch.device("cpu") if choice == "cpu" else None
    return resolve(choice)


def patcher_on(patcher: ModelPatcher, load_device: torch.device, offload_device: torch.device) -> ModelPatcher:
    """Returns a patcher over the same weights, patched alike, that works on another device.

    On a GPU they are read anew (0.33), as two GPUs may want them at the same time; a patcher for the CPU shares them.

    Raises:
        FileNotFoundError: the files that they were read from are there no more.
    """
    make = getattr(patcher, "deepclone_multigpu", None)
    if load_device.type != "cpu" and make is not None:
        moved = make(new_load_device=load_device)
    else:
        moved = cloned_patcher(patcher) if is_dynamic(patcher) else patcher.clone()
        moved.load_device = load_device
    moved.offload_device = offload_device
    return moved


def set_dtypes(model: BASE, storage: torch.dtype, compute: torch.dtype | None, device: torch.device) -> None:
    """Sets a model configuration's storage dtype and, where it differs, the dtype of the arithmetic."""
    config = cast(Any, model)  # each version has another set of attributes and arguments
    if "device" in inspect.signature(config.set_inference_dtype).parameters:
        config.set_inference_dtype(storage, compute, device=device)
    else:
        config.set_inference_dtype(storage, compute)


def known_formats() -> frozenset[str]:
    """Returns the formats of quantised layers that this ComfyUI computes with."""
    return frozenset(comfy.quant_ops.QUANT_ALGOS)


def quantize(model: BASE, layers: Mapping[str, QuantizedLayer]) -> dict[str, torch.Tensor]:
    """Sets in a model configuration which layers are quantised; returns the tensors that loading them takes."""
    config = cast(Any, model)
    extra = {f"{layer}.{name}": tensor for layer, one in layers.items() for name, tensor in one.tensors.items()}
    if "quant_config" not in vars(comfy.supported_models_base.BASE):
        config.layer_quant_config = {layer: dict(one.form) for layer, one in layers.items()}
        return extra
    config.quant_config = {"mixed_ops": True}
    for layer, one in layers.items():
        extra[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(one.form).encode()), dtype=torch.uint8)
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


def cast_weight(
    module: torch.nn.Module, input: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.cuda.Stream | None]:
    """Returns a module's weight and bias where and as `input` is, and the stream that `uncast_bias_weight` wants."""
    return cast(Any, comfy.ops.cast_bias_weight(module, input, offloadable=True))


def cast_packed(
    module: torch.nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, torch.cuda.Stream | None]:
    """Returns a module's packed weight on `device` as the bytes that it is, and its bias in `dtype`; see `cast_weight`.

    Where the weight has functions, the first of which unpacks it, it is numbers instead.
    """
    return cast(
        Any,
        comfy.ops.cast_bias_weight(module, dtype=torch.uint8, device=device, bias_dtype=dtype, offloadable=True),
    )


def cloned_patcher(patcher: ModelPatcher) -> ModelPatcher:
    """Returns a clone of a streaming patcher that does not stream (0.33 and newer)."""
    return cast(Any, patcher).clone(disable_dynamic=True)


def fitted_latent(model: ModelPatcher, latent: Mapping[str, Any]) -> torch.Tensor:
    """Returns the samples of a LATENT; an empty one that was made for another model gets the channels and size of ours.

    Raises:
        ValueError: it is no LATENT, or one that another model has drawn.

    Since 0.33 an empty LATENT says how many pixels per side each of its values stands for.
    """
    samples = latent_samples(latent)
    arguments = [model, samples]
    if LATENT_RATIOS[0] in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters:
        arguments.append(latent.get(LATENT_RATIOS[0]))
    return comfy.sample.fix_empty_latent_channels(*arguments)


def scale_training_latents(sampler: Any, scale: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Brings the pictures that core's trainer keeps beside the run's latent into the model's range by `scale`.

    Those of several sizes, which 0.33 trains on as the VAE gave them.
    """
    methods = [method for method in vars(type(sampler)).values() if inspect.isfunction(method)]
    if any(scale.__name__ in method.__code__.co_names for method in methods):
        return  # a newer one, which does it itself
    for name in ("real_dataset", "bucket_latents"):
        if latents := getattr(sampler, name, None):
            setattr(sampler, name, [scale(one) for one in latents])


def is_serving() -> bool:
    """Returns whether ComfyUI's server has begun to answer; while it starts, it asks for the nodes' inputs as well."""
    return getattr(getattr(PromptServer, "instance", None), "port", None) is not None


def open_weights(file: Path) -> dict[str, torch.Tensor]:
    """Returns a file's tensors, mapped by ComfyUI so that it can stream them later."""
    return cast(dict[str, torch.Tensor], comfy.utils.load_torch_file(str(file), safe_load=True))


def open_part(source: Path, name: str) -> Part:
    """Returns a part of a checkpoint, mapped as ComfyUI's options want it; see `checkpoint.open_part`."""
    part = checkpoint.open_part(source, name, open_weights)
    if comfy.utils.DISABLE_MMAP and part.packed:
        return replace(part, weights={name: tensor.clone() for name, tensor in part.weights.items()})
    return part


def mapped_files(part: Part, weights: Mapping[str, torch.Tensor]) -> tuple[FileState, ...]:
    """Returns the files that `weights` are mapped from; none where ComfyUI was told to read files whole."""
    return () if comfy.utils.DISABLE_MMAP else part.mapped_by(weights)
