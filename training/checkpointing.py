"""States that a training run goes on from: model, EMA and optimizers, each file whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from internvl_u.weights import save_weights

from .optim import EMA

EMA_PREFIX = "ema/"


def save_state(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> None:
    """Writes tensors and metadata (anything JSON can hold) as one safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    # A copy each: safetensors takes no two tensors that share memory.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_weights(draft, copies, {"state": json.dumps(metadata)})
    os.replace(draft, path)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """Returns the tensors and metadata that `save_state` wrote; None where there are none yet."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["state"])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def pack_state(model: nn.Module, ema: EMA, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Returns all that a run goes on from, as tensors for `save_state`."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"{EMA_PREFIX}{name}": value for name, value in ema.weights.items()}
    for i, optimizer in enumerate(optimizers):
        for number, fields in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{number}.{field}": torch.as_tensor(value) for field, value in fields.items()}
    return tensors


def unpack_state(
    model: nn.Module,
    ema: EMA,
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Puts back what `pack_state` returned."""
    model.load_state_dict(with_prefix(tensors, "model/"))
    ema.load(with_prefix(tensors, EMA_PREFIX))
    for i, optimizer in enumerate(optimizers):
        _restore_optimizer(optimizer, with_prefix(tensors, f"optimizer/{i}/"))


def with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the tensors whose names begin with the prefix, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_ema(path: Path, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """Returns the EMA weights in a stage's state whose names begin with `prefix`, without it.

    Raises:
        FileNotFoundError: the stage has not run.
    """
    state = load_state(path)
    if state is None:
        raise FileNotFoundError(f"no {path}: run that stage first")
    return with_prefix(state[0], EMA_PREFIX + prefix)


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, field = name.split(".", 1)
        state.setdefault(int(number), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
