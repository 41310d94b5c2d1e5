"""What a run goes on from after it was stopped, however that was: a file that is whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

STATE = "state.pt"


def save_state(
    folder: Path, fingerprint: str, step: int, weights: Sequence[nn.Parameter], optimizer: Mapping[str, Any]
) -> None:
    """Writes the weights that learn and the optimizer's state after `step` steps."""
    draft = folder / f"{STATE}.part"
    values = [weight.detach().cpu() for weight in weights]
    with draft.open("wb") as file:
        torch.save({"fingerprint": fingerprint, "step": step, "weights": values, "optimizer": dict(optimizer)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / STATE)


def load_state(folder: Path, fingerprint: str, weights: Sequence[nn.Parameter], optimizer: Any) -> int:
    """Takes over the state in a folder and returns its step; 0 where there is none.

    Raises:
        RuntimeError: it is of another run, or unreadable.
    """
    file = folder / STATE
    if not file.exists():
        return 0
    try:
        state: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        same = state["fingerprint"] == fingerprint
    except Exception as error:
        raise RuntimeError(
            f"{file} cannot be read ({' '.join(str(error).split())[:200]}): delete it to begin anew"
        ) from error
    if not same:
        raise RuntimeError(
            f"{file} is of a run with other settings, data or model: give another --out, or delete "
            f"{folder} to begin anew"
        )
    with torch.no_grad():
        for weight, value in zip(weights, state["weights"], strict=True):
            weight.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
