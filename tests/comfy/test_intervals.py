"""Guidance in a part of the schedule: on the sampler, by core's own nodes, with caches, batches and areas."""

import importlib
from collections import Counter

import pytest
import torch
from pack.internvl_u.speed import SPEEDS, GuidanceIntervals, Interval
from PIL import Image

STEPS = 10
HALF = GuidanceIntervals(Interval(end=0.5), Interval(end=0.5))
PICTURES_ALONE = GuidanceIntervals(Interval(end=0.0), Interval())
WORDS_ALONE = GuidanceIntervals(Interval(), Interval(end=0.0))
LATE = GuidanceIntervals(Interval(0.5, 1.0), Interval(0.5, 1.0))
SETTINGS = {"seed": 1234, "steps": STEPS, "all_cfg": 4.5, "part_cfg": 2.0}


@pytest.fixture
def conditions(loaded, golden):
    """Positive, negative, LATENT and the library's request of a picture from text or of an edit."""

    def make(edit):
        case = golden("edit_one" if edit else "t2i_square")
        images = tuple(Image.open(file).convert("RGB") for file in case.images) if edit else ()
        given = {"images": list(images), "vae": loaded.vae} if edit else {}
        positive, negative, latent = loaded.mllm.encode(case.prompt, **given)
        return positive, negative, latent, (case.prompt, images)

    return make


@pytest.fixture
def evaluated(loaded, monkeypatch):
    """Counts the samples that the network is given, with references (True) and without."""
    counts = Counter()
    network = loaded.model.model.diffusion_model
    forward = network._forward

    def counted(x, timesteps, context, control, contexts, references, *rest):
        counts[bool(references)] += x.shape[0]
        return forward(x, timesteps, context, control, contexts, references, *rest)

    monkeypatch.setattr(network, "_forward", counted)
    return counts


def expected_counts(intervals, edit):
    counts = Counter()
    for i in range(STEPS):
        words, pictures = (one.start * STEPS <= i < one.end * STEPS for one in intervals)
        if edit:
            counts[True] += 1 + (words or pictures)
            counts[False] += pictures
        else:
            counts[False] += 1 + words
    return counts


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("intervals", [GuidanceIntervals(), HALF, PICTURES_ALONE, WORDS_ALONE, LATE])
def test_the_sampler_evaluates_what_counts_and_draws_what_the_library_does(
    loaded, parts, conditions, evaluated, checkpoint, normalised, near, edit, intervals
):
    from pack.internvl_u import images, sampling
    from pack.internvl_u.pipeline import ImageRequest, Pipeline

    positive, negative, latent, (prompt, pictures) = conditions(edit)
    drawn = parts.sampler.sample_latent(loaded.model, positive, negative, latent, intervals=intervals, **SETTINGS)
    assert evaluated == expected_counts(intervals, edit)
    wish = ImageRequest(prompt, images=pictures, seed=1234)
    pipeline = Pipeline(checkpoint)
    height, width = latent["samples"].shape[-2:]
    noise = images.noise(8 * width, 8 * height, 1234)
    sigmas = sampling.flow_sigmas(STEPS)
    expected = pipeline.sample(pipeline.encode_prompt(wish), noise, sigmas, wish.guidance, intervals=intervals)
    near(normalised(drawn["samples"]), expected)


@pytest.mark.parametrize("edit", [False, True])
def test_intervals_of_the_whole_schedule_change_no_bit(loaded, parts, conditions, edit):
    positive, negative, latent, _ = conditions(edit)
    plain, whole = (
        parts.sampler.sample_latent(loaded.model, positive, negative, latent, **SETTINGS, **more)["samples"]
        for more in ({}, {"intervals": GuidanceIntervals(Interval(0.0, 1.0), Interval(0.0, 1.0))})
    )
    assert torch.equal(plain, whole)


def ksampler(model, positive, negative, latent):
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent["samples"], 1234)
    arguments = (noise, STEPS, 4.5, "euler", "simple", positive, negative, latent["samples"])
    return comfy.sample.sample(model, *arguments, denoise=1.0, seed=1234)


@pytest.fixture
def euler(loaded, parts):
    """Draws as `ksampler` does, with the intervals of our guider."""

    def draw(positive, negative, latent, intervals):
        import comfy.sample
        import comfy.samplers

        guider = parts.guidance.DualGuider(loaded.model)
        guider.set_conds(positive, negative)
        guider.set_scales(4.5, 2.0)
        guider.set_intervals(intervals)
        noise = comfy.sample.prepare_noise(latent["samples"], 1234)
        sigmas = comfy.samplers.calculate_sigmas(loaded.model.model.model_sampling, "simple", STEPS)
        return guider.sample(noise, latent["samples"], comfy.samplers.ksampler("euler"), sigmas, seed=1234)

    return draw


