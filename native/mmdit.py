"""The flow transformer as a ComfyUI diffusion model: same weights and arithmetic, with ComfyUI's hooks around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import nn

from ..internvl_u.mmdit import Block, MMDiT, Packing
from ..internvl_u.modulation import BlockModulation, Modulations, StepModulation
from ..internvl_u.rope import grid_of
from . import modulation
from .latents import check_frames

if TYPE_CHECKING:
    from .model import PromptContext

Options = dict[str, Any]
_SCALED_BY_ROW = ("TensorWiseINT8Layout",)
"""ComfyUI's layouts of quantised layers that round each row of their input by itself."""


class NativeMMDiT(MMDiT):
    """`MMDiT` called as ComfyUI calls a diffusion model; block patches, wrappers and attention choices work."""

    evaluations: int | None = None
    """How many evaluations its checkpoint was distilled to."""

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        control: object = None,
        transformer_options: Options | None = None,
        contexts: Sequence[PromptContext] = (),
        ref_latents: Sequence[torch.Tensor] = (),
        **_: object,
    ) -> torch.Tensor:
        """Returns the velocity of `x` [B, 16, h, w] or [B, 16, 1, h, w], in its shape.

        `timesteps` are the sinusoids [B, 256] that `InternVLU.process_timestep` makes; `contexts` holds one
        `PromptContext` per sample.

        Raises:
            ValueError: `x` is a video, or a ControlNet is attached.
        """
        options = {} if transformer_options is None else transformer_options
        x = (
            x.clone()
        )  # without a cast before it is the sampler's own, and core's EasyCache writes into what it is given
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options),
        ).execute(x, timesteps, context, control, contexts, ref_latents, options)

    def _forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None,
        control: object,
        contexts: Sequence[PromptContext],
        ref_latents: Sequence[torch.Tensor],
        transformer_options: Options,
    ) -> torch.Tensor:
        if control is not None:
            raise ValueError(
                "a ControlNet is attached, but none exists for InternVL-U: use it on another model of a chain"
            )
        latents = single_frame(x)
        branches = [one.branch_for(grid_of(latents), latents.device) for one in contexts]
        references = [single_frame(reference) for reference in ref_latents]
        options = transformer_options.copy()
        options["total_blocks"], options["block_type"] = len(self.transformer_blocks), "double"
        call = _Call(options, self._remembered(timesteps, options))
        modulation_at = None if call.modulations is None else call.modulation_at
        out = super().forward(latents, timesteps, branches, references, call.run_block, modulation_at)
        return out.reshape(x.shape)

    def run_once(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Runs a layer; ComfyUI brings its weights to where they are needed.

        Row by row where it rounds its input by one scale for all rows: noise levels must not see each other.
        """
        if any(_rounds_input(module) for module in layer.modules()):
            return torch.cat([layer(row) for row in hidden.split(1)])
        return layer(hidden)

    def _remembered(self, time: torch.Tensor, options: Options) -> Modulations | None:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        run = options.get(modulation.KEY)
        return None if run is None else run.of(self, time, options)


def _rounds_input(layer: nn.Module) -> bool:
    """Returns whether a layer of ComfyUI's multiplies in few bits, its input rounded by one scale for all rows."""
    layout = getattr(layer, "layout_type", None)
    return layout not in (None, *_SCALED_BY_ROW) and not getattr(layer, "_full_precision_mm", False)


def single_frame(latents: torch.Tensor) -> torch.Tensor:
    """Returns latents [B, 16, h, w] from the same or from [B, 16, 1, h, w].

    Raises:
        ValueError: there are several frames.
    """
    check_frames(latents)
    return latents[:, :, 0] if latents.ndim == 5 else latents


class _Call:
    """One call of the transformer: its blocks are run as ComfyUI's are, and modulated by what a run remembers."""

    def __init__(self, options: Options, modulations: Modulations | None):
        self.options, self.modulations = options, modulations
        self.level: torch.Tensor | None = None
        self.shown: StepModulation | None = None  # to replacements of blocks, which may write into a copy of `level`

    def modulation_at(self, model: MMDiT, time: torch.Tensor, dtype: torch.dtype) -> StepModulation:
        """Returns the modulation of samples; see `ModulationAt`."""
        made = cast(Modulations, self.modulations).at(model, time, dtype)
        if not self.options.get("patches_replace", {}).get("dit"):
            return made
        self.level = made.level.expand(len(time), -1)
        self.shown = replace(made, level=self.level.clone())
        return self.shown

    def run_block(
        self,
        index: int,
        block: Block,
        image: torch.Tensor,
        text: torch.Tensor,
        made: torch.Tensor | BlockModulation,
        packing: Packing,
        image_tokens: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a block as ComfyUI's double blocks are run: it may be replaced, and patched after; see `RunBlock`."""
        options = self.options
        options["block_index"] = index

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return optimized_attention(
                query, key, value, query.shape[1], skip_reshape=True, transformer_options=options
            )

        def original(args: Options) -> Options:
            given = args["vec"]
            if not isinstance(made, torch.Tensor) and (self.shown is None or _same(given, self.level)):
                given = made
            img, txt = block(args["img"], args["txt"], given, args["pe"], attention, image_tokens)
            return {"img": img, "txt": txt}

        vec = made if isinstance(made, torch.Tensor) else made.level
        args = {"img": image, "txt": text, "vec": vec, "pe": packing, "transformer_options": options}
        replacement = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
        out = original(args) if replacement is None else replacement(args, {"original_block": original})
        if self.shown is not None and not _same(self.shown.level, self.level):
            self.shown.out = None
        for patch in options.get("patches", {}).get("double_block", ()):
            out = patch({**out, "x": None, "block_index": index, "transformer_options": options})
        return out["img"], out["txt"]


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
