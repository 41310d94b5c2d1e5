"""Where a model comes from: a checkpoint folder in the released layout, or single files as `convert` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .checkpoint import OpenFile, map_file, map_weights, open_file, read_header, read_json, strip_prefix

METADATA = "internvl_u"
"""Key in a file's metadata: what the folder's JSON files say, as JSON."""
QUANTIZATION = "_quantization_metadata"
"""ComfyUI's key in a file's metadata: the formats of its quantised layers."""
PADDING = "encoder_padding_token"
"""A tensor of the released files that only fills padding in training."""
_SAVED = "model.diffusion_model."


def told(file: Path) -> dict:
    """Returns what a single file says of itself, empty if it is not of ours."""
    metadata = read_header(file)[0].get("__metadata__", {})
    return json.loads(metadata.get(METADATA, "{}"))


def read_part(source: Path, part: str) -> dict:
    """Returns the configuration of a part ("vlm", "generation_decoder" or "vae").

    Raises:
        FileNotFoundError, RuntimeError: it is missing, unreadable or of another part.
    """
    if source.is_dir():
        return read_json(source / part / "config.json")
    found = told(source)
    if found.get("part", part) != part:
        raise RuntimeError(f"{source} holds the {found['part']} of InternVL-U, {part} expected")
    return found.get("config", {})


def map_part(source: Path, part: str, open_file: OpenFile = open_file) -> dict[str, torch.Tensor]:
    """Returns a part's tensors by name, mapped from disk; see `map_weights`."""
    return map_weights(source / part, open_file) if source.is_dir() else map_file(source, open_file)


def map_mmdit(source: Path, open_file: OpenFile = open_file) -> dict[str, torch.Tensor]:
    """Returns the transformer's tensors by the module's names, of a folder, a converted or a saved file."""
    weights = map_part(source, "generation_decoder", open_file)
    weights = strip_prefix(strip_prefix(weights, "decoder."), _SAVED)
    weights.pop(PADDING, None)
    return weights


def is_mmdit_file(file: Path) -> bool:
    """Tells by its header whether a file holds InternVL-U's transformer: its queries come with gates."""
    try:
        header = read_header(file)[0]
    except RuntimeError:
        return False
    names = {name.removeprefix(_SAVED): entry for name, entry in header.items()}
    query, key = (names.get(f"transformer_blocks.0.attn.{name}.weight") for name in ("to_q", "to_k"))
    return bool(query and key and "txt_norm.weight" in names and query["shape"][0] == 2 * key["shape"][0])


def is_part_file(file: Path, part: str) -> bool:
    """Tells by its header whether a file was converted from a part."""
    try:
        return told(file).get("part") == part
    except (RuntimeError, ValueError):
        return False


def take_scales(
    source: Path, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, dict]]:
    """Returns (weights, scales by layer, formats by layer) of scaled fp8, in either spelling."""
    rest, scales = {}, {}
    for name, tensor in weights.items():
        layer, _, last = name.rpartition(".")
        if last in ("weight_scale", "scale_weight"):
            scales[layer] = tensor
        elif name != "scaled_fp8" and last not in ("scale_input", "input_scale", "comfy_quant"):
            rest[name] = tensor
    stated = {} if source.is_dir() else read_header(source)[0].get("__metadata__", {})
    formats = json.loads(stated.get(QUANTIZATION, "{}")).get("layers", {})
    other = {layer: f for layer, f in formats.items() if f.get("format") != "float8_e4m3fn"}
    if other:
        first = next(iter(other))
        raise RuntimeError(f"{source}: {first} is {other[first].get('format')}, float8_e4m3fn expected")
    return rest, scales, {layer: {"format": "float8_e4m3fn"} for layer in scales}
