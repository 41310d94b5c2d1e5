"""Our latents through core's latent nodes, other shapes into ours, and what holds no numbers."""

import importlib
from types import SimpleNamespace

import pytest
import torch

SETTINGS = {"seed": 1, "steps": 2, "all_cfg": 4.5, "part_cfg": 2.0}
KSAMPLER = {"seed": 1, "steps": 2, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}
BAD = (torch.nan, torch.inf, -torch.inf)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def ours(native, checkpoint):
    names = ("guidance", "sampler", "vae")
    parts = {name: importlib.import_module(f"pack.native.{name}") for name in names}
    with torch.inference_mode():
        model, mllm, vae = native.load(checkpoint, "fp32")
        positive, negative, _ = mllm.encode("a cat")
        generator = torch.Generator().manual_seed(4)
        wide, other, small = (
            {"samples": torch.randn(count, 16, 1, *size, generator=generator)}
            for count, size in ((2, (8, 12)), (2, (8, 12)), (2, (4, 6)))
        )
    given = {"load_model": native.load, "model": model, "mllm": mllm, "loaded_vae": vae, "positive": positive}
    return SimpleNamespace(**given, negative=negative, wide=wide, other=other, small=small, **parts)


def v3(module, name):
    """A core node by its class's name, old or new, as a function of its inputs that returns its outputs."""
    importlib.import_module("comfy_extras.nodes_post_processing")  # 0.33: the latent nodes and it import each other
    kind = getattr(importlib.import_module(module), name)

    def call(**inputs):
        if hasattr(kind, "define_schema"):
            return kind.execute(**inputs).result
        return getattr(kind(), kind.FUNCTION)(**inputs)

    return call


LATENT, MASK, REBATCH = (f"comfy_extras.nodes_{name}" for name in ("latent", "mask", "rebatch"))
SIZE = {"upscale_method": "bilinear", "width": 128, "height": 64, "crop": "center"}
WIDE, OTHER, SMALL = "wide", "other", "small"  # latents of `ours`
# Node, its inputs: it does with ours what it does with the latents of four axes of other models.
WORKS = {
    "scaled up": ("nodes", "LatentUpscale", {"samples": WIDE, **SIZE}),
    "scaled up, bislerp": ("nodes", "LatentUpscale", {"samples": WIDE, **SIZE, "upscale_method": "bislerp"}),
    "scaled by": ("nodes", "LatentUpscaleBy", {"samples": WIDE, "upscale_method": "area", "scale_by": 1.5}),
    "scaled to odd sides": ("nodes", "LatentUpscaleBy", {"samples": WIDE, "upscale_method": "area", "scale_by": 1.13}),
    "one of a batch": ("nodes", "LatentFromBatch", {"samples": WIDE, "batch_index": 1, "length": 1}),
    "repeated": ("nodes", "RepeatLatentBatch", {"samples": WIDE, "amount": 2}),
    "blended": ("nodes", "LatentBlend", {"samples1": WIDE, "samples2": OTHER, "blend_factor": 0.3}),
    "batched": (LATENT, "LatentBatch", {"samples1": WIDE, "samples2": OTHER}),
    "batched, sizes": (LATENT, "LatentBatch", {"samples1": WIDE, "samples2": SMALL}),
    "added": (LATENT, "LatentAdd", {"samples1": WIDE, "samples2": OTHER}),
    "added, sizes": (LATENT, "LatentAdd", {"samples1": WIDE, "samples2": SMALL}),
    "subtracted": (LATENT, "LatentSubtract", {"samples1": WIDE, "samples2": OTHER}),
    "multiplied": (LATENT, "LatentMultiply", {"samples": WIDE, "multiplier": 0.5}),
    "cut along x": (LATENT, "LatentCut", {"samples": WIDE, "dim": "x", "index": 2, "amount": 6}),
    "cut along y": (LATENT, "LatentCut", {"samples": WIDE, "dim": "y", "index": 2, "amount": 4}),
    "joined along x": (LATENT, "LatentConcat", {"samples1": WIDE, "samples2": OTHER, "dim": "x"}),
    "joined along y": (LATENT, "LatentConcat", {"samples1": WIDE, "samples2": OTHER, "dim": "-y"}),
    "fixed seeds": (LATENT, "LatentBatchSeedBehavior", {"samples": WIDE, "seed_behavior": "fixed"}),
    "pasted": (MASK, "LatentCompositeMasked", {"destination": WIDE, "source": SMALL, "x": 16, "y": 16}),
    "pasted in a mask": (MASK, "LatentCompositeMasked", {"destination": WIDE, "source": OTHER, "mask": "mask"}),
    "in batches of one": (REBATCH, "LatentRebatch", {"latents": [WIDE], "batch_size": [1]}),
}
# These take the frame for the rows, and the rows for the columns; so do they with Qwen-Image's latents.
TAKES_FRAMES_FOR_ROWS = {
    "LatentCrop": ("nodes", "LatentCrop", {"samples": WIDE, "width": 64, "height": 64, "x": 32, "y": 0}),
    "LatentFlip, vertically": ("nodes", "LatentFlip", {"samples": WIDE, "flip_method": "x-axis: vertically"}),
    "LatentFlip, horizontally": ("nodes", "LatentFlip", {"samples": WIDE, "flip_method": "y-axis: horizontally"}),
    "LatentRotate, 90": ("nodes", "LatentRotate", {"samples": WIDE, "rotation": "90 degrees"}),
    "LatentRotate, 180": ("nodes", "LatentRotate", {"samples": WIDE, "rotation": "180 degrees"}),
    "LatentComposite": ("nodes", "LatentComposite", {"samples_to": WIDE, "samples_from": SMALL, "x": 16, "y": 16}),
}


