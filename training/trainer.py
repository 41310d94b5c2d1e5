"""The training loop of all stages: learning rate, gradients, EMA, log, and a state from which a stopped run goes on."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .checkpointing import load_state, pack_state, save_state, unpack_state
from .distributed import average_gradients
from .metrics import MetricsLog
from .optim import EMA, set_lr, warmup_cosine, warmup_stable_decay

MAX_GRADIENT_NORM = 1.0
Losses = Mapping[str, torch.Tensor]
logger = logging.getLogger(__name__)


class Stage(Protocol):
    """What is trained: a network (a model, mostly with an auxiliary head), and its losses."""

    network: nn.Module

    def losses(self, step: int) -> Losses:
        """Returns the losses of a step, counted from 0: "total" is minimised, all others are only logged."""

    def report(self, ema: EMA) -> Mapping[str, float]:
        """Returns what a row of the log has beside the means of the losses since the row before."""


class Schedule(Protocol):
    """How long a run takes, in steps or seconds, its learning rate, and when it is logged and saved."""

    def lr(self, step: int, seconds: float) -> float:
        """Returns the learning rate of a step."""

    def is_over(self, step: int, seconds: float) -> bool:
        """Returns whether a run of so many steps and seconds is to stop."""

    def is_log_due(self, step: int, seconds: float, logged: float) -> bool:
        """Returns whether to log after so many steps and seconds, when it was logged last after `logged` seconds."""


@dataclass(frozen=True)
class StepSchedule:
    """A run of `steps` steps: the rate goes up, stays level, and goes down over the last half.

    With `stop_after` the run stops there already, at the rates of the whole run.
    """

    max_lr: float
    steps: int
    log_every: int
    stop_after: int | None = None

    def lr(self, step: int, seconds: float) -> float:
        return self.max_lr * warmup_stable_decay(step, self.steps)

    def is_over(self, step: int, seconds: float) -> bool:
        return step >= (self.stop_after or self.steps)

    def is_log_due(self, step: int, seconds: float, logged: float) -> bool:
        return step % self.log_every == 0 or self.is_over(step, seconds)


@dataclass(frozen=True)
class TimeSchedule:
    """A run of `limit` seconds: the rate goes up in the first steps, and down along a cosine over the time."""

    max_lr: float
    limit: float
    log_every: float

    def lr(self, step: int, seconds: float) -> float:
        return self.max_lr * warmup_cosine(step, seconds / self.limit)

    def is_over(self, step: int, seconds: float) -> bool:
        return seconds >= self.limit

    def is_log_due(self, step: int, seconds: float, logged: float) -> bool:
        return seconds - logged > self.log_every or self.is_over(step, seconds)


class Trainer:
    """Trains the network of a stage, and goes on where an earlier run was stopped.

    `step` and `seconds` count over all runs. Only the process of rank 0 writes `<name>.csv` and `<name>.safetensors`
    into the work folder.
    """

    def __init__(
        self,
        stage: Stage,
        optimizers: Sequence[torch.optim.Optimizer],
        schedule: Schedule,
        *,
        ema_decay: float,
        work: Path,
        name: str,
        columns: Sequence[str],
        rank: int = 0,
    ):
        self.stage, self.network = stage, stage.network
        self.optimizers, self.schedule = optimizers, schedule
        self.ema = EMA(self.network, ema_decay)
        self.step, self.seconds = 0, 0.0
        self.state_file = work / f"{name}.safetensors"
        self.log = MetricsLog(work / f"{name}.csv", ("step", "seconds", *columns)) if rank == 0 else None

    def resume(self) -> bool:
        """Takes over the state of an earlier run, and returns whether there was one."""
        state = load_state(self.state_file)
        if state is None:
            return False
        tensors, metadata = state
        unpack_state(self.network, self.ema, self.optimizers, tensors)
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        if self.log is not None:
            self.log.truncate(self.step)
        return True

    def fit(self) -> None:
        """Trains until the schedule is over."""
        started, logged = time.monotonic() - self.seconds, self.seconds
        history: dict[str, list[float]] = defaultdict(list)
        while not self.schedule.is_over(self.step, self.seconds):
            losses = self.stage.losses(self.step)
            self.optimize(losses["total"])
            for name, loss in losses.items():
                if name != "total":
                    history[name].append(loss.item())
            self.seconds = time.monotonic() - started
            if self.schedule.is_log_due(self.step, self.seconds, logged):
                logged = self.seconds
                means = {name: sum(values) / len(values) for name, values in history.items()}
                history.clear()
                self.record(means | self.stage.report(self.ema))

    def optimize(self, loss: torch.Tensor) -> None:
        """Makes one step down the loss."""
        set_lr(self.optimizers, self.schedule.lr(self.step, self.seconds))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.network)
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update(self.step)
        self.step += 1

    def ema_network(self) -> nn.Module:
        """Returns the network with its averaged weights, which replace those that it was trained to."""
        self.network.load_state_dict(self.ema.weights)
        return self.network

    def record(self, row: Mapping[str, float]) -> None:
        """Logs a row and saves the state."""
        if self.log is None:
            return
        self.log.append(step=self.step, seconds=self.seconds, **row)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
        logger.info("%d steps, %.0f s, %s", self.step, self.seconds, shown)
        tensors = pack_state(self.network, self.ema, self.optimizers)
        save_state(self.state_file, tensors, {"step": self.step, "seconds": self.seconds})


def weighted_sum(losses: Losses, weights: object) -> torch.Tensor:
    """Returns the sum of losses, each times the attribute of `weights` that has its name."""
    return sum(getattr(weights, name) * loss for name, loss in losses.items())
