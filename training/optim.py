"""Optimizers of all stages (Muon for matrices and kernels inside, AdamW for the rest), rates, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

ADAMW_NAMES = ("embed", "lm_head", "img_in", "txt_in", "proj_out", "_mod", "norm_out", "aux_head")
"""Parts of names of matrices that lead in or out: these are for AdamW."""
WARMUP_STEPS = 200
BETAS = (0.9, 0.98)


def make_optimizers(model: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Returns Muon (Jordan 2024; torch's) and AdamW over the parameters of a model that learn."""
    inner, rest = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_inner = weight.ndim == 2 and not any(part in name for part in ADAMW_NAMES)
            (inner if is_inner else rest).append(weight)
    muon = torch.optim.Muon(inner, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)


def make_kernel_optimizers(
    named_parameters: Iterable[tuple[str, torch.Tensor]], lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Returns Muon for convolution kernels and AdamW for the rest, over the parameters that learn."""
    kernels, rest = [], []
    for name, weight in named_parameters:
        if weight.requires_grad:
            (kernels if weight.ndim >= 4 and name.endswith("weight") else rest).append(weight)
    return KernelMuon(kernels, lr), torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0)


def warmup_stable_decay(step: int, steps: int) -> float:
    """Returns the share of the learning rate at a step: up in the first steps, level, and linearly down from half."""
    return min(1.0, (step + 1) / WARMUP_STEPS, 2 * (1 - step / steps))


def warmup_cosine(step: int, progress: float) -> float:
    """Returns the share of the learning rate at a step and at this `progress` (0 to 1) through the run."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Sets the learning rate of all parameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


class KernelMuon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for the last slices of convolution kernels [out, in, time, height, width] or without time.

    torch's own takes matrices only. Kernels of one shape are made orthogonal together, which is faster.
    """

    def __init__(self, kernels: list[torch.Tensor], lr: float, momentum: float = 0.95, decay: float = 0.05):
        super().__init__(kernels, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """Moves all kernels by one step."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for kernel in group["params"]:
                shapes.setdefault(tuple(kernel.shape), []).append(kernel)
            for kernels in shapes.values():
                self._step_batched(kernels, group)

    def _step_batched(self, kernels: list[torch.Tensor], group: dict) -> None:
        slices = [last_slice(kernel) for kernel in kernels]
        gradients = torch.stack([last_slice(kernel.grad) for kernel in kernels]).flatten(2)
        for kernel, gradient in zip(kernels, gradients):
            buffer = self.state[kernel].setdefault("momentum", torch.zeros_like(gradient))
            buffer.lerp_(gradient, 1 - group["momentum"])
            gradient.lerp_(buffer, group["momentum"])
        updates = orthogonalize(gradients)
        rate = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5  # as large as AdamW's steps
        for kernel, update in zip(slices, updates):
            kernel.mul_(1 - group["lr"] * group["decay"]).sub_(update.view_as(kernel), alpha=rate)


def last_slice(kernel: torch.Tensor) -> torch.Tensor:
    """Returns the part of a kernel that a single frame uses, [out, in, height, width]."""
    return kernel[:, :, -1] if kernel.ndim == 5 else kernel


def orthogonalize(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Returns the matrices [N, rows, columns] with singular values near 1, by Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class EMA:
    """The exponential moving average of a model's weights, which is what is exported."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step, counted from 0; early ones fade sooner, since they are soon outdated."""
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes over an average that was saved."""
        self.weights = {name: weights[name].to(old, copy=True) for name, old in self.weights.items()}
