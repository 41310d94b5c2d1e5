"""The run: examples in, adapters out.

What step k learns from is a function of the seed and k alone (order, noise, dropped prompts), so that a run that was
killed and goes on ends with the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from .. import __version__
from . import log as logs
from .adapter import adapter_weights, add_adapter, count_parameters, write_adapter
from .objective import (
    NOISE_GROUPS,
    Dropout,
    FlowObjective,
    TokenObjective,
    add_noise,
    drawn_batches,
    noise_group,
    noise_levels,
)
from .processes import Processes
from .settings import TrainSettings
from .sheet import draw_sheet
from .state import load_state, save_state
from .task import Task
from .timing import Pace

LARGEST_GRADIENT = 1.0
"""Norm that gradients are cut to."""
VALIDATION_DRAWS = 4
"""Noise levels, spread evenly over the groups, at which each example held back is tried."""
COLUMNS = (
    "seconds",
    "lr",
    "loss",
    *(f"loss_{group}" for group in range(NOISE_GROUPS)),
    "text_loss",
    "validation_loss",
    "gradient",
)
Report = Callable[[str], object]


class Learner(nn.Module):
    """The networks with their adapters, and the losses of a batch. One module, which several processes can share."""

    def __init__(self, task: Task, settings: TrainSettings, device: torch.device):
        super().__init__()
        self.task, self.settings = task, settings
        dtype = getattr(torch, settings.dtype)
        more: dict[str, Any] = {"dtype": dtype, "checkpointing": settings.checkpointing}
        self.flow = FlowObjective(task.transformer, **more) if task.transformer is not None else None
        self.tokens = TokenObjective(task.mllm, **more) if task.mllm is not None else None
        for part in settings.parts:
            add_adapter(self.network(part), part, settings.adapter, settings.seed)
        for part in {"transformer", "language"} - set(settings.parts):
            if (network := self._network(part)) is not None:
                network.requires_grad_(False)
        self.to(device)

    def network(self, part: str) -> nn.Module:
        """Returns the network of a part."""
        network = self._network(part)
        assert network is not None, part
        return network

    def _network(self, part: str) -> nn.Module | None:
        objective = self.flow if part == "transformer" else self.tokens
        return None if objective is None else objective.model

    def forward(
        self, pictures: Sequence[int], texts: Sequence[int], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, list[float]]]:
        """Returns the loss of a batch, and what is logged of it: lists of numbers by column."""
        total, logged = torch.zeros((), device=self.task.device), defaultdict(list)
        if pictures:
            errors, groups = self.flow_errors(pictures, self.settings.dropout, generator)
            total = total + errors.mean()
            for group, error in zip(groups, errors.detach().tolist(), strict=True):
                logged[f"loss_{group}"].append(error)
                logged["loss"].append(error)
        if texts:
            assert self.tokens is not None
            losses = [self.tokens(*self.task.text(number)) for number in texts]
            total = total + self.settings.text_weight * torch.stack(losses).mean()
            logged["text_loss"] += [loss.item() for loss in losses]
        return total, logged

    def flow_errors(
        self, pictures: Sequence[int], dropout: Dropout, generator: torch.Generator, levels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Returns the squared error of each picture, in some order, and the group of its noise level."""
        assert self.flow is not None
        errors, groups, first = [], [], 0
        for batch in drawn_batches(self.task.drawn(pictures, self.tokens), dropout, generator):
            count = len(batch.latents)
            chosen = noise_levels(count, generator) if levels is None else levels[first : first + count]
            noisy = add_noise(batch.latents, chosen, generator)
            errors.append(self.flow(batch, noisy))
            groups += noise_group(noisy.timestep).tolist()
            first += count
        return torch.cat(errors), groups


