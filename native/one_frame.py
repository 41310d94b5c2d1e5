"""ComfyUI's own VAE network, made to take the short way where there is only one frame.

Its weights, their casting and offloading stay ComfyUI's, and so does the way of videos. The mathematics of one frame is
`internvl_u/autoencoder.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import comfy.ops
import comfy.sd
import torch
from torch import nn

from ..internvl_u import autoencoder
from ..internvl_u.vae import vae_shapes, wan_name
from ..internvl_u.weights import shapes_of
from . import compat

_KNOWN = {
    *("WanVAE", "Encoder3d", "Decoder3d", "ResidualBlock", "AttentionBlock", "Resample", "CausalConv3d", "RMS_norm"),
    *("Conv2d", "SiLU", "Dropout", "Identity", "Sequential", "Upsample", "ZeroPad2d"),
}
"""The classes of the network's modules: with another one it computes something that is not known here."""
_DECODING, _ENCODING = 2200, 1500
"""Values for each pixel that one frame needs at most: ComfyUI 0.33's numbers; 0.3.75 has those of videos alone."""


def shorten(vae: comfy.sd.VAE) -> bool:
    """Lets ComfyUI's VAE take the short way for one frame, and ask for no more memory; returns whether it does.

    One whose network is not built as the Wan 2.1 network is known to be is left as it is.
    """
    network: Any = getattr(vae, "first_stage_model", None)
    if not isinstance(network, nn.Module) or not _is_known(network):
        return False
    network.__class__ = _shortened(type(network))
    for name, values in (("memory_used_decode", _DECODING * 8 * 8), ("memory_used_encode", _ENCODING)):
        if callable(used := getattr(vae, name, None)):
            setattr(vae, name, _for_one_frame(used, values))
    return True


def _for_one_frame(used: Callable[..., Any], values: int) -> Callable[..., Any]:
    """Returns ComfyUI's estimate of bytes for a shape and a dtype, of one frame at most `values` for each place."""

    def capped(shape: torch.Size, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        needed = used(shape, dtype, *args, **kwargs)
        if len(shape) != 5 or shape[2] != 1:
            return needed
        return min(needed, values * shape[3] * shape[4] * dtype.itemsize)

    return capped


def _is_known(network: nn.Module) -> bool:
    shapes = shapes_of(network.state_dict())
    width = shapes.get("decoder.head.0.gamma", (1,))[0]
    expected = {wan_name(name): shape for name, shape in vae_shapes(width).items()}
    return shapes == expected and {type(module).__name__ for module in network.modules()} <= _KNOWN


@functools.cache
def _shortened(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_OneFrame, cls), {"__module__": __name__})


class _OneFrame:
    """Put before a class of ComfyUI's: one frame [B, channels, 1, h, w] goes the short way, all else the class's."""

    def encode(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns latents [B, 16, frames, h, w], not normalised, of images [B, 3, frames, 8 h, 8 w]."""
        if args or kwargs or not _is_one_frame(x):
            return cast(Any, super()).encode(x, *args, **kwargs)
        with torch.no_grad():
            return autoencoder.encode(x[:, :, 0], _CastLayers(cast(nn.Module, self))).unsqueeze(2)

    def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns images [B, 3, frames, 8 h, 8 w] of latents [B, 16, frames, h, w], not normalised."""
        if args or kwargs or not _is_one_frame(z):
            return cast(Any, super()).decode(z, *args, **kwargs)
        with torch.no_grad():
            return autoencoder.decode(z[:, :, 0], _CastLayers(cast(nn.Module, self))).unsqueeze(2)


def _is_one_frame(x: torch.Tensor) -> bool:
    return x.ndim == 5 and x.shape[2] == 1 and not x.requires_grad


class _CastLayers:
    """The layers of ComfyUI's network, by diffusers' names, their weights cast and moved as ComfyUI does it."""

    def __init__(self, network: nn.Module):
        self._network = network

    def convolution(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns weight [out, in, height, width] and bias of a layer."""
        comfy.ops.run_every_op()
        layer = self._layer(name)
        weight, bias, stream = compat.cast_weight(layer, like)
        assert bias is not None
        # Many layers hold their weights at the same time here, and ComfyUI lends its buffers for one of them.
        kept = (_kept(weight[:, :, -1] if weight.ndim == 5 else weight, layer.weight), _kept(bias, layer.bias))
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return kept

    def gamma(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Returns the weight [channels, 1, 1] of a normalisation."""
        return cast(torch.Tensor, self._layer(name).gamma).to(like).view(-1, 1, 1)

    def attend(self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Returns the attention of queries, keys and values [B, channels, height, width], by the chosen function."""
        return cast(Any, self._layer(name)).optimized_attention(q, k, v)

    def _layer(self, name: str) -> nn.Module:
        return self._network.get_submodule(wan_name(f"{name}.").removesuffix("."))


def _kept(tensor: torch.Tensor, own: Any) -> torch.Tensor:
    return tensor if tensor is own else tensor.clone(memory_format=torch.contiguous_format)
