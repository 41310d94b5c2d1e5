"""LoRAs on a model as it is loaded: added to the weights in memory, the files left as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .adapters import changes_weight, merged, merged_bias
from .checkpoint import open_part
from .load import stays_packed
from .lora import LANGUAGE, PART_NAMES, TRANSFORMER, LoRA, check_kinds, read_lora
from .places import Found

Strengths = Sequence[tuple[Path, float]]
"""LoRA files, each with the strength at which it counts: 1 as trained, 0 not at all, below 0 the other way."""
Network = TypeVar("Network", bound=nn.Module)
_logger = logging.getLogger("internvl_u")


def open_loras(wanted: Strengths, files: Found) -> list[tuple[LoRA, float]]:
    """Returns the LoRAs, held against the model's weights; what was taken of each is logged.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: one is unreadable, of another model, of a kind that cannot be added, or for layers that stay
            packed.
    """
    absent = [str(file) for file, _ in wanted if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"no LoRA {', '.join(absent)} found, the name of a .safetensors file expected")
    if not wanted:
        return []
    parts = {name: open_part(place, name) for name, place in zip((TRANSFORMER, LANGUAGE), files)}
    found = []
    for file, strength in wanted:
        lora = read_lora(file, {name: part.shapes for name, part in parts.items()})
        for name, layers in lora.layers.items():
            check_kinds(layers, str(file))
            packed = [layer for layer in layers if stays_packed(parts[name], layer)]
            if packed:
                raise RuntimeError(
                    f"{file}: {len(packed)} of its layers are packed in {parts[name].checkpoint.path} ({packed[0]}), "
                    f"plain weights expected: give a {PART_NAMES[name]} in bfloat16 or fp8, or use it in ComfyUI"
                )
        report = lora.summary(dict.fromkeys(parts, strength))
        (_logger.warning if lora.unknown else _logger.info)("InternVL-U, LoRA: %s", report)
        found.append((lora, strength))
    return found


@torch.no_grad()
def add_loras(network: Network, part: str, loras: Sequence[tuple[LoRA, float]]) -> Network:
    """Returns a loaded part's network with LoRAs in its weights, which keep their dtype.

    Raises:
        RuntimeError: a weight becomes infinite or not a number.
    """
    for lora, strength in loras:
        for layer, adapter in lora.layers.get(part, {}).items() if strength else ():
            weight, bias = f"{layer}.weight", f"{layer}.bias"
            if changes_weight(adapter):
                _replace(network, weight, merged(network.get_parameter(weight), adapter, strength), lora.file)
            if "diff_b" in adapter:
                _replace(network, bias, merged_bias(network.get_parameter(bias), adapter, strength), lora.file)
    return network


def _replace(network: nn.Module, name: str, value: torch.Tensor, file: Path) -> None:
    layer, _, own = name.rpartition(".")
    value = value.to(network.get_parameter(name).dtype)
    if not torch.isfinite(value).all():
        raise RuntimeError(
            f"{file}: {name} with the LoRA is beyond what {str(value.dtype)[6:]} holds, or not a number: use a "
            "smaller strength"
        )
    setattr(network.get_submodule(layer), own, nn.Parameter(value, requires_grad=False))
