"""Texts written side by side: one step of the language model gives each of them its next token.

The weights are read once for all, which is most of what a token costs. Prompts need not be equally long: each is read
alone, and those that are shorter stand behind places that they do not see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from .encoder import Encoder, ReadPrompt, check_length
from .generation import GenerationConfig, embed_written, sample_token, step_of
from .linear import fitting_threads
from .mllm import MLLM
from .prefix import PrefixCache
from .prompt import TokenizedPrompt
from .qwen3 import KeyValueCache, Qwen3

OnStep = Callable[[], object]


def generate_batch(
    encoder: Encoder,
    model: MLLM,
    prompts: Sequence[tuple[TokenizedPrompt, Sequence[torch.Tensor]]],
    config: GenerationConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_step: OnStep = lambda: None,
    kept: PrefixCache | None = None,
) -> list[list[int]]:
    """Returns the ids that the model writes after each prompt, as `generation.generate` does for one.

    A prompt comes with the features of its images. `on_step()` is called after each token of all texts; what it raises
    ends the generation. Each text is sampled with the config's seed, whatever stands beside it.

    Raises:
        ValueError: a prompt is too long, or the config wants beams.
    """
    if config.beams > 1:
        raise ValueError(f"beams {config.beams} found, 1 expected: texts of a search are written side by side already")
    limits = [max(min(config.max_new_tokens, check_length(model, prompt)), 1) for prompt, _ in prompts]
    where = {"device": device, "dtype": dtype}
    reads = [encoder.read(model, prompt, seen, kept=kept, **where) for prompt, seen in prompts]
    texts = [_Text(limit, torch.Generator().manual_seed(config.seed)) for limit in limits]
    with fitting_threads(model.language_model.typical_matrix, len(prompts)):
        _write(model.language_model, reads, texts, config, encoder.tokenizer.stops, on_step)
    return [text.ids for text in texts]


@dataclasses.dataclass
class _Text:
    """A text that is being written, and the most tokens that it may have."""

    limit: int
    generator: torch.Generator
    ids: list[int] = dataclasses.field(default_factory=list)

    def is_open(self, stops: Sequence[int]) -> bool:
        return self.ids[-1] not in stops and len(self.ids) < self.limit


def _write(
    language: Qwen3,
    reads: list[ReadPrompt],
    texts: list[_Text],
    config: GenerationConfig,
    stops: Sequence[int],
    on_step: OnStep,
) -> None:
    last = torch.cat([read.last for read in reads])
    logits, step = language.logits(last), None
    rows = _Rows(language, [read.cache for read in reads], max(text.limit for text in texts))
    reads.clear()  # their caches are not needed beside the joined one
    while True:
        for text, token in zip(texts, _sampled(logits, config, texts), strict=True):
            text.ids.append(token)
        on_step()
        going = [row for row, text in enumerate(texts) if text.is_open(stops)]
        if not going:
            return
        if len(going) < len(texts):
            rows.keep(going)
            texts = [texts[row] for row in going]
        embedded = embed_written(language, [text.ids[-1] for text in texts], last)
        if len(texts) == 1 and step is None:
            step = step_of(language, rows.alone(texts[0].limit - len(texts[0].ids)), config.cuda_graphs)
        logits = rows.step(embedded) if step is None else step(embedded[0])[None]


def _sampled(logits: torch.Tensor, config: GenerationConfig, texts: Sequence[_Text]) -> list[int]:
    if config.temperature == 0 and not config.penalises:
        return logits.argmax(-1).tolist()
    return [sample_token(row, config, text.generator, text.ids) for row, text in zip(logits, texts, strict=True)]


class _Rows:
    """The keys and values of several texts in one cache, and where in it each begins."""

    def __init__(self, language: Qwen3, caches: Sequence[KeyValueCache], more: int):
        self.language = language
        self.cache = KeyValueCache.joined(caches, language.config, more)
        self._begin([self.cache.length - cache.length for cache in caches])

    def keep(self, rows: Sequence[int]) -> None:
        """Lets go of all other rows."""
        self.cache = self.cache.reordered(torch.tensor(rows, device=self.cache.keys.device))
        self._begin([self._starts[row] for row in rows])

    def step(self, embedded: torch.Tensor) -> torch.Tensor:
        """Returns the logits [N, vocabulary] after the next token's embedding [N, D] of each row."""
        mask = positions = None
        if self._seen is not None:
            mask, positions = self._seen[..., : self.cache.length + 1], self.cache.length - self._places
        hidden, _ = self.language(embedded[:, None], self.cache, mask=mask, positions=positions)
        return self.language.logits(hidden)

    def alone(self, more: int) -> KeyValueCache:
        """Returns a cache of the first row alone, with room for `more` tokens."""
        start, end = self._starts[0], self.cache.length
        like = self.cache.keys
        cache = self.language.new_cache(end - start + more, device=like.device, dtype=like.dtype)
        cache.extend(self.cache.keys[:, :1, :, start:end], self.cache.values[:, :1, :, start:end])
        return cache

    def _begin(self, starts: list[int]) -> None:
        self._starts, self._seen = starts, None
        if any(starts):
            device = self.cache.keys.device
            self._places = torch.tensor(starts, device=device)[:, None]
            self._seen = (torch.arange(self.cache.capacity, device=device) >= self._places)[:, None, None]
