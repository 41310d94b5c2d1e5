"""The flow transformer of InternVL-U (arXiv 2603.09877, section on the generation head): a two-stream MMDiT.

Source of the arithmetic: github.com/OpenGVLab/InternVL-U at 018a59c. What differs is only the work done: every
token goes through its own stream's weights alone, samples of different lengths are packed instead of padded,
and the last block computes nothing but what the image's own tokens need. Attribute names are the checkpoint's keys.

Letters in shape comments: B samples, N tokens of the image and its references, T context tokens of all samples
together, D width, H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from .attention import EPS, Attention, JointAttention, scaled_dot_product
from .config import MMDiTConfig
from .files import FileState
from .modulation import BlockModulation, StepModulation
from .packing import BranchInput, Packing, pack
from .patches import patchify, token_grid, unpatchify
from .rope import Grid, Layout, position_ids, rotary_table

RunBlock = Callable[
    [int, "Block", torch.Tensor, torch.Tensor, "torch.Tensor | BlockModulation", "Packing", "int | None"],
    tuple[torch.Tensor, torch.Tensor],
]
"""(index, block, image [B, N, D], text [T, D], modulation, packing, image_tokens) -> image and text after it.

The modulation is what a block's own is made of [B, D], or that itself.
"""

ModulationAt = Callable[["MMDiT", torch.Tensor, torch.dtype], StepModulation]
"""(model, sinusoids [B, 256], dtype) -> the modulation of samples at these noise levels; see `Modulations.at`."""

FLOAT16_EXPONENT = 14
"""Contexts are brought below 2 ** 14 for float16, which ends at 2 ** 16."""
TIME_WIDTH = 256


def call_block(
    index: int,
    block: Block,
    image: torch.Tensor,
    text: torch.Tensor,
    modulation: torch.Tensor | BlockModulation,
    packing: Packing,
    image_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a block with torch's own attention; see `RunBlock`."""
    return block(image, text, modulation, packing, scaled_dot_product, image_tokens)


def time_frequencies(device: torch.device | None = None) -> torch.Tensor:
    """Returns the frequencies [128], fp32, of the time sinusoids, from 1 down to 1e-4.

    torch's fp32 `exp` differs by one ulp between makers of processors, which shifts a phase by up to 0.1 rad.
    """
    half = TIME_WIDTH // 2
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)


def time_embedding(timestep: torch.Tensor) -> torch.Tensor:
    """Returns the sinusoids [B, 256], fp32, of timesteps [B] in 0..999.

    The phases go up to 1e6, where one fp32 step is 0.06 rad: the order of the products is the official one, and
    a compiler must not touch it, so the transformer takes this result and not the timestep.
    """
    phase = 1000 * (timestep[:, None].float() * time_frequencies(timestep.device))
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


