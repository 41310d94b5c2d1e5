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
        self.encoder = VisionLayers(config, **factory)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embeddings(pixels))[:, 1:]


class VisionLayers(nn.Module):
    """The layers one after the other."""

    def __init__(self, config: VisionConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.layers = nn.ModuleList(VisionLayer(config, **factory) for _ in range(config.layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


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
        self.attn = VisionAttention(config, operations=operations, **factory)
        self.mlp = VisionMLP(config, operations=operations, **factory)
        self.norm1 = operations.LayerNorm(config.width, eps=config.eps, **factory)
        self.norm2 = operations.LayerNorm(config.width, eps=config.eps, **factory)
        self.ls1 = nn.Parameter(torch.empty(config.width, **factory))
        self.ls2 = nn.Parameter(torch.empty(config.width, **factory))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden)) * self.ls1.to(hidden)
        return hidden + self.mlp(self.norm2(hidden)) * self.ls2.to(hidden)


class VisionAttention(nn.Module):
    """Multi-head self-attention over [B, patches, width]."""

    def __init__(self, config: VisionConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.heads = config.heads
        self.qkv = operations.Linear(config.width, 3 * config.width, **factory)
        self.proj = operations.Linear(config.width, config.width, **factory)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = rearrange(self.qkv(hidden), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        attended = functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(rearrange(attended, "b h n e -> b n (h e)"))


class VisionMLP(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, config: VisionConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.fc1 = operations.Linear(config.width, config.mlp_width, **factory)
        self.fc2 = operations.Linear(config.mlp_width, config.width, **factory)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(hidden)))


class Projector(nn.Sequential):
    """Patch features [B, patches, width] -> prompt features [B, tokens, language width]; 2 x 2 patches per token."""

    def __init__(self, config: VisionConfig, *, dtype=None, device=None, operations=nn):
        factory = {"dtype": dtype, "device": device}
        merged_width = config.width * round(1 / config.downsample) ** 2
        super().__init__(
            operations.LayerNorm(merged_width, **factory),
            operations.Linear(merged_width, config.output_width, **factory),
            nn.GELU(),
            operations.Linear(config.output_width, config.output_width, **factory),
        )
        self.side = round(1 / config.downsample)
        self.rows = config.image_size // config.patch_size

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        side = self.side
        merged = rearrange(patches, "b (h i w j) c -> b (h w) (i j c)", i=side, j=side, h=self.rows // side)
        return super().forward(merged)