@pytest.mark.parametrize("edit", [False, True])
def test_a_negative_for_a_part_of_the_schedule_is_guidance_in_that_part(loaded, conditions, evaluated, euler, edit):
    """ConditioningSetTimestepRange: without an unconditional branch references are not scaled, and words alone not."""
    import nodes

    positive, negative, latent, _ = conditions(edit)
    (limited,) = nodes.ConditioningSetTimestepRange().set_range(negative, 0.0, 0.5)
    found = ksampler(loaded.model, positive, limited, latent)
    counts = dict(evaluated)
    evaluated.clear()
    intervals = GuidanceIntervals(Interval(), Interval(end=0.5)) if edit else HALF
    assert torch.equal(found, euler(positive, negative, latent, intervals))
    assert counts == dict(evaluated) == dict(expected_counts(intervals, edit))


def test_references_for_a_part_of_the_schedule_are_scaled_in_that_part(loaded, conditions, evaluated):
    import nodes

    positive, negative, latent, _ = conditions(True)
    words, *_ = conditions(False)
    (early,) = nodes.ConditioningSetTimestepRange().set_range(positive, 0.0, 0.5)
    (late,) = nodes.ConditioningSetTimestepRange().set_range(words, 0.5, 1.0)
    assert torch.isfinite(ksampler(loaded.model, early + late, negative, latent)).all()
    half = STEPS // 2
    assert evaluated == {True: 2 * half, False: half + 2 * half}


def overridden(model, cfg, start, end):
    """Core's CFGOverride, which older versions have not."""
    from comfy.patcher_extension import WrappersMP

    nodes = importlib.import_module("comfy_extras.nodes_custom_sampler")
    if hasattr(nodes, "CFGOverride"):
        return nodes.CFGOverride.execute(model, cfg, start, end).args[0]
    levels = [model.get_model_object("model_sampling").percent_to_sigma(share) for share in (end, start)]

    def wrapper(executor, *args):
        usual = executor.class_obj.cfg
        if levels[0] <= float(args[1][0]) <= levels[1]:
            executor.class_obj.cfg = cfg
        try:
            return executor(*args)
        finally:
            executor.class_obj.cfg = usual

    model = model.clone()
    model.add_wrapper(WrappersMP.PREDICT_NOISE, wrapper)
    return model


@pytest.mark.parametrize("edit", [False, True])
def test_a_cfg_that_a_node_overrides_with_one_is_no_guidance(loaded, conditions, evaluated, euler, edit):
    positive, negative, latent, _ = conditions(edit)
    found = ksampler(overridden(loaded.model, 1.0, 0.5, 1.0), positive, negative, latent)
    counts = dict(evaluated)
    evaluated.clear()
    assert torch.equal(found, euler(positive, negative, latent, HALF))
    assert counts == dict(evaluated) == dict(expected_counts(HALF, edit))


def test_a_cfg_that_a_node_overrides_with_another_is_taken(loaded, conditions, evaluated):
    positive, negative, latent, _ = conditions(True)
    plain = ksampler(loaded.model, positive, negative, latent)
    assert torch.equal(ksampler(overridden(loaded.model, 4.5, 0.2, 0.6), positive, negative, latent), plain)
    assert not torch.equal(ksampler(overridden(loaded.model, 3.0, 0.2, 0.6), positive, negative, latent), plain)
    assert evaluated == {True: 6 * STEPS, False: 3 * STEPS}


def test_a_node_that_wants_both_predictions_gets_them(loaded, parts, conditions, evaluated):
    positive, negative, latent, _ = conditions(False)
    model, seen = loaded.model.clone(), []
    model.set_model_sampler_post_cfg_function(
        lambda args: seen.append(args["uncond_denoised"].abs().sum().item()) or args["denoised"],
        disable_cfg1_optimization=True,
    )
    drawn = parts.sampler.sample_latent(model, positive, negative, latent, intervals=HALF, **SETTINGS)["samples"]
    assert evaluated == {False: 2 * STEPS} and all(seen)
    plain = parts.sampler.sample_latent(loaded.model, positive, negative, latent, intervals=HALF, **SETTINGS)["samples"]
    assert torch.allclose(drawn, plain, atol=1e-3)


@pytest.mark.parametrize("intervals", [HALF, LATE, PICTURES_ALONE, WORDS_ALONE])
@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_cores_step_caches_go_with_intervals(loaded, parts, conditions, evaluated, name, edit, intervals):
    caches = importlib.import_module("comfy_extras.nodes_easycache")
    cached = getattr(caches, f"{name}Node").execute(loaded.model, 0.5, 0.0, 1.0, False).args[0]
    positive, negative, latent, _ = conditions(edit)
    settings = SETTINGS | {"steps": 20, "intervals": intervals}
    plain = parts.sampler.sample_latent(loaded.model, positive, negative, latent, **settings)["samples"]
    whole = evaluated.total()
    evaluated.clear()
    drawn = parts.sampler.sample_latent(cached, positive, negative, latent, **settings)["samples"]
    assert 0 < evaluated.total() < whole and (drawn - plain).norm() / plain.norm() < 0.5


