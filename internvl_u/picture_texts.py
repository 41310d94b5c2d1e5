"""What stands beside the pixels of a drawn PNG: our own JSON, the line that viewers read, and a graph for ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from . import __version__
from .console import shown_name
from .defaults import NANO_CHOICE
from .graph import MOST_IMAGES, SIZE_NAMES, Drawing, api_graph, page_graph
from .pipeline import ImageRequest, Pipeline
from .places import nano_folder, shown_folder

SAMPLER = "DPM++ 2M"
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def picture_texts(pipeline: Pipeline, request: ImageRequest, files: Sequence[Path], model: Path) -> PngInfo:
    """Returns the texts of a drawn picture: internvl_u, parameters, prompt and workflow.

    `files` are those of the request's images, in their order; `model` is the folder or file as it was asked for.
    """
    names = [shown_name(file.name) for file in files]
    info = PngInfo()
    info.add_itxt("internvl_u", json.dumps(_settings(pipeline, request, names, model), ensure_ascii=False))
    info.add_text("parameters", parameters(pipeline, request))  # as Latin-1 where it can be, else as UTF-8
    if len(names) <= MOST_IMAGES and request.reference_size in SIZE_NAMES:
        # ComfyUI's page of 2025 takes `parameters`, made for another program, before its own graph. It alone reads this
        # chunk, which ComfyUI writes into animations, as one more text of the same name: an empty one.
        info.add(b"comf", b"parameters\0")
        nodes = api_graph(_drawing(pipeline, request, names))
        info.add_text("prompt", json.dumps(nodes))
        info.add_text("workflow", json.dumps(page_graph(nodes)))
    return info


def parameters(pipeline: Pipeline, request: ImageRequest) -> str:
    """Returns the text that viewers and sites read, in the form that AUTOMATIC1111's web UI has made usual."""
    (width, height), guidance = pipeline.size(request), request.guidance
    values = {"Steps": request.way.steps, "Sampler": SAMPLER, "CFG scale": guidance.all_cfg}
    if request.images:
        values["Image CFG scale"] = guidance.part_cfg
    values |= {"Seed": request.seed, "Size": f"{width}x{height}"}
    values |= {"Model": model_name(pipeline), "Version": f"internvl_u {__version__}"}
    negative = request.negative_prompt
    lines = [request.prompt, f"Negative prompt: {negative}" if negative else ""]
    return "\n".join([*filter(None, lines), ", ".join(f"{key}: {_quoted(value)}" for key, value in values.items())])


def model_name(pipeline: Pipeline) -> str:
    """Returns a model's name: its folder's, its repository's in the hub's cache, or its file's without the ending."""
    place = pipeline.files.transformer
    return shown_name(place.stem if place.is_file() else shown_folder(place))


def _settings(pipeline: Pipeline, request: ImageRequest, images: list[str], model: Path) -> dict[str, object]:
    (width, height), guidance = pipeline.size(request), request.guidance
    settings = {name: getattr(request, name) for name in ("prompt", "system", "thought", "seed", "speed")}
    settings |= {name: getattr(request, name) for name in ("negative_prompt", "reference_size")}
    settings |= {"steps": request.way.steps, **request.way.intervals.named()}
    settings |= {"width": width, "height": height, **guidance._asdict(), "dtype": str(pipeline.dtype)[6:]}
    if pipeline.loras:
        settings["loras"] = [{"file": name, "strength": strength} for name, strength in _loras(pipeline)]
    return settings | {"images": images, "model": shown_name(model.absolute().name), "version": __version__}


def _drawing(pipeline: Pipeline, request: ImageRequest, images: list[str]) -> Drawing:
    place = pipeline.files.transformer
    asked = request.width is not None or request.height is not None
    return Drawing(
        model=_choice(place),
        precision="auto" if place.is_file() else _PRECISIONS[str(pipeline.dtype)[6:]],
        prompt=request.prompt,
        system=request.system or "",
        thought=request.thought,
        images=images,
        size=pipeline.size(request),
        of_image=bool(images) and not asked,
        steps=request.way.steps,
        seed=request.seed,
        guidance=request.guidance,
        negative_prompt=request.negative_prompt,
        reference_size=request.reference_size,
        intervals=request.way.intervals,
        loras=_loras(pipeline),
    )


def _loras(pipeline: Pipeline) -> list[tuple[str, float]]:
    return [(shown_name(lora.file.name), strength) for lora, strength in pipeline.loras]


def _choice(place: Path) -> str:
    """Returns what Load InternVL-U calls a folder or file."""
    nano = nano_folder()
    if nano is not None and place.resolve() == nano.resolve():
        return NANO_CHOICE
    return shown_name(place.name if place.is_file() else shown_folder(place))


def _quoted(value: object) -> str:
    """Returns a value as that form has it: in quotes where a comma, colon or line's end would be taken for its own."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",:\n") else text
