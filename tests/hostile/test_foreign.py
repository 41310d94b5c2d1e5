"""Objects of other models on our sockets, and core's nodes for conditionings: a sentence at our node, or they work."""

import importlib
import json

import pytest
import torch

from .test_model_folders import graph
from .test_values import refused


@pytest.fixture
def latents(comfyui):
    return importlib.import_module("pack.native.latents")


def edit_graph(server):
    import shutil
    from pathlib import Path

    tests = Path(__file__).parent.parent
    shutil.copy(tests / "data" / "golden" / "image_a.png", server.base / "input" / "internvl_u_harbour.jpg")
    nodes = json.loads((tests / "workflows" / "edit.api.json").read_text(encoding="utf-8"))
    for node in nodes.values():
        values = {"model_name": "tiny", "precision": "fp32", "steps": 1, "largest_size": 64}
        node["inputs"] |= {key: value for key, value in values.items() if key in node["inputs"]}
    return nodes


AREAS = {
    "ConditioningSetAreaPercentage": {"width": 0.5, "height": 1.0, "x": 0.25, "y": 0.0, "strength": 1.0},
    "ConditioningSetArea": {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0},
    "ConditioningSetMask": {"mask": ["mask", 0], "strength": 1.0, "set_cond_area": "default"},
    "ConditioningSetMask, bounds": {"mask": ["mask", 0], "strength": 1.0, "set_cond_area": "mask bounds"},
    "ConditioningZeroOut": {},
    "ConditioningSetTimestepRange": {"start": 0.0, "end": 0.5},
}


@pytest.mark.parametrize("editing", [False, True])
@pytest.mark.parametrize("name", AREAS)
def test_cores_conditioning_nodes_work_with_and_without_references(littered, name, editing):
    nodes = edit_graph(littered) if editing else graph(width=64, height=64)
    sampler = nodes[littered.find(nodes, "InternVLU_SampleLatent")]["inputs"]
    nodes["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 32}}
    inputs = AREAS[name] | {"conditioning": sampler["positive"]}
    nodes["changed"] = {"class_type": name.split(",")[0], "inputs": inputs}
    sampler["positive"] = ["changed", 0]
    entry = littered.run(nodes)
    assert entry["status"]["status_str"] == "success", entry["status"]


def test_an_area_of_shares_is_that_part_of_the_image(loaded_guidance):
    entry = {"area": ("percentage", 0.5, 0.25, 0.1, 0.2)}
    assert loaded_guidance._with_plain_area(entry, (8, 8))["area"] == ("percentage", 1.0, 0.5, 0.25, 0.0, 0.1, 0.2)
    assert loaded_guidance._with_plain_area({"area": (4, 4, 0, 0)}, (8, 8)) == {"area": (4, 4, 0, 0)}


@pytest.mark.parametrize(
    "rows, columns, expected",
    [((0, 16), (0, 32), (8, 16, 0, 0)), ((16, 32), (8, 32), (8, 12, 8, 4)), ((0, 0), (0, 0), (8, 8, 0, 0))],
)
def test_the_bounds_of_a_mask_are_in_latent_pixels(loaded_guidance, rows, columns, expected):
    mask = torch.zeros(1, 32, 32)
    mask[:, slice(*rows), slice(*columns)] = 1
    found = loaded_guidance._bounds(mask, (16, 16))
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected)), found


@pytest.fixture
def loaded_guidance(comfyui):
    return importlib.import_module("pack.native.guidance")


@pytest.mark.parametrize(
    "latent, sentence",
    [
        (None, "NoneType"),
        ({}, "NoneType"),
        ({"samples": None}, "NoneType"),
        ({"samples": [1]}, "list"),
        ({"samples": torch.ones(4, 4)}, r"\(4, 4\)"),
        ({"samples": torch.ones(1, 4, 8, 8)}, "4 channels found, 16 expected"),
        ({"samples": torch.ones(1, 48, 1, 8, 8)}, "48 channels found, 16 expected"),
    ],
)
def test_a_latent_of_another_model_is_named(latents, latent, sentence):
    with pytest.raises(ValueError, match=sentence):
        latents.latent_samples(latent)


def test_an_empty_latent_of_another_model_is_taken_and_ours_too(latents):
    for shape in ((1, 4, 8, 8), (2, 16, 1, 8, 8)):
        assert latents.latent_samples({"samples": torch.zeros(shape)}).shape == shape
    assert latents.latent_samples({"samples": torch.ones(1, 16, 8, 8)}).any()


@pytest.mark.parametrize("vae", [None, object(), type("VAE", (), {"latent_channels": 4, "latent_dim": 2})()])
def test_a_vae_of_another_model_is_named(latents, vae):
    with pytest.raises(ValueError, match="a VAE of .* channels found"):
        latents.check_vae(vae)


def test_a_model_of_another_kind_is_named(loaded_guidance):
    with pytest.raises(ValueError, match="a MODEL of another kind .object. found"):
        loaded_guidance.check_model(type("Patcher", (), {"model": object(), "wrappers": {}})())


def test_an_empty_latent_is_not_decoded_as_if_it_were_drawn(littered):
    nodes = graph()
    nodes["other"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    nodes[littered.find(nodes, "InternVLU_DecodeLatent")]["inputs"]["samples"] = ["other", 0]
    refused(littered, nodes, "draw it before it is decoded")
