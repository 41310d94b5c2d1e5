"""A token's step as a CUDA graph: recorded once, then started with one call instead of a thousand.

What is recorded reads and writes the same places each time, so a token's place is a number on the device, and attention
covers a whole number of `SPAN` tokens, of which a mask leaves those that are written. One graph per such length.

Off unless `GenerationConfig.cuda_graphs` asks for it: the arithmetic is tested on processors, the recording has not
been run on a GPU yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.nn import functional

from .qwen3_step import BoundLayer, TokenStep

SPAN = 256
_logger = logging.getLogger("internvl_u")


class GraphedStep:
    """A `TokenStep` whose work is recorded on a CUDA device."""

    def __init__(self, step: TokenStep):
        device, dtype = step.cache.keys.device, step.cache.keys.dtype
        self.step = step
        self.hidden = torch.zeros(step.width, device=device, dtype=dtype)
        self.place = torch.zeros(1, device=device, dtype=torch.long)
        self._recorded: dict[int, tuple[Callable[[], object], torch.Tensor]] = {}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits [vocabulary] after the next token's embedding [D]; the next call overwrites them."""
        cache = self.step.cache
        span = min(-(-(cache.length + 1) // SPAN) * SPAN, cache.capacity)
        self.hidden.copy_(hidden)
        self.place.fill_(cache.length)
        if span not in self._recorded:
            self._recorded[span] = self._record(span)
        replay, logits = self._recorded[span]
        replay()
        cache.length += 1
        return logits

    def run(self, span: int) -> torch.Tensor:
        """Returns the logits after `self.hidden` at `self.place`, by reads and writes that do not depend on them."""
        cosine, sine = self.step.cache.rotary.index_select(1, self.place)[:, 0].unbind()
        seen = (torch.arange(span, device=self.place.device) <= self.place).view(1, 1, 1, span)

        def attend(layer: BoundLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            layer.keys.index_copy_(2, self.place, key[None, :, None])
            layer.values.index_copy_(2, self.place, value[None, :, None])
            keys, values = layer.keys.narrow(2, 0, span), layer.values.narrow(2, 0, span)
            return functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen)

        return self.step.run(self.hidden, cosine, sine, attend)

    def _record(self, span: int) -> tuple[Callable[[], object], torch.Tensor]:
        # What is not written yet is masked, but a NaN among it would pass through: 0 times NaN is NaN.
        cache = self.step.cache
        for tensor in (cache.keys, cache.values):
            tensor[..., cache.length :, :] = 0
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(span)  # what libraries do at their first call must not be recorded
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = self.run(span)
        _logger.debug("InternVL-U: a token's step recorded for %d tokens", span)
        return graph.replay, logits
