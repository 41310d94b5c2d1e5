"""Memory and time of a step of `distill`, before anything is loaded; see `estimate` for how they are counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from ..checkpoint import open_part
from ..config import mllm_config, mmdit_config
from ..mllm import MLLM
from ..prompt import TokenizedPrompt, branch_prompts
from ..rope import Grid
from .adapter import add_adapter
from .counting import count_forward
from .distill_settings import DistillSettings, adapter_settings
from .estimate import (
    BatchSize,
    DrawnSize,
    Estimate,
    LearningStep,
    Networks,
    estimate,
    forward_seconds,
    networks_to_time,
    step_seconds,
)
from .prompts import PromptSource
from .timing import added, scaled


class PathSize(NamedTuple):
    """What is computed of a batch on its way: by the student, and for each branch of the teacher's guidance."""

    student: BatchSize
    teacher: tuple[BatchSize, ...]

    @property
    def tokens(self) -> int:
        """What the teacher reads and draws, which is most of the work."""
        return sum(one.tokens for branch in self.teacher for one in branch.drawn)


def estimate_distillation(
    settings: DistillSettings, source: PromptSource, device: torch.device | None = None
) -> Estimate:
    """Returns what a step takes: memory with the longest of the prompts, time with those of the usual length.

    The language model is counted too, which makes contexts beside the transformer when they are first asked for. No
    weights are loaded. Time is measured on `device`; None: it is not.
    """
    files, dtype = source.pipeline.files, getattr(torch, settings.dtype)
    part = open_part(files.language, "vlm")
    language = mllm_config(part.shapes, part.config, part.source)
    part = open_part(files.transformer, "generation_decoder")
    transformer = mmdit_config(part.shapes, part.config, part.source)
    layers = adapter_settings(settings, transformer.layers)

    def add(network: nn.Module, part: str) -> None:
        add_adapter(network, part, layers)

    teacher = Networks(transformer, None, dtype, settings.checkpointing)
    networks = replace(teacher, add_adapters=add)
    sizes = sorted(_sizes(source, language.vision.grid, settings.batch), key=lambda one: one.tokens)
    largest, usual = sizes[-1], sizes[len(sizes) // 2]
    memory = estimate(networks, largest.student).memory
    meta = LearningStep(teacher, torch.device("meta"))
    most = max(count_forward(meta, lambda one=one: meta.loss(one)).working for one in largest.teacher)
    memory["working"] = max(memory["working"], most - memory["activations"])
    memory["language model"] = sum(weight.nbytes for weight in MLLM(language, dtype=dtype, device="meta").parameters())
    guided = sum(count_forward(meta, lambda one=one: meta.loss(one)).operations for one in usual.teacher)
    operations = estimate(networks, usual.student).operations + settings.substeps * guided
    found = Estimate(memory, operations)
    if device is None:
        return found
    timed, guiding = (networks_to_time(one, found.total) for one in (networks, teacher))
    guided = added(*(forward_seconds(teacher, one, device, guiding) for one in usual.teacher))
    times = added(step_seconds(networks, usual.student, device, timed), scaled(guided, settings.substeps))
    return replace(found, seconds=times)


def _sizes(source: PromptSource, grid: int, batch: int) -> Iterator[PathSize]:
    """Yields what is computed of a batch of each prompt, without the pictures being read."""
    tokenizer = source.pipeline.encoder.tokenizer
    for shapes, numbers in source.buckets.items():
        for wish in (source.wishes[number] for number in numbers):
            thought, images = tokenizer.encode_thought(wish.thought), len(wish.references)
            prompts = branch_prompts(tokenizer, wish.text, images=images, grid=grid, thought=thought)
            student = _batch(shapes, prompts.conditional, batch)
            teacher = [student, _batch(shapes[:1], prompts.unconditional, batch)]
            if images:
                teacher.append(_batch(shapes, prompts.partial, batch))
            yield PathSize(student, tuple(teacher))


def _batch(shapes: tuple[Grid, ...], prompt: TokenizedPrompt, count: int) -> BatchSize:
    return BatchSize((DrawnSize(shapes, len(prompt.ids) - prompt.user_start),) * count)
