"""One denoising step as a piece of work: the released transformer's size, and inputs of the usual lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from internvl_u.config import MMDiTConfig
from internvl_u.defaults import GUIDANCE
from internvl_u.mmdit import MMDiT
from internvl_u.rope import Layout, Span
from internvl_u.sampling import Denoiser, DrawingContexts

RELEASED = MMDiTConfig(
    channels=16, patch_size=2, context_width=4096, layers=20, heads=12, head_dim=128, rope_axes=(16, 56, 56)
)
PIXELS_A_LATENT = 8
TIMESTEP = 500
_PICTURE = Span(256, 16, 16)
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "t2i": ((Span(90),), (Span(12),)),
    "edit": ((Span(4), _PICTURE, Span(40)), (Span(4), _PICTURE, Span(15)), (Span(12),)),
}
"""The contexts of each mode's branches: the user's words, when editing also the partial branch, and no words."""


@dataclass(frozen=True)
class Inputs:
    """What one step gets: latents [1, 16, n, n], contexts [tokens, 4096] with their layouts, and the timestep.

    The reference, latents [1, 16, n, n] too, belongs to all branches but the last.
    """

    latents: torch.Tensor
    contexts: tuple[torch.Tensor, ...]
    layouts: tuple[Layout, ...]
    reference: torch.Tensor | None
    timestep: torch.Tensor

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.latents.shape[-2:])


def make_inputs(mode: str, pixels: int, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Returns random inputs for a square picture of `pixels`; with mode "edit" the reference has its size."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    side = pixels // PIXELS_A_LATENT
    size = (1, RELEASED.channels, side, side)
    layouts = LAYOUTS[mode]
    contexts = tuple(random(sum(span.count for span in layout), RELEASED.context_width) for layout in layouts)
    reference = random(*size) if mode == "edit" else None
    return Inputs(random(*size), contexts, layouts, reference, torch.tensor([TIMESTEP], device=device))


def make_step(model: MMDiT, inputs: Inputs) -> Callable[[], list[torch.Tensor]]:
    """Returns a function that runs our step, as the pipeline does: one velocity [1, 16, n, n] per branch, fp32."""
    branches = list(zip(inputs.contexts, inputs.layouts, strict=True))
    partial = branches[1] if inputs.reference is not None else None
    references = () if inputs.reference is None else (inputs.reference,)
    contexts = DrawingContexts(branches[0], partial, branches[-1], references)
    denoiser = Denoiser(model, contexts, inputs.size, GUIDANCE, inputs.latents.dtype)

    def run() -> list[torch.Tensor]:
        conditional, partial, unconditional = denoiser.velocities(inputs.latents, inputs.timestep)
        return [conditional, unconditional] if partial is unconditional else [conditional, partial, unconditional]

    return run
