"""Several requests at once: pictures of one shape share the transformer's calls, texts the language model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from .chat import History
from .generation import GenerationConfig
from .images import drawn_size, latent_size
from .pipeline import Pipeline
from .request import ImageRequest
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
    """Returns what requests must share to be drawn together: a value to compare and to hash.

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


def draw_together(pipeline: Pipeline, requests: Sequence[ImageRequest]) -> list[Image.Image]:
    """Returns the picture of each request, at its wished size.

    Raises:
        ValueError: two requests differ in `shape_of`, or one is refused by `Pipeline.draw`.
    """
    shapes = {shape_of(pipeline, request) for request in requests}
    if len(shapes) > 1:
        raise ValueError(f"requests of {len(shapes)} shapes found, one expected: group them by `shape_of`")
    return [pipeline.draw(request) for request in requests]


def answer_together(pipeline: Pipeline, prompts: Sequence[Question]) -> list[str]:
    """Returns the answer to each question.

    Raises:
        ValueError: two have different configs, or one is refused by `Pipeline.answer`.
    """
    _check_configs([question.config for question in prompts])
    return [pipeline.answer(one.text, one.images, one.system, one.config, history=one.history) for one in prompts]


def think_together(
    pipeline: Pipeline, requests: Sequence[ImageRequest], config: GenerationConfig | None = None
) -> list[Thought]:
    """Returns the thought that the model has before it draws each of the requests; see `Pipeline.think`.

    Raises:
        ValueError: one is refused by `Pipeline.think`.
    """
    return [pipeline.think(request, config) for request in requests]


def _check_configs(configs: Sequence[GenerationConfig]) -> None:
    if len(set(configs)) > 1:
        raise ValueError(f"{len(set(configs))} configs found, one for all questions expected: group them by `config`")
