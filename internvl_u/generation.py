"""Text from the language model: answers, and thoughts before drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from .defaults import BEAMS, LONGEST_CONTEXT, THOUGHT_TOKENS
from .encoder import Encoder, check_length
from .mllm import MLLM, cache_name
from .numbers import check_real, check_whole
from .prompt import TokenizedPrompt

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

SMALLEST_TOP_P = 1e-9
SMALLEST_PENALTY = 1e-3
OnToken = Callable[[list[int]], None]


@dataclass(frozen=True)
class GenerationConfig:
    """How text is generated. `temperature` 0 always takes the likeliest token; above, it samples with `seed`.

    Samples are taken of the `top_k` likeliest tokens (0: of all), of those that are at least `min_p` times as likely as
    the likeliest, and of the likeliest that add up to `top_p`. `repetition_penalty` above 1 makes tokens less likely
    that are written already, by a factor, and `presence_penalty` above 0 by a difference; the prompt does not count.
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
) -> list[int]:
    """Returns the ids that the model writes after `prompt`, with the one that ended it, if one did.

    `features` are those of the prompt's images. `on_token(ids)` is called with all ids so far after each one (with
    beams those of the first beam); what it raises ends the generation.
    """
    config = config or GenerationConfig()
    room = check_length(model, prompt)
    config = dataclasses.replace(config, max_new_tokens=max(min(config.max_new_tokens, room), 1))
    embedded = encoder.embed(model, prompt, features, device=device, dtype=dtype)
    strategy = beam_search if config.beams > 1 else sample_tokens
    return strategy(model.language_model, embedded, config, encoder.tokenizer.stops, on_token or (lambda ids: None))


def ended(written: Sequence[int], stops: Sequence[int]) -> bool:
    """Returns whether the model ended a text itself; if not, the limit of new tokens or of the context did."""
    return any(token in stops for token in written)


def cut_warning(tokens: int, limit: str = "max_new_tokens") -> str:
    """Returns what a user should know of a text that a limit has ended, and what the limit is called."""
    return f"the text was cut after {tokens} tokens: raise {limit} for all of it"


def sample_tokens(
    language: Qwen3ForCausalLM,
    embedded: torch.Tensor,
    config: GenerationConfig,
    stops: Sequence[int],
    on_token: OnToken,
) -> list[int]:
    """Returns one token after the other. What transformers' generate does besides costs more than the choice itself."""
    generator = torch.Generator().manual_seed(config.seed)
    cache = cache_name(language)
    given, past, ids = {"inputs_embeds": embedded}, None, []
    while True:
        output = language.model(**given, use_cache=True, **{cache: past})
        past = output[cache]
        logits = language.lm_head(output.last_hidden_state[:, -1])
        ids.append(sample_token(logits[0], config, generator, ids))
        on_token(ids.copy())
        if ids[-1] in stops or len(ids) == config.max_new_tokens:
            return ids
        given = {"input_ids": torch.tensor([ids[-1:]], device=embedded.device)}
        given["position_ids"] = torch.tensor([[embedded.shape[1] + len(ids) - 1]], device=embedded.device)


def sample_token(
    logits: torch.Tensor, config: GenerationConfig, generator: torch.Generator, written: Sequence[int] = ()
) -> int:
    """Returns a token of logits [vocabulary]: the likeliest, or at temperature above 0 one by chance."""
    if written and config.penalises:
        logits = _penalised(logits, config, written)
    if config.temperature == 0:
        return int(logits.argmax())
    # Chance comes from the CPU, so that a seed does not depend on the device and no global generator is touched.
    odds = torch.softmax(_limited(logits.float().cpu() / config.temperature, config), dim=-1)
    odds, tokens = odds.sort(descending=True, stable=True)  # bf16 logits are often equal
    odds[odds.cumsum(0) - odds >= config.top_p] = 0.0
    return int(tokens[torch.multinomial(odds, 1, generator=generator)])


def _penalised(logits: torch.Tensor, config: GenerationConfig, written: Sequence[int]) -> torch.Tensor:
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = torch.tensor(sorted(set(written)), device=logits.device)
    penalise = RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty))
    scores = penalise(cast(Any, ids[None]), cast(Any, logits.float()[None]))[0]
    return scores.index_add(0, ids, torch.full_like(scores[ids], -config.presence_penalty))


def _limited(scores: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    from transformers import MinPLogitsWarper, TopKLogitsWarper

    warpers = [TopKLogitsWarper(config.top_k)] if config.top_k else []
    warpers += [MinPLogitsWarper(float(config.min_p))] if config.min_p else []
    for warper in warpers:
        scores = warper(cast(Any, None), cast(Any, scores[None]))[0]
    return scores


def beam_search(
    language: Qwen3ForCausalLM,
    embedded: torch.Tensor,
    config: GenerationConfig,
    stops: Sequence[int],
    on_token: OnToken,
) -> list[int]:
    """Returns the ids of the best beam, as transformers finds it."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Listen(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            on_token(input_ids[0].tolist())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    ids = cast(Any, language).generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device),
        max_new_tokens=config.max_new_tokens,
        num_beams=config.beams,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([Listen()]),
    )
    return ids[0].tolist()
