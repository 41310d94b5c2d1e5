"""Drawing, editing, thinking and answering from a checkpoint folder or single files, without ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image

from . import images as image_module
from . import sampling
from .chat import History
from .checkpoint import check_folder, open_checkpoint
from .defaults import Guidance
from .distilled import evaluations_in
from .encoder import BranchContexts, Encoder, check_length, fit_history
from .files import check_unchanged
from .generation import GenerationConfig, OnToken, cut_warning, ended, generate
from .load import load_mllm, load_mmdit, load_vae
from .lora import LANGUAGE, TRANSFORMER
from .mllm import MLLM
from .mmdit import MMDiT
from .patched import Strengths, add_loras, open_loras
from .places import locate
from .prefix import PrefixCache
from .prompt import (
    SYSTEM_ANSWER,
    BranchPrompts,
    TokenizedPrompt,
    branch_prompts,
    drawing_system,
    generation_prompt,
)
from .request import ImageRequest
from .rope import grid_of
from .sampling import Denoiser, DrawingContexts
from .speed import ALWAYS, NOT_DISTILLED, TURBO, GuidanceIntervals
from .tokenizer import Thought
from .vae import StandaloneVAE

_logger = logging.getLogger("internvl_u")
Network = TypeVar("Network", bound=torch.nn.Module)


class Pipeline:
    """A checkpoint on one device. Its parts are loaded when first needed.

    They are never on the device together, unless `offload` is False: then each stays there once it is loaded.
    """

    def __init__(
        self,
        root: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        mllm: Path | None = None,
        vae: Path | None = None,
        loras: Strengths = (),
        offload: bool = True,
    ):
        """Opens a checkpoint folder (also in the hub's cache), or the transformer's single file.

        `mllm` and `vae` are the other two files, which are found beside the first by the names that `convert` gives.
        `loras` are files and their strengths, added to the weights when these are loaded.

        Raises:
            FileNotFoundError: the folder, a part of it or a file is missing.
            RuntimeError: it holds another model or is damaged, or a LoRA does not fit it.
            ValueError: several models or files are there, and none is named.
        """
        self.files = locate(Path(root), mllm, vae)
        if not self.files.transformer.is_file():
            check_folder(self.files.transformer)
        self.root, self.dtype, self.device = self.files.transformer, dtype, torch.device(device)
        self.encoder = Encoder.from_checkpoint(open_checkpoint(self.files.language))
        self.loras = open_loras(loras, self.files)
        self.offload = offload
        self._networks: dict[str, torch.nn.Module] = {}
        self._given: set[str] = set()
        self._kept = PrefixCache()

    @torch.inference_mode()
    def draw(self, request: ImageRequest, on_step: Callable[[int], object] | None = None) -> Image.Image:
        """Returns the image, at the wished size; `on_step(n)` is called after each of the steps.

        Raises:
            ValueError: a size, the number of steps or the number of placeholders is out of range.
        """
        return next(self.draw_several(request, [request.seed], on_step))

    def draw_several(
        self, request: ImageRequest, seeds: Sequence[int], on_step: Callable[[int], object] | None = None
    ) -> Iterator[Image.Image]:
        """Yields an image for each seed, equal to the one that is drawn alone; the prompt is read once.

        Raises:
            ValueError: a size, the number of steps or the number of placeholders is out of range.
        """
        request = self.settled(request)
        width, height = self.size(request)
        drawn = image_module.drawn_size(width, height)
        self._vae()  # one that cannot be loaded is not found after minutes of work
        sigmas, intervals = sampling.flow_sigmas(request.way.steps), request.way.intervals
        contexts = self.encode_prompt(request)
        for seed in seeds:
            noise = image_module.noise(*drawn, seed)
            latent = self.sample(contexts, noise, sigmas, request.guidance, on_step, intervals)
            yield image_module.resize(image_module.to_image(self.decode(latent)[0]), width, height)

    def settled(self, request: ImageRequest) -> ImageRequest:
        """Returns the request with the evaluations of `turbo`, if that is its preset and it has none.

        Raises:
            ValueError: the transformer has not been distilled to few of them.
        """
        if request.speed != TURBO or request.evaluations is not None:
            return request
        evaluations = evaluations_in(self._mmdit().state_dict())
        if evaluations is None:
            raise ValueError(NOT_DISTILLED)
        return replace(request, evaluations=evaluations)

    def use(self, networks: Mapping[str, torch.nn.Module]) -> None:
        """Takes networks in the place of those of the files: "mllm", "mmdit" or "vae". What was read is forgotten.

        They are the caller's: each is put on the pipeline's device now, and stays there.
        """
        self._networks |= {name: network.to(self.device) for name, network in networks.items()}
        self._given |= set(networks)
        self._kept = PrefixCache()

    def load(self, drawing: bool = True) -> None:
        """Loads its parts now, which are else loaded when first needed; without `drawing` the language model alone.

        Raises:
            FileNotFoundError: a file is missing.
            RuntimeError: one is damaged, or a LoRA does not fit.
        """
        if drawing:
            self._vae()
            self._mmdit()
        self._mllm()

    def forget(self) -> None:
        """Lets go of all networks, which are loaded anew when they are needed, and of what was read."""
        self._networks.clear()
        self._given.clear()
        self._kept = PrefixCache()

    def size(self, request: ImageRequest) -> tuple[int, int]:
        """Returns the wished (width, height): by default the first input image's, or the checkpoint's own."""
        width, height = self.encoder.default_size
        if request.images:
            width, height = self.encoder.sizes.fit(*request.images[0].size)
        return (
            width if request.width is None else request.width,
            height if request.height is None else request.height,
        )

    @torch.inference_mode()
    def generate(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        system: str = SYSTEM_ANSWER,
        config: GenerationConfig | None = None,
        on_token: OnToken | None = None,
        history: History | None = None,
    ) -> list[int]:
        """Returns the ids that the model writes after the prompt; see `generation.generate`.

        `history` is the conversation before; turns that do not fit are left out, which is logged.
        """
        config, model = config or GenerationConfig(), self._mllm()
        prompt, features = self.question(text, images, system, config, history)

        def report(ids: list[int]) -> None:
            check_unchanged(model.mapped)
            if on_token is not None:
                on_token(ids)

        written = generate(self.encoder, model, prompt, features, config, on_token=report, **self.reading)
        self.warn_of_cut(written)
        return written

    @torch.inference_mode()
    def question(
        self,
        text: str,
        images: Sequence[Image.Image],
        system: str,
        config: GenerationConfig,
        history: History | None = None,
    ) -> tuple[TokenizedPrompt, list[torch.Tensor]]:
        """Returns a question's prompt and the features of its images and those before; see `generate`.

        Raises:
            ValueError: a text has more placeholders than there are images, or the prompt is too long.
        """
        model = self._mllm()

        def build(some: History) -> TokenizedPrompt:
            given: dict[str, Any] = {
                "system": system,
                "images": len(images),
                "grid": model.vision.grid,
                "earlier": some.turns,
            }
            return generation_prompt(self.encoder.tokenizer, text, **given)

        history = _fitting(model, history or History(), build, config.max_new_tokens)
        prompt = build(history)
        check_length(model, prompt)
        return prompt, self.encoder.image_features(model, (*history.images, *images), **self.reading)

    def warn_of_cut(self, written: Sequence[int]) -> None:
        """Logs that a limit has ended a text, if one has."""
        if not ended(written, self.encoder.tokenizer.stops):
            _logger.warning("InternVL-U: %s", cut_warning(len(written)))

    def answer(
        self,
        question: str,
        images: Sequence[Image.Image] = (),
        system: str | None = None,
        config: GenerationConfig | None = None,
        on_token: OnToken | None = None,
        history: History | None = None,
    ) -> str:
        """Returns the model's answer to a question about any number of images, and about those of `history`."""
        system = SYSTEM_ANSWER if system is None else system
        return self.encoder.tokenizer.decode(self.generate(question, images, system, config, on_token, history))

    def think(
        self, request: ImageRequest, config: GenerationConfig | None = None, on_token: OnToken | None = None
    ) -> Thought:
        """Returns the thought that the model has before it draws, as far as the official code hands it on."""
        system = drawing_system(len(request.images)) if request.system is None else request.system
        written = self.generate(request.prompt, request.images, system, config, on_token, request.history)
        return self.encoder.tokenizer.decode_thought(written)

    @torch.inference_mode()
    def encode_prompt(self, request: ImageRequest) -> DrawingContexts:
        """Returns what the transformer draws from.

        Raises:
            ValueError: a text has more placeholders than there are input images, or `reference_size` is out of range.
        """
        references = self.encode_references(request)
        contexts = self.encode_contexts(request)
        return DrawingContexts(contexts.conditional, contexts.partial, contexts.unconditional, references)

    @torch.inference_mode()
    def encode_references(self, request: ImageRequest) -> tuple[torch.Tensor, ...]:
        """Returns the latents [1, 16, h, w] of the input images as the transformer sees them.

        Raises:
            ValueError: `reference_size` is out of range.
        """
        sizes = self.encoder.sizes.limited(request.reference_size)
        if not request.images:
            return ()
        vae = self._vae()
        return tuple(vae.encode(image_module.reference_pixels(image, sizes)) for image in request.images)

    @torch.inference_mode()
    def encode_contexts(self, request: ImageRequest) -> BranchContexts:
        """Returns the contexts that the transformer draws from: `encode_prompt` without the references' latents.

        Raises:
            ValueError: as for `branch_prompts`.
        """
        prompts, history = self._branch_prompts(request)
        model = self._mllm()
        seen = self.encoder.image_features(model, (*history.images, *request.images), **self.reading)
        earlier, features = seen[: len(history.images)], seen[len(history.images) :]
        return self.encoder.encode_branches(model, prompts, features, earlier=earlier, **self.reading)

    def branch_prompts(self, request: ImageRequest) -> BranchPrompts:
        """Returns the prompts of a picture's branches as token ids, before anything is computed of them.

        Raises:
            ValueError: a text has more placeholders than there are input images, or a prompt is too long.
        """
        return self._branch_prompts(request)[0]

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> torch.Tensor:
        """Returns the latent [1, 16, h, w] of an RGB image of 8 h x 8 w pixels: what `decode` turns back.

        Raises:
            ValueError: a side is no multiple of 16.
        """
        if image.width % image_module.STRIDE or image.height % image_module.STRIDE:
            raise ValueError(
                f"a picture of {image.width} x {image.height} pixels found, multiples of {image_module.STRIDE} expected"
            )
        latent = self._vae().encode(image_module.vae_pixels(image))
        sampling.check_finite(latent, "the latent", "the VAE")
        return latent

    @torch.inference_mode()
    def sample(
        self,
        contexts: DrawingContexts | Sequence[DrawingContexts],
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        guidance: Guidance,
        on_step: Callable[[int], object] | None = None,
        intervals: GuidanceIntervals = ALWAYS,
    ) -> torch.Tensor:
        """Returns the final latents [N, 16, h, w], fp32, from `noise` [N, 16, h, w] and the contexts of N pictures."""
        model = self._mmdit()
        levels = sigmas.to(self.device)
        denoise = Denoiser(model, contexts, grid_of(noise), guidance, self.dtype, intervals, levels)

        def report(index: int, *_: torch.Tensor) -> None:
            check_unchanged(model.mapped)
            if on_step is not None:
                on_step(index + 1)

        latent = sampling.sample(denoise, noise.to(self.device), levels, report)
        sampling.check_finite(latent, "the drawn latent", "the transformer")
        return latent

    @torch.inference_mode()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Returns images [N, 3, 8 h, 8 w] in [-1, 1] from final latents [N, 16, h, w]."""
        decoded = self._vae().decode(latent.to(self.dtype)).float()
        sampling.check_finite(decoded, "the decoded image", "the VAE")
        return decoded

    @property
    def reading(self) -> dict[str, Any]:
        """What prompts are read with, by the names that the encoder's functions take."""
        return {"device": self.device, "dtype": self.dtype, "kept": self._kept}

    def _mmdit(self) -> MMDiT:
        def load() -> MMDiT:
            return add_loras(load_mmdit(self.files.transformer, dtype=self.dtype), TRANSFORMER, self.loras)

        return self._on_device("mmdit", load)

    def _branch_prompts(self, request: ImageRequest) -> tuple[BranchPrompts, History]:
        model, tokenizer = self._mllm(), self.encoder.tokenizer

        def build(history: History) -> BranchPrompts:
            return branch_prompts(
                tokenizer,
                request.prompt,
                images=len(request.images),
                grid=model.vision.grid,
                system=request.system,
                thought=tokenizer.encode_thought(request.thought),
                negative=request.negative_prompt,
                earlier=history.turns,
            )

        history = _fitting(model, request.history, lambda some: build(some).conditional)
        prompts = build(history)
        check_length(model, prompts.conditional, prompts.partial, prompts.unconditional)
        return prompts, history

    def _vae(self) -> StandaloneVAE:
        return self._on_device("vae", lambda: load_vae(self.files.vae, dtype=self.dtype))

    def _mllm(self) -> MLLM:
        def load() -> MLLM:
            return add_loras(load_mllm(self.files.language, dtype=self.dtype), LANGUAGE, self.loras)

        return self._on_device("mllm", load)

    def _on_device(self, name: str, load: Callable[[], Network]) -> Network:
        for other, network in self._networks.items():
            if self.offload and other not in (name, *self._given):
                network.to("cpu")
        if name not in self._networks:
            self._networks[name] = load()
        network = self._networks[name]
        check_unchanged(getattr(network, "mapped", ()))
        if name in self._given:
            return cast(Network, network)
        move = network.to_sample if self.offload and isinstance(network, MMDiT) else network.to
        return cast(Network, move(self.device))


def _fitting(
    model: MLLM, history: History, build: Callable[[History], TokenizedPrompt], new_tokens: int = 0
) -> History:
    fitting, note = fit_history(model, history, build, new_tokens)
    if note:
        _logger.warning("InternVL-U: %s", note)
    return fitting
