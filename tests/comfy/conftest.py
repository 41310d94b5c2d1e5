"""The checkpoint as ComfyUI's objects, drawing with them in this process, and graphs for a running ComfyUI."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs every node in this mode."""
    with torch.inference_mode():
        yield


@pytest.fixture
def loaded(native, checkpoint):
    """Freshly loaded MODEL, MLLM and VAE in fp32."""
    return SimpleNamespace(**dict(zip(("model", "mllm", "vae"), native.load(checkpoint, "fp32"), strict=True)))


@pytest.fixture
def parts(native):
    """The modules of the native layer."""
    names = ("guidance", "mllm", "model", "sampler", "vae")
    return SimpleNamespace(**{name: importlib.import_module(f"pack.native.{name}") for name in names})


@pytest.fixture
def normalised(native):
    """Turns ComfyUI's latents [B, 16, 1, h, w] into the transformer's [B, 16, h, w]."""
    import comfy.latent_formats

    return lambda samples: comfy.latent_formats.Wan21().process_in(samples)[:, :, 0]


@pytest.fixture
def empty():
    def make(width, height, batch=1):
        return {"samples": torch.zeros(batch, 16, 1, height // 16 * 2, width // 16 * 2)}

    return make


@pytest.fixture
def draw(parts, empty):
    """Draws a golden case with our sampler; returns ComfyUI's latents."""

    def run(model, mllm, case, seed=1234, **changes):
        positive, negative, _ = mllm.encode(case.prompt)
        settings = {"steps": case.steps, "all_cfg": 4.5, "part_cfg": 2.0} | changes
        latent = empty(case.width, case.height)
        return parts.sampler.sample_latent(model, positive, negative, latent, seed=seed, **settings)["samples"]

    return run


@pytest.fixture
def shipped_graph():
    """Reads a shipped workflow in API format; values are put in wherever an input of that name is no link."""

    def make(name, **values):
        file = Path(__file__).parent.parent / "workflows" / f"{name}.api.json"
        nodes = json.loads(file.read_text(encoding="utf-8"))
        for node in nodes.values():
            for key, value in values.items():
                if key in node["inputs"] and not isinstance(node["inputs"][key], list):
                    node["inputs"][key] = value
        return nodes

    return make


@pytest.fixture
def graph(shipped_graph):
    """Reads a shipped workflow in API format and puts a golden case's values in."""

    def make(name, case, **changes):
        values = {"model_name": "tiny", "precision": "fp32", "preset": "custom", "noise_seed": 1234, "seed": 1234}
        values |= {"width": case.width, "height": case.height, "steps": case.steps, "prompt": case.prompt} | changes
        return shipped_graph(name, **values)

    return make


@pytest.fixture
def load_images(server):
    """Puts LoadImage nodes for files into a graph; returns their outputs."""

    def add(nodes, files):
        outputs = []
        for i, file in enumerate(files):
            shutil.copy(file, server.base / "input" / file.name)
            nodes[f"load{i}"] = {"class_type": "LoadImage", "inputs": {"image": file.name}}
            outputs.append([f"load{i}", 0])
        return outputs

    return add
