"""The optimisers of all stages (Muon for matrices and kernels inside, AdamW for the rest), and averaged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .log import optimiser_tensors, restore_optimiser

BESIDE = ("embed", "lm_head", "img_in", "txt_in", "proj_out", "_mod", "norm_out", "cells", "layout")
"""Parts of names of matrices that lead in or out: these are for AdamW."""
WARM_UP = 200


def optimisers(model: nn.Module, rate: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Returns Muon (Jordan 2024; torch's) and AdamW over the parameters of a model that learn."""
    inner, rest = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_inner = weight.ndim == 2 and not any(part in name for part in BESIDE)
            (inner if is_inner else rest).append(weight)
    muon = torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def set_rates(steppers: Sequence[torch.optim.Optimizer], rate: float, step: int, steps: int) -> None:
    """Sets the learning rate of a step: up in the first steps, level, and down to nothing over the last half."""
    share = min(1.0, (step + 1) / WARM_UP, 2 * (1 - step / steps))
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = rate * share


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
                self._step_together(kernels, group)

    def _step_together(self, kernels: list[torch.Tensor], group: dict) -> None:
        slices = [last_slice(kernel) for kernel in kernels]
        gradients = torch.stack([last_slice(kernel.grad) for kernel in kernels]).flatten(2)
        for kernel, gradient in zip(kernels, gradients):
            memory = self.state[kernel].setdefault("momentum", torch.zeros_like(gradient))
            memory.lerp_(gradient, 1 - group["momentum"])
            gradient.lerp_(memory, group["momentum"])
        updates = orthogonal(gradients)
        rate = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5  # as large as AdamW's steps
        for kernel, update in zip(slices, updates):
            kernel.mul_(1 - group["lr"] * group["decay"]).sub_(update.view_as(kernel), alpha=rate)


def last_slice(kernel: torch.Tensor) -> torch.Tensor:
    """Returns the part of a kernel that a single frame uses, [out, in, height, width]."""
    return kernel[:, :, -1] if kernel.ndim == 5 else kernel


def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Returns the matrices [N, rows, columns] with singular values near 1, by Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Averaged:
    """An exponential average of a model's weights, which is what is kept."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step; early steps count more, since they are soon outdated."""
        keep = min(self.decay, (step + 1) / (step + 10))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - keep)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes over an average that was saved."""
        self.weights = {name: weights[name].to(old, copy=True) for name, old in self.weights.items()}


def state_of(model: nn.Module, average: Averaged, steppers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Returns all that a run goes on from, as tensors for `log.save_state`."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average/{name}": value for name, value in average.weights.items()}
    for i, stepper in enumerate(steppers):
        tensors |= {f"{i}/{name}": value for name, value in optimiser_tensors(stepper).items()}
    return tensors


def restore(
    model: nn.Module,
    average: Averaged,
    steppers: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Puts back what `state_of` returned."""

    def part(name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}

    model.load_state_dict(part("model/"))
    average.load(part("average/"))
    for i, stepper in enumerate(steppers):
        restore_optimiser(stepper, part(f"{i}/"))
