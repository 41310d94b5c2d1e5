"""Beam search, as transformers' `generate` does it with `num_beams` and its defaults.

`num_beams` texts are written side by side. In each step the likeliest continuations of all of them are taken; those
that end are finished texts, and the search is over when no open one can still become better than the worst of as many
finished ones. What counts is the mean log-likelihood of a text's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Advance = Callable[[Sequence[int], Sequence[int]], torch.Tensor]
"""(which beam each of the new beams continues, its token) -> logits [beams, vocabulary] of what comes next."""


class Finished(NamedTuple):
    """A text that has ended, and its mean log-likelihood."""

    score: float
    ids: list[int]


def beam_search(
    logits: torch.Tensor,
    advance: Advance,
    *,
    beams: int,
    max_new_tokens: int,
    stops: Sequence[int],
    on_token: Callable[[list[int]], None],
) -> list[int]:
    """Returns the ids of the best text after logits [vocabulary] of its first token.

    `on_token(ids)` is called after each step with the ids of the likeliest open text.
    """
    texts: list[list[int]] = [[] for _ in range(beams)]
    totals = torch.full((beams,), -1e9)
    totals[0] = 0.0  # all beams are the same so far
    scores = torch.log_softmax(logits.float(), -1).cpu().expand(beams, -1)
    finished: list[Finished] = []
    count = max(2, 1 + len(stops)) * beams
    for length in range(1, max_new_tokens + 1):
        sums = (totals[:, None] + scores).flatten()
        best, places = sums.topk(min(count, len(sums)))
        vocabulary = scores.shape[-1]
        candidates = [
            (total, place // vocabulary, place % vocabulary)
            for total, place in zip(best.tolist(), places.tolist(), strict=True)
        ]
        ending = [length == max_new_tokens or token in stops for _, _, token in candidates]
        for (total, beam, token), ends in list(zip(candidates, ending, strict=True))[:beams]:
            if ends:
                finished.append(Finished(total / length, [*texts[beam], token]))
        finished = sorted(finished, key=lambda one: -one.score)[:beams]
        going_on = [candidate for candidate, ends in zip(candidates, ending, strict=True) if not ends][:beams]
        if not going_on:
            on_token(finished[0].ids)
            break
        texts = [[*texts[beam], token] for _, beam, token in going_on]
        totals = torch.tensor([total for total, _, _ in going_on])
        on_token(texts[0])
        if len(finished) == beams and going_on[0][0] / length <= finished[-1].score:
            break
        logits = advance([beam for _, beam, _ in going_on], [token for _, _, token in going_on])
        scores = torch.log_softmax(logits.float(), -1).cpu()
    return finished[0].ids
