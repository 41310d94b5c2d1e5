"""The Qwen-Image VAE (diffusers' AutoencoderKLQwenImage): its names in the Wan 2.1 layout, and standalone use.

ComfyUI knows the same network under Wan 2.1's names. The table is a pure renaming: 194 tensors to 194.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from .checkpoint import Part

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

_TO_WAN = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
)
_IN_RESNET = (
    (".norm1.", ".residual.0."),
    (".conv1.", ".residual.2."),
    (".norm2.", ".residual.3."),
    (".conv2.", ".residual.6."),
    (".conv_shortcut.", ".shortcut."),
)
_BLOCKS_PER_LEVEL = 4  # three residual blocks and one upsampler


def wan_name(name: str) -> str:
    """Returns the Wan 2.1 name of a diffusers AutoencoderKLQwenImage tensor."""
    for pattern, replacement in _TO_WAN:
        name = re.sub(pattern, replacement, name)
    level = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name)
    if level:
        block, kind, number = int(level[1]), level[2], int(level[3])
        index = _BLOCKS_PER_LEVEL * block + (number if kind == "resnets" else _BLOCKS_PER_LEVEL - 1)
        name = f"decoder.upsamples.{index}.{name[level.end() :]}"
    if re.match(r"(encoder\.(downsamples|middle)|decoder\.(upsamples|middle))\.", name):
        for old, new in _IN_RESNET:
            name = name.replace(old, new)
    return name


def to_wan(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the same tensors under Wan 2.1's names."""
    return {wan_name(name): tensor for name, tensor in weights.items()}


def check_vae_config(part: Part) -> None:
    """Makes sure that an opened VAE of a checkpoint folder is the Qwen-Image VAE.

    Raises:
        RuntimeError: it is another one.
    """
    name = part.config.get("_class_name")
    if name != "AutoencoderKLQwenImage":
        raise RuntimeError(f"{part.checkpoint.path / part.name} holds a {name}, AutoencoderKLQwenImage expected")


class StandaloneVAE(nn.Module):
    """The VAE through diffusers, for use without ComfyUI. Latents are the transformer's, normalised."""

    model: AutoencoderKLQwenImage

    def __init__(self, config: Mapping):
        """Makes the network of a configuration, with weights on the meta device.

        Raises:
            ModuleNotFoundError: diffusers is not installed.
        """
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

        with torch.device("meta"):
            self.model = cast(AutoencoderKLQwenImage, AutoencoderKLQwenImage.from_config(dict(config)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images [B, 3, 8 h, 8 w] in [-1, 1] from latents [B, 16, h, w]."""
        mean, std = self._statistics(latents)
        latents = (latents * std + mean).to(self.model.device, self.model.dtype)
        decoded: torch.Tensor = self.model.decode(latents[:, :, None], return_dict=False)[0]
        return decoded[:, :, 0]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns latents [B, 16, h, w] (the mode) of images [B, 3, 8 h, 8 w] in [-1, 1]."""
        images = images.to(self.model.device, self.model.dtype)
        latents = self.model.encode(images[:, :, None], return_dict=False)[0].mode()[:, :, 0]
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def like(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)

        return like(self.model.config["latents_mean"]), like(self.model.config["latents_std"])
