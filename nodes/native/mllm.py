"""MLLM: the multimodal language model under ComfyUI's memory management."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management as mm
import comfy.ops
import torch

from ...internvl_u import mllm, prompt
from ...internvl_u.checkpoint import check_weights
from ...internvl_u.picture import drawn_size, reference_pixels
from ...internvl_u.source import map_part, take_scales
from ...internvl_u.writing import Writing, write
from . import compat
from .guidance import PARTIAL
from .model import LAYOUT
from .precision import arithmetic, operations, stored
from .sampler import empty_latent


class CastRMSNorm(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """transformers' RMSNorm with ComfyUI's casting of the weight; modules become it by a change of class."""

    bias = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not (self.comfy_cast_weights or self.weight_function):
            return self._normed(hidden, self.weight)
        weight, bias, stream = comfy.ops.cast_bias_weight(self, hidden, offloadable=True)
        result = self._normed(hidden, weight)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weight * wide.to(hidden.dtype)


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


class ScaledLinear(comfy.ops.manual_cast.Linear):
    """A linear layer whose fp8 matrix was divided by `scale`; the few inputs are multiplied, not the matrix."""

    def forward_comfy_cast_weights(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias, stream = comfy.ops.cast_bias_weight(self, hidden, offloadable=True)
        result = torch.nn.functional.linear(hidden * self.scale, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result


@dataclass
class NativeMLLM:
    """What the MLLM output carries: the model under ComfyUI's patcher, and the checkpoint's encoder."""

    patcher: object
    encoder: mllm.Encoder
    dtype: torch.dtype
    nothing: dict[prompt.TokenIds, torch.Tensor] = field(default_factory=dict)
    """The last empty prompt and its context: it is the same for every text."""

    @property
    def context_width(self) -> int:
        """Values a token that are handed on to the transformer."""
        return len(self.encoder.layers) * self.patcher.model.language_model.config.hidden_size

    def get_ram_usage(self) -> int:
        """Returns the bytes that ComfyUI's cache counts for this object."""
        return self.patcher.model_size()

    def is_dynamic(self) -> bool:
        """Tells ComfyUI's cache whether the weights take no memory of their own; it keeps such outputs longer."""
        return compat.is_dynamic(self.patcher)

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
            wanted = [(prompts.conditional, features)] + ([(prompts.partial, features)] if images else [])
            if prompts.unconditional not in self.nothing:
                wanted.append((prompts.unconditional, ()))
            contexts = self.encoder.contexts(self.patcher.model, wanted, **where)
        made = {tokens: self._handed_out(context) for (tokens, _), context in zip(wanted, contexts, strict=True)}
        self.nothing = {prompts.unconditional: (self.nothing | made)[prompts.unconditional]}
        positive = _conditioning(prompts.conditional, made, references)
        negative = _conditioning(prompts.unconditional, self.nothing, {})
        if images:
            positive[0][1][PARTIAL] = _conditioning(prompts.partial, made, references)
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
        self.patcher.model.language_model.runs_on = (device, self.dtype)
        with compat.device_context(device):
            yield {"device": device, "dtype": self.dtype}

    def _handed_out(self, context: torch.Tensor) -> torch.Tensor:
        return context.unsqueeze(0).to(mm.intermediate_device(), torch.float32)

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


def _conditioning(tokens: prompt.TokenIds, contexts: dict, extra: dict) -> list:
    return [[contexts[tokens], {LAYOUT: tokens.layout, **extra}]]


def load_mllm(source: str, precision: torch.dtype | None = None) -> NativeMLLM:
    """Returns the MLLM of a checkpoint folder or a converted file; `precision` None keeps the files' dtype.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
        ValueError: the precision does not fit the file.
    """
    patcher, dtype = _load_patcher(source, precision)
    return NativeMLLM(patcher, mllm.Encoder.read(Path(source)), dtype)


def _load_patcher(source: str, precision: torch.dtype | None, disable_dynamic: bool = False):
    weights = map_part(Path(source), "vlm", compat.open_weights)
    weights, scales, _ = take_scales(Path(source), weights)
    config = mllm.read_config(Path(source), {name: tuple(tensor.shape) for name, tensor in weights.items()})
    check_weights(mllm.MLLM(config, device="meta").state_dict(), weights, "vlm")
    weights = stored(weights, precision, scales)
    load_device, offload_device = mm.text_encoder_device(), mm.text_encoder_offload_device()
    compute = arithmetic(weights, load_device)
    chosen = operations(weights, compute)
    model = mllm.MLLM(config, device="meta", operations=chosen)
    cast_language(model.language_model, chosen, compute)
    for layer, scale in scales.items():
        model.get_submodule(layer).__class__ = ScaledLinear
        model.get_submodule(layer).scale = float(scale)
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False).eval()
    compat.remember_dtypes(model)
    patcher = compat.make_patcher(model, weights, load_device, offload_device, dynamic=not disable_dynamic)
    compat.reload_with(patcher, _reload, source, precision)
    return patcher, compute


def _reload(source: str, precision: torch.dtype | None, disable_dynamic: bool = False):
    return _load_patcher(source, precision, disable_dynamic)[0]


def cast_language(model: torch.nn.Module, operations, compute: torch.dtype) -> None:
    """Gives transformers' modules ComfyUI's classes, so that their weights can be cast and offloaded."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = operations.Linear
        elif type(module) is torch.nn.Embedding:
            module.__class__ = CastEmbedding
            module.out_dtype = compute
        elif type(module).__name__.endswith("RMSNorm"):
            module.__class__ = CastRMSNorm
            module.comfy_cast_weights = operations.Linear.comfy_cast_weights
    # transformers asks the first weight where and how the model runs, and that may be offloaded or in fp8.
    told = {"device": property(lambda self: self.runs_on[0]), "dtype": property(lambda self: self.runs_on[1])}
    model.__class__ = type(type(model).__name__, (type(model),), told)
