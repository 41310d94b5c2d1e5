"""Prompts on their way from noise to a picture, each at a step of its own, so that every batch has all noise levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import LATENT_CHANNELS
from ..rope import Grid


class Pool:
    """A batch of prompts of equal sizes on their way; those that arrive make room for others, at new noise.

    `wishes` [B] are their numbers, `index` [B] the step that each is at, `latents` [B, 16, h, w] what is there, and
    `previous` what that was seen as a step before.
    """

    def __init__(self, numbers: Sequence[int], size: Grid, batch: int, evaluations: int, generator: torch.Generator):
        self.numbers, self.size, self.evaluations, self.generator = torch.tensor(numbers), size, evaluations, generator
        self.wishes, self.index, self.left = (torch.zeros(batch, dtype=torch.long) for _ in range(3))
        self.latents, self.previous = (torch.empty(batch, LATENT_CHANNELS, *size) for _ in range(2))
        self._begin(torch.arange(batch))
        self.left = torch.arange(batch) % evaluations + 1  # the first ones end early, so that their steps differ

    def arrange(self, order: Sequence[int]) -> None:
        """Puts the samples in another order."""
        for name in ("wishes", "index", "left", "latents", "previous"):
            setattr(self, name, getattr(self, name)[list(order)])

    def move(self, latents: torch.Tensor, clean: torch.Tensor) -> None:
        """Brings all one step on, to `latents` [B, 16, h, w], seen as `clean` before."""
        self.latents, self.previous = latents, clean
        self.index, self.left = self.index + 1, self.left - 1
        self._begin((self.left == 0).nonzero().flatten())

    def state(self) -> dict[str, torch.Tensor]:
        """Returns all that is remembered."""
        return {name: getattr(self, name) for name in ("wishes", "index", "left", "latents", "previous")}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def _begin(self, which: torch.Tensor) -> None:
        """Starts with other prompts in some places."""
        count = len(which)
        chosen = torch.randint(len(self.numbers), (count,), generator=self.generator)
        noise = torch.randn(count, LATENT_CHANNELS, *self.size, generator=self.generator)
        self.wishes[which], self.latents[which], self.previous[which] = self.numbers[chosen], noise, noise
        self.index[which], self.left[which] = 0, self.evaluations
