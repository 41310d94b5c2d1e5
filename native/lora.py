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
from ..internvl_u.weights import shapes_of
from .guidance import check_model
from .mllm import NativeMLLM, check_mllm

_logger = logging.getLogger("internvl_u")
_PREFIX = {TRANSFORMER: "diffusion_model.", LANGUAGE: ""}


class WithMagnitude(WeightAdapterBase):
    """An adapter of ComfyUI's with DoRA's norms after it.

    `weights` are that adapter and DoRA's magnitudes. ComfyUI moves tensors in `weights` to the GPU by itself.
    """

    name = "internvl_u"
    weights: Any

    def __init__(self, loaded_keys: set[str], weights: tuple[WeightAdapterBase, torch.Tensor]):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, *more, **options) -> Any:
        """Returns the weight, changed; arguments as ComfyUI gives them to every adapter."""
        inner, magnitude = self.weights
        added = inner.calculate_weight(weight.clone(), key, 1.0, 1.0, None, lambda change: change, *more, **options)
        change = decomposed(added.float(), magnitude.to(added.device)).to(weight) - weight
        return weight + function(strength * change).to(weight)


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
        mllm = dataclasses.replace(mllm, patcher=patcher, _empty_prompt=None, _empty_context=None)
    report = lora.summary(strengths)
    (_logger.warning if lora.unknown else _logger.info)("InternVL-U, LoRA: %s", report)
    return model, mllm, report


def _shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's weights by name; of packed matrices the shapes that they stand for."""
    packed = {f"{name}.weight": getattr(layer, "packing", None) for name, layer in network.named_modules()}
    return shapes_of(dict(network.named_parameters())) | {name: one.shape for name, one in packed.items() if one}


def _patched(patcher: ModelPatcher, part: str, layers: Mapping[str, Adapter], strength: float) -> ModelPatcher:
    prefix = _PREFIX[part]
    changed = patcher.clone()
    added = changed.add_patches(_patches(prefix, layers), strength)
    expected = sum(len(_targets(adapter)) for adapter in layers.values())
    assert len(added) == expected, f"{len(added)} of {expected} weights are patched"
    return changed


def _patches(prefix: str, layers: Mapping[str, Adapter]) -> dict[str, Any]:
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
        magnitude, patch = adapter.get("dora_scale"), patches.get(name)
        if isinstance(patch, WeightAdapterBase) and magnitude is not None:
            patches[name] = WithMagnitude(patch.loaded_keys, (patch, magnitude))
    return patches


def _targets(adapter: Adapter) -> set[str]:
    return {"bias" if name == "diff_b" else "weight" for name in adapter if name != "alpha"}
