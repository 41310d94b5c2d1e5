"""The optimisers of all stages: Muon for the matrices inside layers, AdamW for the rest, and averaged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pack.training.log import optimiser_tensors, restore_optimiser
from torch import nn

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
