"""MODEL: the flow transformer under ComfyUI's BaseModel and ModelPatcher."""

from __future__ import annotations

from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_sampling
import comfy.supported_models_base
import comfy.utils
import torch

from ...internvl_u import sampling
from ...internvl_u.checkpoint import check_weights
from ...internvl_u.config import read_mmdit
from ...internvl_u.mmdit import Branch, MMDiT, time_embedding
from ...internvl_u.positions import Grid, Layout, Span
from ...internvl_u.source import map_mmdit, read_part, take_scales
from . import compat, guidance
from .mmdit import NativeMMDiT
from .precision import storage_dtype, stored

LAYOUT = "internvl_u_layout"
"""Key in a conditioning entry: the context's spans of words and pictures."""


class InternVLUConfig(comfy.supported_models_base.BASE):
    """The model configuration that BaseModel reads. Not registered with ComfyUI's detection."""

    unet_extra_config = {}
    latent_format = comfy.latent_formats.Wan21
    sampling_settings = {"shift": sampling.SHIFT, "multiplier": sampling.TRAIN_STEPS}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    memory_usage_factor = 1.0

    def inpaint_model(self):
        return False

    def get_model(self, state_dict, prefix="", device=None):
        return InternVLU(self, device=device)


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Noise levels as the official scheduler has them: the highest is 0.99967, and a start is pure noise."""

    def set_parameters(self, shift=sampling.SHIFT, timesteps=sampling.TRAIN_STEPS, multiplier=sampling.TRAIN_STEPS):
        super().set_parameters(shift=shift, timesteps=timesteps, multiplier=multiplier)
        self.sigmas = sampling.sigma_table()

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise if max_denoise else super().noise_scaling(sigma, noise, latent_image, max_denoise)


class InternVLU(comfy.model_base.QwenImage):
    """Derived from QwenImage for the one test that ComfyUI makes of it: the names that LoRA files may use."""

    def __init__(self, model_config, device=None):
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=NativeMMDiT
        )
        self.memory_usage_factor_conds = ("ref_latents",)
        self.model_sampling = FlowSampling(model_config)

    def process_timestep(self, timestep, x=None, contexts=(), **kwargs):
        """Returns the time sinusoids [B, 256]. They and the rotary tables are made here, out of reach of a compiler."""
        for context in contexts:
            context.at(tuple(x.shape[-2:]))
        compute = self.manual_cast_dtype or self.get_dtype()
        return time_embedding(torch.floor(timestep).to(compute))

    def extra_conds(self, **kwargs):
        """Returns the conditions of one conditioning entry: its context with positions, and reference latents.

        Raises:
            ValueError: the conditioning was not made by InternVL-U Encode.
        """
        out = comfy.model_base.BaseModel.extra_conds(self, **kwargs)
        out.pop("c_crossattn", None)
        references = [_five_axes(latent) for latent in kwargs.get("reference_latents") or ()]
        if references:
            out["ref_latents"] = comfy.conds.CONDList([self.process_latent_in(latent) for latent in references])
        context = kwargs.get("cross_attn")
        config = self.diffusion_model.config
        if context is None or context.shape[-1] != config.context_width:
            width = None if context is None else context.shape[-1]
            raise ValueError(
                f"conditioning of width {width} found, {config.context_width} expected: connect InternVL-U Encode"
            )
        layout = _spans(kwargs.get(LAYOUT), context.shape[1])
        grids = [tuple(latent.shape[-2:]) for latent in references]
        contexts = [PromptContext(self.diffusion_model, one, layout, grids) for one in context.to(kwargs["device"])]
        out["contexts"] = CONDContexts(contexts)
        return out


class PromptContext:
    """One prompt's context of exact length, with its positions in a picture of any size.

    The size is known only when the model is called: areas, tiles and the like take parts of a picture.
    """

    def __init__(self, model: MMDiT, context: torch.Tensor, layout: Layout, references: list[Grid]):
        self.model, self.context, self.layout, self.references = model, context, layout, references
        self.made: dict[Grid, Branch] = {}

    def at(self, size: Grid) -> Branch:
        """Returns the branch for latents of (height, width), made when first asked for."""
        if size not in self.made:
            self.made[size] = self.model.branch(self.context, self.layout, size, self.references)
        return self.made[size]


class CONDContexts(comfy.conds.CONDRegular):
    """Prompt contexts, one a sample. Any lengths go together in a batch, unpadded."""

    def process_cond(self, batch_size, **kwargs):
        repeats = -(-batch_size // len(self.cond))
        return self._copy_with((self.cond * repeats)[:batch_size])

    def can_concat(self, other):
        return True

    def concat(self, others):
        return [context for conds in (self, *others) for context in conds.cond]

    def size(self):
        return [1]


def load_model(source: str, precision: torch.dtype | None = None, disable_dynamic: bool = False):
    """Returns the MODEL of a checkpoint folder or a single file; `precision` None lets ComfyUI choose the storage.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
        ValueError: the precision does not fit the file.
    """
    weights, scales, formats = take_scales(Path(source), map_mmdit(Path(source), compat.open_weights))
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    settings = read_mmdit(shapes, read_part(Path(source), "generation_decoder"))
    check_weights(MMDiT(settings, device="meta").state_dict(), weights, "generation_decoder")
    weights = stored(weights, precision, scales)

    config = InternVLUConfig({"config": settings})
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    kept = None if scales else precision or comfy.utils.weight_dtype(weights)
    storage = precision or storage_dtype(weights, kept, config.supported_inference_dtypes)
    compute = mm.unet_manual_cast(None if scales else storage, load_device, config.supported_inference_dtypes)
    compat.set_dtypes(config, storage, compute, load_device)
    if scales:
        weights |= compat.quantize(config, scales, formats)
    elif precision is None and storage != kept:
        weights = stored(weights, storage, scales)
    model = config.get_model(weights, device=offload_device if scales else "meta")
    model.diffusion_model.load_state_dict(weights, strict=True, assign=True)
    model.diffusion_model.requires_grad_(False)
    model.device = offload_device
    compat.remember_dtypes(model.diffusion_model)
    patcher = compat.make_patcher(model, weights, load_device, offload_device, dynamic=not disable_dynamic)
    compat.reload_with(patcher, load_model, source, precision)
    guidance.install(patcher)
    return patcher


def _five_axes(latent: torch.Tensor) -> torch.Tensor:
    return latent.unsqueeze(2) if latent.ndim == 4 else latent  # [B, 16, h, w] -> [B, 16, 1, h, w]


def _spans(layout, tokens: int):
    known = sum(span.count for span in layout or ())
    if known > tokens:
        raise ValueError(f"conditioning of {tokens} tokens found, {known} expected: it was cut by another node")
    # What another node has appended is words.
    return tuple(layout or ()) + ((Span(tokens - known),) if tokens > known else ())
