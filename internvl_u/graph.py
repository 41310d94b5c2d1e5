"""The graph with which ComfyUI draws what the command line drew: in the API's format, and as the page opens it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .defaults import REFERENCE_SIZES, Guidance
from .images import drawn_size
from .speed import ALWAYS, GuidanceIntervals

MOST_IMAGES = 8
"""Slots for reference images that InternVL-U Encode has."""
SIZE_NAMES = {side: name for name, side in REFERENCE_SIZES.items()}
"""What InternVL-U Encode calls the sides of reference images."""
_SEEDS = 2**64 - 1
Nodes = dict[str, dict[str, Any]]


class Drawing(NamedTuple):
    """What was drawn: texts, the names of the reference images and of LoRAs with their strengths, and numbers.

    `size` is (width, height) in pixels; `of_image` tells that it is the first reference's. `model` and `precision` are
    choices of Load InternVL-U.
    """

    model: str
    precision: str
    prompt: str
    system: str
    thought: str
    images: Sequence[str]
    size: tuple[int, int]
    of_image: bool
    steps: int
    seed: int
    guidance: Guidance
    negative_prompt: str = ""
    reference_size: int | None = None
    intervals: GuidanceIntervals = ALWAYS
    loras: Sequence[tuple[str, float]] = ()


class _Kind(NamedTuple):
    """How the page has a node: slots (name, type), outputs (name, type), widgets, column, size in pixels."""

    slots: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    widgets: tuple[str, ...]
    column: int
    size: tuple[int, int]


_FIXED, _UPLOAD = "control_after_generate", "upload"
_CONSTANT = {_FIXED: "fixed", _UPLOAD: "image"}
"""Widgets that the page has and the API has not."""
_MLLM, _CONDITIONINGS = "INTERNVL_U_MLLM", (("positive", "CONDITIONING"), ("negative", "CONDITIONING"))
_IMAGES = tuple((f"image{number}", "IMAGE") for number in range(1, MOST_IMAGES + 1))
_KINDS = {
    "InternVLU_LoadModel": _Kind(
        (),
        (("MODEL", "MODEL"), ("MLLM", _MLLM), ("VAE", "VAE")),
        ("model_name", "precision", "mllm_name", "vae_name"),
        0,
        (300, 170),
    ),
    "InternVLU_LoadLoRA": _Kind(
        (("model", "MODEL"), ("mllm", _MLLM)),
        (("MODEL", "MODEL"), ("MLLM", _MLLM)),
        ("lora_name", "strength_model", "strength_mllm"),
        0,
        (300, 150),
    ),
    "InternVLU_CreateLatent": _Kind(
        (), (("LATENT", "LATENT"),), ("preset", "width", "height", "batch_size"), 0, (300, 130)
    ),
    "LoadImage": _Kind((), (("IMAGE", "IMAGE"), ("MASK", "MASK")), ("image", _UPLOAD), 0, (300, 320)),
    "PrimitiveStringMultiline": _Kind((), (("STRING", "STRING"),), ("value",), 0, (300, 200)),
    "InternVLU_EncodePrompt": _Kind(
        (("mllm", _MLLM), ("vae", "VAE"), *_IMAGES[:4], ("thought", "STRING"), *_IMAGES[4:]),
        (*_CONDITIONINGS, ("latent", "LATENT")),
        ("prompt", "system_prompt", "negative_prompt", "reference_size"),
        1,
        (400, 420),
    ),
    "InternVLU_SampleLatent": _Kind(
        (("model", "MODEL"), *_CONDITIONINGS, ("latent_image", "LATENT")),
        (("LATENT", "LATENT"),),
        ("seed", _FIXED, "steps", "all_cfg", "part_cfg", "denoise", "scales", *ALWAYS.named()),
        2,
        (300, 262),
    ),
    "InternVLU_DecodeLatent": _Kind(
        (("vae", "VAE"), ("samples", "LATENT")), (("IMAGE", "IMAGE"),), ("width", "height"), 3, (300, 102)
    ),
    "SaveImage": _Kind((("images", "IMAGE"),), (), ("filename_prefix",), 4, (300, 340)),
}
_OLD_SLOTS = len(_KINDS["InternVLU_EncodePrompt"].slots) - len(_IMAGES[4:])


def api_graph(drawing: Drawing) -> Nodes:
    """Returns the graph in the format that ComfyUI's API takes.

    Raises:
        ValueError: there are more reference images than InternVL-U Encode has slots for.
    """
    if len(drawing.images) > MOST_IMAGES:
        raise ValueError(f"{len(drawing.images)} images found, {MOST_IMAGES} expected at most")
    width, height = drawing.size
    nodes: Nodes = {}

    def add(kind: str, **inputs: object) -> str:
        name = str(len(nodes) + 1)
        nodes[name] = {"inputs": inputs, "class_type": kind}
        return name

    load = add(
        "InternVLU_LoadModel",
        model_name=drawing.model,
        precision=drawing.precision,
        mllm_name="auto",
        vae_name="auto",
    )
    model = load
    for name, strength in drawing.loras:
        given = {"model": [model, 0], "mllm": [model, 1]}
        model = add("InternVLU_LoadLoRA", lora_name=name, strength_model=strength, strength_mllm=strength, **given)
    read: dict[str, object] = {"mllm": [model, 1]}
    if drawing.images:
        read["vae"] = [load, 2]
    for number, image in enumerate(drawing.images, 1):
        read[f"image{number}"] = [add("LoadImage", image=image), 0]
    if drawing.thought:
        read["thought"] = [add("PrimitiveStringMultiline", value=str(drawing.thought)), 0]
    if not drawing.of_image:
        size = add("InternVLU_CreateLatent", preset="custom", width=width, height=height, batch_size=1)
    read |= {"negative_prompt": drawing.negative_prompt, "reference_size": SIZE_NAMES[drawing.reference_size]}
    encode = add("InternVLU_EncodePrompt", prompt=drawing.prompt, system_prompt=drawing.system, **read)
    limits: dict[str, object] = {}
    if drawing.intervals != ALWAYS:
        limits = {"scales": "as typed", **drawing.intervals.named()}
    sample = add(
        "InternVLU_SampleLatent",
        seed=drawing.seed if drawing.seed >= 0 else drawing.seed + _SEEDS,  # as torch takes negative ones
        steps=drawing.steps,
        all_cfg=drawing.guidance.all_cfg,
        part_cfg=drawing.guidance.part_cfg,
        denoise=1.0,
        **limits,
        model=[model, 0],
        positive=[encode, 0],
        negative=[encode, 1],
        latent_image=[encode, 2] if drawing.of_image else [size, 0],
    )
    final = (
        {"width": 0, "height": 0} if drawn_size(width, height) == (width, height) else dict(width=width, height=height)
    )
    decode = add("InternVLU_DecodeLatent", vae=[load, 2], samples=[sample, 0], **final)
    add("SaveImage", filename_prefix="InternVL-U", images=[decode, 0])
    return nodes


def page_graph(nodes: Nodes) -> dict[str, Any]:
    """Returns a graph of `api_graph` as ComfyUI's page opens it: nodes at places, and links."""
    links: list[list[Any]] = []
    bottoms = [0] * 5
    made = []
    for order, (name, node) in enumerate(nodes.items()):
        kind = _KINDS[node["class_type"]]
        left = sum(max(k.size[0] for k in _KINDS.values() if k.column == c) + 60 for c in range(kind.column))
        made.append(
            {
                "id": int(name),
                "type": node["class_type"],
                "pos": [left, bottoms[kind.column]],
                "size": list(kind.size),
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": _slots(name, node, nodes, links),
                "outputs": [{"name": output, "type": type, "links": []} for output, type in kind.outputs],
                "properties": {"Node name for S&R": node["class_type"]},
                "widgets_values": _widgets(kind, node),
            }
        )
        bottoms[kind.column] += kind.size[1] + 60
    for number, source, output, *_ in links:
        made[source - 1]["outputs"][output]["links"].append(number)
    ids = {"last_node_id": len(nodes), "last_link_id": len(links)}
    return {**ids, "nodes": made, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def _widgets(kind: _Kind, node: dict[str, Any]) -> list[Any]:
    """Returns the values of a node's widgets; the page has defaults for the last ones that are missing."""
    values = [_CONSTANT.get(widget, node["inputs"].get(widget)) for widget in kind.widgets]
    while values and values[-1] is None:
        values.pop()
    return values


def _slots(name: str, node: dict[str, Any], nodes: Nodes, links: list[list[Any]]) -> list[dict[str, Any]]:
    """Returns a node's slots, and adds a link [number, from node, its output, to node, its slot, type] for each."""
    slots = []
    for slot, type in _KINDS[node["class_type"]].slots:
        linked = node["inputs"].get(slot)
        if linked is None and len(slots) >= _OLD_SLOTS:
            continue  # newer than saved graphs are; the page adds it
        if linked is not None:
            links.append([len(links) + 1, int(linked[0]), linked[1], int(name), len(slots), type])
        slots.append({"name": slot, "type": type, "link": len(links) if linked is not None else None})
    return slots
