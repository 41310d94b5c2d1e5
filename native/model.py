"""MODEL: the flow transformer under ComfyUI's BaseModel and ModelPatcher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.supported_models_base
import torch

from ..internvl_u import sampling
from ..internvl_u.config import mmdit_config
from ..internvl_u.distilled import evaluations_in
from ..internvl_u.files import check_unchanged
from ..internvl_u.load import check_part
from ..internvl_u.mmdit import BranchInput, MMDiT, time_embedding
from ..internvl_u.rope import Grid, Layout, Span, grid_of
from . import compat, guidance, modulation, training
from .conditioning import CONTEXTS
from .dtypes import plan_transformer
from .gguf_ops import cast_packed_layers, check_plain
from .latents import check_numbers, reference_samples
from .mmdit import NativeMMDiT
from .quantized import check_formats, check_unscaled, quantize_layers

LAYOUT = "internvl_u_layout"
"""Key in a conditioning entry: the context's spans of words and images."""


class InternVLUConfig(comfy.supported_models_base.BASE):
    """The model configuration that BaseModel reads. Not registered with ComfyUI's detection."""

    unet_extra_config = {}
    latent_format = comfy.latent_formats.Wan21
    sampling_settings = {"shift": sampling.SHIFT, "multiplier": sampling.TRAIN_STEPS}
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    memory_usage_factor = 1.0

    def inpaint_model(self) -> bool:
        return False

    def get_model(
        self, state_dict: dict[str, torch.Tensor], prefix: str = "", device: torch.device | str | None = None
    ) -> InternVLU:
        return InternVLU(self, device=device)


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Noise levels as the official scheduler has them: the highest is 0.99967, and a start is pure noise."""

    def set_parameters(
        self,
        shift: float = sampling.SHIFT,
        timesteps: int = sampling.TRAIN_STEPS,
        multiplier: int = sampling.TRAIN_STEPS,
    ) -> None:
        super().set_parameters(shift=shift, timesteps=timesteps, multiplier=multiplier)
        self.sigmas = sampling.sigma_table()

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool = False
    ) -> torch.Tensor:
        return noise if max_denoise else super().noise_scaling(sigma, noise, latent_image, max_denoise)


class InternVLU(comfy.model_base.QwenImage, comfy.model_base.HunyuanDiT):
    """Derived from two models for the one test that ComfyUI makes of each: the names that LoRA files may use.

    QwenImage brings `X`, `transformer.X` and `lycoris_X`, HunyuanDiT `base_model.model.X`. Nothing else of them is
    used.
    """

    def __init__(self, model_config: InternVLUConfig, device: torch.device | str | None = None):
        comfy.model_base.BaseModel.__init__(
            self,
            model_config,
            comfy.model_base.ModelType.FLOW,
            device=cast(Any, device),
            unet_model=cast(Any, NativeMMDiT),
        )
        self.memory_usage_factor_conds = ("ref_latents",)
        self.model_sampling = FlowSampling(model_config)

    def process_timestep(
        self,
        timestep: torch.Tensor,
        x: torch.Tensor | None = None,
        contexts: Sequence[PromptContext] = (),
        **kwargs: object,
    ) -> torch.Tensor:
        """Returns the time sinusoids [B, 256]. They and the rotary tables are made here, out of reach of a compiler."""
        check_unchanged(cast(NativeMMDiT, self.diffusion_model).mapped)
        for context in contexts:
            latent = cast(torch.Tensor, x)
            context.branch_for(grid_of(latent), latent.device)
        compute = self.manual_cast_dtype or self.get_dtype()
        return time_embedding(torch.floor(timestep).to(compute))

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        """Returns the conditions of one conditioning entry: its context with positions, and reference latents.

        Raises:
            ValueError: the conditioning was not made by InternVL-U Encode, or holds what is no number.
        """
        out = comfy.model_base.BaseModel.extra_conds(self, **kwargs)
        out.pop("c_crossattn", None)
        references = [reference_samples(latent) for latent in kwargs.get("reference_latents") or ()]
        if references:
            out["ref_latents"] = comfy.conds.CONDList([self.process_latent_in(latent) for latent in references])
        context = kwargs.get("cross_attn")
        network = cast(NativeMMDiT, self.diffusion_model)
        config = network.config
        if context is None or context.ndim != 3 or context.shape[-1] != config.context_width:
            width = None if context is None else context.shape[-1] if context.ndim == 3 else tuple(context.shape)
            raise ValueError(
                f"conditioning of width {width} found, {config.context_width} expected: connect InternVL-U Encode"
            )
        check_numbers(context, "a CONDITIONING")
        layout = _spans(kwargs.get(LAYOUT), context.shape[1])
        grids = [grid_of(latent) for latent in references]
        contexts = [PromptContext(network, one, layout, grids) for one in context.to(kwargs["device"])]
        out[CONTEXTS] = CONDContexts(contexts)
        return out

    def get_dynamic_vram__units(self) -> tuple[list[torch.nn.Module], list[list[torch.nn.Module]]]:
        """Returns what ComfyUI is to stream first, and what last: the modulation, which a run reads once (0.33)."""
        return [], [cast(NativeMMDiT, self.diffusion_model).modulation_layers()]

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Returns the weights for a file.

        Raises:
            ValueError: they are packed, or quantised by our own arithmetic: ComfyUI would leave their scales away.
        """
        check_plain(self.diffusion_model, "saving the model")
        check_unscaled(self.diffusion_model, "saving the model")
        return super().state_dict_for_saving(*args, **kwargs)


