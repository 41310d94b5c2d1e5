"""Memory and time of a training step, before anything is loaded: the run's own losses, counted on the meta device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint import open_part
from ..config import MLLMConfig, MMDiTConfig, mllm_config, mmdit_config
from ..mllm import MLLM
from ..mmdit import MMDiT
from ..prompt import branch_prompts
from ..rope import Grid, Span
from .adapter import add_adapter
from .counting import count
from .objective import DrawnBatch, FlowObjective, NoisyBatch, TokenObjective

if TYPE_CHECKING:
    from .cache import SampleCache
    from .examples import Example
    from .settings import TrainSettings

OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256}
"""What an optimizer keeps of each number that learns."""
AddAdapters = Callable[[nn.Module, str], object]
"""Puts adapters into a network, on the meta device; the part is named. What requires gradients after it learns."""


@dataclass(frozen=True)
class Estimate:
    """What a training step takes: `memory` in bytes by kind; `seconds_a_step` is None where nothing was measured.

    "activations" are kept for the backward pass, "working" is alive beside them at the worst moment.
    """

    memory: dict[str, int] = field(default_factory=dict)
    operations: float = 0.0
    seconds_a_step: float | None = None

    @property
    def total(self) -> int:
        """All memory in bytes, without what libraries and a GPU's driver take for themselves."""
        return sum(self.memory.values())

    def describe(self, steps: int = 0) -> str:
        """Returns a sentence on memory and time, also of all `steps`."""
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in self.memory.items() if size)
        text = f"about {_bytes(self.total)} of memory ({parts}), {self.operations / 1e12:.3g} TFLOP a step"
        if self.seconds_a_step is None:
            return text
        whole = f", {_duration(self.seconds_a_step * steps)} for {steps} steps" if steps else ""
        return f"{text}, about {self.seconds_a_step:.2g} s a step{whole}"


@dataclass(frozen=True)
class DrawnSize:
    """A picture to draw: (rows, columns) of its latent and of its references', tokens of the context it is drawn from.

    `prompts` are the tokens of all that the language model reads of it, where it learns: the whole prompt of each
    branch, first that of the context.
    """

    shape: tuple[Grid, ...]
    context_tokens: int
    prompts: tuple[int, ...] = ()


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


def estimate(
    networks: Networks, batch: BatchSize, optimizer: str = "adamw", arithmetic: float | None = None
) -> Estimate:
    """Returns what a step of one batch takes. `arithmetic`: operations a second, as by `measured_arithmetic`.

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
    return Estimate(memory, counted.operations, counted.operations / arithmetic if arithmetic else None)


def measured_arithmetic(networks: Networks, batch: BatchSize, device: torch.device, times: int = 3) -> float:
    """Returns how many operations a second a device makes in a step: two layers of each network are run."""
    small = networks.small()
    operations = estimate(small, batch).operations
    step, seconds = LearningStep(small, device), math.inf
    for _ in range(times):
        start = time.perf_counter()
        loss = step.loss(batch)
        loss.backward()
        loss.item()  # waits for a GPU
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - start)
    return operations / seconds


def estimate_run(
    settings: TrainSettings, cache: SampleCache, examples: Sequence[Example], device: torch.device | None = None
) -> Estimate:
    """Returns what a step of a run takes: memory with its largest examples, time with those of the usual length.

    No weights are loaded. Time is measured on `device`, with two layers of each network; None: it is not.

    Raises:
        ValueError: an example cannot be learned from.
    """
    files, dtype = cache.pipeline.files, getattr(torch, settings.dtype)
    part = open_part(files.language, "vlm")
    language = mllm_config(part.shapes, part.config, part.source)
    part = open_part(files.transformer, "generation_decoder")
    transformer = mmdit_config(part.shapes, part.config, part.source)
    learns = "language" in settings.parts
    drawn = [_drawn_size(cache, one, language, learns) for one in examples if one.image is not None]
    texts = [_text_size(cache, one, language) for one in examples if learns and (one.answer is not None or one.thought)]

    def add(network: nn.Module, part: str) -> None:
        if part in settings.parts:
            add_adapter(network, part, settings.adapter)

    networks = Networks(
        transformer if drawn else None,
        language if learns else None,
        dtype,
        settings.checkpointing,
        add,
        cache.pipeline.encoder.layers,
    )
    largest = _batch(settings.batch, max(drawn, key=_tokens, default=None), max(texts, key=_tokens, default=None))
    whole = estimate(networks, largest, settings.optimizer)
    usual = _batch(settings.batch, _middle(drawn), _middle(texts))
    share = sum(map(_tokens, (*usual.drawn, *usual.texts))) / sum(map(_tokens, (*largest.drawn, *largest.texts)))
    operations = whole.operations * share * settings.accumulate
    seconds = operations / measured_arithmetic(networks, usual, device) if device is not None else None
    return replace(whole, operations=operations, seconds_a_step=seconds)


def _batch(count: int, drawn: DrawnSize | None, text: TextSize | None) -> BatchSize:
    return BatchSize((drawn,) * count if drawn else (), (text,) * count if text else ())


def _middle(sizes: Sequence[Any]) -> Any:
    return sorted(sizes, key=_tokens)[len(sizes) // 2] if sizes else None


def _tokens(size: DrawnSize | TextSize) -> int:
    if isinstance(size, TextSize):
        return size.tokens
    return sum(rows * columns // 4 for rows, columns in size.shape) + size.context_tokens + sum(size.prompts)


def _drawn_size(cache: SampleCache, example: Example, language: MLLMConfig, learns: bool) -> DrawnSize:
    request, tokenizer = cache.request_with(example), cache.pipeline.encoder.tokenizer
    given: dict[str, Any] = {"images": len(request.images), "grid": language.vision.grid}
    prompts = branch_prompts(tokenizer, request.prompt, thought=tokenizer.encode_thought(request.thought), **given)
    read = [prompts.conditional, *([prompts.partial] if request.images else []), prompts.unconditional]
    read.sort(key=lambda one: one.user_start - len(one.ids))
    whole = tuple(len(one.ids) for one in read) if learns else ()
    return DrawnSize(cache.shape(example), len(read[0].ids) - read[0].user_start, whole)


def _text_size(cache: SampleCache, example: Example, language: MLLMConfig) -> TextSize:
    sample = cache.text_sample(example, language.vision.grid)
    return TextSize(len(sample.prompt.ids), len(sample.prompt.ids) - sample.target_start)


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
