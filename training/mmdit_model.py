"""The network of the nano transformer, its batches of padded contexts, and a forward pass that can be compiled."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from internvl_u.config import MMDiTConfig
from internvl_u.mmdit import MLP, MMDiT, time_embedding
from internvl_u.sampling import SHIFT, whole_timestep

from .data.replay_buffer import bucket_of
from .data.samples import Sample

CONFIG = MMDiTConfig(
    channels=16, patch_size=2, context_width=384, layers=6, heads=4, head_dim=32, rope_axes=(8, 12, 12)
)
POSITION_BLOCK, LAYOUT_BLOCK = 1, 3
"""Blocks after which the auxiliary head reads from each token where it lies itself, and what lies under it."""
UNIFORM_SHARE, PURE_NOISE_SHARE = 0.3, 0.03
"""Shares of the samples whose times are uniform before the shift instead of logit-normal, and that are noise alone."""
RunBlock = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""What computes both streams after a block, as `run_padded_block` does."""


def new_model(seed: int = 0) -> MMDiT:
    """Returns the nano transformer with random weights; its blocks and its output begin as nothing."""
    model = MMDiT(CONFIG, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if "norm_" in name and "linear" not in name or name.startswith("txt_norm"):
                weight.fill_(1.0)
            elif name.endswith("bias") or "_mod." in name or name.startswith(("norm_out", "proj_out")):
                weight.zero_()
            else:
                weight.normal_(0, weight.shape[1] ** -0.5 * 0.7, generator=generator)
    return model


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket side by side, their contexts padded to one length."""

    latents: torch.Tensor  # [B, 16, h, w]
    references: tuple[torch.Tensor, ...]
    context: torch.Tensor  # [B, L, width]
    rotary_image: torch.Tensor  # [2, 1, N, 1, E / 2]
    rotary_text: torch.Tensor  # [2, B * L, 1, E / 2]
    bias: torch.Tensor  # [B, 1, 1, N + L], nothing or nearly minus infinity

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "references"}
        return dataclasses.replace(self, **moved, references=tuple(x.to(device) for x in self.references))


class RotaryCache:
    """Rotary tables of a model, each made once."""

    def __init__(self, model: MMDiT):
        self.model, self.tables = model, {}

    def __call__(self, sample: Sample) -> torch.Tensor:
        """Returns the table of a sample's image and context [2, N + tokens, E / 2]."""
        grid = tuple(sample.latent.shape[-2:])
        key = (grid, sample.reference is not None, sample.layout)
        if key not in self.tables:
            references = [grid] if sample.reference is not None else []
            self.tables[key] = self.model.branch(sample.context, sample.layout, grid, references).rotary
        return self.tables[key]


def collate(samples: Sequence[Sample], rotary_cache: RotaryCache) -> Batch:
    """Returns samples of one bucket as one batch."""
    longest = bucket_of(samples[0]).length
    tokens = sum(x.shape[-1] * x.shape[-2] // 4 for x in (samples[0].latent, samples[0].reference) if x is not None)
    context = torch.zeros(len(samples), longest, CONFIG.context_width, dtype=torch.bfloat16)
    rotary = torch.zeros(2, len(samples), longest, CONFIG.head_dim // 2)
    bias = torch.zeros(len(samples), 1, 1, tokens + longest)
    for i, sample in enumerate(samples):
        table, length = rotary_cache(sample), len(sample.context)
        context[i, :length] = sample.context
        rotary[:, i, :length] = table[:, tokens:]
        bias[i, ..., tokens + length :] = -1e4
    references = (torch.stack([s.reference for s in samples]),) if samples[0].reference is not None else ()
    image = rotary_cache(samples[0])[:, None, :tokens, None].contiguous()  # other strides would be compiled anew
    latents = torch.stack([sample.latent for sample in samples])
    return Batch(latents, references, context, image, rotary.flatten(1, 2)[:, :, None], bias)


def run_padded_block(
    block: nn.Module,
    image: torch.Tensor,
    text: torch.Tensor,
    modulation: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
    image_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both streams after a block, for contexts of one length."""
    count, length = image.shape[0], text.shape[0] // image.shape[0]
    which = torch.arange(count, device=image.device)[:, None].expand(count, length).flatten()
    packing = _EqualLengths(length, which, *rotary)

    def attention(query, key, value):
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
        # Queries and keys have been normalised, so that no maximum need be taken off first.
        weights = (scores.float() + bias).exp()
        total = weights.sum(-1, keepdim=True).to(value.dtype)
        return (weights.to(value.dtype) @ value / total).transpose(1, 2).flatten(2)

    return block(image, text, modulation, packing, attention, image_tokens)


def compile_blocks(model: MMDiT) -> RunBlock:
    """Returns `run_padded_block`, compiled once for all blocks (and once for the last) of each shape."""
    template = copy.deepcopy(model.transformer_blocks[0])
    for module in template.modules():
        if isinstance(module, MLP):
            module.__class__ = _FastMLP

    def run(weights: dict[str, torch.Tensor], *inputs):
        def block(*inner):
            return torch.func.functional_call(template, weights, inner)

        return run_padded_block(block, *inputs)

    torch._dynamo.config.cache_size_limit = 64
    fast = torch.compile(run, dynamic=False)
    return lambda block, *inputs: fast(dict(block.named_parameters()), *inputs)


class _FastMLP(MLP):
    """The same with the tanh-GELU written with a sigmoid, which is much faster on the CPU than tanh."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.net[0].proj(tokens)
        twice = 2 * (2 / math.pi) ** 0.5 * (inner + 0.044715 * inner * inner * inner)
        return self.net[2](inner * torch.sigmoid(twice))


class _EqualLengths:
    """A `Packing` of contexts of one length."""

    def __init__(self, length: int, sample: torch.Tensor, rotary_image: torch.Tensor, rotary_text: torch.Tensor):
        self.length, self.sample, self.rotary_image, self.rotary_text = length, sample, rotary_image, rotary_text

    def groups(self) -> list[tuple[slice, slice, int]]:
        return [(slice(None), slice(None), self.length)]


def predict_velocity(
    model: MMDiT, noisy: torch.Tensor, timestep: torch.Tensor, batch: Batch, run: RunBlock = run_padded_block
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the velocity [B, 16, h, w], and the image's tokens [2, B, N, D] early and midway in the transformer.

    As `MMDiT.forward`, for padded contexts.
    """
    image, grid = model.embed_image(noisy, batch.references)
    latent_tokens = grid[0] * grid[1]
    text = model.embed_text(batch.context.flatten(0, 1).to(noisy.device), noisy.dtype)
    modulation = model.embed_time(time_embedding(timestep), noisy.dtype)
    rotary, inner = (batch.rotary_image, batch.rotary_text), []

    def run_and_keep(index, block, image, text, modulation, packing, image_tokens):
        image, text = run(block, image, text, modulation, rotary, batch.bias, image_tokens)
        if index + 1 in (POSITION_BLOCK, LAYOUT_BLOCK):
            inner.append(image[:, :latent_tokens])
        return image, text

    image = model.run_blocks(image, text, modulation, None, latent_tokens, run_and_keep)
    return model.velocity(image, modulation, grid, noisy.shape[-2:]), torch.stack(inner)


def add_noise(latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns latents at shifted noise levels, their whole timesteps [B], and the velocity to predict."""
    count = len(latents)
    sigma = torch.randn(count, generator=generator).sigmoid()
    # Where things go is decided in the first steps of sampling, where logit-normal times hardly ever come.
    uniform = torch.rand(count, generator=generator) < UNIFORM_SHARE
    sigma = torch.where(uniform, torch.rand(count, generator=generator), sigma)
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    sigma = torch.where(torch.rand(count, generator=generator) < PURE_NOISE_SHARE, 0.9995, sigma)
    noise = torch.randn(latents.shape, generator=generator)
    noise_share = sigma.view(-1, 1, 1, 1)
    return (1 - noise_share) * latents + noise_share * noise, whole_timestep(sigma), noise - latents
