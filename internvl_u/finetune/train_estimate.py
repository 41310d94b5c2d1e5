"""Memory and time of a step of `train`, before anything is loaded; see `estimate` for how they are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..checkpoint import open_part
from ..config import MLLMConfig, mllm_config, mmdit_config
from ..prompt import branch_prompts
from .adapter import add_adapter
from .cache import SampleCache
from .estimate import BatchSize, DrawnSize, Estimate, Networks, TextSize, estimate, networks_to_time, step_seconds
from .examples import Example
from .settings import TrainSettings
from .timing import scaled


def estimate_run(
    settings: TrainSettings, cache: SampleCache, examples: Sequence[Example], device: torch.device | None = None
) -> Estimate:
    """Returns what a step of a run takes: memory with its largest examples, time with those of the usual length.

    No weights are loaded. Time is measured on `device`; None: it is not.

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
    largest = _batch(settings.batch, max(drawn, key=_tokens_of, default=None), max(texts, key=_tokens_of, default=None))
    whole = estimate(networks, largest, settings.optimizer)
    usual = _batch(settings.batch, _middle(drawn), _middle(texts))
    share = sum(map(_tokens_of, (*usual.drawn, *usual.texts))) / sum(map(_tokens_of, (*largest.drawn, *largest.texts)))
    operations = whole.operations * share * settings.accumulate
    if device is None:
        return replace(whole, operations=operations)
    times = step_seconds(networks, usual, device, networks_to_time(networks, whole.total))
    return replace(whole, operations=operations, seconds=scaled(times, settings.accumulate))


def _batch(count: int, drawn: DrawnSize | None, text: TextSize | None) -> BatchSize:
    return BatchSize((drawn,) * count if drawn else (), (text,) * count if text else ())


def _middle(sizes: Sequence[Any]) -> Any:
    return sorted(sizes, key=_tokens_of)[len(sizes) // 2] if sizes else None


def _tokens_of(size: DrawnSize | TextSize) -> int:
    return size.tokens


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