class Trainer:
    """A run; see `TrainSettings`."""

    def __init__(self, settings: TrainSettings, report: Report):
        self.settings, self.processes = settings, Processes(settings.device)
        self.accelerator, self.main = self.processes.accelerator, self.processes.main
        self.report = self.processes.saying(report)
        self.task = Task(settings, self.processes.device, self.report)
        settings.folder.mkdir(parents=True, exist_ok=True)
        self.log = logs.CSVLog(settings.folder / "log.csv", COLUMNS)
        self.step, self.seconds = 0, 0.0

    def estimate(self) -> None:
        """Says what a step takes, before anything is computed or loaded."""
        if self.main:
            self.report(self.task.estimate().describe(self.settings.steps))

    def run(self) -> list:
        """Trains and returns what was written."""
        settings = self.settings
        self.estimate()
        with self.accelerator.main_process_first():  # the others find what it has cached
            self.task.prepare()
        self.task.load()
        self.learner = Learner(self.task, settings, self.task.device)
        self.weights = [weight for weight in self.learner.parameters() if weight.requires_grad]
        self.report(f"{count_parameters(self.learner):,} numbers learn")
        self.optimizer = self._optimizer()
        fingerprint = settings.fingerprint(self.task.fingerprint)
        self.step = load_state(settings.folder, fingerprint, self.weights, self.optimizer)
        if self.step:
            self.report(f"going on after step {self.step}")
        model, self.optimizer = self.accelerator.prepare(self.learner, self.optimizer)
        if self.main:
            self.log.start(self.step)
        self._fit(model, fingerprint)
        return self.write(settings.out) if self.main else []

    def _fit(self, model: nn.Module, fingerprint: str) -> None:
        settings, logged, pace = self.settings, defaultdict(list), Pace()
        started, due = time.monotonic(), settings.sample_every
        if due and self.step == 0:
            self.sheet()
        while self.step < settings.steps:
            with pace.step():
                learnt = self._learn(model)
            for name, values in learnt.items():
                logged[name] += values
            self.step += 1
            last = self.step == settings.steps
            row: dict[str, float] = {}
            if self.task.held_back and (self.step % settings.validate_every == 0 or last):
                row["validation_loss"] = self.validate()
            if self.main and (self.step % settings.log_every == 0 or last or row):
                row |= {name: sum(values) / len(values) for name, values in logged.items()}
                row |= {"seconds": time.monotonic() - started, "lr": settings.rate(self.step - 1)}
                logged.clear()
                self.log.append(self.step, row)
                self.report(f"{_line(self.step, settings.steps, row)}, {pace.told(settings.steps - self.step)}")
            if due and (self.step % due == 0 or last):
                self.sheet()
            if self.main and (self.step % settings.save_every == 0 or last):
                save_state(settings.folder, fingerprint, self.step, self.weights, self.optimizer.state_dict())
                logs.plot(self.log, settings.folder / "loss.png", ("loss", "text_loss", "validation_loss"))

    def _learn(self, model: nn.Module) -> Mapping[str, list[float]]:
        """Makes one step down the loss of `accumulate` batches in each process."""
        settings, logged = self.settings, defaultdict(list)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step)
        processes, rank = self.processes.count, self.processes.rank
        for part in range(settings.accumulate):
            number = (self.step * settings.accumulate + part) * processes + rank
            generator = torch.Generator().manual_seed(seed_of(settings.seed, number))
            apart = contextlib.nullcontext() if part + 1 == settings.accumulate else self.accelerator.no_sync(model)
            with apart:
                loss, rows = model(self.task.pictures_at(number), self.task.texts_at(number), generator)
                check_loss(loss, self.step + 1)
                self.accelerator.backward(loss / settings.accumulate)
            for name, values in rows.items():
                logged[name] += values
        norm = cast(torch.Tensor, self.accelerator.clip_grad_norm_(self.weights, LARGEST_GRADIENT))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        logged["gradient"].append(float(norm))
        return logged

    @torch.no_grad()
    def validate(self) -> float:
        """Returns the mean loss of the examples held back, at noise and noise levels that are the same each time."""
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, -1))
        errors = []
        for number in self.task.held_back:
            for draw in range(VALIDATION_DRAWS):
                level = torch.tensor([(draw + 0.5) / VALIDATION_DRAWS])
                errors.append(self.learner.flow_errors([number], Dropout(0, 0), generator, level)[0].mean())
        return float(torch.stack(errors).mean())

    def sheet(self) -> None:
        """Draws the sample prompts with what was learnt so far."""
        wishes = self.task.sample_wishes()
        if not self.main or not wishes:
            return
        file = self.settings.folder / f"sheet_{self.step:06}.png"
        draw_sheet(self.task.pipeline, {"mmdit": self.task.transformer, "mllm": self.task.mllm}, wishes, file)
        self.report(f"drawn: {file}")

    def write(self, target) -> list:
        """Writes the adapters as they are now."""
        dtype = self.settings.save_dtype
        parts = {part: adapter_weights(self.learner.network(part), dtype) for part in self.settings.parts}
        parts = {part: {_inner(part, name): w for name, w in weights.items()} for part, weights in parts.items()}
        return write_adapter(target, parts, self.settings.adapter, self.metadata())

    def metadata(self) -> dict[str, str]:
        """Returns what the file says of itself."""
        settings = self.settings
        return {
            "made_by": f"internvl_u {__version__}",
            "base": self.task.base,
            "dataset": self.task.fingerprint,
            "examples": str(self.task.count),
            "steps": str(self.step),
            "trigger": settings.trigger,
            "adapter": settings.adapter.kind,
            "rank": str(settings.adapter.rank),
            "alpha": f"{settings.adapter.scale:g}",
            "learning_rate": f"{settings.lr:g}",
            "batch": str(settings.batch * settings.accumulate * self.processes.count),
            "seed": str(settings.seed),
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        given: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if settings.optimizer == "adamw":
            return torch.optim.AdamW(self.weights, **given)
        try:
            optimizers = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise ImportError(
                "--optimizer adamw8bit needs the package bitsandbytes: pip install bitsandbytes, or take adamw"
            ) from error
        return optimizers.AdamW8bit(self.weights, **given)


def _inner(part: str, name: str) -> str:
    """Returns a layer's name below its part's module of the checkpoint."""
    return name.removeprefix("language_model.") if part == "language" else name


def seed_of(seed: int, number: int) -> int:
    """Returns the seed of the batch of a number, so that neighbours have nothing in common."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    return (mixed * 0x94D049BB133111EB) % 2**63


def check_loss(loss: torch.Tensor, step: int) -> None:
    """Makes sure that a loss is a number: what learns from another is lost.

    Raises:
        RuntimeError: it is infinite or not a number.
    """
    if not torch.isfinite(loss):
        raise RuntimeError(
            f"a loss of {float(loss)} found at step {step}, a number expected: try a lower --lr, or --dtype float32. "
            "The last state that was saved is kept."
        )


def _line(step: int, steps: int, row: Mapping[str, float]) -> str:
    shown = {name: row[name] for name in ("loss", "text_loss", "validation_loss", "gradient") if name in row}
    return f"step {step} of {steps}, {', '.join(f'{name} {value:.4f}' for name, value in shown.items())}"
