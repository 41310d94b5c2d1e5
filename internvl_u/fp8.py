"""Scaled fp8: matrices that are stored in float8_e4m3fn divided by one scale each.

ComfyUI has two spellings of it. Recent versions name the scale `LAYER.weight_scale` and list the layers in the metadata
key `_quantization_metadata`; the older spelling is `LAYER.scale_weight` beside an empty tensor `scaled_fp8`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of float8_e4m3fn."""
FORMAT = "float8_e4m3fn"
QUANTIZATION_METADATA = "_quantization_metadata"
SCALE_NAMES = ("weight_scale", "scale_weight")
OLD_MARKER = "scaled_fp8"
_IGNORED = ("scale_input", "input_scale", "comfy_quant")
_KEPT = ("img_in.", "txt_in.", "proj_out.", "norm_out.", "lm_head.", "embed")


class Quantized(NamedTuple):
    """A part's weights with the scales and formats of its layers taken out; without scales they are plain."""

    weights: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]
    formats: dict[str, dict[str, str]]


def split_scales(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str], source: object) -> Quantized:
    """Returns weights, scales by layer and formats by layer, of either spelling; `source` is named in errors.

    Raises:
        RuntimeError: a layer is quantised in another format.
    """
    plain, scales = {}, {}
    for name, tensor in weights.items():
        layer, _, last = name.rpartition(".")
        if last in SCALE_NAMES:
            scales[layer] = tensor
        elif name != OLD_MARKER and last not in _IGNORED:
            plain[name] = tensor
    layers = json.loads(metadata.get(QUANTIZATION_METADATA, "{}")).get("layers", {})
    other = {layer: entry for layer, entry in layers.items() if entry.get("format") != FORMAT}
    if other:
        first = next(iter(other))
        raise RuntimeError(f"{source}: {first} is {other[first].get('format')}, {FORMAT} expected")
    return Quantized(plain, scales, {layer: {"format": FORMAT} for layer in scales})


def shrinks(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a tensor is converted to fp8: matrices, but for embeddings and the ends of a network."""
    return name.endswith(".weight") and len(shape) == 2 and not any(kept in name for kept in _KEPT)


def scale_for(largest: float) -> float:
    """Returns the scale of a matrix whose largest absolute value is `largest`, rounded to fp32."""
    return float(torch.tensor(largest / LARGEST, dtype=torch.float32)) or 1.0


def metadata_of(layers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Returns the metadata entry that lists the scaled layers, in ComfyUI's present spelling."""
    return {QUANTIZATION_METADATA: json.dumps({"format_version": "1.0", "layers": layers})}
