"""Quantised layers of a file: which there are, in which format, and what stands beside their matrices.

The spelling is ComfyUI's: the format of a layer is in a tensor `LAYER.comfy_quant` (JSON as bytes) or in the metadata
key `_quantization_metadata`, its scale in `LAYER.weight_scale`. The older spelling of scaled fp8 is
`LAYER.scale_weight` beside an empty tensor `scaled_fp8`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import int8
from .schema import LayerFormat, QuantizationMetadata, checked, parse

LAYERS_KEY = "_quantization_metadata"
SCALE, OLD_SCALE = "weight_scale", "scale_weight"
OLD_MARKER = "scaled_fp8"
STORED = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    int8.FORMAT: torch.int8,
    "mxfp8": torch.float8_e4m3fn,
    "nvfp4": torch.uint8,
    "convrot_w4a4": torch.int8,
    "asym_w4a8_int8": torch.int8,
}
"""Formats by name, with the dtype that a matrix is stored in."""
OURS = ("float8_e4m3fn", "float8_e5m2", int8.FORMAT)
"""Formats that we compute with ourselves; the others are ComfyUI's alone."""
_TWO_IN_ONE = ("nvfp4", "convrot_w4a4", "asym_w4a8_int8")
_BESIDE = (SCALE, OLD_SCALE, "weight_scale_2", "input_scale", "scale_input", "pre_quant_scale", "comfy_quant")
_BESIDE += ("weight_s_rel", "weight_s_channel", "weight_codebook")


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer: its format as ComfyUI spells it, and the tensors beside its matrix by the last part of their names."""

    form: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def format(self) -> str:
        """The format's name."""
        return self.form["format"]

    @property
    def scale(self) -> torch.Tensor:
        """The scale of the matrix: one, or one per row."""
        return self.tensors[SCALE]

    @property
    def group(self) -> int:
        """Columns that are rotated together; 0: none are."""
        inner = self.form.get("params", {})
        rotated = self.form.get("convrot", inner.get("convrot", False))
        return int(self.form.get("convrot_groupsize", inner.get("convrot_groupsize", 256))) if rotated else 0

    @property
    def values_per_byte(self) -> int:
        """How many columns of the matrix one stored column holds."""
        return 2 if self.format in _TWO_IN_ONE else 1


def split_layers(
    weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str], source: object
) -> tuple[dict[str, torch.Tensor], dict[str, QuantizedLayer]]:
    """Returns a file's weights without what only describes quantised layers, and these by name; `source` is named.

    Raises:
        RuntimeError: a layer is in a format that is not known, or its tensors do not fit it.
    """
    plain: dict[str, torch.Tensor] = {}
    beside: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        layer, _, last = name.rpartition(".")
        if last in _BESIDE:
            beside.setdefault(layer, {})[SCALE if last == OLD_SCALE else last] = tensor
        elif last != OLD_MARKER:
            plain[name] = tensor
    place = f"{source}, {LAYERS_KEY} in its metadata"
    stated = checked(QuantizationMetadata, parse(metadata.get(LAYERS_KEY, "{}"), place), place).layers
    layers = {}
    for layer in {**beside, **dict.fromkeys(layer for layer in stated if f"{layer}.weight" in plain)}:
        tensors = beside.get(layer, {})
        form = _form(layer, tensors.pop("comfy_quant", None), stated.get(layer), plain, tensors, source)
        if form is not None:
            layers[layer] = QuantizedLayer(form, tensors)
            _check(layer, layers[layer], plain.get(f"{layer}.weight"), source)
    for layer, entry in stated.items():
        _known(layer, entry.format, source)
    return plain, layers


def joined(metadata: Sequence[Mapping[str, str]], source: object) -> dict[str, str]:
    """Returns the metadata of a part's files as one, with the lists of all of them."""
    layers: dict[str, Any] = {}
    for one in metadata:
        layers |= parse(one.get(LAYERS_KEY, "{}"), f"{source}, {LAYERS_KEY}").get("layers", {})
    return {key: value for one in metadata for key, value in one.items()} | (layers_entry(layers) if layers else {})


def layers_entry(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the metadata entry that lists the formats of layers by name, in ComfyUI's present spelling."""
    return {LAYERS_KEY: json.dumps({"format_version": "1.0", "layers": layers})}


def _form(
    layer: str,
    described: torch.Tensor | None,
    listed: LayerFormat | None,
    plain: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    source: object,
) -> dict[str, Any] | None:
    """Returns a layer's format: from its own tensor, else from the list, else by the dtype of its matrix."""
    if described is not None:
        place = f"{source}, {layer}.comfy_quant"
        text = bytes(described.flatten().to(torch.uint8).tolist()).decode("utf-8", "replace")
        listed = checked(LayerFormat, parse(text, place), place)
    if listed is not None:
        _known(layer, listed.format, source)
        return listed.model_dump(exclude_unset=True)
    if SCALE not in tensors:
        return None  # the scale of an input alone, which is not needed
    weight = plain.get(f"{layer}.weight")
    by_dtype = {STORED[name]: name for name in reversed(OURS)}
    if weight is None or weight.dtype not in by_dtype:
        found = "nothing" if weight is None else str(weight.dtype)[6:]
        raise RuntimeError(f"{source}: {layer}.{SCALE} scales {found}, a weight of {_names(OURS)} expected")
    return {"format": by_dtype[weight.dtype]}


def _known(layer: str, found: str, source: object) -> None:
    if found not in STORED:
        raise RuntimeError(
            f"{source}: {layer} is {found[:100]}, one of {', '.join(STORED)} expected. `convert` makes int8 and scaled "
            "fp8 of the released folder"
        )


def _check(layer: str, one: QuantizedLayer, weight: torch.Tensor | None, source: object) -> None:
    expected = STORED[one.format]
    if weight is None or weight.dtype != expected or weight.ndim != 2:
        found = "nothing" if weight is None else f"{str(weight.dtype)[6:]} {list(weight.shape)}"
        raise RuntimeError(
            f"{source}: {layer}.weight is {found}, a matrix of {str(expected)[6:]} expected ({one.format})"
        )
    if one.format not in OURS:
        return
    scale, rows = one.tensors.get(SCALE), (1, weight.shape[0]) if one.format == int8.FORMAT else (1,)
    if scale is None or scale.numel() not in rows or not scale.is_floating_point() or not _positive(scale):
        found = "nothing" if scale is None else f"{scale.numel()} values" if scale.numel() != 1 else float(scale)
        number = "one number" if len(rows) == 1 else "one number, or one per row,"
        raise RuntimeError(f"{source}: the scale of {layer} is {found}, {number} above 0 expected")
    if one.group and (one.group not in int8.GROUPS or weight.shape[1] % one.group):
        raise RuntimeError(
            f"{source}: {layer} is rotated in groups of {one.group}, a power of 4 that divides its {weight.shape[1]} "
            "columns expected"
        )


def _positive(scale: torch.Tensor) -> bool:
    values = scale.float()
    return bool(((values > 0) & (values < math.inf)).all())


def _names(formats: tuple[str, ...]) -> str:
    return ", ".join(formats[:-1]) + f" or {formats[-1]}"
