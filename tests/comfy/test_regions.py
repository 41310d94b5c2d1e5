"""Regional prompts: core's nodes for areas and masks on our latents, judged by what the nano model draws."""

import pytest
from PIL import Image

pytest.importorskip("scipy")

from training.data import scenes
from training.data.scenes import Scene, Thing
from training.eval import detector

WIDTH, HEIGHT = 128, 64
BEFORE = Scene(
    64, 64, "white", (Thing("circle", "red", "medium", 0.25, 0.5), Thing("square", "blue", "medium", 0.75, 0.5))
)
HALVES = {
    "ConditioningSetArea": [{"width": 64, "height": HEIGHT, "x": x, "y": 0} for x in (0, 64)],
    "ConditioningSetAreaPercentage": [{"width": 0.5, "height": 1.0, "x": x, "y": 0.0} for x in (0.0, 0.5)],
    "ConditioningSetAreaPercentageVideo": [
        {"width": 0.5, "height": 1.0, "temporal": 1.0, "x": x, "y": 0.0, "z": 0.0} for x in (0.0, 0.5)
    ],
    "ConditioningSetMask": [
        {"mask": [side, 0], "set_cond_area": "mask bounds"} for side in ("left mask", "right mask")
    ],
}


def model():
    return {
        "model": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": "internvl-u-nano", "precision": "auto"}}
    }


def encoded(prompt, **more):
    return {"class_type": "InternVLU_EncodePrompt", "inputs": {"mllm": ["model", 1], "prompt": prompt} | more}


def masks(width, height):
    half = {"value": 1.0, "width": width // 2, "height": height}
    nodes = {
        "none": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": width, "height": height}},
        "half": {"class_type": "SolidMask", "inputs": half},
    }
    for side, x in (("left", 0), ("right", width // 2)):
        put = {"destination": ["none", 0], "source": ["half", 0], "x": x, "y": 0, "operation": "add"}
        nodes[f"{side} mask"] = {"class_type": "MaskComposite", "inputs": put}
    return nodes


def limited(kind, halves):
    """Each of the two prompts in its half, and both together."""
    nodes = {
        f"{side} part": {"class_type": kind, "inputs": {"conditioning": [side, 0], "strength": 1.0, **half}}
        for side, half in zip(("left", "right"), halves, strict=True)
    }
    parts = {"conditioning_1": ["left part", 0], "conditioning_2": ["right part", 0]}
    return nodes | {"both": {"class_type": "ConditioningCombine", "inputs": parts}}


def drawing(sampler, latent, part_cfg=2.0):
    inputs = {"model": ["model", 0], "positive": ["both", 0], "negative": ["left", 1], "latent_image": latent}
    inputs |= {"seed": 1, "steps": 20, "denoise": 1.0}
    if sampler == "KSampler":
        inputs |= {"cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}
    else:
        inputs |= {"all_cfg": 4.5, "part_cfg": part_cfg}
    decode = {"vae": ["model", 2], "samples": ["draw", 0], "width": 0, "height": 0}
    return {
        "draw": {"class_type": sampler, "inputs": inputs},
        "decode": {"class_type": "InternVLU_DecodeLatent", "inputs": decode},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "regions"}},
    }


def seen(server, nodes):
    entry = server.run(nodes)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    reading = detector.detect(Image.fromarray(server.picture(entry, "save")))
    return [thing.name for thing in sorted(reading.things, key=lambda thing: thing.x)], reading


@pytest.mark.parametrize("sampler", ["InternVLU_SampleLatent", "KSampler"])
@pytest.mark.parametrize("kind", HALVES)
def test_each_half_shows_what_its_prompt_says(server, kind, sampler):
    size = {"preset": "custom", "width": WIDTH, "height": HEIGHT, "batch_size": 1}
    nodes = model() | {"left": encoded("a red circle"), "right": encoded("a blue square")}
    nodes |= {"size": {"class_type": "InternVLU_CreateLatent", "inputs": size}}
    nodes |= masks(WIDTH, HEIGHT) | limited(kind, HALVES[kind]) | drawing(sampler, ["size", 0])
    names, reading = seen(server, nodes)
    assert names == ["red circle", "blue square"]
    left, right = sorted(reading.things, key=lambda thing: thing.x)
    assert left.box[2] <= 0.5 + 1 / WIDTH and right.box[0] >= 0.5 - 1 / WIDTH


@pytest.mark.parametrize("sampler", ["InternVLU_SampleLatent", "KSampler"])
def test_an_edit_changes_each_half_by_its_own_words(server, sampler):
    """A mask of the mode default: each prompt sees the whole picture and its reference."""
    scenes.render(BEFORE).save(server.base / "input" / "regions.png")
    nodes = model() | {"before": {"class_type": "LoadImage", "inputs": {"image": "regions.png"}}}
    given = {"vae": ["model", 2], "image1": ["before", 0]}
    nodes |= {"left": encoded("make the circle green", **given), "right": encoded("make the square yellow", **given)}
    halves = [half | {"set_cond_area": "default"} for half in HALVES["ConditioningSetMask"]]
    nodes |= masks(64, 64) | limited("ConditioningSetMask", halves) | drawing(sampler, ["left", 2])
    assert seen(server, nodes)[0] == ["green circle", "yellow square"]


def test_the_branch_of_the_references_gets_the_area_of_the_words(parts):
    """Dual guidance takes the difference of branches: over another area it would be one of nothing."""
    partial = [["context", {"reference_latents": "seen"}]]
    limits = {"area": (4, 4, 0, 0), "strength": 0.5, "mask": "a mask", "mask_strength": 0.7, "start_percent": 0.1}
    entries = [{parts.guidance.PARTIAL: partial, **limits}, {"area": (4, 4, 0, 4)}]
    (middle,) = parts.guidance._partial_conds({"positive": entries, "negative": []})
    assert {key: middle[key] for key in limits} == limits and middle["reference_latents"] == "seen"
