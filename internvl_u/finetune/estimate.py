"""Memory and time of a training step, before anything is loaded: the run's own losses, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import MLLMConfig, MMDiTConfig
from ..mllm import MLLM
from ..mmdit import MMDiT
from ..rope import Grid, Span
from .counting import count, count_forward
from .objective import DrawnBatch, FlowObjective, NoisyBatch, TokenObjective
from .timing import Range, duration, scaled, step_time, time_of

if TYPE_CHECKING:
    pass

WHOLE = 2 << 30
"""Bytes of memory up to which a step is timed with all layers."""
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256}
"""What an optimizer keeps of each number that learns."""
AddAdapters = Callable[[nn.Module, str], object]
"""Puts adapters into a network, on the meta device; the part is named. What requires gradients after it learns."""


@dataclass(frozen=True)
class Estimate:
    """What a training step takes: `memory` in bytes by kind; `seconds` is None where nothing was timed.

    "activations" are kept for the backward pass, "working" is alive beside them at the worst moment.
    """

    memory: dict[str, int] = field(default_factory=dict)
    operations: float = 0.0
    seconds: Range | None = None

    @property
    def total(self) -> int:
        """All memory in bytes, without what libraries and a GPU's driver take for themselves."""
        return sum(self.memory.values())

    def describe(self, steps: int = 0) -> str:
        """Returns a sentence on memory and time, also of all `steps`."""
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in self.memory.items() if size)
        text = f"about {_bytes(self.total)} of memory ({parts}), {self.operations / 1e12:.3g} TFLOP a step"
        if self.seconds is None:
            return text
        whole = f", {duration(scaled(self.seconds, steps))} for {steps} steps" if steps else ""
        return f"{text}, {step_time(self.seconds)} a step as timed just now{whole}"


