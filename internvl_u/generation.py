"""Text from the language model: answers, and thoughts before drawing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from .beams import beam_search
from .defaults import BEAMS, LONGEST_CONTEXT, THOUGHT_TOKENS
from .encoder import Encoder, ReadPrompt, check_length
from .linear import fitting_threads
from .mllm import MLLM
from .numbers import check_real, check_whole
from .prefix import PrefixCache
from .prompt import TokenizedPrompt
from .qwen3 import KeyValueCache, Qwen3
from .qwen3_graph import GraphedStep
from .qwen3_step import TokenStep

SMALLEST_TOP_P = 1e-9
SMALLEST_PENALTY = 1e-3
OnToken = Callable[[list[int]], None]


@dataclass(frozen=True)
class GenerationConfig:
    """How text is generated. `temperature` 0 always takes the likeliest token; above, it samples with `seed`.

    Samples are taken of the `top_k` likeliest tokens (0: of all), of those that are at least `min_p` times as likely as
    the likeliest, and of the likeliest that add up to `top_p`. `repetition_penalty` above 1 makes tokens less likely
    that are written already, by a factor, and `presence_penalty` above 0 by a difference; the prompt does not count.
    `cuda_graphs` has tokens recorded on a CUDA device; see `qwen3_graph`.
    """

    max_new_tokens: int = THOUGHT_TOKENS
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    cuda_graphs: bool = False

    def __post_init__(self):
        check_whole("max_new_tokens", self.max_new_tokens, 1, LONGEST_CONTEXT)
        check_whole("beams", self.beams, 1, BEAMS)
        check_whole("seed", self.seed, -(2**63), 2**64 - 1)
        check_real("temperature", self.temperature, 0.0)
        check_real("top_p", self.top_p, SMALLEST_TOP_P, 1.0)
        check_whole("top_k", self.top_k, 0, LONGEST_CONTEXT)
        check_real("min_p", self.min_p, 0.0, 1.0)
        check_real("repetition_penalty", self.repetition_penalty, SMALLEST_PENALTY)
        check_real("presence_penalty", self.presence_penalty)
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(f"beams {self.beams} and temperature {self.temperature} found, one of the two expected")
        if self.beams > 1 and self.penalises:
            raise ValueError(f"beams {self.beams} and a penalty found, one of the two expected")

    @property
    def penalises(self) -> bool:
        """Whether what is written already counts."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0


def generate(
    encoder: Encoder,
    model: MLLM,
    prompt: TokenizedPrompt,
    features: Sequence[torch.Tensor] = (),
    config: GenerationConfig | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_token: OnToken | None = None,
    kept: PrefixCache | None = None,
) -> list[int]:
    """Returns the ids that the model writes after `prompt`, with the one that ended it, if one did.

    `features` are those of the prompt's images. `on_token(ids)` is called with all ids so far after each one (with
    beams those of the likeliest open text); what it raises ends the generation. What is in `kept` is not read again.
    """
    config = config or GenerationConfig()
    room = check_length(model, prompt)
    config = dataclasses.replace(config, max_new_tokens=max(min(config.max_new_tokens, room), 1))
    read = encoder.read(model, prompt, features, device=device, dtype=dtype, more=config.max_new_tokens, kept=kept)
    strategy = search_beams if config.beams > 1 else sample_tokens
    with fitting_threads(model.language_model.typical_matrix):
        return strategy(model.language_model, read, config, encoder.tokenizer.stops, on_token or (lambda ids: None))


def ended(written: Sequence[int], stops: Sequence[int]) -> bool:
    """Returns whether the model ended a text itself; if not, the limit of new tokens or of the context did."""
    return any(token in stops for token in written)


def cut_warning(tokens: int, limit: str = "max_new_tokens") -> str:
    """Returns what a user should know of a text that a limit has ended, and what the limit is called."""
    return f"the text was cut after {tokens} tokens: raise {limit} for all of it"


def sample_tokens(
    language: Qwen3, read: ReadPrompt, config: GenerationConfig, stops: Sequence[int], on_token: OnToken
) -> list[int]:
    """Returns the ids that are written after a prompt, one token after the other."""
    generator = torch.Generator().manual_seed(config.seed)
    step = step_of(language, read.cache, config.cuda_graphs)
    logits, ids = language.logits(read.last)[0], []
    while True:
        ids.append(sample_token(logits, config, generator, ids))
        on_token(ids.copy())
        if ids[-1] in stops or len(ids) == config.max_new_tokens:
            return ids
        logits = step(embed_written(language, ids[-1:], read.last)[0])


