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
EDITED_SIZE = "internvl_u_edited_size"
"""Key of a LATENT: width and height in pixels of the picture that is edited, and the samples' rows and columns."""


def latent_samples(latent: Latent) -> torch.Tensor:
    """Returns the samples [B, channels, (1,) h, w] of a LATENT; only empty ones may have other channels than ours.

    Raises:
        ValueError: it is no LATENT, one that another model has drawn, one of several frames, or one of no numbers.
    """
    samples = latent.get("samples") if isinstance(latent, Mapping) else None
    if not isinstance(samples, torch.Tensor) or samples.ndim not in (4, 5):
        found = tuple(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise ValueError(f"a LATENT of {found} found, samples [batch, {CHANNELS}, (1,) rows, columns] expected")
    if not samples.numel():
        raise ValueError(f"an empty LATENT {tuple(samples.shape)} found, at least one picture expected")
    check_frames(samples)
    if samples.shape[1] != CHANNELS and samples.count_nonzero():
        raise ValueError(
            f"a LATENT of {samples.shape[1]} channels found, {CHANNELS} expected: another model has drawn it; decode "
            "it with that model's VAE and encode it with the VAE of Load InternVL-U"
        )
    check_numbers(samples, "a LATENT")
    return samples


def reference_samples(samples: torch.Tensor) -> torch.Tensor:
    """Returns the latent [B, 16, 1, h, w] of a reference in a CONDITIONING.

    Raises:
        ValueError: it is none of ours, or of no numbers.
    """
    samples = latent_samples({"samples": samples})
    if samples.shape[1] != CHANNELS:
        raise ValueError(
            f"a reference latent of {samples.shape[1]} channels found, {CHANNELS} expected: encode the picture with "
            "the VAE of Load InternVL-U"
        )
    return with_frame(samples)


def check_frames(samples: torch.Tensor) -> None:
    """Makes sure that samples [B, channels, (frames,) h, w] are of pictures.

    Raises:
        ValueError: there are several frames.
    """
    if samples.ndim == 5 and samples.shape[2] != 1:
        raise ValueError(
            f"a latent of {samples.shape[2]} frames found, 1 expected: InternVL-U draws no videos. Rotate Latent and "
            "LatentConcat along t make frames of a picture, and a VAE of Load VAE encodes a batch as a video: turn or "
            "join pictures instead of latents, and encode with the VAE of Load InternVL-U"
        )


def with_frame(samples: torch.Tensor) -> torch.Tensor:
    """Returns samples [B, channels, 1, h, w] of the same or of [B, channels, h, w]."""
    return samples.unsqueeze(2) if samples.ndim == 4 else samples


def noise_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the noise mask [B, 1, 1, H, W] of one mask [(B, (1,)) H, W] for each picture.

    ComfyUI would take the masks of a batch for the frames of one video, and draw with what is between them.

    Raises:
        ValueError: it is no mask, or one of no numbers.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim < 2 or not mask.numel():
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"a noise mask of {found} found, [batch, 1, height, width] expected")
    check_numbers(mask, "a noise mask")
    return mask.reshape(-1, 1, 1, *mask.shape[-2:]) if mask.ndim < 5 else mask


def with_edited_size(latent: Latent, width: int, height: int) -> Latent:
    """Returns a LATENT that remembers for which picture, of (width, height) pixels, it was made."""
    return {**latent, EDITED_SIZE: (width, height, tuple(latent["samples"].shape[-2:]))}


def edited_size(latent: Latent) -> tuple[int, int] | None:
    """Returns the (width, height) in pixels of the picture that a LATENT was made for, if it still has its shape.

    One that was scaled, cropped or turned after Encode made it is for a picture of its own.
    """
    match latent.get(EDITED_SIZE):
        case (int(width), int(height), tuple(shape)) if shape == tuple(latent["samples"].shape[-2:]):
            return width, height
    return None


def check_numbers(values: torch.Tensor, what: str) -> None:
    """Makes sure that what a user connected holds numbers: a picture drawn of others would be black without a word.

    Raises:
        ValueError: some values are infinite or not a number.
    """
    finite = torch.isfinite(values)
    if not finite.all():
        share = 100 * (1 - finite.float().mean().item())
        raise ValueError(
            f"{what} found of which {share:.3g} % are infinite or not a number (NaN), numbers expected: the fault lies "
            "in what made it"
        )


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