@dataclass(frozen=True)
class DrawnSize:
    """A picture to draw: (rows, columns) of its latent and of its references', tokens of the context it is drawn from.

    `prompts` are the tokens of all that the language model reads of it, where it learns: the whole prompt of each
    branch, first that of the context.
    """

    shape: tuple[Grid, ...]
    context_tokens: int
    prompts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """All tokens: of latents, contexts and prompts."""
        image = sum(rows * columns // 4 for rows, columns in self.shape)
        return image + self.context_tokens + sum(self.prompts)


@dataclass(frozen=True)
class TextSize:
    """A text in tokens, of which the last `targets` are learned."""

    tokens: int
    targets: int


@dataclass(frozen=True)
class BatchSize:
    """The pictures, of one shape, and the texts of a batch."""

    drawn: tuple[DrawnSize, ...] = ()
    texts: tuple[TextSize, ...] = ()


@dataclass(frozen=True)
class Networks:
    """The networks of a run, None where it does without, and how they learn.

    `layers` are those of the language model that the transformer is handed. `add_adapters` None: all weights learn.
    """

    transformer: MMDiTConfig | None
    language: MLLMConfig | None
    dtype: torch.dtype
    checkpointing: bool = False
    add_adapters: AddAdapters | None = None
    layers: tuple[int, ...] = (-1, -2)

    def small(self) -> Networks:
        """Returns the same with two layers of each network, and few tokens known."""
        transformer, language = self.transformer, self.language
        if transformer is not None:
            transformer = replace(transformer, layers=2)
        if language is not None:
            qwen3 = replace(language.language, num_hidden_layers=2, vocab_size=1024)
            language = replace(language, vision=replace(language.vision, layers=1), language=qwen3)
        return replace(self, transformer=transformer, language=language)


class LearningStep(nn.Module):
    """The networks of a run with weights that mean nothing, and the loss of a batch as the run has it."""

    def __init__(self, networks: Networks, device: torch.device):
        super().__init__()
        self.networks, self.device = networks, device
        factory: dict[str, Any] = {"dtype": networks.dtype, "device": device}
        how: dict[str, Any] = {"dtype": networks.dtype, "checkpointing": networks.checkpointing}
        self.flow = self.tokens = None
        with device:
            if networks.transformer is not None:
                self.flow = FlowObjective(MMDiT(networks.transformer, **factory), **how)
            if networks.language is not None:
                self.tokens = TokenObjective(MLLM(networks.language, **factory), **how)
            if networks.add_adapters is not None:
                self.requires_grad_(False)
                for objective, part in ((self.flow, "transformer"), (self.tokens, "language")):
                    if objective is not None:
                        networks.add_adapters(objective.model, part)

    def loss(self, batch: BatchSize) -> torch.Tensor:
        """Returns the loss of a batch of random numbers, a scalar."""
        total = torch.zeros((), device=self.device)
        if batch.drawn:
            total = total + self._drawn(batch.drawn).mean()
        for text in batch.texts:
            assert self.tokens is not None
            total = total + self.tokens(self._embedded(text.tokens), [0] * text.targets) / len(batch.texts)
        return total

    def _drawn(self, drawn: Sequence[DrawnSize]) -> torch.Tensor:
        assert self.flow is not None
        channels = self.flow.model.config.channels
        shape = drawn[0].shape
        target, latents, *references = (torch.randn(len(drawn), channels, *grid) for grid in (shape[0], *shape))
        read = [self._read(one) for one in drawn]  # of all, before one branch of each is chosen
        contexts = [(of[0][-one.context_tokens :], (Span(one.context_tokens),)) for one, of in zip(drawn, read)]
        del read
        noisy = NoisyBatch(latents, torch.zeros(len(drawn)), target)
        return self.flow(DrawnBatch(latents, tuple(references), contexts), noisy)

    def _read(self, one: DrawnSize) -> list[torch.Tensor]:
        """Returns the contexts of a picture's branches, at least one; not cut to the user's turn."""
        if self.tokens is None or not one.prompts:
            assert self.flow is not None
            width = self.flow.model.config.context_width
            return [torch.randn(one.context_tokens, width, dtype=self.networks.dtype)]
        states = [self.tokens.hidden(self._embedded(tokens), self.networks.layers)[1] for tokens in one.prompts]
        return [found[0] for found in states if found is not None]

    def _embedded(self, tokens: int) -> torch.Tensor:
        assert self.networks.language is not None
        width = self.networks.language.language.hidden_size
        return torch.randn(1, tokens, width, device=self.device, dtype=self.networks.dtype)


def estimate(networks: Networks, batch: BatchSize, optimizer: str = "adamw") -> Estimate:
    """Returns what a step of one batch takes; the time is not measured.

    Raises:
        ValueError: the optimizer is unknown.
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(f"optimizer {optimizer!r} found, one of {', '.join(OPTIMIZER_BYTES)} expected")
    step = LearningStep(networks, torch.device("meta"))
    weights = list(step.parameters())
    learning = [weight for weight in weights if weight.requires_grad]
    size = sum(weight.nbytes for weight in learning)
    counted = count(step, lambda: step.loss(batch))
    memory = {
        "weights": sum(weight.nbytes for weight in weights) - size,
        "adapters" if networks.add_adapters is not None else "learning weights": size,
        "gradients": size,
        "optimizer": round(OPTIMIZER_BYTES[optimizer] * sum(weight.numel() for weight in learning)),
        "activations": counted.activations,
        "working": counted.working,
    }
    return Estimate(memory, counted.operations)


def networks_to_time(networks: Networks, memory: int) -> Networks:
    """Returns what is timed in the place of networks whose step takes so many bytes: the same, if that is little.

    Of larger ones two layers each are, whose times grow as the operations do.
    """
    return networks if memory <= WHOLE else networks.small()


def step_seconds(networks: Networks, batch: BatchSize, device: torch.device, timed: Networks) -> Range:
    """Returns the seconds of the fastest and of the slowest of some warm steps, the optimizer's part with them.

    The weights mean nothing. `timed` are the networks that are run; see `networks_to_time`.
    """
    step = LearningStep(timed, device)
    optimizer = torch.optim.AdamW([weight for weight in step.parameters() if weight.requires_grad])

    def learn() -> None:
        step.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.random.fork_rng(devices=[]):
        times = time_of(learn, device)
    if timed is networks:
        return times
    return scaled(times, estimate(networks, batch).operations / estimate(timed, batch).operations)


def forward_seconds(networks: Networks, batch: BatchSize, device: torch.device, timed: Networks) -> Range:
    """Returns the same of a forward pass of which nothing is learned."""
    step = LearningStep(timed, device)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        times = time_of(lambda: step.loss(batch), device)
    if timed is networks:
        return times
    large, small = (LearningStep(one, torch.device("meta")) for one in (networks, timed))
    return scaled(times, _forward_operations(large, batch) / _forward_operations(small, batch))


def _forward_operations(step: LearningStep, batch: BatchSize) -> float:
    return count_forward(step, lambda: step.loss(batch)).operations


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
