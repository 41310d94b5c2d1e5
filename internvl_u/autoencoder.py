"""The network of the Qwen-Image VAE (diffusers' AutoencoderKLQwenImage, Wan 2.1's) for one frame.

Of a picture the causal convolutions over time see one frame and zeros before it: the last slice of their kernels is all
that counts, and they are two-dimensional. The convolutions over time of the samplers are left out at a first frame.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch.nn import functional

from . import bands
from .bands import Convolution, Doubling, Halving, Skipped, passed, regrouped, whole
from .config import LATENT_CHANNELS

LEVELS = 4
WIDENING = ("encoder.down_blocks.3", "encoder.down_blocks.6", "decoder.up_blocks.1.resnets.0")
"""The residual blocks that give more channels than they get, and have a convolution beside them."""


class Layers(Protocol):
    """Where the weights are, by diffusers' names of the layers; each is wanted where and as `like` is."""

    def convolution(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns weight [out, in, height, width] and bias."""
        ...

    def gamma(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Returns the weight [channels, 1, 1] of a normalisation."""
        ...

    def attend(self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Returns the attention of queries, keys and values [B, channels, height, width] with a single head."""
        ...


def decode(latents: torch.Tensor, layers: Layers) -> torch.Tensor:
    """Returns images [B, 3, 8 h, 8 w], not clamped, of latents [B, 16, h, w], not normalised."""
    weights = partial(_weights, layers)
    x = _pointwise(_laid_out(latents), layers, "post_quant_conv")
    x = whole(passed([(x, True)], [Convolution(weights("decoder.conv_in"))]))
    x = _middle(x, layers, "decoder.mid_block")
    size, images = bands.band_bytes(x), iter([(x, True)])
    for level in range(LEVELS):
        name = f"decoder.up_blocks.{level}"
        steps = [_Residual(layers, f"{name}.resnets.{number}") for number in range(3)]
        images = passed(regrouped(images, size), steps)
        if level < LEVELS - 1:
            images = passed(images, [Doubling(weights(f"{name}.upsamplers.0.resample.1"))])
    return whole(passed(images, [_Head(layers, "decoder")]))


def encode(images: torch.Tensor, layers: Layers) -> torch.Tensor:
    """Returns the mode [B, 16, h, w], not normalised, of images [B, 3, 8 h, 8 w] in [-1, 1]."""
    weights = partial(_weights, layers)
    images = _laid_out(images)
    size = bands.band_bytes(images)
    # What goes in has 3 channels, what it becomes many.
    x = passed(regrouped([(images, True)], max(size // 32, 1)), [Convolution(weights("encoder.conv_in"))])
    for level in range(LEVELS):
        steps = [_Residual(layers, f"encoder.down_blocks.{3 * level + number}") for number in (0, 1)]
        x = passed(regrouped(x, size), steps)
        if level < LEVELS - 1:
            x = passed(x, [Halving(weights(f"encoder.down_blocks.{3 * level + 2}.resample.1"))])
    small = _middle(whole(x), layers, "encoder.mid_block")
    small = whole(passed([(small, True)], [_Head(layers, "encoder")]))
    return _pointwise(small, layers, "quant_conv")[:, :LATENT_CHANNELS]


class _Residual:
    """A step: a residual block."""

    def __init__(self, layers: Layers, name: str):
        self._layers, self._name = layers, name
        self._first, self._second = (Convolution(_weights(layers, f"{name}.conv{number}")) for number in (1, 2))
        self._skipped = Skipped()

    def __call__(self, band: torch.Tensor, last: bool) -> torch.Tensor | None:
        layers, name = self._layers, self._name
        self._skipped.keep(_pointwise(band, layers, f"{name}.conv_shortcut") if name in WIDENING else band)
        inner = self._first(_activated(band, layers, f"{name}.norm1"), last)
        if inner is not None:
            inner = self._second(_activated(inner, layers, f"{name}.norm2"), last)
        return None if inner is None else self._skipped.added(inner)


class _Head:
    """A step: what makes an image or a latent of the last map."""

    def __init__(self, layers: Layers, name: str):
        self._layers, self._name = layers, name
        self._convolution = Convolution(_weights(layers, f"{name}.conv_out"))

    def __call__(self, band: torch.Tensor, last: bool) -> torch.Tensor | None:
        return self._convolution(_activated(band, self._layers, f"{self._name}.norm_out"), last)


def _middle(x: torch.Tensor, layers: Layers, name: str) -> torch.Tensor:
    x = whole(passed([(x, True)], [_Residual(layers, f"{name}.resnets.0")]))
    x = _attention(x, layers, f"{name}.attentions.0")
    return whole(passed([(x, True)], [_Residual(layers, f"{name}.resnets.1")]))


def _attention(x: torch.Tensor, layers: Layers, name: str) -> torch.Tensor:
    normalised = bands.normalised(x, layers.gamma(f"{name}.norm", x))
    q, k, v = _pointwise(normalised, layers, f"{name}.to_qkv").chunk(3, dim=1)
    return _pointwise(_laid_out(layers.attend(name, q, k, v)), layers, f"{name}.proj").add_(x)


def _activated(x: torch.Tensor, layers: Layers, name: str) -> torch.Tensor:
    return functional.silu(bands.normalised(x, layers.gamma(name, x)), inplace=True)


def _pointwise(x: torch.Tensor, layers: Layers, name: str) -> torch.Tensor:
    return functional.conv2d(x, *layers.convolution(name, x))


def _weights(layers: Layers, name: str) -> bands.Weights:
    return partial(layers.convolution, name)


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with its channels last on a CPU, where convolutions and sums over channels are faster so."""
    return x.contiguous(memory_format=torch.channels_last) if bands.on_cpu(x) else x
