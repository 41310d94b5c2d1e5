"""Our conditionings in other models' samplers, and theirs in ours: one sentence, whichever nodes are between."""

import importlib
from types import SimpleNamespace

import pytest
import torch

OURS = "a CONDITIONING of InternVL-U Encode found at a MODEL of another kind, the MODEL of Load InternVL-U expected"
STEPS = {"seed": 1, "steps": 1, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def ours(native, checkpoint):
    with torch.inference_mode():
        model, mllm, vae = native.load(checkpoint, "fp32")
        positive, negative, latent = mllm.encode("a cat")
    return SimpleNamespace(model=model, positive=positive, negative=negative, latent=latent, width=mllm.context_width)


@pytest.fixture(scope="module")
def core(comfyui):
    return importlib.import_module("nodes")


def custom(name):
    return getattr(importlib.import_module("comfy_extras.nodes_custom_sampler"), name).execute


SPEAK_FIRST = {"ACEStep15", "MiniMaxH3", "MiniMaxMusic3"}
"""Music, and a model that calls its network with the text (0.33): they fail for something else before they ask."""


class Network(torch.nn.Module):
    """Has what core's models look at in their network before they call it; calling it would be the fault."""

    dtype = torch.float32
    patch_size = patch_spatial = 2
    ofs_proj_dim = None

    def __init__(self, channels):
        super().__init__()
        self.in_channels = channels
        self.patch_embedding = torch.nn.Conv3d(channels, 16, 1)
        self.img_in = SimpleNamespace(proj=torch.nn.Conv3d(2 * channels + 1, 16, 1))

    def forward(self, *args, **kwargs):
        pytest.fail("the network was called")


def patcher(model):
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def core_models():
    """Yields each of core's models that needs no weights to be made, with a network that is none."""
    import comfy.supported_models

    for kind in comfy.supported_models.models:
        channels = kind.latent_format.latent_channels
        more = {"disable_unet_model_creation": True, "in_channels": channels, "out_channels": channels}
        try:
            config = kind({**kind.unet_config, **more})
            config.set_inference_dtype(torch.float32, None)
            model = config.get_model({}, device="cpu")
        except (KeyError, RuntimeError):  # wants weights of its own
            continue
        model.diffusion_model = Network(channels)
        yield kind.__name__, patcher(model)


@pytest.mark.filterwarnings("ignore")  # core's, at the schedules of old models
@pytest.mark.parametrize("latent", ["theirs", "ours"])
def test_every_model_of_core_says_that_our_conditioning_is_not_its_own(core, ours, latent):
    told = {}
    for name, model in core_models():
        samples = ours.latent if latent == "ours" else {"samples": torch.zeros(1, 4, 8, 8)}
        try:
            core.KSampler().sample(model, **STEPS, positive=ours.positive, negative=ours.negative, latent_image=samples)
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    assert len(told) >= 60
    assert {name: text for name, text in told.items() if OURS not in text and name not in SPEAK_FIRST} == {}


@pytest.fixture(scope="module")
def unet(comfyui, ours):
    """A small Stable Diffusion whose text is as wide as ours: without a word it would draw from it."""
    import comfy.model_base
    import comfy.supported_models

    shape = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1]}
    attention = {"transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1}
    heads = {"channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "context_dim": ours.width}
    config = comfy.supported_models.SD15({**shape, **attention, **heads, "legacy": False, "dtype": torch.float32})
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode():
        return patcher(comfy.model_base.BaseModel(config, device="cpu"))


def changed(core, ours, name):
    """Our positive conditioning after one of core's nodes."""
    other = [[torch.zeros(1, 77, ours.width), {"pooled_output": torch.zeros(1, 768)}]]
    mask = torch.ones(1, 64, 64)
    return {
        "as it is": lambda: ours.positive,
        "ConditioningCombine": lambda: core.ConditioningCombine().combine(other, ours.positive)[0],
        "ConditioningConcat": lambda: core.ConditioningConcat().concat(ours.positive, other)[0],
        "ConditioningAverage": lambda: core.ConditioningAverage().addWeighted(ours.positive, other, 0.5)[0],
        "ConditioningZeroOut": lambda: core.ConditioningZeroOut().zero_out(ours.positive)[0],
        "ConditioningSetTimestepRange": lambda: core.ConditioningSetTimestepRange().set_range(ours.positive, 0, 1)[0],
        "ConditioningSetArea": lambda: core.ConditioningSetArea().append(ours.positive, 32, 32, 0, 0, 1.0)[0],
        "ConditioningSetMask": lambda: core.ConditioningSetMask().append(ours.positive, mask, "default", 1.0)[0],
        "ConditioningSetMask, bounds": lambda: core.ConditioningSetMask().append(
            ours.positive, mask, "mask bounds", 1.0
        )[0],
    }[name]()


CHANGES = (
    "as it is",
    "ConditioningCombine",
    "ConditioningConcat",
    "ConditioningAverage",
    "ConditioningZeroOut",
    "ConditioningSetTimestepRange",
    "ConditioningSetArea",
    "ConditioningSetMask",
    "ConditioningSetMask, bounds",
)
SAMPLERS = ("KSampler", "BasicGuider", "CFGGuider")


def run(core, sampler, model, positive, negative, latent):
    if sampler == "KSampler":
        return core.KSampler().sample(model, **STEPS, positive=positive, negative=negative, latent_image=latent)[0]
    conditions = (positive,) if sampler == "BasicGuider" else (positive, negative, 4.5)
    (guider,) = custom(sampler)(model, *conditions).result
    (noise,) = custom("RandomNoise")(1).result
    (solver,) = custom("KSamplerSelect")("euler").result
    (sigmas,) = custom("BasicScheduler")(model, "simple", 2, 1.0).result
    return custom("SamplerCustomAdvanced")(noise, guider, solver, sigmas, latent).result[0]


def test_the_small_unet_draws_from_a_conditioning_of_that_width(core, unet, ours):
    theirs = [[torch.zeros(1, 77, ours.width), {}]]
    for sampler in SAMPLERS:
        drawn = run(core, sampler, unet, theirs, theirs, {"samples": torch.zeros(1, 4, 8, 8)})
        assert drawn["samples"].shape == (1, 4, 8, 8)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_real_unet_says_so_after_each_of_cores_nodes_and_ours_draws(core, unet, ours, sampler, change):
    theirs = [[torch.zeros(1, 77, ours.width), {}]]
    conditioning = changed(core, ours, change)
    with pytest.raises(ValueError, match=OURS):
        run(core, sampler, unet, conditioning, theirs, {"samples": torch.zeros(1, 4, 8, 8)})
    drawn = run(core, sampler, ours.model, conditioning, ours.negative, {"samples": torch.zeros(1, 16, 1, 8, 8)})
    assert torch.isfinite(drawn["samples"]).all()


def test_the_condition_for_others_changes_no_picture(core, ours):
    """Nor do the options of which it is one: without all of them the same is drawn."""
    own = importlib.import_module("pack.native.conditioning").own_options()
    bare = [
        [context, {key: value for key, value in options.items() if key not in own}]
        for context, options in ours.positive
    ]
    assert bare[0][1].keys() != ours.positive[0][1].keys()
    for sampler in SAMPLERS:
        pictures = [
            run(core, sampler, ours.model, conditioning, ours.negative, ours.latent)["samples"]
            for conditioning in (ours.positive, bare)
        ]
        assert torch.equal(*pictures)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "entry, found",
    [
        ([torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}], "768"),
        ([torch.zeros(1, 77, 768), {}], "768"),
        ([None, {}], "None"),
        ([torch.zeros(77, 128), {}], r"\(77, 128\)"),
    ],
)
def test_another_models_conditioning_is_named_by_ours(core, ours, sampler, entry, found):
    with pytest.raises(
        ValueError, match=f"conditioning of width {found} found, 128 expected: connect InternVL-U Encode"
    ):
        run(core, sampler, ours.model, [entry], ours.negative, ours.latent)
    if sampler != "BasicGuider":
        with pytest.raises(ValueError, match=f"width {found} found"):
            run(core, sampler, ours.model, ours.positive, [entry], ours.latent)


@pytest.mark.parametrize(
    "reference, told",
    [
        (torch.ones(1, 4, 8, 8), "4 channels found, 16 expected"),
        (torch.zeros(1, 4, 8, 8), "4 channels found, 16 expected"),
        (torch.ones(1, 16, 3, 8, 8), "3 frames found, 1 expected"),
        (torch.full((1, 16, 1, 8, 8), torch.nan), "not a number"),
    ],
)
def test_a_reference_that_another_model_has_encoded_is_named(core, ours, reference, told):
    context, options = ours.positive[0]
    with pytest.raises(ValueError, match=told):
        run(
            core,
            "KSampler",
            ours.model,
            [[context, options | {"reference_latents": [reference]}]],
            ours.negative,
            ours.latent,
        )
