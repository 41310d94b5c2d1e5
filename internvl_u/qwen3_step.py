"""One token through Qwen3, with as few calls as it can be: while writing, a GPU waits for them.

The same arithmetic as `Qwen3.forward` for one token of one sequence, on vectors, for weights that are used as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional

from .linear import Product, is_plain, row_product, without_onednn
from .qwen3 import Attention, KeyValueCache, Layer, Qwen3

Norm = Callable[[torch.Tensor], torch.Tensor]


class BoundLayer(NamedTuple):
    """A layer's products and norms; `keys` and `values` [1, K, capacity, E] are the cache's own."""

    before_attention: Norm
    query: Product
    key: Product
    value: Product
    heads_norm: Norm
    output: Product
    before_mlp: Norm
    gate: Product
    up: Product
    down: Product
    keys: torch.Tensor
    values: torch.Tensor


Attend = Callable[[BoundLayer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, query [1, K, H / K, E], key [K, E], value [K, E]) -> attended [1, K, H / K, E]."""


class TokenStep:
    """Token ids in, logits out, one after the other; see `of`."""

    def __init__(self, model: Qwen3, cache: KeyValueCache, layers: list[BoundLayer], final: Norm, head: Product):
        config = model.config
        self.width = config.hidden_size
        self.cache, self.layers, self._final, self._head = cache, layers, final, head
        self._widths, self._split = (config.num_attention_heads, config.num_key_value_heads), (-1, config.head_dim)
        self._grouped = (1, config.num_key_value_heads, -1, config.head_dim)

    @classmethod
    def of(cls, model: Qwen3, cache: KeyValueCache) -> TokenStep | None:
        """Returns the step after the tokens of a cache of one sequence.

        None where the model's own forward is needed: some weights are cast, moved, unpacked or patched when they are
        used, have a bias, or something stands beside a layer.
        """
        device, dtype = cache.keys.device, cache.keys.dtype
        if cache.keys.shape[1] != 1:
            return None
        eps, width = model.config.rms_norm_eps, (model.config.num_attention_heads, model.config.num_key_value_heads)

        def norm(*weights: tuple[Any, int]) -> Norm:
            """The norm over the last axis of several groups of heads, each with its own weights."""
            tables = [one.weight.to(device, dtype).expand(count, -1) for one, count in weights]
            return _norm(tables[0][0] if len(tables) == 1 else torch.cat(tables), eps)

        def bound(layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> list[Any]:
            attention, mlp = cast(Attention, layer.self_attn), layer.mlp
            projections = [getattr(attention, f"{name}_proj") for name in "qkvo"]
            query, key, value, output = (row_product(one, device, dtype) for one in projections)
            inner = (row_product(one, device, dtype) for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            heads_norm = norm((attention.q_norm, width[0]), (attention.k_norm, width[1]))
            before = norm((layer.input_layernorm, 1)), norm((layer.post_attention_layernorm, 1))
            return [before[0], query, key, value, heads_norm, output, before[1], *inner, keys, values]

        if not all(map(is_plain, (*model.model.layers.modules(), model.model.norm, model.lm_head))):
            return None
        layers = [
            bound(cast(Layer, layer), keys, values)
            for layer, keys, values in zip(model.model.layers, cache.keys, cache.values, strict=True)
        ]
        head = row_product(model.lm_head, device, dtype)
        if head is None or any(part is None for layer in layers for part in layer):
            return None
        return cls(model, cache, [BoundLayer(*layer) for layer in layers], norm((model.model.norm, 1)), head)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits [vocabulary] after the next token's embedding [D], which is written into the cache."""
        cache = self.cache
        place, end = cache.length, cache.length + 1

        def attend(layer: BoundLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            layer.keys.select(2, place).copy_(key)
            layer.values.select(2, place).copy_(value)
            return functional.scaled_dot_product_attention(
                query, layer.keys.narrow(2, 0, end), layer.values.narrow(2, 0, end)
            )

        cosine, sine = cache.rotary[:, place].unbind()
        with without_onednn(hidden.device):
            logits = self.run(hidden, cosine, sine, attend)
        cache.length = end
        return logits

    def run(self, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Returns the logits [vocabulary] after an embedding [D]; `attend` writes into the cache and reads from it."""
        half = cosine.shape[-1] // 2
        for layer in self.layers:
            row = layer.before_attention(hidden)
            heads = torch.cat((layer.query(row), layer.key(row))).view(self._split)
            heads = layer.heads_norm(heads)
            heads = torch.addcmul(heads * cosine, heads.roll(half, -1), sine)
            query, key = heads.split_with_sizes(self._widths)
            attended = attend(layer, query.view(self._grouped), key, layer.value(row).view(self._split))
            hidden = hidden + layer.output(attended.view(-1))
            row = layer.before_mlp(hidden)
            hidden = hidden + layer.down(functional.silu(layer.gate(row)).mul_(layer.up(row)))
        return self._head(self._final(hidden))


def _norm(weight: torch.Tensor, eps: float) -> Norm:
    """Returns the RMS norm over the last axis. In fp32 by half as many calls as torch's own takes on a processor."""
    width = weight.shape[-1]
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return lambda values: functional.rms_norm(values, (width,), eps=eps) * weight
    smallest, scaled = torch.tensor((width * eps) ** 0.5), weight * width**0.5

    def norm(values: torch.Tensor) -> torch.Tensor:
        length = torch.hypot(torch.linalg.vector_norm(values, dim=-1, keepdim=True), smallest)
        return values.div(length).mul_(scaled)

    return norm