class MMDiT(nn.Module):
    """The transformer: latents, references and context in, velocity of the latents out."""

    mapped: tuple[FileState, ...] = ()
    """The files that weights are mapped from, as they were."""

    def __init__(self, config: MMDiTConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        self.config = config
        self.dtype = dtype
        factory = {"dtype": dtype, "device": device}
        packed = config.channels * config.patch_size**2
        self.img_in = operations.Linear(packed, config.width, **factory)
        self.txt_norm = operations.RMSNorm(config.context_width, eps=EPS, **factory)
        self.txt_in = operations.Linear(config.context_width, config.width, **factory)
        self.time_text_embed = TimeEmbedding(config.width, operations=operations, **factory)
        self.transformer_blocks = nn.ModuleList(
            Block(config.width, config.heads, operations=operations, **factory) for _ in range(config.layers)
        )
        self.norm_out = OutputNorm(config.width, operations=operations, **factory)
        self.proj_out = operations.Linear(config.width, packed, **factory)

    def branch(self, context: torch.Tensor, layout: Layout, image: Grid, references: Sequence[Grid]) -> BranchInput:
        """Returns one sample's `BranchInput`. Made once per image: nothing in it depends on the noise level.

        `context` is [tokens, context width]; `image` and `references` are (rows, columns) in latent pixels.

        Raises:
            ValueError: the context has another width.
        """
        config = self.config
        if context.shape[-1] != config.context_width:
            raise ValueError(
                f"a context of {context.shape[-1]} values per token found, {config.context_width} expected: the "
                "language model and the transformer do not belong together"
            )
        tokens = [token_grid(grid, config.patch_size) for grid in (image, *references)]
        positions = position_ids(tokens[0], tokens[1:], layout, config.image_scale)
        table = rotary_table(positions, config.rope_axes, config.rope_theta)
        return BranchInput(context, table.to(context.device))

    def forward(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        branches: Sequence[BranchInput],
        references: Sequence[torch.Tensor] = (),
        run_block: RunBlock | None = None,
        modulation_at: ModulationAt | None = None,
    ) -> torch.Tensor:
        """Returns the velocity [B, channels, height, width] of `latents` [B, channels, height, width].

        In float16 the two streams between the blocks stay fp32.

        `time` is `time_embedding(timestep)`; there is one branch per sample; each reference is a batch of latents
        [B, channels, h, w]. `run_block` may wrap or replace the call of a block. All tensors but the rotary tables are
        cast to the dtype of `latents`. With `modulation_at` the layers of modulation are not run here.
        """
        image, grid = self.embed_image(latents, references)
        packing = pack(branches, image)
        text = self.embed_text(torch.cat([branch.context.to(image.device) for branch in branches]), latents.dtype)
        if modulation_at is None:
            modulation = self.embed_time(time, latents.dtype)
        else:
            modulation = modulation_at(self, time, latents.dtype)
        image = self.run_blocks(image, text, modulation, packing, grid[0] * grid[1], run_block)
        return self.velocity(image, modulation, grid, latents.shape[-2:])

    def embed_image(self, latents: torch.Tensor, references: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Grid]:
        """Returns the image stream's tokens [B, N, D] and the image's (rows, columns) of them."""
        patches = [patchify(x.to(latents.dtype), self.config.patch_size) for x in (latents, *references)]
        image = _wide(self.img_in(torch.cat(patches, dim=1)))
        return image, token_grid(latents.shape[-2:], self.config.patch_size)

    def embed_text(self, context: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns the text stream's tokens [T, D] of contexts [T, context width], computed in `dtype`."""
        if dtype == torch.float16:  # hidden states may be larger than it holds; the norm takes the factor out again
            _, exponent = torch.frexp(context.float().abs().amax(-1, keepdim=True))
            context = torch.ldexp(context.float(), (FLOAT16_EXPONENT - exponent).clamp(max=0))
        return _wide(self.txt_in(self.txt_norm(context.to(dtype))))

    def embed_time(self, time: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns what all modulations are made of [B, D], from the sinusoids [B, 256]."""
        return functional.silu(self.time_text_embed(time.to(dtype)))

    def modulation(self, time: torch.Tensor, dtype: torch.dtype) -> StepModulation:
        """Returns the modulation of everything at the noise levels of sinusoids [R, 256]."""
        level = functional.silu(self.run_once(self.time_text_embed, time.to(dtype)))
        blocks = [
            (self.run_once(block.img_mod, level), self.run_once(block.txt_mod, level))
            for block in cast("Sequence[Block]", self.transformer_blocks)
        ]
        return StepModulation(level, blocks, self.run_once(self.norm_out.linear, level))

    def modulation_layers(self) -> list[nn.Module]:
        """Returns the modules that `modulation` runs, which read nothing but the noise level."""
        blocks = cast("Sequence[Block]", self.transformer_blocks)
        each = [layer for block in blocks for layer in (block.img_mod, block.txt_mod)]
        return [self.time_text_embed, *each, self.norm_out.linear]

    def run_once(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Runs a layer where `hidden` is. One that lies elsewhere stays there, and lends its weights for the call."""
        weights = {name: weight.to(hidden.device) for name, weight in layer.named_parameters()}
        return torch.func.functional_call(layer, weights, (hidden,))

    def to_sample(self, device: torch.device) -> MMDiT:
        """Moves what each step of a run with `Modulations` needs; the layers of modulation stay where they are."""
        once = {module for layer in self.modulation_layers() for module in layer.modules()}
        for module in set(self.modules()) - once:
            if not any(True for _ in module.children()):
                module.to(device)
        return self

    def run_blocks(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor | StepModulation,
        packing: Packing,
        image_tokens: int,
        run_block: RunBlock | None = None,
    ) -> torch.Tensor:
        """Returns the first `image_tokens` tokens [B, image_tokens, D] after all blocks: those of the image itself."""
        run_block = call_block if run_block is None else run_block
        last = len(self.transformer_blocks) - 1
        for i, block in enumerate(self.transformer_blocks):
            kept = image_tokens if i == last else None
            given = modulation if isinstance(modulation, torch.Tensor) else modulation.block(i)
            image, text = run_block(i, cast("Block", block), image, text, given, packing, kept)
        return image

    def velocity(
        self, image: torch.Tensor, modulation: torch.Tensor | StepModulation, grid: Grid, size: Sequence[int]
    ) -> torch.Tensor:
        """Returns the velocity [B, channels, *size] that the image's tokens [B, rows * columns, D] stand for."""
        output = self.proj_out(self.norm_out(image, modulation))
        return unpatchify(output, grid, self.config.patch_size)[..., : size[0], : size[1]]


class TimeEmbedding(nn.Module):
    """Sinusoids [B, 256] -> [B, D]."""

    def __init__(self, width: int, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.timestep_embedder = nn.ModuleDict(
            {
                "linear_1": operations.Linear(TIME_WIDTH, width, **factory),
                "linear_2": operations.Linear(width, width, **factory),
            }
        )

    def forward(self, sinusoids: torch.Tensor) -> torch.Tensor:
        hidden = functional.silu(self.timestep_embedder["linear_1"](sinusoids))
        return self.timestep_embedder["linear_2"](hidden)


class Block(nn.Module):
    """One double-stream block: joint attention, then an MLP per stream, both modulated by the noise level."""

    def __init__(self, width: int, heads: int, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.img_mod = Modulation(width, **factory)
        self.txt_mod = Modulation(width, **factory)
        self.attn = JointAttention(width, heads, **factory)
        self.img_mlp = MLP(width, **factory)
        self.txt_mlp = MLP(width, **factory)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor | BlockModulation,
        packing: Packing,
        attention: Attention,
        image_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the two streams after the block: image [B, N, D], text [T, D].

        With `image_tokens` set (the last block) only so many image tokens are carried on, and the text comes back as it
        was.
        """
        if isinstance(modulation, torch.Tensor):
            modulation = BlockModulation(modulation, self.img_mod(modulation), self.txt_mod(modulation))
        img_mod = modulation.image[:, None]  # [B or 1, 1, 6 D]
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, -1)
        txt_mod = modulation.text if len(modulation.text) == 1 else modulation.text[packing.sample]  # [T or 1, 6 D]
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, -1)

        img_out, txt_out = self.attn(
            modulate(image, img_shift1, img_scale1),
            modulate(text, txt_shift1, txt_scale1),
            packing,
            attention,
            image_tokens,
        )
        image = image[:, :image_tokens] + img_gate1.to(image) * img_out
        image = image + img_gate2.to(image) * self.img_mlp(modulate(image, img_shift2, img_scale2))
        if txt_out is None:
            return image, text
        text = text + txt_gate1.to(text) * txt_out
        return image, text + txt_gate2.to(text) * self.txt_mlp(modulate(text, txt_shift2, txt_scale2))


class Modulation(nn.Sequential):
    """Noise level, already through SiLU, [B, D] -> [B, 6 D]. Index 0 of the checkpoint is that SiLU."""

    def __init__(self, width: int, *, dtype=None, device=None, operations=nn):
        super().__init__(nn.Identity(), operations.Linear(width, 6 * width, dtype=dtype, device=device))


class MLP(nn.Module):
    """Two linear layers with tanh-GELU between, four times as wide inside."""

    def __init__(self, width: int, *, dtype=None, device=None, operations=nn):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        inner = InnerProjection(width, operations=operations, **factory)
        self.net = nn.ModuleList([inner, nn.Identity(), operations.Linear(4 * width, width, **factory)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](tokens))


class InnerProjection(nn.Module):
    """The first linear layer of an MLP, and its tanh-GELU."""

    def __init__(self, width: int, *, dtype=None, device=None, operations=nn):
        super().__init__()
        self.proj = operations.Linear(width, 4 * width, dtype=dtype, device=device)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.proj(tokens), approximate="tanh")


class OutputNorm(nn.Module):
    """Layer norm modulated by the noise level; unlike in the blocks the scale comes first."""

    def __init__(self, width: int, *, dtype=None, device=None, operations=nn):
        super().__init__()
        self.linear = operations.Linear(width, 2 * width, dtype=dtype, device=device)

    def forward(self, image: torch.Tensor, modulation: torch.Tensor | StepModulation) -> torch.Tensor:
        level, made = (modulation, None) if isinstance(modulation, torch.Tensor) else (modulation.level, modulation.out)
        scale, shift = (self.linear(level) if made is None else made)[:, None].chunk(2, -1)
        return modulate(image, shift, scale)


def modulate(tokens: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the layer-normalised tokens (no weights, eps 1e-6), scaled and shifted, in the dtype of the shift."""
    return (functional.layer_norm(tokens, tokens.shape[-1:], eps=EPS) * (1 + scale) + shift).to(shift.dtype)


def _wide(stream: torch.Tensor) -> torch.Tensor:
    """Returns a stream in a dtype that its sum over the blocks fits: float16 alone is too narrow."""
    return stream.float() if stream.dtype == torch.float16 else stream