def test_below_denoise_1_a_share_is_of_the_whole_schedule(loaded, parts, conditions, evaluated):
    positive, negative, latent, _ = conditions(False)
    settings = SETTINGS | {"steps": 4, "denoise": 0.5}
    latent = latent | {"samples": torch.ones_like(latent["samples"])}
    for end, guided in ((0.5, 0), (0.75, 2), (1.0, 4)):
        evaluated.clear()
        intervals = GuidanceIntervals(Interval(end=end), Interval())
        parts.sampler.sample_latent(loaded.model, positive, negative, latent, intervals=intervals, **settings)
        assert evaluated == {False: 4 + guided}


@pytest.mark.parametrize("edit", [False, True])
def test_batches_areas_and_patches_go_with_intervals(loaded, parts, conditions, evaluated, near, edit):
    positive, negative, latent, _ = conditions(edit)

    def draw(model, positive, latent):
        return parts.sampler.sample_latent(model, positive, negative, latent, intervals=HALF, **SETTINGS)["samples"]

    samples = latent["samples"].expand(2, -1, -1, -1, -1)
    both = draw(loaded.model, positive, {"samples": samples})
    single = expected_counts(HALF, edit)
    assert evaluated == Counter({key: 2 * count for key, count in single.items()})
    near(both[:1], draw(loaded.model, positive, latent | {"batch_index": [0]}), 1e-4)
    height, width = samples.shape[-2:]
    areas = [(height, width // 2, 0, 0), (height, width - width // 2, 0, width // 2)]
    halves = [[tensor, more | {"area": area, "strength": 1.0}] for area in areas for tensor, more in positive]
    assert torch.isfinite(draw(loaded.model, halves, latent)).all()
    patched = loaded.model.clone()
    key = "diffusion_model.proj_out.weight"
    weight = patched.model.state_dict()[key]
    assert patched.add_patches({key: ("diff", (0.1 * torch.ones_like(weight),))}) == [key]
    evaluated.clear()
    assert not torch.equal(draw(patched, positive, latent), draw(loaded.model, positive, latent))
    assert evaluated == Counter({key: 2 * count for key, count in single.items()})


def test_a_guider_refuses_intervals_that_are_none(loaded, parts):
    guider = parts.guidance.DualGuider(loaded.model)
    for wrong, sentence in (
        (Interval(0.6, 0.2), r"all_cfg_end 0.2 found, all_cfg_start \(0.6\) or more expected"),
        (Interval(float("nan"), 1.0), "all_cfg_start nan found, a number from 0 to 1 expected"),
    ):
        with pytest.raises(ValueError, match=sentence):
            guider.set_intervals(GuidanceIntervals(wrong))
    assert guider.intervals == GuidanceIntervals()


@pytest.fixture
def queued(server, graph, golden):
    """Draws by a shipped workflow with values on each node that has an input of such a name; latent and log."""

    def run(name, **values):
        nodes = server.with_latent(graph(name, golden("t2i_square"), steps=values.get("steps", 20)))
        info = server.get("/object_info")
        for node in nodes.values():
            known = info[node["class_type"]]["input"]
            known = {**known.get("required", {}), **known.get("optional", {})}
            if node["class_type"].startswith("InternVLU"):
                node["inputs"] |= {key: value for key, value in values.items() if key in known}
        before = len(server.log.read_text())
        latent = server.latent(server.run(nodes))
        return latent, server.log.read_text()[before:]

    return run


@pytest.mark.parametrize("speed", ["balanced", "fast"])
def test_a_preset_is_its_numbers_in_the_sampler_and_in_its_parts_and_says_so(queued, speed):
    typed, silent = queued("text_to_image", steps=SPEEDS[speed].steps, **SPEEDS[speed].intervals.named())
    assert "taken" not in silent
    for name in ("text_to_image", "text_to_image_custom_sampling"):
        found, log = queued(name, speed=speed)
        assert torch.equal(found, typed)
        assert f"{SPEEDS[speed].steps} steps" in log
        assert f"prompt cfg from 0 to {SPEEDS[speed].intervals.all_cfg.end} of the schedule" in log


def test_typed_numbers_stay_beside_a_preset(queued):
    typed, _ = queued("text_to_image", steps=5, all_cfg_start=0.2, part_cfg_end=SPEEDS["fast"].intervals.part_cfg.end)
    found, log = queued("text_to_image", steps=5, all_cfg_start=0.2, speed="fast")
    assert torch.equal(found, typed)
    assert (
        "speed fast: picture cfg from 0 to 0.5 of the schedule taken" in log
        and "steps" not in log.split("fast")[1][:60]
    )


def test_quality_is_what_a_graph_without_the_choice_draws(queued):
    old, _ = queued("text_to_image")
    found, log = queued("text_to_image", speed="quality (official)")
    assert torch.equal(found, old) and "taken" not in log
