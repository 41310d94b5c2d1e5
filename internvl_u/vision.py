"""The vision tower (InternViT-300M, arXiv 2312.14238) and the projector into the language model's width.

Attribute names are the checkpoint's keys.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from .config import VisionConfig


class VisionTower(nn.Module):
    """Pixels [B, 3, size, size] -> patch features [B, patches, width]; the class token is dropped."""

    def __init__(self, config: VisionConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.embeddings = PatchEmbedding(config, **factory)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(config, **factory) for _ in range(config.layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(pixels)
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return hidden[:, 1:]


class PatchEmbedding(nn.Module):
    """Pixels -> class token and patches, with learned positions."""

    def __init__(self, config: VisionConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        patch = config.patch_size
        patches = (config.image_size // patch) ** 2
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.width, **factory))
        self.patch_embedding = operations.Conv2d(3, config.width, patch, stride=patch, **factory)
        self.position_embedding = nn.Parameter(torch.empty(1, patches + 1, config.width, **factory))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, width, h, w] -> [B, h w, width]
        first = self.class_embedding.to(patches).expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.to(patches)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with a learned scale on each residual branch."""

    def __init__(self, config: VisionConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.heads = config.heads
        self.attn = nn.Module()
        self.attn.qkv = operations.Linear(config.width, 3 * config.width, **factory)
        self.attn.proj = operations.Linear(config.width, config.width, **factory)
        self.mlp = nn.Module()
        self.mlp.fc1 = operations.Linear(config.width, config.mlp_width, **factory)
        self.mlp.fc2 = operations.Linear(config.mlp_width, config.width, **factory)
        self.norm1 = operations.LayerNorm(config.width, eps=config.eps, **factory)
        self.norm2 = operations.LayerNorm(config.width, eps=config.eps, **factory)
        self.ls1 = nn.Parameter(torch.empty(config.width, **factory))
        self.ls2 = nn.Parameter(torch.empty(config.width, **factory))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = rearrange(self.attn.qkv(self.norm1(hidden)), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        attended = functional.scaled_dot_product_attention(*qkv.unbind(0))
        hidden = hidden + self.attn.proj(rearrange(attended, "b h n e -> b n (h e)")) * self.ls1.to(hidden)
        return hidden + self.mlp.fc2(functional.gelu(self.mlp.fc1(self.norm2(hidden)))) * self.ls2.to(hidden)


class Projector(nn.Sequential):
    """Patch features [B, patches, width] -> prompt features [B, tokens, language width]; 2 x 2 patches a token."""

    def __init__(self, config: VisionConfig, *, dtype=None, device=None, operations=nn):
        factory = {"dtype": dtype, "device": device}
        self_width = config.width * round(1 / config.downsample) ** 2
        super().__init__(
            operations.LayerNorm(self_width, **factory),
            operations.Linear(self_width, config.output_width, **factory),
            nn.GELU(),
            operations.Linear(config.output_width, config.output_width, **factory),
        )
        self.side = round(1 / config.downsample)
        self.rows = config.image_size // config.patch_size

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        side = self.side
        merged = rearrange(patches, "b (h i w j) c -> b (h w) (i j c)", i=side, j=side, h=self.rows // side)
        return super().forward(merged)
