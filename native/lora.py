"""LoRA on MODEL and MLLM: `internvl_u.lora` knows the spellings, ComfyUI's adapters and patchers do the rest."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase

from ..internvl_u.adapters import Adapter, decomposed
from ..internvl_u.lora import LANGUAGE, TRANSFORMER, read_lora
from .gguf_ops import CastPackedEmbedding, CastPackedLinear
from .guidance import check_model
from .mllm import NativeMLLM, check_mllm
from .quantized import Quantized

_logger = logging.getLogger("internvl_u")
_PREFIX = {TRANSFORMER: "diffusion_model.", LANGUAGE: ""}


class InMeantValues(WeightAdapterBase):
    """An adapter of ComfyUI's that is given a weight in the values that it was trained on, with DoRA's norms after it.

    `weights` are that adapter, or a difference as it is; DoRA's magnitudes or None; and the layer if it is quantised by
    our own arithmetic, else None. ComfyUI moves tensors in `weights` to the GPU by itself.
    """

    name = "internvl_u"
    weights: Any

    def __init__(
        self,
        loaded_keys: set[str],
        weights: tuple[WeightAdapterBase | torch.Tensor, torch.Tensor | None, Quantized | None],
    ):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_shape(self, key: str) -> torch.Size | None:
        """Returns another shape than the weight's for a quantised layer.

        ComfyUI 0.33 then patches it when it is loaded: streamed, it would be rounded to its few bits again.
        """
        return None if self.weights[2] is None else torch.Size()

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, *more, **options) -> Any:
        """Returns the weight, changed; arguments as ComfyUI gives them to every adapter."""
        inner, magnitude, layer = self.weights
        stored = None if getattr(weight, "is_meant", False) else layer
        meant = weight if stored is None else stored.offloaded(weight)
        whole = 1.0 if magnitude is not None else strength
        if isinstance(inner, torch.Tensor):
            added = meant + whole * inner.to(meant)
        else:
            added = inner.calculate_weight(meant.clone(), key, whole, 1.0, None, _as_it_is, *more, **options)
        if magnitude is not None:
            added = meant + strength * (decomposed(added.float(), magnitude.to(added.device)).to(meant) - meant)
        changed = meant + function(added - meant)
        if stored is not None:
            return stored.set_weight(changed, return_weight=True).to(weight)
        changed.is_meant = True  # for the next LoRA on this weight
        return changed


def _as_it_is(change: torch.Tensor) -> torch.Tensor:
    return change


def apply_lora(
    model: ModelPatcher | None, mllm: NativeMLLM | None, file: Path, strength_model: float, strength_mllm: float
) -> tuple[ModelPatcher | None, NativeMLLM | None, str]:
    """Returns MODEL and MLLM with a LoRA on each, and what was taken of the file, in a sentence.

    What was given is left as it is; where the strength is 0 it is what comes back.

    Raises:
        ValueError: nothing is connected, or another model's.
        RuntimeError: the file is unreadable, damaged, of another model or of another size.
    """
    if model is None and mllm is None:
        raise ValueError("no MODEL and no MLLM found, one of them or both expected: connect Load InternVL-U")
    strengths, networks = {}, {}
    if model is not None:
        check_model(model)
        strengths[TRANSFORMER], networks[TRANSFORMER] = strength_model, model.model.diffusion_model
    if mllm is not None:
        check_mllm(mllm)
        strengths[LANGUAGE], networks[LANGUAGE] = strength_mllm, mllm.model
    if not any(strengths.values()):
        return model, mllm, f"{file.name}: strength 0, nothing is changed"
    lora = read_lora(file, {part: _shapes(network) for part, network in networks.items()})
    if model is not None and strength_model and lora.layers.get(TRANSFORMER):
        model = _patched(model, TRANSFORMER, lora.layers[TRANSFORMER], strength_model)
    if mllm is not None and strength_mllm and lora.layers.get(LANGUAGE):
        patcher = _patched(mllm.patcher, LANGUAGE, lora.layers[LANGUAGE], strength_mllm)
        mllm = dataclasses.replace(mllm, patcher=patcher)
    report = lora.summary(strengths)
    (_logger.warning if lora.unknown else _logger.info)("InternVL-U, LoRA: %s", report)
    return model, mllm, report


def _shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's weights by name; of packed ones those of their values."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    for name, layer in network.named_modules():
        if isinstance(layer, CastPackedLinear | CastPackedEmbedding):
            shapes[f"{name}.weight"] = tuple(layer.packing.shape)
    return shapes


def _patched(patcher: ModelPatcher, part: str, layers: Mapping[str, Adapter], strength: float) -> ModelPatcher:
    prefix = _PREFIX[part]
    changed = patcher.clone()
    added = changed.add_patches(_patches(patcher.model, prefix, layers), strength)
    expected = sum(len(_targets(adapter)) for adapter in layers.values())
    assert len(added) == expected, f"{len(added)} of {expected} weights are patched"
    return changed


def _patches(network: torch.nn.Module, prefix: str, layers: Mapping[str, Adapter]) -> dict[str, Any]:
    """Returns ComfyUI's patches by the names of weights: its adapters, made by itself, in ours where they need it."""
    tensors = {
        f"{layer}.{name}": tensor
        for layer, adapter in layers.items()
        for name, tensor in adapter.items()
        if name != "dora_scale"
    }
    patches = comfy.lora.load_lora(tensors, {layer: f"{prefix}{layer}.weight" for layer in layers})
    for layer, adapter in layers.items():
        name = f"{prefix}{layer}.weight"
        module = network.get_submodule(f"{prefix}{layer}")
        quantized = module if isinstance(module, Quantized) else None
        magnitude, patch = adapter.get("dora_scale"), patches.get(name)
        if patch is None or (magnitude is None and quantized is None):
            continue
        inner, keys = (patch, patch.loaded_keys) if isinstance(patch, WeightAdapterBase) else (patch[1][0], set())
        patches[name] = InMeantValues(keys, (inner, magnitude, quantized))
    return patches


def _targets(adapter: Adapter) -> set[str]:
    return {"bias" if name == "diff_b" else "weight" for name in adapter if name != "alpha"}
