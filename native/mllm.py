"""MLLM: the multimodal language model under ComfyUI's memory management."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import comfy.hooks
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch
from PIL import Image

from ..internvl_u.chat import History
from ..internvl_u.checkpoint import Part
from ..internvl_u.config import mllm_config
from ..internvl_u.encoder import Encoder, check_length, fit_history
from ..internvl_u.files import check_unchanged
from ..internvl_u.generation import GenerationConfig, OnToken, generate
from ..internvl_u.images import ReferenceSizes, drawn_size, reference_pixels
from ..internvl_u.load import check_part
from ..internvl_u.mllm import MLLM
from ..internvl_u.prefix import PrefixCache
from ..internvl_u.prompt import BranchPrompts, TokenizedPrompt, branch_prompts, generation_prompt
from ..internvl_u.rope import Layout
from ..internvl_u.sampling import check_finite
from . import compat
from .conditioning import Conditioning, own_options
from .dtypes import cast_weights, check_device, compute_dtype, operations_for
from .embedding import with_embeddings
from .gguf_ops import PackedPatcher, cast_packed_layers
from .guidance import PARTIAL, THOUGHT
from .latents import Latent, check_vae, with_edited_size
from .model import LAYOUT
from .patcher import MovingPatcher
from .quantized import quantize_layers
from .sampler import empty_latent

_logger = logging.getLogger("internvl_u")
OnNote = Callable[[str], object]
Execution = dict[str, Any]
"""The `device` and the `dtype` of the arithmetic, and what is `kept` of earlier texts, as keywords."""


@dataclass
class NativeMLLM:
    """What the MLLM output carries: the model under ComfyUI's patcher, and the checkpoint's encoder."""

    patcher: comfy.model_patcher.ModelPatcher
    encoder: Encoder
    dtype: torch.dtype
    kept: PrefixCache = dataclasses.field(default_factory=PrefixCache)

    @property
    def model(self) -> MLLM:
        """The network; its weights may be offloaded."""
        return self.patcher.model

    @property
    def context_width(self) -> int:
        """Values per token that are handed on to the transformer."""
        return len(self.encoder.layers) * self.model.language_model.config.hidden_size

    def get_ram_usage(self) -> int:
        """Returns the bytes that ComfyUI's cache counts for this object: its weights, and what it has read."""
        return self.patcher.model_size() + self.kept.bytes

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
        negative_prompt: str = "",
        reference_size: int | None = None,
        history: History | None = None,
        on_note: OnNote | None = None,
    ) -> tuple[Conditioning, Conditioning, Latent]:
        """Returns positive and negative CONDITIONING and a latent of the size to draw.

        `images` are RGB images to edit; they need the `vae`. `thought` is a chain of thought to draw from,
        `negative_prompt` a text in place of the model's own empty prompt. `reference_size` is the most that the
        transformer sees of each image, as the side in pixels of a square of equal area; None for the official size.
        `history` is the conversation before, as far as it fits; `on_note(sentence)` is told of what does not. The
        latent remembers the first image's own size; see `latents.edited_size`.

        Raises:
            ValueError: images without a VAE, or more placeholders in the text than images.
        """
        if images and vae is None:
            raise ValueError(f"{len(images)} pictures found and no VAE: connect the VAE of Load InternVL-U to Encode")
        if images:
            check_vae(vae)
        tokenizer = self.encoder.tokenizer
        thinking = tokenizer.encode_thought(thought)

        def build(history: History) -> BranchPrompts:
            return branch_prompts(
                tokenizer,
                text,
                images=len(images),
                grid=self.model.vision.grid,
                system=system,
                thought=thinking,
                negative=negative_prompt,
                earlier=history.turns,
            )

        history = self._fitting(history, lambda some: build(some).conditional, 0, on_note)
        prompts = build(history)
        every = (prompts.conditional, prompts.partial, prompts.unconditional)
        check_length(self.model, *every)
        sizes = self.encoder.sizes.limited(reference_size)
        references = {"reference_latents": self._references(vae, images, sizes)} if images and vae is not None else {}
        with self._ready(max(len(prompt.ids) for prompt in every)) as where:
            seen = self.encoder.image_features(self.model, (*history.images, *images), **where)
            earlier, features = seen[: len(history.images)], seen[len(history.images) :]
            contexts = self.encoder.encode_branches(self.model, prompts, features, earlier=earlier, **where)
        positive = self._conditioning(*contexts.conditional, references)
        negative = self._conditioning(*contexts.unconditional, {})
        if thinking is not None:
            positive[0][1][THOUGHT] = True
        if contexts.partial is not None:
            positive[0][1][PARTIAL] = self._conditioning(*contexts.partial, references)
        return positive, negative, self._latent(images)

    def generate(
        self,
        text: str,
        *,
        system: str,
        images: Sequence[Image.Image] = (),
        config: GenerationConfig,
        on_token: OnToken | None = None,
        history: History | None = None,
        on_note: OnNote | None = None,
    ) -> list[int]:
        """Returns the ids that the model writes after a prompt; `on_token(ids)` is called after each token.

        `history` is the conversation before, as far as it fits; `on_note(sentence)` is told of what does not.

        Raises:
            ValueError: more placeholders in the text than images.
        """
        given: dict[str, Any] = {"system": system, "images": len(images), "grid": self.model.vision.grid}

        def build(history: History) -> TokenizedPrompt:
            return generation_prompt(self.encoder.tokenizer, text, earlier=history.turns, **given)

        history = self._fitting(history, build, config.max_new_tokens, on_note)
        return self.write(build(history), (*history.images, *images), config, on_token)

    def write(
        self,
        prompt: TokenizedPrompt,
        images: Sequence[Image.Image],
        config: GenerationConfig,
        on_token: OnToken | None = None,
    ) -> list[int]:
        """Returns the ids that the model writes after a prompt with these images; see `generate`.

        Raises:
            ValueError: the prompt does not fit the model.
        """
        check_length(self.model, prompt)

        def report(ids: list[int]) -> None:
            check_unchanged(self.model.mapped)
            if on_token is not None:
                on_token(ids)

        with self._ready(len(prompt.ids), config) as where:
            features = self.encoder.image_features(self.model, images, **where)
            return generate(self.encoder, self.model, prompt, features, config, on_token=report, **where)

    def _fitting(
        self,
        history: History | None,
        build: Callable[[History], TokenizedPrompt],
        new_tokens: int,
        on_note: OnNote | None,
    ) -> History:
        fitting, note = fit_history(self.model, history or History(), build, new_tokens)
        if note:
            _logger.warning("InternVL-U: %s", note)
            if on_note is not None:
                on_note(note)
        return fitting

    def load(self, tokens: int, config: GenerationConfig | None = None) -> None:
        """Loads the weights as far as there is room for them beside a prompt's values, and for those of writing."""
        check_unchanged(self.model.mapped)
        mm.load_models_gpu([self.patcher], memory_required=self._activations(tokens, config))

    def over(self, patcher: comfy.model_patcher.ModelPatcher) -> NativeMLLM:
        """Returns the MLLM over another patcher of the same network, or of one like it on another device.

        Where that device has no fast arithmetic in bf16, as the CPU, it computes in fp32.
        """
        moved = patcher.load_device != self.patcher.load_device
        if not moved or self.dtype != torch.bfloat16 or mm.should_use_bf16(patcher.load_device):
            return dataclasses.replace(self, patcher=patcher)
        patcher.force_cast_weights = True
        return dataclasses.replace(self, patcher=patcher, dtype=torch.float32)

    @contextlib.contextmanager
    def computing(self) -> Iterator[Execution]:
        """Makes the loaded weights ready; gives the device and the dtype of the arithmetic, and what has been read."""
        device = self.patcher.load_device
        with compat.device_context(device):
            yield {"device": device, "dtype": self.dtype, "kept": self._kept()}
        check_unchanged(self.model.mapped)

    def _kept(self) -> PrefixCache | None:
        """Returns what has been read with these weights; None where they are changed in a way that has no name."""
        patcher = self.patcher
        if patcher.current_hooks is not None or patcher.injections or patcher.object_patches:
            return None
        self.kept.weights = f"{self.patcher.patches_uuid} on {patcher.load_device} in {self.dtype}"
        return self.kept

    @contextlib.contextmanager
    def _ready(self, tokens: int, config: GenerationConfig | None = None) -> Iterator[Execution]:
        self.load(tokens, config)
        with self.computing() as where:
            yield where

    def _conditioning(self, context: torch.Tensor, layout: Layout, options: dict[str, Any]) -> Conditioning:
        context = context.unsqueeze(0).to(mm.intermediate_device(), torch.float32)
        return [[context, {LAYOUT: layout, **own_options(), **options}]]

    def _latent(self, images: Sequence[Image.Image]) -> Latent:
        if not images:
            return empty_latent(*drawn_size(*self.encoder.default_size))
        latent = empty_latent(*drawn_size(*self.encoder.sizes.fit(*images[0].size)))
        return with_edited_size(latent, *images[0].size)

    def _references(
        self, vae: comfy.sd.VAE, images: Sequence[Image.Image], sizes: ReferenceSizes
    ) -> list[torch.Tensor]:
        pixels = (reference_pixels(image, sizes) for image in images)
        latents = [cast(torch.Tensor, vae.encode((one.movedim(1, -1) + 1) / 2)) for one in pixels]  # BCHW -> BHWC
        for latent in latents:
            check_finite(latent, "a picture's latent", "the VAE")
        return latents

    def _activations(self, tokens: int, config: GenerationConfig | None) -> int:
        language = self.model.language_model.config
        values = tokens * (language.num_hidden_layers * language.hidden_size + 4 * language.intermediate_size)
        if config is not None:
            values += language.cache_width * (tokens + config.max_new_tokens) * config.beams
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
    model = MLLM(config, device="meta", operations=with_embeddings(operations_for(plain, compute), compute))
    quantize_layers(model, part.layers, compute, part.checkpoint.path)
    cast_packed_layers(model, part.packed, compute)
    model.requires_grad_(False)
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()
    model.mapped = compat.mapped_files(part, weights)
    compat.remember_dtypes(model)
    streams = not disable_dynamic and not part.packed and compat.can_stream()
    cls = None if streams else PackedPatcher if part.packed else MovingPatcher
    patcher = compat.make_patcher(model, weights, load_device, offload_device, streams, cls)
    # As ComfyUI's own text encoders have it, for hooks on the CLIP over it.
    patcher.is_clip, patcher.hook_mode = True, comfy.hooks.EnumHookMode.MinVram
    compat.reload_with(patcher, _reload_patcher, part, str(part.checkpoint.path), precision)
    return patcher, compute


def _reload_patcher(
    source: str, precision: torch.dtype | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    part = compat.open_part(Path(source), "vlm")
    return _make_patcher(part, precision, disable_dynamic)[0]
