"""The language model: Qwen3 (arXiv 2505.09388), with keys and values of fixed size that are written in place.

Attribute names are the checkpoint's keys below `vlm/language_model.`, and those of transformers' Qwen3ForCausalLM.

Letters in shape comments: B sequences, T tokens, D width, H heads, K heads of keys and values, E head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from .config import LanguageConfig
from .operations import Operations

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""See `attend`."""

RunLayer = Callable[..., torch.Tensor]
"""(layer, hidden [B, T, D], rotary, cache, mask) -> hidden after it; see `Layer.forward`."""


class KeyValueCache:
    """Keys and values of up to `capacity` tokens of each sequence, of which the first `length` are written."""

    def __init__(
        self, config: LanguageConfig, capacity: int, *, batch: int = 1, device: torch.device, dtype: torch.dtype
    ):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.length, self.capacity = 0, capacity
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.rotary = rotary_table(config, torch.arange(capacity)).to(device, dtype)
        self._layers = list(zip(self.keys, self.values, strict=True))

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's new keys and values [B, K, T, E] after the others; returns all [B, K, length + T, E]."""
        all_keys, all_values = self._layers[layer]
        end = self.length + keys.shape[2]
        all_keys[:, :, self.length : end] = keys
        all_values[:, :, self.length : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def part(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns copies of keys and values [layers, B, K, end - start, E] of some tokens."""
        return self.keys[..., start:end, :].clone(), self.values[..., start:end, :].clone()

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes what `part` of another cache gave for the tokens that come next."""
        end = self.length + keys.shape[-2]
        self.keys[..., self.length : end, :] = keys
        self.values[..., self.length : end, :] = values
        self.length = end

    @classmethod
    def joined(cls, caches: Sequence[KeyValueCache], config: LanguageConfig, more: int) -> KeyValueCache:
        """Returns a cache of what is in several caches of one sequence, with room for `more` tokens.

        Sequences end at the same place; before those that are shorter stand zeros, not to be seen.
        """
        longest, first = max(cache.length for cache in caches), caches[0].keys
        joined = cls(config, longest + more, batch=len(caches), device=first.device, dtype=first.dtype)
        for row, cache in enumerate(caches):
            for whole, part in ((joined.keys, cache.keys), (joined.values, cache.values)):
                whole[:, row, :, : longest - cache.length] = 0.0  # what is not seen is multiplied by zero: no NaN
                whole[:, row, :, longest - cache.length : longest] = part[:, 0, :, : cache.length]
        joined.length = longest
        return joined

    def repeated(self, batch: int) -> KeyValueCache:
        """Returns this cache of one sequence for `batch` equal ones."""
        return self.reordered(torch.zeros(batch, dtype=torch.long, device=self.keys.device))

    def reordered(self, order: torch.Tensor) -> KeyValueCache:
        """Returns a cache whose sequence i is this one's sequence `order[i]`."""
        copy = object.__new__(KeyValueCache)
        copy.__dict__ |= self.__dict__
        copy.keys, copy.values = self.keys.index_select(1, order), self.values.index_select(1, order)
        copy._layers = list(zip(copy.keys, copy.values, strict=True))
        return copy


class Qwen3(nn.Module):
    """Embeddings in; hidden states and logits out."""

    def __init__(self, config: LanguageConfig, *, dtype=None, device=None, operations: Operations = nn):
        super().__init__()
        self.config = config
        factory = {"dtype": dtype, "device": device}
        self.model = Decoder(config, operations=operations, **factory)
        self.lm_head = operations.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)

    def forward(
        self, embedded: torch.Tensor, cache: KeyValueCache | None = None, layers: Sequence[int] = (), **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the last hidden states [B, T, D] of tokens; see `Decoder.forward`."""
        return self.model(embedded, cache, layers, **more)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, vocabulary] after the last of hidden states [B, T, D].

        torch 2.11 multiplies a slice of three axes in bf16 with a transposed copy of the matrix, which takes seconds.
        """
        return self.lm_head(hidden[:, -1])

    @property
    def typical_matrix(self) -> torch.Tensor:
        """One of the matrices that most of a token's time goes to."""
        return cast(Layer, self.model.layers[0]).mlp.up_proj.weight

    def new_cache(self, capacity: int, *, batch: int = 1, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        """Returns an empty cache for `capacity` tokens; `dtype` is that of the embeddings."""
        return KeyValueCache(self.config, capacity, batch=batch, device=device, dtype=dtype)


class Decoder(nn.Module):
    """The layers between embeddings and final norm."""

    def __init__(self, config: LanguageConfig, *, dtype=None, device=None, operations: Operations = nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            Layer(config, index, operations=operations, **factory) for index in range(config.num_hidden_layers)
        )
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)

    def forward(
        self,
        embedded: torch.Tensor,
        cache: KeyValueCache | None = None,
        layers: Sequence[int] = (),
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        run_layer: RunLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the last hidden states [B, T, D] of embedded tokens [B, T, D], which follow those in `cache`.

        They are written into the cache. With `layers` come the hidden states of these layers side by side
        [B, T, len(layers) * D]: layer -1 is the output after the final norm, -2 the input of the last layer. `mask`
        [B, 1, T, length + T] may say or weigh what a token sees instead of all before it, and `positions` [B, T] where
        it stands. `run_layer` may wrap or replace the call of a layer.
        """
        rotary = self._rotary(embedded, cache, positions)
        if mask is None and cache is not None:
            mask = _causal_mask(cache.length, embedded)
        count = len(self.layers)
        wanted = {layer % (count + 1) for layer in layers}
        hidden, states = embedded, {}
        for index, layer in enumerate(self.layers):
            if index in wanted:
                states[index] = hidden
            run = cast(Layer, layer) if run_layer is None else functools.partial(run_layer, layer)
            hidden = run(hidden, rotary, cache, mask)
        hidden = self.norm(hidden)
        if cache is not None:
            cache.length += embedded.shape[1]
        if not layers:
            return hidden, None
        states[count] = hidden
        return hidden, torch.cat([states[layer % (count + 1)] for layer in layers], dim=-1)

    def _rotary(
        self, embedded: torch.Tensor, cache: KeyValueCache | None, positions: torch.Tensor | None
    ) -> Sequence[torch.Tensor]:
        tokens = embedded.shape[1]
        if cache is not None and positions is None:
            return cache.rotary[:, cache.length : cache.length + tokens].unbind()
        if positions is None:
            positions = torch.arange(tokens, device=embedded.device)
        table = rotary_table(self.config, positions).to(embedded) if cache is None else cache.rotary[:, positions]
        return (table if positions.ndim == 1 else table.unsqueeze(2)).unbind()


class Layer(nn.Module):
    """Attention and MLP, each after a norm and with a residual."""

    def __init__(self, config: LanguageConfig, index: int, *, dtype=None, device=None, operations: Operations = nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.self_attn = Attention(config, index, operations=operations, **factory)
        self.mlp = MLP(config, operations=operations, **factory)
        self.input_layernorm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)
        self.post_attention_layernorm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: Sequence[torch.Tensor],
        cache: KeyValueCache | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, cache, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Causal attention of H query heads over K heads of keys and values, with a norm on each query and key head."""

    attend: AttentionFunction

    def __init__(self, config: LanguageConfig, index: int, *, dtype=None, device=None, operations: Operations = nn):
        super().__init__()
        self.index, self.head_dim, self.attend = index, config.head_dim, attend
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        width, inner = config.hidden_size, self.heads * self.head_dim
        factory = {"bias": config.attention_bias, "dtype": dtype, "device": device}
        self.q_proj = operations.Linear(width, inner, **factory)
        self.k_proj = operations.Linear(width, self.shared * self.head_dim, **factory)
        self.v_proj = operations.Linear(width, self.shared * self.head_dim, **factory)
        self.o_proj = operations.Linear(inner, width, **factory)
        self.q_norm = operations.RMSNorm(self.head_dim, eps=config.rms_norm_eps, dtype=dtype, device=device)
        self.k_norm = operations.RMSNorm(self.head_dim, eps=config.rms_norm_eps, dtype=dtype, device=device)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: Sequence[torch.Tensor],
        cache: KeyValueCache | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, tokens, _ = hidden.shape
        query = rotate(self.q_norm(self._split(self.q_proj(hidden))), *rotary)
        key = rotate(self.k_norm(self._split(self.k_proj(hidden))), *rotary)
        value = self._split(self.v_proj(hidden))
        if cache is not None:
            key, value = cache.write(self.index, key, value)
        attended = self.attend(query, key, value, mask)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, tokens, -1))

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == 1:  # nothing to transpose
            return tokens.view(tokens.shape[0], -1, 1, self.head_dim)
        return tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, H * E] -> [B, H, T, E]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LanguageConfig, *, dtype=None, device=None, operations: Operations = nn):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        factory = {"bias": False, "dtype": dtype, "device": device}
        self.gate_proj = operations.Linear(width, inner, **factory)
        self.up_proj = operations.Linear(width, inner, **factory)
        self.down_proj = operations.Linear(inner, width, **factory)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the attention [B, H, T, E] of queries [B, H, T, E], the last T of the tokens of [B, K, N, E].

    `mask` [..., T, N], one for all heads, says what each sees; without one T is 1 or N, and each sees itself and what
    is before it.
    """
    batch, heads, tokens, width = query.shape
    if tokens == 1:  # the heads that share a key are its queries
        grouped = query.view(batch, keys.shape[1], -1, width)
        return functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).view(query.shape)
    repeats = heads // keys.shape[1]
    keys, values = (one.repeat_interleave(repeats, dim=1) for one in (keys, values))
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None)


def _causal_mask(before: int, hidden: torch.Tensor) -> torch.Tensor | None:
    """Returns which tokens [T, before + T] each of T new ones sees; None where attention knows by itself."""
    tokens = hidden.shape[1]
    if tokens == 1 or before == 0:
        return None
    return torch.ones(tokens, before + tokens, dtype=torch.bool, device=hidden.device).tril(before)


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Returns heads [B, H, T, E] with the two halves of each rotated, by the columns [T, E] of `rotary_table`."""
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, -1), sine)


def rotary_table(config: LanguageConfig, positions: torch.Tensor) -> torch.Tensor:
    """Returns the cosines, and the sines with the sign of their half, [2, ..., E], fp32, at positions [...]."""
    frequencies, scale = _frequencies(config)
    angle = positions[..., None].float() * frequencies.to(positions.device)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    return torch.stack([torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)])


def _frequencies(config: LanguageConfig) -> tuple[torch.Tensor, float]:
    """Returns the frequencies [E / 2] of the positions, and a factor on both cosines and sines."""
    if config.rope_scaling is None:
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / (config.rope_theta**exponent), 1.0
    # Stretched positions have many definitions, which transformers keeps; the released model has none.
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = Qwen3Config.from_dict(dataclasses.asdict(config))
    return ROPE_INIT_FUNCTIONS[config.rope_scaling["rope_type"]](settings, torch.device("cpu"))
