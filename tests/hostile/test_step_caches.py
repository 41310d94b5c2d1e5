"""Core's step caches, several runs on the same MODEL and server: nothing of another size or precision is kept."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from .test_model_folders import graph

NAMES = ("EasyCache", "LazyCache")
HOW = {"reuse_threshold": 0.3, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
SIZES = ((64, 64), (96, 64), (64, 96), (32, 32))


@pytest.fixture
def drawer(native, checkpoint, monkeypatch):
    """Returns a function that draws with a cache's MODEL in a size, and how often it called the network."""
    sampler = importlib.import_module("pack.native.sampler")
    caches = importlib.import_module("comfy_extras.nodes_easycache")

    def make(name, precision):
        model, mllm, _ = native.load(checkpoint, precision)
        positive, negative, _ = mllm.encode("a cat")
        cached = getattr(caches, f"{name}Node").execute(model, **HOW).result[0]
        calls = []
        network = model.model.diffusion_model
        forward = network._forward
        monkeypatch.setattr(network, "_forward", lambda *args: calls.append(1) or forward(*args))

        def draw(width, height, batch=1, node=cached):
            calls.clear()
            settings = {"seed": 1, "steps": 20, "all_cfg": 4.5, "part_cfg": 2.0}
            latent = {"samples": torch.zeros(batch, 16, 1, height // 8, width // 8)}
            return sampler.sample_latent(node, positive, negative, latent, **settings)["samples"], len(calls)

        return SimpleNamespace(draw=draw, plain=lambda *size: draw(*size, node=model)[0])

    with torch.inference_mode():
        yield make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_runs_of_other_sizes_on_the_same_model_draw_what_the_first_run_would(drawer, name, precision):
    one = drawer(name, precision)
    first = {size: drawer(name, precision).draw(*size) for size in SIZES}
    assert min(calls for _, calls in first.values()) < 20  # steps are skipped
    for size in (*SIZES, *SIZES[::-1]):
        drawn, calls = one.draw(*size)
        assert torch.equal(drawn, first[size][0]) and calls == first[size][1]
        plain = one.plain(*size)
        assert (drawn - plain).norm() / plain.norm() < 0.3
    assert one.draw(64, 64, batch=2)[0].shape == (2, 16, 1, 8, 8)
    assert torch.equal(one.draw(64, 64)[0], first[64, 64][0])


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_other_precisions_and_sizes_on_the_same_server_draw_what_the_first_run_did(littered, name):
    def picture(precision, width, height, seed):
        nodes = graph(precision=precision, width=width, height=height, steps=20, seed=seed)
        sampler = nodes[littered.find(nodes, "InternVLU_SampleLatent")]["inputs"]
        nodes["cache"] = {"class_type": name, "inputs": HOW | {"model": sampler["model"]}}
        sampler["model"] = ["cache", 0]
        entry = littered.run(nodes)
        assert entry["status"]["status_str"] == "success", entry["status"]
        drawn = littered.picture(entry, littered.find(nodes, "SaveImage"))
        assert drawn.shape == (height, width, 3)
        return drawn

    runs = [(precision, *size) for precision in ("fp32", "bf16", "fp32") for size in SIZES[:2]]
    drawn = {}
    for run in runs:
        picture(*run, seed=7)  # the sampler's output of the run before is in ComfyUI's cache
        pixels = picture(*run, seed=8)
        assert (drawn.setdefault(run, pixels) == pixels).all()
    assert f"{name} enabled" in littered.log.read_text()
