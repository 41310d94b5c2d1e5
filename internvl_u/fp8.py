"""Scaled fp8: matrices that are stored in float8_e4m3fn divided by one scale each.

ComfyUI has two spellings of it. Recent versions name the scale `LAYER.weight_scale` and list the layers in the metadata
key `_quantization_metadata`; the older spelling is `LAYER.scale_weight` beside an empty tensor `scaled_fp8`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .schema import QuantizationMetadata, QuantizedLayer, checked, parse

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of float8_e4m3fn."""
FORMAT = "float8_e4m3fn"
QUANTIZATION_METADATA = "_quantization_metadata"
SCALE_NAMES = ("weight_scale", "scale_weight")
OLD_MARKER = "scaled_fp8"
_IGNORED = ("scale_input", "input_scale")
_KEPT = ("img_in.", "txt_in.", "proj_out.", "norm_out.", "lm_head.", "embed")


class Quantized(NamedTuple):
    """A part's weights with the scales and formats of its layers taken out; without scales they are plain."""

    weights: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]
    formats: dict[str, dict[str, str]]


def split_scales(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str], source: object) -> Quantized:
    """Returns weights, scales by layer and formats by layer, of either spelling; `source` is named in errors.

    Raises:
        RuntimeError: a layer is quantised in another format, or a scale is none.
    """
    plain, scales = {}, {}
    for name, tensor in weights.items():
        layer, _, last = name.rpartition(".")
        if last in SCALE_NAMES:
            scales[layer] = _checked_scale(tensor, weights.get(f"{layer}.weight"), name, source)
        elif last == "comfy_quant":
            _check_format(layer, bytes(tensor.flatten().to(torch.uint8).tolist()), source)
        elif name != OLD_MARKER and last not in _IGNORED:
            plain[name] = tensor
    stated = parse(metadata.get(QUANTIZATION_METADATA, "{}"), f"{source}, {QUANTIZATION_METADATA} in its metadata")
    layers = checked(QuantizationMetadata, stated, f"{source}, {QUANTIZATION_METADATA} in its metadata").layers
    for layer, entry in layers.items():
        _refuse_other(layer, entry.format, source)
    return Quantized(plain, scales, {layer: {"format": FORMAT} for layer in scales})


def _check_format(layer: str, text: bytes, source: object) -> None:
    where = f"{source}, {layer}.comfy_quant"
    stated = parse(text.decode("utf-8", "replace"), where)
    _refuse_other(layer, checked(QuantizedLayer, stated, where).format, source)


def _refuse_other(layer: str, found: str, source: object) -> None:
    if found != FORMAT:
        raise RuntimeError(f"{source}: {layer} is {found[:100]}, {FORMAT} expected")


def _checked_scale(scale: torch.Tensor, weight: torch.Tensor | None, name: str, source: object) -> torch.Tensor:
    if weight is None or weight.dtype != DTYPE:
        found = "nothing" if weight is None else str(weight.dtype)
        raise RuntimeError(f"{source}: {name} scales {found}, a weight of {DTYPE} expected")
    if scale.numel() != 1 or not scale.is_floating_point() or not 0 < float(scale) < math.inf:
        found = float(scale) if scale.numel() == 1 else f"{scale.numel()} values"
        raise RuntimeError(f"{source}: {name} is {found}, one number above 0 expected")
    return scale


def shrinks(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a tensor is converted to fp8: matrices, but for embeddings and the ends of a network."""
    return name.endswith(".weight") and len(shape) == 2 and not any(kept in name for kept in _KEPT)


def scale_for(largest: float) -> float:
    """Returns the scale of a matrix whose largest absolute value is `largest`, rounded to fp32."""
    return float(torch.tensor(largest / LARGEST, dtype=torch.float32)) or 1.0


def metadata_of(layers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Returns the metadata entry that lists the scaled layers, in ComfyUI's present spelling."""
    return {QUANTIZATION_METADATA: json.dumps({"format_version": "1.0", "layers": layers})}
