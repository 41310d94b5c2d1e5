"""The networks of a checkpoint folder, ready for inference without ComfyUI."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .checkpoint import check_finite_weights, load_weights, open_part
from .config import mllm_config, mmdit_config
from .mllm import MLLM
from .mmdit import MMDiT
from .operations import Operations
from .vae import StandaloneVAE, check_vae_config


def load_mllm(
    root: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", operations: Operations = nn
) -> MLLM:
    """Returns the multimodal language model. With `dtype` None the files' own is kept.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
    """
    part = open_part(root, "vlm")
    model = MLLM(mllm_config(part.shapes, part.config), device="meta", operations=operations)
    load_weights(model, part.weights, part.name)
    return model.to(device=device, dtype=dtype).eval()


def load_mmdit(
    root: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", operations: Operations = nn
) -> MMDiT:
    """Returns the transformer. With `dtype` None the files' own is kept.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
    """
    part = open_part(root, "generation_decoder")
    model = MMDiT(mmdit_config(part.shapes, part.config), device="meta", operations=operations)
    load_weights(model, part.weights, part.name)
    return model.to(device=device, dtype=dtype).eval()


def load_vae(root: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> StandaloneVAE:
    """Returns the VAE through diffusers. With `dtype` None the files' own is kept.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged or of another VAE.
    """
    part = open_part(root, "vae")
    check_vae_config(part)
    check_finite_weights(part.weights, part.name)  # what is infinite would be cut off to white
    vae = StandaloneVAE(part.config)
    load_weights(vae.model, part.weights, part.name)
    # diffusers' own `to` warns of a choice that this VAE does not have.
    nn.Module.to(vae.model, device=device, dtype=dtype).eval()
    return vae
