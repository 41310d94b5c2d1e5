"""The Qwen-Image VAE (diffusers' AutoencoderKLQwenImage): its names in the Wan 2.1 layout, and standalone use.

ComfyUI knows the same network under Wan 2.1's names. The table is a pure renaming: 194 tensors to 194.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from . import autoencoder
from .checkpoint import Part
from .config import LATENT_CHANNELS
from .schema import VAEConfig, checked
from .weights import check_shapes

LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
LATENTS_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
LATENTS_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916)
"""Of the released VAE: the released pipeline, and ComfyUI, normalise latents with these numbers."""
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


def from_wan(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the same tensors, by Wan 2.1's names or diffusers' own, under diffusers' names."""
    names = {wan_name(name): name for name in vae_shapes(1)}
    return {names.get(name, name): tensor for name, tensor in weights.items()}


def check_vae(part: Part) -> VAEConfig | None:
    """Returns what the configuration of an opened VAE says, which a single file may lack.

    Raises:
        RuntimeError: it is another VAE, or its weights contradict the configuration.
    """
    stated = None
    if part.checkpoint.path.is_dir():
        name = part.config.get("_class_name")
        if name != "AutoencoderKLQwenImage":
            raise RuntimeError(f"{part.checkpoint.path / part.name} holds a {name}, AutoencoderKLQwenImage expected")
        stated = checked(VAEConfig, part.config, part.source)
    check_vae_shapes(part.shapes, stated.base_dim if stated else None, part.source)
    return stated


def check_vae_shapes(shapes: Mapping[str, tuple[int, ...]], width: int | None, source: str) -> None:
    """Makes sure that shapes, by diffusers' or Wan 2.1's names, are those of the Qwen-Image VAE of a width.

    `width` None is the weights' own.

    Raises:
        RuntimeError: they are not.
    """
    shapes = {wan_name(name): shape for name, shape in shapes.items()}
    first = shapes.get("decoder.head.0.gamma")
    if not first:
        raise RuntimeError(f"{source}: no decoder.norm_out.gamma found: this is not the Qwen-Image VAE")
    expected = vae_shapes(width or first[0])
    check_shapes({wan_name(name): shape for name, shape in expected.items()}, shapes, "vae")


def vae_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the VAE's weights, by diffusers' names, with `width` channels at full resolution."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, *kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, *kernel), (out,)

    def residual(name: str, into: int, out: int) -> None:
        shapes[f"{name}.norm1.gamma"], shapes[f"{name}.norm2.gamma"] = (into, 1, 1, 1), (out, 1, 1, 1)
        conv(f"{name}.conv1", out, into, 3, 3, 3)
        conv(f"{name}.conv2", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.conv_shortcut", out, into, 1, 1, 1)

    def half(name: str, into: int, first: int, last: int, out: int) -> None:
        conv(f"{name}.conv_in", first, into, 3, 3, 3)
        for number in (0, 1):
            residual(f"{name}.mid_block.resnets.{number}", deepest, deepest)
        shapes[f"{name}.mid_block.attentions.0.norm.gamma"] = (deepest, 1, 1)
        conv(f"{name}.mid_block.attentions.0.to_qkv", 3 * deepest, deepest, 1, 1)
        conv(f"{name}.mid_block.attentions.0.proj", deepest, deepest, 1, 1)
        shapes[f"{name}.norm_out.gamma"] = (last, 1, 1, 1)
        conv(f"{name}.conv_out", out, last, 3, 3, 3)

    down, up = [width * factor for factor in (1, 2, 4, 4)], [width * factor for factor in (4, 4, 2, 1)]
    deepest = down[-1]
    half("encoder", 3, width, deepest, 2 * LATENT_CHANNELS)
    half("decoder", LATENT_CHANNELS, deepest, width, 3)
    conv("quant_conv", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, 1, 1)
    conv("post_quant_conv", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1)
    for level, out in enumerate(down):
        name = "encoder.down_blocks"
        residual(f"{name}.{3 * level}", down[max(level - 1, 0)], out)
        residual(f"{name}.{3 * level + 1}", out, out)
        if level < 3:
            conv(f"{name}.{3 * level + 2}.resample.1", out, out, 3, 3)
        if level in (1, 2):  # these two halve the frames as well
            conv(f"{name}.{3 * level + 2}.time_conv", out, out, 3, 1, 1)
    for level, out in enumerate(up):
        name = f"decoder.up_blocks.{level}"
        residual(f"{name}.resnets.0", up[level - 1] // 2 if level else out, out)
        residual(f"{name}.resnets.1", out, out)
        residual(f"{name}.resnets.2", out, out)
        if level < 3:
            conv(f"{name}.upsamplers.0.resample.1", out // 2, out, 3, 3)
        if level < 2:
            conv(f"{name}.upsamplers.0.time_conv", 2 * out, out, 3, 1, 1)
    return shapes


def one_frame(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what of the weights, by diffusers' names, a single frame is computed with.

    Of kernels over time that is the last slice; the samplers' convolutions over time come in at the second frame.
    """
    return {
        name: _last_slice(name, tensor).contiguous() for name, tensor in weights.items() if ".time_conv." not in name
    }


def _last_slice(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith(".gamma"):
        return tensor.view(-1, 1, 1)
    return tensor[:, :, -1] if tensor.ndim == 5 else tensor


class StandaloneVAE(nn.Module):
    """The VAE of single pictures, for use without ComfyUI. Latents are the transformer's, normalised."""

    def __init__(self, weights: Mapping[str, torch.Tensor], config: VAEConfig | None = None):
        """Makes the network of the weights, by diffusers' names; without a configuration its statistics are usual."""
        super().__init__()
        self.model = nn.Module()
        for name, tensor in one_frame(weights).items():
            *path, last = name.split(".")
            layer = self.model
            for part in path:
                if part not in dict(layer.named_children()):
                    layer.add_module(part, nn.Module())
                layer = layer.get_submodule(part)
            layer.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        self.latents_mean = tuple(config.latents_mean) if config else LATENTS_MEAN
        self.latents_std = tuple(config.latents_std) if config else LATENTS_STD

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images [B, 3, 8 h, 8 w] in [-1, 1] from latents [B, 16, h, w]."""
        mean, std = self._statistics(latents)
        return autoencoder.decode(self._placed(latents * std + mean), self).clamp_(-1.0, 1.0)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns latents [B, 16, h, w] (the mode) of images [B, 3, 8 h, 8 w] in [-1, 1]."""
        latents = autoencoder.encode(self._placed(images), self)
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def convolution(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns weight [out, in, height, width] and bias of a layer, by diffusers' name."""
        layer = self.model.get_submodule(name)
        return cast(torch.Tensor, layer.weight), cast(torch.Tensor, layer.bias)

    def gamma(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Returns the weight [channels, 1, 1] of a normalisation, by diffusers' name."""
        return cast(torch.Tensor, self.model.get_submodule(name).gamma)

    def attend(self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Returns the attention of queries, keys and values [B, channels, height, width] with a single head."""
        shape = q.shape
        q, k, v = (one.flatten(2).transpose(1, 2)[:, None] for one in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(shape)

    def _placed(self, values: torch.Tensor) -> torch.Tensor:
        weight = next(self.parameters())
        return values.to(weight.device, weight.dtype)

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def like(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)

        return like(self.latents_mean), like(self.latents_std)