def run(ours, table, name, frame):
    """Runs a node of a table on latents with or without their axis of one frame; returns the LATENT."""
    module, kind, inputs = table[name]

    def given(value):
        if value == "mask":
            return (torch.arange(64 * 96).reshape(1, 64, 96) % 3 == 0).float()
        if not isinstance(value, str) or value not in (WIDE, OTHER, SMALL):
            return [given(one) for one in value] if isinstance(value, list) else value
        samples = getattr(ours, value)["samples"]
        return {"samples": samples if frame else samples[:, :, 0]}

    more = {"x": 0, "y": 0, "resize_source": False} if kind == "LatentCompositeMasked" else {}
    (latent,) = v3(module, kind)(**(more | {key: given(value) for key, value in inputs.items()}))
    return latent[0] if isinstance(latent, list) else latent


@pytest.mark.parametrize("name", WORKS)
def test_core_s_node_does_with_ours_what_it_does_with_four_axes_and_all_nodes_take_the_result(comfyui, ours, name):
    import nodes

    latent, flat = (run(ours, WORKS, name, frame) for frame in (True, False))
    samples = latent["samples"]
    assert torch.equal(samples[:, :, 0], flat["samples"]) and samples.ndim == 5
    pixels = (samples.shape[0], 8 * samples.shape[-2], 8 * samples.shape[-1], 3)
    for given in (latent, flat):
        assert ours.vae.decode(ours.loaded_vae, given).shape == pixels
        drawn = ours.sampler.sample_latent(ours.model, ours.positive, ours.negative, given, **SETTINGS, denoise=0.5)
        assert drawn["samples"].shape == samples.shape
        conditions = {"positive": ours.positive, "negative": ours.negative, "latent_image": given}
        assert nodes.KSampler().sample(ours.model, **KSAMPLER, **conditions)[0]["samples"].shape == samples.shape
    assert nodes.VAEDecode().decode(ours.loaded_vae, latent)[0].shape == pixels


@pytest.mark.parametrize("name", TAKES_FRAMES_FOR_ROWS)
def test_what_the_help_page_says_of_core_s_nodes_is_so(comfyui, ours, name):
    try:
        samples = run(ours, TAKES_FRAMES_FOR_ROWS, name, True)["samples"]
    except RuntimeError:
        return
    expected = run(ours, TAKES_FRAMES_FOR_ROWS, name, False)["samples"]
    right = samples.shape[-2:] == expected.shape[-2:] and torch.equal(samples[:, :, 0], expected)
    assert not right, "ComfyUI has mended this node: take it off the help page of InternVL-U Sampler"


def test_a_latent_without_its_frame_is_decoded_and_drawn_from_the_same(ours):
    flat = {"samples": ours.wide["samples"][:, :, 0]}
    assert torch.equal(*(ours.vae.decode(ours.loaded_vae, latent) for latent in (ours.wide, flat)))
    drawn = [
        ours.sampler.sample_latent(ours.model, ours.positive, ours.negative, latent, **SETTINGS, denoise=0.5)["samples"]
        for latent in (ours.wide, flat)
    ]
    assert torch.equal(*drawn)


