"""VAE: ComfyUI's own, filled from a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import comfy.model_patcher
import comfy.sd
import numpy
import torch
from PIL import Image

from ..internvl_u.checkpoint import open_part
from ..internvl_u.defaults import LARGEST
from ..internvl_u.images import resize
from ..internvl_u.sampling import check_finite
from ..internvl_u.vae import check_vae as check_vae_part
from ..internvl_u.vae import to_wan
from ..internvl_u.weights import check_finite_weights
from . import compat, one_frame
from .latents import CHANNELS, Latent, check_vae, edited_size, latent_samples, with_frame


def load_vae(source: str) -> comfy.sd.VAE:
    """Returns the VAE of a checkpoint folder or a single file. A batch of images stays a batch and is no video.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged or of another model.
    """
    part = open_part(Path(source), "vae", compat.open_weights)
    check_vae_part(part)
    weights = to_wan(part.weights)
    check_finite_weights(weights, part.name)  # what is infinite would be cut off to white
    vae = comfy.sd.VAE(sd=weights)
    vae.throw_exception_if_invalid()
    vae.not_video = True
    one_frame.shorten(vae)
    compat.reload_with(vae.patcher, _load_patcher, part, source)
    return vae


def decode(vae: comfy.sd.VAE, latent: Latent, width: int = 0, height: int = 0, as_edited: bool = False) -> torch.Tensor:
    """Returns images [B, height, width, 3] in [0, 1], at a size in pixels (0: as drawn; Lanczos otherwise).

    `as_edited` with neither width nor height: at the size of the picture that the latent was made to edit, if there is
    one and neither side is above 4096 pixels.

    ComfyUI centres a level on its value, the official pipeline is half a level brighter; this is the latter.
    """
    check_vae(vae)
    samples = latent_samples(latent)
    if samples.shape[1] != CHANNELS:
        raise ValueError(f"an empty LATENT of {samples.shape[1]} channels found: draw it before it is decoded")
    images = vae.decode(with_frame(samples))
    check_finite(images, "the decoded image", "the latent or the VAE")
    if images.ndim == 5:
        images = images.flatten(0, 1)  # [B, frames, H, W, 3]
    images = (images + 0.5 / 255).clamp(0.0, 1.0)
    if as_edited and not width and not height:
        width, height = _edited_size(latent)
    size = (width or images.shape[2], height or images.shape[1])
    if size == (images.shape[2], images.shape[1]):
        return images
    return torch.stack([_resized(image, *size) for image in images])


def _edited_size(latent: Latent) -> tuple[int, int]:
    size = edited_size(latent)
    return size if size is not None and max(size) <= LARGEST else (0, 0)


def _resized(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    levels = (image.cpu().float().numpy() * 255).astype(numpy.uint8)
    scaled = numpy.asarray(resize(Image.fromarray(levels), width, height))
    return torch.from_numpy(scaled.astype(numpy.float32) / 255)


def _load_patcher(source: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    vae = load_vae(source)
    if disable_dynamic and compat.is_dynamic(vae.patcher):
        return compat.cloned_patcher(vae.patcher)
    return vae.patcher
