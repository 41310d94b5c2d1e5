"""Samples whose contexts are not cached, since the language model that makes them learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..prompt import BranchPrompts, TokenizedPrompt
from .stored import Branch


@dataclasses.dataclass(frozen=True)
class LiveSample:
    """A `Sample` whose contexts are computed when they are asked for, through the language model that learns."""

    latent: torch.Tensor
    references: tuple[torch.Tensor, ...]
    prompts: BranchPrompts
    context: Callable[[TokenizedPrompt], Branch]

    @property
    def conditional(self) -> Branch:
        """What is drawn from."""
        return self.context(self.prompts.conditional)

    @property
    def partial(self) -> Branch:
        """The same without the words."""
        return self.context(self.prompts.partial)

    @property
    def unconditional(self) -> Branch:
        """The empty prompt."""
        return self.context(self.prompts.unconditional)
