"""What is minimised: flow matching for the transformer, the likelihood of written tokens for the language model.

A latent z at noise level s is x = (1 - s) z + s * noise, and the velocity to predict noise - z. Levels are logit-normal
(0, 1) and shifted by 3, as the decoder's own configuration states (`weighting_scheme`, `logit_mean`, `logit_std`,
`flow_shift`); timesteps are whole, as in inference. Some prompts are dropped to those that guidance compares with.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..mllm import MLLM
from ..mmdit import MMDiT, call_block, time_embedding
from ..packing import BranchInput
from ..rope import Grid, Layout, grid_of
from ..sampling import SHIFT, TRAIN_STEPS, whole_timestep
from .live import LiveSample
from .stored import Branch, Sample

Hidden = tuple[torch.Tensor, torch.Tensor | None]
"""The last hidden states [1, T, D] of a text, and those of some layers side by side."""
NOISE_GROUPS = 4
"""Groups of equal width of the timesteps, for each of which the loss is logged."""


class Dropout(NamedTuple):
    """Shares of the samples whose prompt is the unconditional one, and of those with references the partial one."""

    prompt: float = 0.1
    reference: float = 0.1


class DrawnBatch(NamedTuple):
    """Latents [B, 16, h, w] of one size, each with what it is drawn from; references [B, 16, h, w] for all or none."""

    latents: torch.Tensor
    references: tuple[torch.Tensor, ...]
    contexts: list[tuple[torch.Tensor, Layout]]


class NoisyBatch(NamedTuple):
    """Latents [B, 16, h, w] at levels of noise, their whole timesteps [B], and the velocity to predict."""

    latents: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Returns noise levels [count], fp32: logit-normal and shifted."""
    level = torch.randn(count, generator=generator).sigmoid()
    return SHIFT * level / (1 + (SHIFT - 1) * level)


def add_noise(latents: torch.Tensor, levels: torch.Tensor, generator: torch.Generator) -> NoisyBatch:
    """Returns latents at noise levels [B]; all on the CPU, so that a seed means the same everywhere."""
    noise = torch.randn(latents.shape, generator=generator)
    share = levels.view(-1, 1, 1, 1)
    return NoisyBatch((1 - share) * latents + share * noise, whole_timestep(levels), noise - latents)


def drawn_batches(
    samples: Sequence[Sample | LiveSample], dropout: Dropout, generator: torch.Generator
) -> list[DrawnBatch]:
    """Returns samples of one shape as batches, after some prompts were dropped: with and without references."""
    chances = torch.rand(len(samples), generator=generator).tolist()
    seeing, blind = [], []
    for sample, chance in zip(samples, chances, strict=True):
        if chance < dropout.prompt:
            blind.append((sample, sample.unconditional))
        elif sample.references and chance < dropout.prompt + dropout.reference:
            assert sample.partial is not None
            seeing.append((sample, sample.partial))
        else:
            (seeing if sample.references else blind).append((sample, sample.conditional))
    return [_stacked(kind, with_references) for kind, with_references in ((seeing, True), (blind, False)) if kind]


def _stacked(samples: list[tuple[Sample | LiveSample, Branch]], with_references: bool) -> DrawnBatch:
    samples = sorted(samples, key=lambda one: len(one[1][0]))  # equal lengths share a call of the attention
    latents = torch.stack([sample.latent for sample, _ in samples])
    references = zip(*(sample.references for sample, _ in samples), strict=True) if with_references else ()
    return DrawnBatch(latents, tuple(map(torch.stack, references)), [context for _, context in samples])


class Branches:
    """Makes `MMDiT.branch`, each rotary table once: many samples share one."""

    def __init__(self, model: MMDiT):
        self._rotary = functools.lru_cache(maxsize=4096)(functools.partial(_rotary, model))

    def __call__(self, context: torch.Tensor, layout: Layout, grid: Grid, references: tuple[Grid, ...]) -> BranchInput:
        """Returns a sample's `BranchInput`, where its context is."""
        return BranchInput(context, self._rotary(layout, grid, references).to(context.device))


def _rotary(model: MMDiT, layout: Layout, grid: Grid, references: tuple[Grid, ...]) -> torch.Tensor:
    nothing = torch.empty(sum(span.count for span in layout), model.config.context_width)
    return model.branch(nothing, layout, grid, references).rotary


class FlowObjective(nn.Module):
    """The transformer's loss. `checkpointing` computes each block again on the way back instead of keeping it."""

    def __init__(self, model: MMDiT, *, dtype: torch.dtype, checkpointing: bool = False):
        super().__init__()
        self.model, self.dtype, self.checkpointing = model, dtype, checkpointing
        self.branches = Branches(model)

    def forward(self, batch: DrawnBatch, noisy: NoisyBatch) -> torch.Tensor:
        """Returns the mean squared error of each sample [B], fp32."""
        device = self.model.img_in.weight.device
        grid, seen = grid_of(batch.latents), tuple(grid_of(one) for one in batch.references)
        branches = [self.branches(context.to(device), layout, grid, seen) for context, layout in batch.contexts]
        velocity = self.model(
            noisy.latents.to(device, self.dtype),
            time_embedding(noisy.timestep.to(device)).to(self.dtype),
            branches,
            [one.to(device, self.dtype) for one in batch.references],
            run_block=checkpointed if self.checkpointing and torch.is_grad_enabled() else None,
        )
        return (velocity.float() - noisy.target.to(device)).square().flatten(1).mean(1)


def checkpointed(index, block, image, text, modulation, packing, image_tokens):
    """Runs a block, to be computed again when its gradients are asked for; see `RunBlock`."""
    return checkpoint(call_block, index, block, image, text, modulation, packing, image_tokens, use_reentrant=False)


def noise_group(timestep: torch.Tensor) -> torch.Tensor:
    """Returns the group, 0 to 3, of whole timesteps [B]: 0 is the least noise."""
    return (timestep * NOISE_GROUPS / TRAIN_STEPS).long().clamp(0, NOISE_GROUPS - 1)


class TokenObjective(nn.Module):
    """The language model's loss: the tokens of answers and thoughts, each after all before it."""

    def __init__(self, model: MLLM, *, dtype: torch.dtype, checkpointing: bool = False):
        super().__init__()
        self.model, self.dtype, self.checkpointing = model, dtype, checkpointing

    def forward(self, embedded: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
        """Returns the mean cross entropy of the last tokens, `targets`, of a text embedded as [1, T, D]."""
        hidden = self.hidden(embedded)[0][0, -len(targets) - 1 : -1]
        logits = self.model.language_model.lm_head(hidden).float()
        return functional.cross_entropy(logits, torch.tensor(targets, device=logits.device))

    def hidden(self, embedded: torch.Tensor, layers: Sequence[int] = ()) -> Hidden:
        """Returns the last hidden states [1, T, D] and those of layers side by side; see `Qwen3.forward`."""
        run_layer = _checkpointed_layer if self.checkpointing and torch.is_grad_enabled() else None
        return self.model.language_model(embedded, None, layers, run_layer=run_layer)


def _checkpointed_layer(layer: nn.Module, *inputs: Any) -> torch.Tensor:
    return cast(torch.Tensor, checkpoint(layer, *inputs, use_reentrant=False))
