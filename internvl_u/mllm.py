"""The multimodal language model: vision tower, projector, special-token rows and Qwen3 (through transformers).

Attribute names are the checkpoint's keys below `vlm/`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .config import MLLMConfig
from .files import FileState
from .tokenizer import ROW_TOKENS
from .vision import Projector, VisionTower

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


class MLLM(nn.Module):
    """Token ids and images in, hidden states out."""

    mapped: tuple[FileState, ...] = ()
    """The files that weights are mapped from, as they were."""

    def __init__(self, config: MLLMConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        self.vision = config.vision
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.vision_model = VisionTower(config.vision, **factory)
        self.mlp1 = Projector(config.vision, **factory)
        self.language_model: Qwen3ForCausalLM = build_language(config.language, dtype=dtype, device=device)
        width = self.language_model.config.hidden_size
        self.special_token_embedding = operations.Embedding(len(ROW_TOKENS), width, dtype=dtype, device=device)

    def embed(self, ids: Sequence[int], rows: Mapping[int, int], device: torch.device) -> torch.Tensor:
        """Returns embeddings [1, tokens, width] on `device`; ids in `rows` (id -> row) take that special row."""
        table = self.language_model.get_input_embeddings()
        embedded = table(torch.tensor([ids], device=device))
        special = [(i, rows[token]) for i, token in enumerate(ids) if token in rows]
        if special:
            where, which = zip(*special, strict=True)
            replaced = self.special_token_embedding(torch.tensor(which, device=device))
            embedded = embedded.index_copy(1, torch.tensor(where, device=device), replaced[None].to(embedded))
        return embedded

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the features [B, tokens, width] of normalised pixels [B, 3, size, size]."""
        return self.mlp1(self.vision_model(pixels))

    def prefill(self, embedded: torch.Tensor) -> object:
        """Returns keys and values of a text's beginning [1, tokens, width], for `hidden_states` to go on from."""
        output = self.language_model.model(inputs_embeds=embedded, use_cache=True)
        return output[cache_name(self.language_model)]

    def hidden_states(self, embedded: torch.Tensor, layers: Sequence[int], past: object = None) -> torch.Tensor:
        """Returns the chosen layers' hidden states side by side [1, tokens, len(layers) * width].

        Layer -1 is the output after the final norm, -2 the input of the last layer. `past` is what `prefill` gave for
        the tokens before; it is left as it is.
        """
        states = self.language_model.model(
            inputs_embeds=embedded,
            use_cache=past is not None,
            output_hidden_states=True,
            **{cache_name(self.language_model): copy.deepcopy(past)},
        ).hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1)


def cache_name(language: Qwen3ForCausalLM) -> str:
    """Returns transformers' name of the keys and values of the tokens before, as an argument and in an output.

    It is `cache` since 5.24, which announces the end of `past_key_values` for 5.40.
    """
    arguments = inspect.signature(type(language.model).forward).parameters
    return "cache" if "cache" in arguments else "past_key_values"


def build_language(
    config: Mapping, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Qwen3ForCausalLM:
    """Returns transformers' Qwen3 with uninitialised weights.

    Raises:
        RuntimeError: the configuration is of another architecture.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if config.get("model_type") != "qwen3":
        raise RuntimeError(f"vlm: language model {config.get('model_type')!r} found, 'qwen3' expected")
    settings = Qwen3Config.from_dict({k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")})
    settings._attn_implementation = "sdpa"
    if not settings.use_sliding_window:
        settings.sliding_window = None  # transformers 4.51 warns of a window even where it is not used
    with torch.device("meta"):
        model = Qwen3ForCausalLM(settings)
    if torch.device(device or "cpu").type != "meta":
        model = model.to_empty(device=device or "cpu")
    # Its table is a buffer that no checkpoint stores, so it cannot stay on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    if dtype is not None:
        nn.Module.to(model, dtype=dtype)
    return model
