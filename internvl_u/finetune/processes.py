"""The processes that share a run, through accelerate: one each GPU, or several on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn


class Processes:
    """This process among those of a run, and the device that it computes on."""

    def __init__(self, device: str):
        """`device` is torch's name of one; "cuda" is the GPU of this process."""
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # The last block has no use for its text's output, nor a batch without texts for the language model.
        some_unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[some_unused])
        self.device = self.accelerator.device if device in ("cpu", "cuda") else torch.device(device)
        self.main, self.count = self.accelerator.is_main_process, self.accelerator.num_processes
        self.rank = self.accelerator.process_index

    def saying(self, report: Callable[[str], object]) -> Callable[[str], object]:
        """Returns what reports in the main process alone: one of several is enough."""
        return report if self.main else _say_nothing

    def average_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Gives all processes the mean of their gradients; of a weight without one it counts as 0."""
        if self.count == 1:
            return
        for weight in weights:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = cast(torch.Tensor, self.accelerator.reduce(gradient, "mean"))

    def gather(self, value: Any) -> list[Any]:
        """Returns what all processes give, in the order of their ranks."""
        from accelerate.utils import gather_object

        return [value] if self.count == 1 else gather_object([value])


def _say_nothing(line: str) -> None:
    pass
