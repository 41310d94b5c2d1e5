"""The checkpoint as ComfyUI's objects, and drawing with them in this process."""

import importlib
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
    return SimpleNamespace(**{name: importlib.import_module(f"pack.nodes.native.{name}") for name in names})


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
        positive, negative = mllm.encode(case.prompt)
        settings = {"steps": case.steps, "all_cfg": 4.5, "part_cfg": 2.0} | changes
        latent = empty(case.width, case.height)
        return parts.sampler.sample_latent(model, positive, negative, latent, seed=seed, **settings)["samples"]

    return run
