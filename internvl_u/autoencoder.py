"""The network of the Qwen-Image VAE (diffusers' AutoencoderKLQwenImage, Wan 2.1's) for one frame.

Of a picture the causal convolutions over time see one frame and zeros before it: the last slice of their kernels is all
that counts, and they are two-dimensional. The convolutions over time of the samplers are left out at a first frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch.nn import functional

from . import bands
from .bands import Bands, Skipped
from .config import LATENT_CHANNELS

LEVELS = 4
WIDENING = ("encoder.down_blocks.3", "encoder.down_blocks.6", "decoder.up_blocks.1.resnets.0")
"""The residual blocks that give more channels than they get, and have a convolution beside them."""
Filter = Callable[[Bands, torch.Tensor, torch.Tensor], Iterator[torch.Tensor]]
WeightAndBias = AbstractContextManager[tuple[torch.Tensor, torch.Tensor]]


class Layers(Protocol):
    """Where the weights are, by diffusers' names of the layers; each is wanted where and as `like` is."""

    def convolution(self, name: str, like: torch.Tensor) -> WeightAndBias:
        """Returns a context with weight [out, in, height, width] and bias."""
        ...

    def gamma(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Returns the weight [channels, 1, 1] of a normalisation."""
        ...

    def attend(self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Returns the attention of queries, keys and values [B, channels, height, width] with a single head."""
        ...


def decode(latents: torch.Tensor, layers: Layers) -> torch.Tensor:
    """Returns images [B, 3, 8 h, 8 w], not clamped, of latents [B, 16, h, w], not normalised."""
    x = _pointwise(_laid_out(latents), layers, "post_quant_conv")
    (x,) = _filtered(bands.convolved, [x], layers, "decoder.conv_in")
    x = _middle(x, layers, "decoder.mid_block")
    size, images = bands.band_bytes(x), iter([x])
    for level in range(LEVELS):
        name = f"decoder.up_blocks.{level}"
        images = bands.regrouped(images, size)
        for number in range(3):
            images = _residual(images, layers, f"{name}.resnets.{number}")
        if level < LEVELS - 1:
            images = _filtered(bands.doubled, images, layers, f"{name}.upsamplers.0.resample.1")
    images = _head(bands.regrouped(images, size), layers, "decoder")
    return torch.cat(list(images), dim=2)


def encode(images: torch.Tensor, layers: Layers) -> torch.Tensor:
    """Returns the mode [B, 16, h, w], not normalised, of images [B, 3, 8 h, 8 w] in [-1, 1]."""
    images = _laid_out(images)
    size = bands.band_bytes(images)
    # What goes in has 3 channels, what it becomes many.
    x = bands.regrouped([images], max(size // 32, 1))
    x = _filtered(bands.convolved, x, layers, "encoder.conv_in")
    for level in range(LEVELS):
        x = bands.regrouped(x, size)
        for number in (0, 1):
            x = _residual(x, layers, f"encoder.down_blocks.{3 * level + number}")
        if level < LEVELS - 1:
            x = _filtered(bands.halved, x, layers, f"encoder.down_blocks.{3 * level + 2}.resample.1")
    whole = _middle(torch.cat(list(x), dim=2), layers, "encoder.mid_block")
    (whole,) = _head([whole], layers, "encoder")
    return _pointwise(whole, layers, "quant_conv")[:, :LATENT_CHANNELS]


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with its channels last on a CPU, where convolutions and sums over channels are faster so."""
    return x.contiguous(memory_format=torch.channels_last) if bands.on_cpu(x) else x


def _middle(x: torch.Tensor, layers: Layers, name: str) -> torch.Tensor:
    (x,) = _residual([x], layers, f"{name}.resnets.0")
    x = _attention(x, layers, f"{name}.attentions.0")
    (x,) = _residual([x], layers, f"{name}.resnets.1")
    return x


def _residual(x: Bands, layers: Layers, name: str) -> Iterator[torch.Tensor]:
    skipped = Skipped()
    inner = _activated(_around(x, skipped, layers, name), layers, f"{name}.norm1")
    inner = _activated(_filtered(bands.convolved, inner, layers, f"{name}.conv1"), layers, f"{name}.norm2")
    return skipped.added(_filtered(bands.convolved, inner, layers, f"{name}.conv2"))


def _around(x: Bands, skipped: Skipped, layers: Layers, name: str) -> Iterator[torch.Tensor]:
    for band in x:
        skipped.keep(_pointwise(band, layers, f"{name}.conv_shortcut") if name in WIDENING else band)
        yield band


def _head(x: Bands, layers: Layers, name: str) -> Iterator[torch.Tensor]:
    return _filtered(bands.convolved, _activated(x, layers, f"{name}.norm_out"), layers, f"{name}.conv_out")


def _attention(x: torch.Tensor, layers: Layers, name: str) -> torch.Tensor:
    normalised = bands.normalised(x, layers.gamma(f"{name}.norm", x))
    q, k, v = _pointwise(normalised, layers, f"{name}.to_qkv").chunk(3, dim=1)
    return _pointwise(_laid_out(layers.attend(name, q, k, v)), layers, f"{name}.proj").add_(x)


def _activated(x: Bands, layers: Layers, name: str) -> Iterator[torch.Tensor]:
    for band in x:
        yield functional.silu(bands.normalised(band, layers.gamma(name, band)), inplace=True)


def _pointwise(x: torch.Tensor, layers: Layers, name: str) -> torch.Tensor:
    with layers.convolution(name, x) as (weight, bias):
        return functional.conv2d(x, weight, bias)


def _filtered(filtered: Filter, x: Bands, layers: Layers, name: str) -> Iterator[torch.Tensor]:
    """Yields the map under one of the filters of `bands` with the weights of a layer."""
    rest = iter(x)
    first = [next(rest)]
    with layers.convolution(name, first[0]) as (weight, bias):
        yield from filtered(itertools.chain(_emptied(first), rest), weight, bias)


def _emptied(first: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield first.pop()
