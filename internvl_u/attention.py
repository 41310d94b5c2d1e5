"""Attention of the flow transformer over both streams of a sample; letters in shape comments as in `mmdit`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from .packing import Packing

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query, key, value) [B, H, tokens, E] -> [B, tokens, H * E], softmax over all keys, scale E ** -0.5."""

EPS = 1e-6


class JointAttention(nn.Module):
    """Attention over both streams of a sample, each stream with its own projections and a sigmoid output gate."""

    def __init__(self, width: int, heads: int, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.heads = heads
        self.to_q = operations.Linear(width, 2 * width, **factory)  # per head: the query, then its gate
        self.to_k = operations.Linear(width, width, **factory)
        self.to_v = operations.Linear(width, width, **factory)
        self.add_q_proj = operations.Linear(width, 2 * width, **factory)
        self.add_k_proj = operations.Linear(width, width, **factory)
        self.add_v_proj = operations.Linear(width, width, **factory)
        self.to_out = nn.ModuleList([operations.Linear(width, width, **factory)])
        self.to_add_out = operations.Linear(width, width, **factory)
        head_width = width // heads
        self.norm_q = operations.RMSNorm(head_width, eps=EPS, **factory)
        self.norm_k = operations.RMSNorm(head_width, eps=EPS, **factory)
        self.norm_added_q = operations.RMSNorm(head_width, eps=EPS, **factory)
        self.norm_added_k = operations.RMSNorm(head_width, eps=EPS, **factory)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, packing: Packing, attention: Attention, image_tokens: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns image [B, N, D] and text [T, D] attended; with `image_tokens` set so many tokens, and no text."""
        img_k = rotate(self.norm_k(self._split(self.to_k(image))), packing.rotary_image)
        txt_k = rotate(self.norm_added_k(self._split(self.add_k_proj(text))), packing.rotary_text)
        img_v, txt_v = self._split(self.to_v(image)), self._split(self.add_v_proj(text))
        img_q, img_gate = self._split(self.to_q(image[:, :image_tokens])).chunk(2, -1)
        img_q = rotate(self.norm_q(img_q), packing.rotary_image[:, :, :image_tokens])
        txt_q = txt_gate = None
        if image_tokens is None:
            txt_q, txt_gate = self._split(self.add_q_proj(text)).chunk(2, -1)
            txt_q = rotate(self.norm_added_q(txt_q), packing.rotary_text)

        img_parts, txt_parts = [], []
        for samples, tokens, length in packing.groups():
            query, key, value = (
                _join(img[samples], None if txt is None else txt[tokens], length)
                for img, txt in ((img_q, txt_q), (img_k, txt_k), (img_v, txt_v))
            )
            attended = attention(query, key, value)  # [b, H, n, E] -> [b, n, D]
            img_parts.append(attended[:, : img_q.shape[1]])
            txt_parts.append(attended[:, img_q.shape[1] :].flatten(0, 1))
        img_out = self.to_out[0](torch.cat(img_parts)) * torch.sigmoid(img_gate.flatten(-2))
        if txt_gate is None:
            return img_out, None
        return img_out, self.to_add_out(torch.cat(txt_parts)) * torch.sigmoid(txt_gate.flatten(-2))

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.heads, -1))  # [..., H * E] -> [..., H, E]


def scaled_dot_product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns torch's own attention; see `Attention`."""
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def rotate(heads: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns heads [..., H, E] with adjacent pairs rotated by `table` (cosine, sine) [2, ..., 1, E / 2]."""
    cosine, sine = table
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(-2).to(heads.dtype)


def _join(image: torch.Tensor, text: torch.Tensor | None, length: int) -> torch.Tensor:
    if text is not None:
        image = torch.cat([image, text.unflatten(0, (-1, length))], dim=1)
    return image.transpose(1, 2)  # [b, n, H, E] -> [b, H, n, E]
