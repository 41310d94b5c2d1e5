"""Text from the language model: answers, and thoughts before drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .mllm import MLLM, Encoder
from .prompt import TokenIds


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
    on_token: Callable[[list[int]], None] | None = None,
) -> list[int]:
    """Returns the ids that the model writes after `prompt`, with the one that ended it, if one did.

    `features` are those of the prompt's pictures. `on_token(ids)` hears all ids so far after each
    one (with beams those of the first beam); what it raises ends the writing.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Listen(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if on_token is not None:
                on_token(input_ids[0].tolist())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    writing = writing or Writing()
    embedded = encoder.embedded(model, prompt, features, device=device, dtype=dtype)
    sampling = {"do_sample": False}
    if writing.temperature > 0:
        sampling = {"do_sample": True, "temperature": writing.temperature, "top_p": writing.top_p, "top_k": 0}
    # transformers samples from torch's global generators: they are given back as they were.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(writing.seed)
        ids = model.language_model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=device),
            max_new_tokens=writing.max_new_tokens,
            num_beams=writing.beams,
            eos_token_id=list(encoder.tokenizer.stops),
            pad_token_id=encoder.tokenizer.stops[0],
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([Listen()]),
            **sampling,
        )
    return ids[0].tolist()
