"""MLLM: the multimodal language model under ComfyUI's memory management."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as mm
import comfy.ops
import torch

from ...internvl_u import mllm, prompt
from ...internvl_u.checkpoint import check_weights, map_weights
from ...internvl_u.picture import drawn_size, reference_pixels
from ...internvl_u.writing import Writing, write
from . import compat
from .guidance import PARTIAL
from .model import LAYOUT
from .sampler import empty_latent

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class CastRMSNorm(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """transformers' RMSNorm with ComfyUI's casting of the weight; modules become it by a change of class."""

    comfy_cast_weights = True
    bias = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        comfy.ops.run_every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(self, hidden, offloadable=True)
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        result = weight * wide.to(hidden.dtype)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result


@dataclass
class NativeMLLM:
    """What the MLLM output carries: the model under ComfyUI's patcher, and the checkpoint's encoder."""

    patcher: object
    encoder: mllm.Encoder
    dtype: torch.dtype

    def get_ram_usage(self) -> int:
        """Returns the bytes that ComfyUI's cache counts for this object."""
        return self.patcher.model_size()

    def encode(self, text: str, *, system: str | None = None, images=(), vae=None, thought: str = "") -> tuple:
        """Returns positive and negative CONDITIONING and a latent of the size to draw.

        `images` are RGB pictures to edit; they need the `vae`. `thought` is a chain of thought to draw from.

        Raises:
            ValueError: pictures without a VAE, or more placeholders in the text than pictures.
        """
        if images and vae is None:
            raise ValueError(f"{len(images)} pictures found and no VAE: connect the VAE of Load InternVL-U to Encode")
        tokenizer, grid = self.encoder.tokenizer, self.patcher.model.vision.grid
        thought = tokenizer.thought(thought)
        prompts = prompt.branches(tokenizer, text, pictures=len(images), grid=grid, system=system, thought=thought)
        references = {"reference_latents": [self._reference(vae, image) for image in images]} if images else {}
        with self._ready(max(len(tokens.ids) for tokens in (prompts.conditional, prompts.partial))) as where:
            features = self.encoder.features(self.patcher.model, images, **where)
            positive = self._conditioning(prompts.conditional, features, where, references)
            negative = self._conditioning(prompts.unconditional, (), where, {})
            if images:
                positive[0][1][PARTIAL] = self._conditioning(prompts.partial, features, where, references)
        size = self.encoder.sizes.fit(*images[0].size) if images else self.encoder.default_size
        return positive, negative, empty_latent(*drawn_size(*size))

    def write(self, text: str, *, system: str, images=(), writing: Writing, on_token=None) -> list[int]:
        """Returns the ids that the model writes after a prompt; `on_token(ids)` hears after each token.

        Raises:
            ValueError: more placeholders in the text than pictures.
        """
        model = self.patcher.model
        opening = prompt.opening(
            self.encoder.tokenizer, text, system=system, pictures=len(images), grid=model.vision.grid
        )
        with self._ready(len(opening.ids), writing) as where:
            features = self.encoder.features(model, images, **where)
            return write(self.encoder, model, opening, features, writing, on_token=on_token, **where)

    @contextlib.contextmanager
    def _ready(self, tokens: int, writing: Writing | None = None):
        mm.load_models_gpu([self.patcher], memory_required=self._activations(tokens, writing))
        device = self.patcher.load_device
        run_on(self.patcher.model.language_model, device, self.dtype)
        with compat.device_context(device):
            yield {"device": device, "dtype": self.dtype}

    def _conditioning(self, tokens: prompt.TokenIds, features, where, extra: dict) -> list:
        context = self.encoder.context(self.patcher.model, tokens, features, **where)
        context = context.unsqueeze(0).to(mm.intermediate_device(), torch.float32)
        return [[context, {LAYOUT: tokens.layout, **extra}]]

    def _reference(self, vae, image) -> torch.Tensor:
        pixels = reference_pixels(image, self.encoder.sizes)
        return vae.encode((pixels.movedim(1, -1) + 1) / 2)  # BCHW -> BHWC

    def _activations(self, tokens: int, writing: Writing | None) -> int:
        config = self.patcher.model.language_model.config
        kept = config.num_hidden_layers * config.hidden_size + 4 * config.intermediate_size
        cached = 0
        if writing is not None:
            a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            cached = a_token * (tokens + writing.max_new_tokens) * writing.beams + config.vocab_size * writing.beams * 4
        return (tokens * kept + cached) * self.dtype.itemsize


def load_mllm(root: str, precision: torch.dtype | None = None) -> NativeMLLM:
    """Returns the MLLM of a checkpoint folder; `precision` None keeps the files' dtype.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
    """
    patcher, dtype = _load_patcher(root, precision)
    return NativeMLLM(patcher, mllm.Encoder.read(Path(root)), dtype)


def _load_patcher(root: str, precision: torch.dtype | None, disable_dynamic: bool = False):
    weights = map_weights(Path(root) / "vlm", compat.open_weights)
    config = mllm.read_config(Path(root), {name: tuple(tensor.shape) for name, tensor in weights.items()})
    check_weights(mllm.MLLM(config, device="meta").state_dict(), weights, "vlm")
    model = mllm.MLLM(config, device="meta", operations=comfy.ops.manual_cast)
    cast_language(model.language_model)
    model.load_state_dict(_stored(weights, precision), strict=True, assign=True)
    model.requires_grad_(False).eval()
    compat.remember_dtypes(model)
    load_device, offload_device = mm.text_encoder_device(), mm.text_encoder_offload_device()
    patcher = compat.make_patcher(model, load_device, offload_device, dynamic=not disable_dynamic)
    compat.reload_with(patcher, _reload, root, precision)
    return patcher, _arithmetic(weights, precision, load_device)


def _reload(root: str, precision: torch.dtype | None, disable_dynamic: bool = False):
    return _load_patcher(root, precision, disable_dynamic)[0]


def cast_language(model: torch.nn.Module) -> None:
    """Gives transformers' modules ComfyUI's classes, so that their weights can be cast and offloaded."""
    swaps = {torch.nn.Linear: comfy.ops.manual_cast.Linear, torch.nn.Embedding: comfy.ops.manual_cast.Embedding}
    for module in model.modules():
        if type(module) in swaps:
            module.__class__ = swaps[type(module)]
            if not hasattr(module, "bias"):
                module.bias = None
        elif type(module).__name__.endswith("RMSNorm"):
            module.__class__ = CastRMSNorm


def run_on(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Tells transformers where and how the model runs: it would ask the first weight, which may be offloaded."""
    kind = type(model) if not hasattr(type(model), "asked") else type(model).asked
    where = {"asked": kind, "device": property(lambda self: device), "dtype": property(lambda self: dtype)}
    model.__class__ = type(kind.__name__, (kind,), where)


def _stored(weights: dict[str, torch.Tensor], precision: torch.dtype | None) -> dict[str, torch.Tensor]:
    if precision is None:
        return weights
    if precision not in FP8:
        return {name: tensor.to(precision) for name, tensor in weights.items()}
    # In fp8 only the matrices shrink: norms, biases and embeddings are small and suffer most.
    return {
        name: tensor.to(precision) if tensor.ndim == 2 and "embed" not in name else tensor
        for name, tensor in weights.items()
    }


def _arithmetic(weights: dict[str, torch.Tensor], precision: torch.dtype | None, device: torch.device) -> torch.dtype:
    stored = precision or next(iter(weights.values())).dtype
    if stored == torch.float32 or not mm.should_use_bf16(device):
        return torch.float32
    return torch.bfloat16