def consumers(ours):
    """Each way on which a LATENT comes into ours."""
    import nodes

    model, positive, negative = ours.model, ours.positive, ours.negative

    def advanced(latent):
        custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
        (guider,) = custom.BasicGuider.execute(model, positive).result
        (noise,) = custom.RandomNoise.execute(1).result
        return custom.SamplerCustomAdvanced.execute(
            noise, guider, ours.sampler.dpmpp_2m_flow(), ours.sampler.flow_sigmas(2), latent
        ).result[0]

    return {
        "InternVL-U Sampler": lambda latent: ours.sampler.sample_latent(model, positive, negative, latent, **SETTINGS),
        "InternVL-U Decode": lambda latent: {"samples": ours.vae.decode(ours.loaded_vae, latent)},
        "KSampler": lambda latent: nodes.KSampler().sample(
            model, **KSAMPLER, positive=positive, negative=negative, latent_image=latent
        )[0],
        "SamplerCustomAdvanced": advanced,
    }


CONSUMERS = ("InternVL-U Sampler", "InternVL-U Decode", "KSampler", "SamplerCustomAdvanced")


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name", ["turned", "joined along t", "a video", "no frame"])
def test_a_latent_of_several_frames_is_refused_with_what_makes_one(comfyui, ours, consumer, name):
    wide = ours.wide["samples"]
    samples, frames = {
        "turned": (torch.rot90(wide, dims=[3, 2]), 8),
        "joined along t": (torch.cat([wide, wide], dim=2), 2),
        "a video": (torch.zeros(1, 16, 5, 8, 8), 5),
        "no frame": (wide[:, :, :0], 0),
    }[name]
    told = f"{frames} frames found, 1 expected: .* Rotate Latent and LatentConcat" if frames else "an empty LATENT"
    with pytest.raises(ValueError, match=told):
        consumers(ours)[consumer]({"samples": samples})


@pytest.fixture
def no_step(ours, monkeypatch):
    network = ours.model.model.diffusion_model
    monkeypatch.setattr(network, "_forward", lambda *args, **kwargs: pytest.fail("a step was taken"))


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", BAD)
def test_a_latent_that_holds_no_numbers_is_named_before_any_step(comfyui, ours, no_step, consumer, dtype, value):
    samples = torch.ones(1, 16, 1, 8, 8, dtype=dtype)
    samples[0, 3, 0, 2, 5] = value
    with pytest.raises(ValueError, match=r"a LATENT found of which 0\.0977 % are infinite or not a number \(NaN\)"):
        consumers(ours)[consumer]({"samples": samples})


@pytest.mark.parametrize("consumer", [name for name in CONSUMERS if name != "InternVL-U Decode"])
@pytest.mark.parametrize("value", BAD)
def test_a_mask_that_holds_no_numbers_is_named_before_any_step(comfyui, ours, no_step, consumer, value):
    mask = torch.ones(1, 1, 64, 64)
    mask[0, 0, :32] = value
    with pytest.raises(ValueError, match="a noise mask found of which .* % are infinite or not a number"):
        consumers(ours)[consumer]({"samples": torch.zeros(1, 16, 1, 8, 8), "noise_mask": mask})


