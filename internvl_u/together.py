"""Several pictures or texts at once: the networks' weights are read once for all of them.

A picture is drawn from its own noise and contexts, which are read alone, and a text written after its own prompt, so
none depends on what it comes with but for rounding: products of more rows may be summed in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from .batch_generation import generate_batch
from .chat import History
from .files import check_unchanged
from .generation import GenerationConfig
from .images import drawn_size, latent_size, noise, resize, to_image
from .pipeline import Pipeline
from .prompt import SYSTEM_ANSWER, drawing_system
from .request import ImageRequest
from .sampling import DrawingContexts, flow_sigmas
from .speed import TURBO
from .tokenizer import Thought


@dataclass(frozen=True)
class Question:
    """What is to be answered; see `Pipeline.answer`. Without a `system` message it is the usual one."""

    text: str
    images: tuple[Image.Image, ...] = ()
    system: str | None = None
    config: GenerationConfig = GenerationConfig()
    history: History = History()


def shape_of(pipeline: Pipeline, request: ImageRequest) -> tuple[Any, ...]:
    """Returns what pictures must share to be drawn together: a value to compare and to hash.

    That is the drawn size, steps and intervals of guidance, both scales, and the latents' sizes of the input images.
    Nothing is loaded for it.

    Raises:
        ValueError: a size or `reference_size` is out of range.
    """
    unsettled = request.speed == TURBO and request.evaluations is None
    way = (replace(request, evaluations=0) if unsettled else request).way
    sizes = pipeline.encoder.sizes.limited(request.reference_size)
    references = tuple(latent_size(*sizes.fit(*image.size)) for image in request.images)
    return drawn_size(*pipeline.size(request)), unsettled, way, request.guidance, references


def draw_together(pipeline: Pipeline, wishes: Sequence[ImageRequest]) -> list[Image.Image]:
    """Returns the picture of each wish, at its wished size. A single one has the very bits of `Pipeline.draw`.

    Raises:
        ValueError: two differ in `shape_of`, or one is refused by `Pipeline.draw`.
        RuntimeError: as from `Pipeline.draw`; which of the pictures is at fault is found by drawing each alone.
    """
    if not wishes:
        return []
    # One by one: several share little, need more memory, and other kernels round otherwise.
    decoded = [pipeline.decode(latent[None])[0] for latent in sample_together(pipeline, wishes)]
    sizes = [pipeline.size(wish) for wish in wishes]
    return [resize(to_image(pixels), *size) for pixels, size in zip(decoded, sizes, strict=True)]


def sample_together(pipeline: Pipeline, wishes: Sequence[ImageRequest]) -> torch.Tensor:
    """Returns the final latents [N, 16, h, w], fp32, of N wishes of one shape, at least one.

    Raises:
        ValueError, RuntimeError: as from `draw_together`.
    """
    shapes = {shape_of(pipeline, wish) for wish in wishes}
    if len(shapes) > 1:
        raise ValueError(f"pictures of {len(shapes)} shapes found, one expected: group them by `shape_of`")
    wishes = [pipeline.settled(wish) for wish in wishes]
    first, drawn = wishes[0], drawn_size(*pipeline.size(wishes[0]))
    pipeline._vae()  # one that cannot be loaded is not found after minutes of work
    references = [pipeline.encode_references(wish) for wish in wishes]
    read = [pipeline.encode_contexts(wish) for wish in wishes]
    contexts = [
        DrawingContexts(one.conditional, one.partial, one.unconditional, seen)
        for one, seen in zip(read, references, strict=True)
    ]
    order = sorted(range(len(wishes)), key=lambda i: _lengths(contexts[i]))  # equal ones share calls of the attention
    start = torch.cat([noise(*drawn, wishes[i].seed) for i in order])
    sigmas, intervals = flow_sigmas(first.way.steps), first.way.intervals
    latents = pipeline.sample([contexts[i] for i in order], start, sigmas, first.guidance, intervals=intervals)
    return latents[torch.tensor(order, device=latents.device).argsort()]


def _lengths(contexts: DrawingContexts) -> list[int]:
    return [0 if branch is None else len(branch[0]) for branch in contexts[:3]]


def answer_together(pipeline: Pipeline, prompts: Sequence[Question]) -> list[str]:
    """Returns the answer to each question.

    Raises:
        ValueError: two have different configs, or one is refused by `Pipeline.answer`.
    """
    configs = {question.config for question in prompts}
    if len(configs) > 1:
        raise ValueError(f"{len(configs)} configs found, one for all questions expected: group them by `config`")
    decode = pipeline.encoder.tokenizer.decode
    return [decode(written) for written in _generate(pipeline, prompts)]


def think_together(
    pipeline: Pipeline, wishes: Sequence[ImageRequest], config: GenerationConfig | None = None
) -> list[Thought]:
    """Returns the thought that the model has before it draws each of them; see `Pipeline.think`.

    Raises:
        ValueError: one is refused by `Pipeline.think`.
    """
    config = config or GenerationConfig()
    prompts = [
        Question(
            one.prompt,
            one.images,
            drawing_system(len(one.images)) if one.system is None else one.system,
            config,
            one.history,
        )
        for one in wishes
    ]
    decode = pipeline.encoder.tokenizer.decode_thought
    return [decode(written) for written in _generate(pipeline, prompts)]


def _generate(pipeline: Pipeline, prompts: Sequence[Question]) -> list[list[int]]:
    """Returns the ids that the model writes after each of questions of one config."""
    given = [(one.text, one.images, SYSTEM_ANSWER if one.system is None else one.system, one.config) for one in prompts]
    if len(prompts) < 2 or prompts[0].config.beams > 1:
        return [pipeline.generate(*some, history=one.history) for some, one in zip(given, prompts, strict=True)]
    model = pipeline._mllm()
    read = [pipeline.question(*some, history=one.history) for some, one in zip(given, prompts, strict=True)]
    inputs = (pipeline.encoder, model, read, prompts[0].config)
    with torch.inference_mode():
        texts = generate_batch(*inputs, on_step=lambda: check_unchanged(model.mapped), **pipeline.reading)
    for written in texts:
        pipeline.warn_of_cut(written)
    return texts
