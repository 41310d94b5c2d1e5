"""The networks of a checkpoint folder or of single files, ready for inference without ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from . import int8
from .checkpoint import Part, open_part
from .config import mllm_config, mmdit_config
from .dequantize import pack_layers
from .mllm import MLLM
from .mmdit import MMDiT
from .operations import Operations
from .quantization import OURS
from .vae import StandaloneVAE, check_vae, from_wan
from .weights import Weights, check_finite_weights, check_shapes, load_weights, shapes_of

Network = TypeVar("Network", MLLM, MMDiT)


def check_part(part: Part) -> None:
    """Makes sure that an opened part's weights are exactly those that its configuration describes.

    Raises:
        RuntimeError: they are not.
    """
    if part.name == "vae":
        check_vae(part)
        return
    config = (part.shapes, part.config, part.source)
    is_mllm = part.name == "vlm"
    model = MLLM(mllm_config(*config), device="meta") if is_mllm else MMDiT(mmdit_config(*config), device="meta")
    check_shapes(shapes_of(model.state_dict()), part.shapes, part.name)


def load_mllm(
    root: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", operations: Operations = nn
) -> MLLM:
    """Returns the multimodal language model. With `dtype` None the files' own is kept.

    Matrices of a GGUF file and of int8 stay packed, and are turned into `dtype` when a layer runs; scaled fp8 is
    unpacked here.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
    """
    part = open_part(root, "vlm")
    model = MLLM(mllm_config(part.shapes, part.config, part.source), device="meta", operations=operations)
    return _filled(model, part, dtype, device)


def load_mmdit(
    root: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", operations: Operations = nn
) -> MMDiT:
    """Returns the transformer. With `dtype` None the files' own is kept.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
    """
    part = open_part(root, "generation_decoder")
    model = MMDiT(mmdit_config(part.shapes, part.config, part.source), device="meta", operations=operations)
    return _filled(model, part, dtype, device)


def _filled(model: Network, part: Part, dtype: torch.dtype | None, device: torch.device | str) -> Network:
    check_shapes(shapes_of(model.state_dict()), part.shapes, part.name)
    kept = dtype or next((tensor.dtype for tensor in part.plain.values()), torch.float32)
    pack_layers(model, part.packed, kept)
    load_weights(model, _unpacked(part, kept, model), part.name)
    model.to(device=device, dtype=dtype).eval()
    model.mapped = part.mapped_by(model.state_dict())
    return model


def stays_packed(part: Part, layer: str) -> bool:
    """Returns whether a layer's matrix is kept as it is stored, and unpacked whenever the layer runs."""
    quantized = part.layers.get(layer)
    kept = quantized is not None and quantized.format == int8.FORMAT and part.name == "vlm"
    return kept or f"{layer}.weight" in part.packed


def _unpacked(part: Part, dtype: torch.dtype, model: nn.Module) -> Weights:
    """Returns the weights of a part, those of quantised layers as the values, of `dtype`, that they stand for.

    In int8 the language model stays: it reads its matrices once for each token that it writes. The transformer uses
    each for thousands of tokens at once.
    """
    weights = dict(part.weights)
    for name, one in part.layers.items():
        if one.format not in OURS:
            raise RuntimeError(
                f"{part.checkpoint.path}: {name} is in {one.format}, which ComfyUI alone computes with; one of "
                f"{', '.join(OURS)} expected here"
            )
        layer = model.get_submodule(name)
        if stays_packed(part, name) and isinstance(layer, nn.Linear):
            int8.keep_packed(layer, one.scale, one.group)
            continue
        weights[f"{name}.weight"] = int8.dequantize(weights[f"{name}.weight"], one.scale, one.group).to(dtype)
    return weights


def load_vae(root: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> StandaloneVAE:
    """Returns the VAE. With `dtype` None the files' own is kept.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged or of another VAE.
    """
    part = open_part(root, "vae")
    stated = check_vae(part)
    check_finite_weights(part.weights, part.name)  # what is infinite would be cut off to white
    return StandaloneVAE(from_wan(part.weights), stated).to(device=device, dtype=dtype).eval()
