"""The table of tokens under ComfyUI's memory management."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch

from ..internvl_u.operations import Operations


class CastEmbedding(comfy.ops.manual_cast.Embedding):
    """An embedding that gives the arithmetic's dtype, and looks rows up where its table lies.

    ComfyUI would bring an offloaded table, which is the largest weight, to the GPU for each token that is written.
    """

    bias = None
    out_dtype: torch.dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.weight.device == ids.device or self.weight_function:
            return super().forward(ids).to(self.out_dtype)
        comfy.ops.run_every_op()
        rows = torch.nn.functional.embedding(ids.to(self.weight.device), self.weight)
        return rows.to(ids.device, self.out_dtype)


def with_embeddings(operations: Operations, compute: torch.dtype) -> Operations:
    """Returns ComfyUI's operations with the embedding above, which gives `compute`."""
    embedding: Any = type("CastEmbedding", (CastEmbedding,), {"out_dtype": compute})
    return type("Operations", (operations,), {"Embedding": embedding})
