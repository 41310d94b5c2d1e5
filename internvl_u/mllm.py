"""The multimodal language model: vision tower, projector, special-token rows and Qwen3.

Attribute names are the checkpoint's keys below `vlm/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .config import MLLMConfig
from .files import FileState
from .operations import Operations
from .qwen3 import Qwen3
from .tokenizer import ROW_TOKENS
from .vision import Projector, VisionTower


class MLLM(nn.Module):
    """Token ids and images in; hidden states, and logits, out."""

    mapped: tuple[FileState, ...] = ()
    """The files that weights are mapped from, as they were."""

    def __init__(self, config: MLLMConfig, *, dtype=None, device=None, operations: Operations = nn):
        super().__init__()
        self.vision = config.vision
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.vision_model = VisionTower(config.vision, **factory)
        self.mlp1 = Projector(config.vision, **factory)
        self.language_model = Qwen3(config.language, **factory)
        width = config.language.hidden_size
        self.special_token_embedding = operations.Embedding(len(ROW_TOKENS), width, dtype=dtype, device=device)

    def embed(self, ids: Sequence[int], rows: Mapping[int, int], device: torch.device) -> torch.Tensor:
        """Returns embeddings [1, tokens, width] on `device`; ids in `rows` (id -> row) take that special row."""
        embedded = self.language_model.model.embed_tokens(torch.tensor([ids], device=device))
        special = [(i, rows[token]) for i, token in enumerate(ids) if token in rows]
        if special:
            where, which = zip(*special, strict=True)
            replaced = self.special_token_embedding(torch.tensor(which, device=device))
            embedded = embedded.index_copy(1, torch.tensor(where, device=device), replaced[None].to(embedded))
        return embedded

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the features [B, tokens, width] of normalised pixels [B, 3, size, size]."""
        return self.mlp1(self.vision_model(pixels))