@pytest.mark.parametrize("consumer", ["InternVL-U Sampler", "KSampler", "SamplerCustomAdvanced"])
@pytest.mark.parametrize("place", ["context", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", BAD)
def test_a_conditioning_that_holds_no_numbers_is_named_before_any_step(ours, no_step, consumer, place, dtype, value):
    context, options = ours.positive[0]
    context, reference = context.to(dtype).clone(), torch.ones(1, 16, 1, 8, 8, dtype=dtype)
    (context if place == "context" else reference).view(-1)[7] = value
    what = {"context": "a CONDITIONING", "reference": "a LATENT"}[place]
    changed = SimpleNamespace(**vars(ours) | {"positive": [[context, options | {"reference_latents": [reference]}]]})
    with pytest.raises(ValueError, match=f"{what} found of which .* not a number"):
        consumers(changed)[consumer]({"samples": torch.zeros(1, 16, 1, 8, 8)})


@pytest.mark.parametrize("consumer", ["InternVL-U Sampler", "KSampler", "SamplerCustomAdvanced"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["weights", "lora"])
@pytest.mark.parametrize("value", BAD)
def test_weights_that_are_no_numbers_are_told_by_every_sampler(ours, checkpoint, consumer, precision, how, value):
    import comfy.sd

    model = ours.load_model(checkpoint, precision)[0]
    layer = "transformer_blocks.0.attn.to_q"
    weight = model.model.diffusion_model.get_submodule(layer).weight
    if how == "weights":
        weight.data = weight.data.clone()
        weight.data[0] = value
    else:
        rows, columns = weight.shape
        up, down = torch.ones(rows, 1), torch.ones(1, columns)
        up[0] = value
        file = {f"diffusion_model.{layer}.lora_B.weight": up, f"diffusion_model.{layer}.lora_A.weight": down}
        model, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    changed = SimpleNamespace(**vars(ours) | {"model": model})
    told = "the drawn latent are infinite or not a number .* a LoRA on it"
    with pytest.raises(RuntimeError, match=told):
        consumers(changed)[consumer]({"samples": torch.zeros(1, 16, 1, 8, 8)})


@pytest.mark.parametrize("value", BAD)
def test_a_schedule_that_holds_no_numbers_is_named(comfyui, ours, no_step, value):
    sigmas = torch.tensor([1.0, value, 0.0])
    guider = ours.guidance.DualGuider(ours.model)
    guider.set_conds(ours.positive, ours.negative)
    noise = torch.zeros(1, 16, 1, 8, 8)
    with pytest.raises(ValueError, match="SIGMAS found of which 33.3 % are infinite"):
        guider.sample(noise, noise, ours.sampler.dpmpp_2m_flow(), sigmas, seed=1)


@pytest.mark.parametrize("value", BAD)
def test_a_picture_whose_latent_is_no_numbers_is_told_by_encode(ours, monkeypatch, value):
    from PIL import Image

    monkeypatch.setattr(ours.loaded_vae, "encode", lambda pixels: torch.full((1, 16, 1, 8, 8), value))
    with pytest.raises(RuntimeError, match="a picture's latent are infinite or not a number .* the VAE"):
        ours.mllm.encode("a cat", images=[Image.new("RGB", (64, 64))], vae=ours.loaded_vae)


@pytest.mark.parametrize("axes", [2, 3, 4, 5])
def test_each_picture_of_a_batch_has_its_own_mask(ours, axes):
    """Core takes the masks of a batch for the frames of one video, and draws with what is between them."""
    start, count = ours.wide["samples"], 1 if axes == 2 else 2
    masks = torch.zeros(count, 64, 96)
    masks[0, :, :48] = 1
    shape = {2: (64, 96), 3: (count, 64, 96), 4: (count, 1, 64, 96), 5: (count, 1, 1, 64, 96)}[axes]
    latent = {"samples": start, "noise_mask": masks.reshape(shape)}
    drawn = ours.sampler.sample_latent(ours.model, ours.positive, ours.negative, latent, **SETTINGS)["samples"]
    changed = (drawn - start).abs().amax(dim=(1, 2, 3)) > 1e-3  # [picture, column]
    assert changed[0, :6].all() and not changed[0, 6:].any()
    assert changed[1].tolist() == (changed[0].tolist() if axes == 2 else [False] * 12)


@pytest.mark.parametrize("mask", ["a mask", [1], torch.ones(5), torch.ones(0, 1, 8, 8)])
def test_what_is_no_mask_is_named(ours, mask):
    latent = {"samples": torch.zeros(1, 16, 1, 8, 8), "noise_mask": mask}
    with pytest.raises(ValueError, match="a noise mask of .* found"):
        ours.sampler.sample_latent(ours.model, ours.positive, ours.negative, latent, **SETTINGS)


def test_a_latent_is_saved_and_loaded_the_same(littered):
    """Also with a VAE of Load VAE behind it, which wants five axes."""
    from safetensors.torch import load_file

    from .test_model_folders import graph

    nodes = graph(width=64, height=48)
    nodes = littered.with_latent(nodes)
    entry = littered.run(nodes)
    (file,) = littered.files(entry, "latent", "latents")
    samples = load_file(file)["latent_tensor"]
    assert samples.shape == (1, 16, 1, 6, 8)
    (littered.base / "input" / "ours.latent").write_bytes(file.read_bytes())
    decode = nodes[littered.find(nodes, "InternVLU_DecodeLatent")]["inputs"]
    decode["samples"] = ["load_latent", 0]
    nodes["load_latent"] = {"class_type": "LoadLatent", "inputs": {"latent": "ours.latent"}}
    del nodes["latent"]
    nodes["core"] = {"class_type": "VAEDecode", "inputs": {"samples": ["load_latent", 0], "vae": decode["vae"]}}
    nodes["shown"] = {"class_type": "SaveImage", "inputs": {"images": ["core", 0], "filename_prefix": "core"}}
    before = littered.picture(entry, littered.find(graph(), "SaveImage"))
    entry = littered.run(nodes)
    assert entry["status"]["status_str"] == "success", entry["status"]
    saved = littered.find(graph(), "SaveImage")
    assert (littered.picture(entry, saved) == before).all()
    assert littered.picture(entry, "shown").shape == before.shape
