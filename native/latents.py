"""What a LATENT and a VAE must be to be ours: other models' have other channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.latent_formats
import comfy.sd
import torch

CHANNELS = comfy.latent_formats.Wan21.latent_channels
Latent = Mapping[str, Any]
"""ComfyUI's LATENT: `samples` [B, channels, (frames,) h, w] and what goes with them."""


def latent_samples(latent: Latent) -> torch.Tensor:
    """Returns the samples [B, channels, (1,) h, w] of a LATENT; only empty ones may have other channels than ours.

    Raises:
        ValueError: it is no LATENT, or one that another model has drawn.
    """
    samples = latent.get("samples") if isinstance(latent, Mapping) else None
    if not isinstance(samples, torch.Tensor) or samples.ndim not in (4, 5):
        found = tuple(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise ValueError(f"a LATENT of {found} found, samples [batch, {CHANNELS}, (1,) rows, columns] expected")
    if samples.shape[1] != CHANNELS and samples.count_nonzero():
        raise ValueError(
            f"a LATENT of {samples.shape[1]} channels found, {CHANNELS} expected: another model has drawn it; decode "
            "it with that model's VAE and encode it with the VAE of Load InternVL-U"
        )
    return samples


def check_vae(vae: comfy.sd.VAE | None) -> None:
    """Makes sure that a VAE has latents like ours.

    Raises:
        ValueError: it is one of another model.
    """
    channels = getattr(vae, "latent_channels", None)
    if channels != CHANNELS or getattr(vae, "latent_dim", 3) != 3:
        raise ValueError(
            f"a VAE of {channels} channels found, that of the Qwen-Image VAE ({CHANNELS}, as video) expected: connect "
            "the VAE of Load InternVL-U"
        )
