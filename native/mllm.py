"""MLLM: the multimodal language model under ComfyUI's memory management."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch
from PIL import Image

from ..internvl_u.checkpoint import Part
from ..internvl_u.config import mllm_config
from ..internvl_u.encoder import Encoder, check_length
from ..internvl_u.files import check_unchanged
from ..internvl_u.generation import GenerationConfig, OnToken, generate
from ..internvl_u.images import drawn_size, reference_pixels
from ..internvl_u.load import check_part
from ..internvl_u.mllm import MLLM
from ..internvl_u.prompt import TokenizedPrompt, branch_prompts, generation_prompt
from ..internvl_u.rope import Layout
from ..internvl_u.sampling import check_finite
from . import compat
from .conditioning import Conditioning, own_options
from .dtypes import cast_weights, check_device, compute_dtype, operations_for
from .gguf_ops import PackedPatcher, cast_packed_layers
from .guidance import PARTIAL, THOUGHT
from .hf_modules import cast_language_model
from .latents import Latent, check_vae
from .model import LAYOUT
from .quantized import quantize_layers
from .sampler import empty_latent

Execution = dict[str, Any]
"""The `device` and the `dtype` of the arithmetic, as keywords."""


@dataclass
class NativeMLLM:
    """What the MLLM output carries: the model under ComfyUI's patcher, and the checkpoint's encoder."""

    patcher: comfy.model_patcher.ModelPatcher
    encoder: Encoder
    dtype: torch.dtype
    _empty_prompt: TokenizedPrompt | None = None
    _empty_context: torch.Tensor | None = None  # of the last empty prompt: it is the same for every text

    @property
    def model(self) -> MLLM:
        """The network; its weights may be offloaded."""
        return self.patcher.model

    @property
    def context_width(self) -> int:
        """Values per token that are handed on to the transformer."""
        return len(self.encoder.layers) * self.model.language_model.config.hidden_size

    def get_ram_usage(self) -> int:
        """Returns the bytes that ComfyUI's cache counts for this object."""
        return self.patcher.model_size()

    def is_dynamic(self) -> bool:
        """Returns whether the weights take no memory of their own: ComfyUI's cache keeps such outputs longer."""
        return compat.is_dynamic(self.patcher)

    def encode(
        self,
        text: str,
        *,
        system: str | None = None,
        images: Sequence[Image.Image] = (),
        vae: comfy.sd.VAE | None = None,
        thought: str = "",
    ) -> tuple[Conditioning, Conditioning, Latent]:
        """Returns positive and negative CONDITIONING and a latent of the size to draw.

        `images` are RGB images to edit; they need the `vae`. `thought` is a chain of thought to draw from.

        Raises:
            ValueError: images without a VAE, or more placeholders in the text than images.
        """
        if images and vae is None:
            raise ValueError(f"{len(images)} pictures found and no VAE: connect the VAE of Load InternVL-U to Encode")
        if images:
            check_vae(vae)
        tokenizer = self.encoder.tokenizer
        thinking = tokenizer.encode_thought(thought)
        prompts = branch_prompts(
            tokenizer,
            text,
            images=len(images),
            grid=self.model.vision.grid,
            system=system,
            thought=thinking,
        )
        check_length(self.model, prompts.conditional, prompts.partial)
        references = {"reference_latents": self._references(vae, images)} if images and vae is not None else {}
        known = self._empty_context if self._empty_prompt == prompts.unconditional else None
        with self._ready(max(len(prompts.conditional.ids), len(prompts.partial.ids))) as where:
            features = self.encoder.image_features(self.model, images, **where)
            contexts = self.encoder.encode_branches(self.model, prompts, features, unconditional=known, **where)
        positive = self._conditioning(*contexts.conditional, references)
        negative = self._conditioning(*contexts.unconditional, {})
        self._empty_prompt, self._empty_context = prompts.unconditional, negative[0][0][0]
        if thinking is not None:
            positive[0][1][THOUGHT] = True
        if contexts.partial is not None:
            positive[0][1][PARTIAL] = self._conditioning(*contexts.partial, references)
        size = self.encoder.sizes.fit(*images[0].size) if images else self.encoder.default_size
        return positive, negative, empty_latent(*drawn_size(*size))

    def generate(
        self,
        text: str,
        *,
        system: str,
        images: Sequence[Image.Image] = (),
        config: GenerationConfig,
        on_token: OnToken | None = None,
    ) -> list[int]:
        """Returns the ids that the model writes after a prompt; `on_token(ids)` is called after each token.

        Raises:
            ValueError: more placeholders in the text than images.
        """
        grid = self.model.vision.grid
        prompt = generation_prompt(self.encoder.tokenizer, text, system=system, images=len(images), grid=grid)
        check_length(self.model, prompt)

        def report(ids: list[int]) -> None:
            check_unchanged(self.model.mapped)
            if on_token is not None:
                on_token(ids)

        with self._ready(len(prompt.ids), config) as where:
            features = self.encoder.image_features(self.model, images, **where)
            return generate(self.encoder, self.model, prompt, features, config, on_token=report, **where)

    @contextlib.contextmanager
    def _ready(self, tokens: int, config: GenerationConfig | None = None) -> Iterator[Execution]:
        check_unchanged(self.model.mapped)
        mm.load_models_gpu([self.patcher], memory_required=self._activations(tokens, config))
        device = self.patcher.load_device
        cast(Any, self.model.language_model).execution = (device, self.dtype)
        with compat.device_context(device):
            yield {"device": device, "dtype": self.dtype}
        check_unchanged(self.model.mapped)

    def _conditioning(self, context: torch.Tensor, layout: Layout, options: dict[str, Any]) -> Conditioning:
        context = context.unsqueeze(0).to(mm.intermediate_device(), torch.float32)
        return [[context, {LAYOUT: layout, **own_options(), **options}]]

    def _references(self, vae: comfy.sd.VAE, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        pixels = (reference_pixels(image, self.encoder.sizes) for image in images)
        latents = [cast(torch.Tensor, vae.encode((one.movedim(1, -1) + 1) / 2)) for one in pixels]  # BCHW -> BHWC
        for latent in latents:
            check_finite(latent, "a picture's latent", "the VAE")
        return latents

    def _activations(self, tokens: int, config: GenerationConfig | None) -> int:
        language = cast(Any, self.model.language_model.config)
        values = tokens * (language.num_hidden_layers * language.hidden_size + 4 * language.intermediate_size)
        if config is not None:
            per_token = 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim
            values += per_token * (tokens + config.max_new_tokens) * config.beams
            values += language.vocab_size * config.beams * 4
        return values * self.dtype.itemsize


def check_mllm(mllm: object) -> None:
    """Makes sure that an MLLM is InternVL-U's.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(mllm, NativeMLLM):
        raise ValueError(f"an MLLM of another kind ({type(mllm).__name__}) found: connect the MLLM of Load InternVL-U")


def load_mllm(source: str, precision: torch.dtype | None = None) -> NativeMLLM:
    """Returns the MLLM of a checkpoint folder or a converted file; `precision` None keeps the files' dtype.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
        ValueError: the precision does not fit the file.
    """
    part = compat.open_part(Path(source), "vlm")
    patcher, compute = _make_patcher(part, precision)
    return NativeMLLM(patcher, Encoder.from_checkpoint(part.checkpoint), compute)


def _make_patcher(
    part: Part, precision: torch.dtype | None, disable_dynamic: bool = False
) -> tuple[comfy.model_patcher.ModelPatcher, torch.dtype]:
    check_part(part)
    config = mllm_config(part.shapes, part.config, part.source)
    weights = cast_weights(part, precision)
    load_device, offload_device = mm.text_encoder_device(), mm.text_encoder_offload_device()
    check_device(weights, load_device, part)
    plain = {name: tensor for name, tensor in weights.items() if name not in part.packed}
    compute = compute_dtype(plain, load_device)
    operations = operations_for(plain, compute)
    model = MLLM(config, device="meta", operations=operations)
    cast_language_model(model.language_model, operations, compute)
    quantize_layers(model, part.layers, compute, part.checkpoint.path)
    cast_packed_layers(model, part.packed, compute)
    model.requires_grad_(False)
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()
    model.mapped = compat.mapped_files(part, weights)
    compat.remember_dtypes(model)
    patcher = compat.make_patcher(
        model, weights, load_device, offload_device, not disable_dynamic, PackedPatcher if part.packed else None
    )
    compat.reload_with(patcher, _reload_patcher, str(part.checkpoint.path), precision)
    return patcher, compute


def _reload_patcher(
    source: str, precision: torch.dtype | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    part = compat.open_part(Path(source), "vlm")
    return _make_patcher(part, precision, disable_dynamic)[0]
