"""Text from the language model: answers, and thoughts before drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .mllm import MLLM, Encoder, cache_name
from .prompt import TokenIds

OnToken = Callable[[list[int]], None]


@dataclass(frozen=True)
class Writing:
    """How text is written. `temperature` 0 always takes the likeliest token; above, it samples with `seed`."""

    max_new_tokens: int = 200
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} found, at least 1 expected")
        if self.beams < 1:
            raise ValueError(f"beams {self.beams} found, at least 1 expected")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(f"beams {self.beams} and temperature {self.temperature} found, one of the two expected")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature} and top_p {self.top_p} found, 0 or more and above 0 to 1 expected"
            )


def write(
    encoder: Encoder,
    model: MLLM,
    prompt: TokenIds,
    features: Sequence[torch.Tensor] = (),
    writing: Writing | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_token: OnToken | None = None,
) -> list[int]:
    """Returns the ids that the model writes after `prompt`, with the one that ended it, if one did.

    `features` are those of the prompt's pictures. `on_token(ids)` hears all ids so far after each one (with beams those
    of the first beam); what it raises ends the writing.
    """
    writing = writing or Writing()
    embedded = encoder.embedded(model, prompt, features, device=device, dtype=dtype)
    follow = _search if writing.beams > 1 else _choose
    return follow(model.language_model, embedded, writing, encoder.tokenizer.stops, on_token or (lambda ids: None))


def _choose(language, embedded: torch.Tensor, writing: Writing, stops: Sequence[int], on_token: OnToken) -> list[int]:
    """One token after the other. What transformers' generate does besides costs more than the choice itself."""
    generator = torch.Generator().manual_seed(writing.seed)
    cache = cache_name(language)
    given, past, ids = {"inputs_embeds": embedded}, None, []
    while True:
        output = language.model(**given, use_cache=True, **{cache: past})
        past = output[cache]
        logits = language.lm_head(output.last_hidden_state[:, -1])
        ids.append(_pick(logits[0], writing, generator))
        on_token(ids.copy())
        if ids[-1] in stops or len(ids) == writing.max_new_tokens:
            return ids
        given = {"input_ids": torch.tensor([ids[-1:]], device=embedded.device)}
        given["position_ids"] = torch.tensor([[embedded.shape[1] + len(ids) - 1]], device=embedded.device)


def _pick(logits: torch.Tensor, writing: Writing, generator: torch.Generator) -> int:
    if writing.temperature == 0:
        return int(logits.argmax())
    # Chance comes from the CPU, so that a seed does not depend on the device and no global generator is touched.
    odds = torch.softmax(logits.float().cpu() / writing.temperature, dim=-1)
    odds, tokens = odds.sort(descending=True, stable=True)  # bf16 logits are often equal
    odds[odds.cumsum(0) - odds >= writing.top_p] = 0.0
    return int(tokens[torch.multinomial(odds, 1, generator=generator)])


def _search(language, embedded: torch.Tensor, writing: Writing, stops: Sequence[int], on_token: OnToken) -> list[int]:
    """Beam search, as transformers has it."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Listen(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            on_token(input_ids[0].tolist())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    ids = language.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device),
        max_new_tokens=writing.max_new_tokens,
        num_beams=writing.beams,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([Listen()]),
    )
    return ids[0].tolist()