def step_of(language: Qwen3, cache: KeyValueCache, graphs: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the fastest way from an embedding [width] to the logits [vocabulary] that the weights allow."""
    step = TokenStep.of(language, cache)
    if step is None:
        return functools.partial(_step, language, cache)
    return GraphedStep(step) if graphs and cache.keys.device.type == "cuda" else step


def embed_written(language: Qwen3, ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Returns the embeddings [tokens, width] of ids that were written: a special token has none of its own there."""
    return language.model.embed_tokens(torch.tensor(ids, device=like.device)).to(like.dtype)


def _step(language: Qwen3, cache: KeyValueCache, embedded: torch.Tensor) -> torch.Tensor:
    """Returns the logits [vocabulary] after an embedding [width], whatever the weights are."""
    return language.logits(language(embedded[None, None], cache)[0])[0]


def sample_token(
    logits: torch.Tensor, config: GenerationConfig, generator: torch.Generator, written: Sequence[int] = ()
) -> int:
    """Returns a token of logits [vocabulary]: the likeliest, or at temperature above 0 one by chance."""
    if written and config.penalises:
        logits = penalised(logits, config, written)
    if config.temperature == 0:
        return int(logits.argmax())
    odds, tokens = distribution(logits, config)
    # Chance comes from the CPU, so that a seed does not depend on the device and no global generator is touched.
    sums = numpy.cumsum(odds.numpy(), dtype=numpy.float64)
    wanted = float(torch.rand(1, generator=generator)) * sums[-1]
    place = min(int(numpy.searchsorted(sums, wanted, side="right")), len(sums) - 1)
    return place if tokens is None else int(tokens[place])


def distribution(logits: torch.Tensor, config: GenerationConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the probabilities [n], on the CPU, that a token is drawn by, and their tokens: None for all in order.

    Limits are applied in the order of transformers' processors: temperature, `top_k`, `min_p`, `top_p`. With limits
    the likeliest comes first, and of equally likely tokens (which bf16 has many of) that of the smaller id.
    """
    scores = logits.float() / config.temperature
    odds = torch.softmax(scores, dim=-1)
    count = len(odds)
    if not config.top_k and not config.min_p and config.top_p == 1:
        return odds.cpu(), None
    lowest = odds.max() * config.min_p
    if 0 < config.top_k < count:
        lowest = torch.maximum(lowest, odds.topk(config.top_k).values[-1])
    odds = torch.where(odds >= lowest, odds, 0.0)
    odds = odds / odds.sum()
    # All that are less likely than this have less than 1 - top_p together: none of the likeliest is among them.
    tokens = (odds >= max((1 - config.top_p) / count, SMALLEST_TOP_P / count)).nonzero()[:, 0]
    odds, order = odds[tokens].cpu().sort(descending=True, stable=True)
    return odds.masked_fill(odds.cumsum(0) - odds >= config.top_p, 0.0), tokens.cpu()[order]


def penalised(logits: torch.Tensor, config: GenerationConfig, written: Sequence[int]) -> torch.Tensor:
    """Returns logits, fp32, with those of the written tokens made smaller (arXiv 1909.05858; OpenAI's presence)."""
    ids = torch.tensor(sorted(set(written)), device=logits.device)
    scores = logits.float()
    taken = scores[ids]
    penalty = float(config.repetition_penalty)
    taken = torch.where(taken < 0, taken * penalty, taken / penalty) - config.presence_penalty
    return scores.index_copy(0, ids, taken)


def search_beams(
    language: Qwen3, read: ReadPrompt, config: GenerationConfig, stops: Sequence[int], on_token: OnToken
) -> list[int]:
    """Returns the ids of the best of several texts that are written side by side; see `beams.beam_search`."""
    cache = read.cache.repeated(config.beams)

    def advance(order: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
        nonlocal cache
        if list(order) != list(range(len(order))):
            cache = cache.reordered(torch.tensor(order, device=read.last.device))
        return language.logits(language(embed_written(language, ids, read.last)[:, None], cache)[0])

    limits: dict[str, Any] = {"beams": config.beams, "max_new_tokens": config.max_new_tokens, "stops": stops}
    return beam_search(language.logits(read.last)[0], advance, on_token=on_token, **limits)