class PromptContext:
    """One prompt's context of exact length, with its positions in an image of any size.

    The size is known only when the model is called: areas, tiles and the like take parts of an image. So is the device,
    where several GPUs share the prompts of a step.
    """

    def __init__(self, model: MMDiT, context: torch.Tensor, layout: Layout, references: Sequence[Grid]):
        self.model, self.context, self.layout, self.references = model, context, layout, references
        self._branches: dict[tuple[Grid, torch.device], BranchInput] = {}

    def branch_for(self, size: Grid, device: torch.device) -> BranchInput:
        """Returns the branch for latents of (height, width) on a device, made when first asked for."""
        key = size, device
        if key not in self._branches:
            self._branches[key] = self.model.branch(self.context.to(device), self.layout, size, self.references)
        return self._branches[key]


class CONDContexts(comfy.conds.CONDRegular):
    """Prompt contexts, one per sample. Any lengths go together in a batch, unpadded."""

    def process_cond(self, batch_size: int, **kwargs: object) -> CONDContexts:
        repeats = -(-batch_size // len(self.cond))
        return self._copy_with((self.cond * repeats)[:batch_size])

    def can_concat(self, other: comfy.conds.CONDRegular) -> bool:
        return True

    def concat(self, others: Sequence[CONDContexts]) -> list[PromptContext]:
        return [context for conds in (self, *others) for context in conds.cond]

    def size(self) -> list[int]:
        return [1]


def load_model(
    source: str, precision: torch.dtype | None = None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Returns the MODEL of a checkpoint folder or a single file; `precision` None lets ComfyUI choose the storage.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
        ValueError: the precision does not fit the file.
    """
    part = compat.open_part(Path(source), "generation_decoder")
    check_part(part)
    settings = mmdit_config(part.shapes, part.config, part.source)
    config = InternVLUConfig({"config": settings})
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    plan = plan_transformer(part, precision, config.supported_inference_dtypes, load_device)
    compat.set_dtypes(config, plan.storage, plan.compute, load_device)
    known = check_formats(part.layers, source)
    weights = plan.weights | (compat.quantize(config, part.layers) if part.layers and known else {})
    if not known:
        cast(Any, config).custom_operations = comfy.ops.manual_cast
    model = config.get_model(weights, device=offload_device if part.layers and known else "meta")
    if not known:
        quantize_layers(model.diffusion_model, part.layers, plan.compute or plan.storage, source)
    cast_packed_layers(model.diffusion_model, part.packed, plan.compute or plan.storage)
    model.diffusion_model.requires_grad_(False)
    model.diffusion_model.load_state_dict(weights, strict=True, assign=True)
    network = cast(NativeMMDiT, model.diffusion_model)
    network.mapped = compat.mapped_files(part, weights)
    network.evaluations = evaluations_in(weights)
    model.device = offload_device
    compat.remember_dtypes(model.diffusion_model)
    streams = not disable_dynamic and not part.packed and compat.can_stream()
    cls = None if streams else modulation.PackedFlowPatcher if part.packed else modulation.FlowPatcher
    patcher = compat.make_patcher(model, weights, load_device, offload_device, streams, cls)
    compat.reload_with(patcher, load_model, part, source, precision)
    guidance.install(patcher)
    modulation.install(patcher)
    training.install(patcher)
    return patcher


def _spans(layout: Layout | None, tokens: int) -> Layout:
    known = sum(span.count for span in layout or ())
    if known > tokens:
        raise ValueError(f"conditioning of {tokens} tokens found, {known} expected: it was cut by another node")
    # What another node has appended is words.
    return tuple(layout or ()) + ((Span(tokens - known),) if tokens > known else ())
