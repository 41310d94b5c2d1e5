"""What every training stage keeps on disk: a CSV of its progress and the state from which it goes on."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class Log:
    """A CSV file with a fixed set of columns, one row at a time."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        """Opens the log, which may hold rows already, and writes its heading where it is new."""
        self.path, self.columns = path, columns
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._write([])

    def append(self, **row: float) -> None:
        """Adds a row; numbers are kept to six digits."""
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([_short(row.get(column, "")) for column in self.columns])

    def rows(self) -> list[dict[str, str]]:
        """Returns all rows, each by column."""
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def cut(self, step: int) -> None:
        """Drops the rows after `step`: those that a run wrote after the state from which it now goes on."""
        self._write([row for row in self.rows() if int(row["step"]) <= step])

    def _write(self, rows: list[dict[str, str]]) -> None:
        draft = self.path.with_suffix(".draft")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.path)


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def save_state(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, object]) -> None:
    """Writes tensors and facts (anything JSON can hold) as one safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    # A copy each: safetensors takes no two tensors that share memory.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, draft, {"facts": json.dumps(facts)})
    os.replace(draft, path)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """Returns the tensors and facts that `save_state` wrote; None where there are none yet."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        return {name: file.get_tensor(name) for name in file.keys()}, facts


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns the optimiser's state as tensors named `optimiser.<parameter number>.<field>`, for `save_state`."""
    state = optimiser.state_dict()["state"]
    return {f"optimiser.{i}.{field}": torch.as_tensor(v) for i, fields in state.items() for field, v in fields.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `optimiser_tensors` returned (other tensors are passed over)."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, number, field = name.split(".", 2)
            state.setdefault(int(number), {})[field] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
