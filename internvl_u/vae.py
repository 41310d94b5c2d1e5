"""The Qwen-Image VAE (diffusers' AutoencoderKLQwenImage): its names in the Wan 2.1 layout, and standalone use.

ComfyUI knows the same network under Wan 2.1's names. The table is a pure renaming: 194 tensors to 194.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from .checkpoint import OpenFile, fill, map_file, map_weights, open_file, read_json

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
_BLOCKS_A_LEVEL = 4  # three residual blocks and one upsampler


def wan_name(name: str) -> str:
    """Returns the Wan 2.1 name of a diffusers AutoencoderKLQwenImage tensor."""
    for pattern, replacement in _TO_WAN:
        name = re.sub(pattern, replacement, name)
    level = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name)
    if level:
        block, kind, number = int(level[1]), level[2], int(level[3])
        index = _BLOCKS_A_LEVEL * block + (number if kind == "resnets" else _BLOCKS_A_LEVEL - 1)
        name = f"decoder.upsamples.{index}.{name[level.end() :]}"
    if re.match(r"(encoder\.(downsamples|middle)|decoder\.(upsamples|middle))\.", name):
        for old, new in _IN_RESNET:
            name = name.replace(old, new)
    return name


def to_wan(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the same tensors under Wan 2.1's names."""
    return {wan_name(name): tensor for name, tensor in weights.items()}


def map_wan(source: Path, open_file: OpenFile = open_file) -> dict[str, torch.Tensor]:
    """Returns the VAE's tensors under Wan 2.1's names, of a checkpoint folder or a single file in either naming.

    Raises:
        FileNotFoundError, RuntimeError: see `map_vae`.
    """
    return to_wan(map_vae(source, open_file) if source.is_dir() else map_file(source, open_file))


def map_vae(root: Path, open_file: OpenFile = open_file) -> dict[str, torch.Tensor]:
    """Returns the VAE's tensors of a checkpoint folder under their diffusers names, mapped from disk.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: a file is damaged or the folder holds another VAE.
    """
    name = read_json(root / "vae" / "config.json").get("_class_name")
    if name != "AutoencoderKLQwenImage":
        raise RuntimeError(f"{root / 'vae'} holds a {name}, AutoencoderKLQwenImage expected")
    return map_weights(root / "vae", open_file)


class StandaloneVAE(nn.Module):
    """The VAE through diffusers, for use without ComfyUI. Latents are the transformer's, normalised."""

    def __init__(self, root: Path, *, dtype: torch.dtype | None = None, device="cpu"):
        """Loads the VAE of a checkpoint folder.

        Raises:
            ModuleNotFoundError: diffusers is not installed.
            FileNotFoundError, RuntimeError: see `map_vae`; also where tensors are missing or misshapen.
        """
        super().__init__()
        from diffusers import AutoencoderKLQwenImage

        weights = map_vae(root)
        with torch.device("meta"):
            self.model = AutoencoderKLQwenImage.from_config(read_json(root / "vae" / "config.json"))
        fill(self.model, weights, "vae")
        # diffusers' own `to` warns of a choice that this VAE does not have.
        nn.Module.to(self.model, device=device, dtype=dtype).eval()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns pictures [B, 3, 8 h, 8 w] in [-1, 1] from latents [B, 16, h, w]."""
        mean, std = self._statistics(latents)
        latents = (latents * std + mean).to(self.model.device, self.model.dtype)
        return self.model.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns latents [B, 16, h, w] (the mode) of pictures [B, 3, 8 h, 8 w] in [-1, 1]."""
        pictures = pictures.to(self.model.device, self.model.dtype)
        latents = self.model.encode(pictures[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.model.config
        return tuple(
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
