"""Guidance in a part of the schedule: the formula outside, which branches are evaluated, and the presets."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy
import pytest
import torch
from pack.internvl_u import graph, images, sampling
from pack.internvl_u.__main__ import main
from pack.internvl_u.defaults import Guidance
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.speed import ALWAYS, QUALITY, SPEEDS, Branches, GuidanceIntervals, Interval, Speed
from PIL import Image

STEPS = 20
OFF = Interval(0.0, 0.0)


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline(checkpoint)


@pytest.fixture(scope="module")
def contexts(pipeline):
    """What is drawn from, without and with a reference."""
    picture = Image.new("RGB", (32, 32), "red")
    return {
        count: pipeline.encode_prompt(ImageRequest("a cat", 32, 32, images=(picture,) * count)) for count in (0, 1, 2)
    }


@pytest.fixture
def evaluated(pipeline, monkeypatch):
    """Counts the samples that the transformer is given with each number of references."""
    pipeline._on_device("mmdit", lambda: sampling_model(pipeline))
    model, counts = pipeline._networks["mmdit"], Counter()
    forward = model.forward

    def counted(latents, time, branches, references=(), *args, **more):
        counts[len(references)] += len(branches)
        return forward(latents, time, branches, references, *args, **more)

    monkeypatch.setattr(model, "forward", counted)
    return counts


def sampling_model(pipeline):
    from pack.internvl_u.load import load_mmdit

    return load_mmdit(pipeline.files.transformer, dtype=pipeline.dtype)


def draw(pipeline, contexts, intervals, steps=STEPS):
    noise, sigmas = images.noise(32, 32, 3), sampling.flow_sigmas(steps)
    return pipeline.sample(contexts, noise, sigmas, Guidance(4.5, 2.0), intervals=intervals)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.5, 0.65, 0.95, 1.0])
def test_a_share_of_the_schedule_is_that_share_of_its_steps(share):
    sigmas = sampling.flow_sigmas(STEPS)[:-1].tolist()
    before = [Interval(end=share).holds(sigma, sampling.percent_to_sigma) for sigma in sigmas]
    after = [Interval(start=share).holds(sigma, sampling.percent_to_sigma) for sigma in sigmas]
    steps = round(share * STEPS)
    assert before == [i < steps for i in range(STEPS)] and after == [i >= steps for i in range(STEPS)]


@pytest.mark.parametrize("references", [0, 1, 2])
def test_intervals_of_the_whole_schedule_change_no_bit_and_no_work(pipeline, contexts, evaluated, references):
    plain = pipeline.sample(contexts[references], images.noise(32, 32, 3), sampling.flow_sigmas(4), Guidance(4.5, 2.0))
    work = dict(evaluated)
    evaluated.clear()
    assert torch.equal(draw(pipeline, contexts[references], ALWAYS, 4), plain)
    assert dict(evaluated) == work == ({0: 8} if not references else {0: 4, references: 8})


@pytest.mark.parametrize("words", [Interval(), Interval(end=0.5), Interval(0.25, 0.75), OFF])
@pytest.mark.parametrize("pictures", [Interval(), Interval(end=0.25), Interval(0.5, 1.0), OFF])
@pytest.mark.parametrize("references", [0, 1])
def test_only_the_branches_that_count_are_evaluated(pipeline, contexts, evaluated, words, pictures, references):
    draw(pipeline, contexts[references], GuidanceIntervals(words, pictures))
    expected = Counter()
    for i in range(STEPS):
        on_words, on_pictures = (one.start * STEPS <= i < one.end * STEPS for one in (words, pictures))
        if references:
            expected[1] += 1 + (on_words or on_pictures)
            expected[0] += on_pictures
        else:
            expected[0] += 1 + on_words
    assert evaluated == expected


@pytest.mark.parametrize("timestep", [500, 950])
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize("references", [0, 1])
def test_outside_its_interval_a_scale_is_one(pipeline, contexts, timestep, words, pictures, references, near):
    sigma = torch.tensor(timestep / 1000 + 1e-4)
    latent = images.noise(32, 32, 1)
    intervals = GuidanceIntervals(Interval() if words else OFF, Interval() if pictures else OFF)
    model = pipeline._on_device("mmdit", lambda: sampling_model(pipeline))
    guidance = Guidance(4.5, 2.0)
    with torch.inference_mode():
        denoise = sampling.Denoiser(model, contexts[references], (4, 4), guidance, torch.float32, intervals)
        time = torch.tensor([timestep])
        c, p, u = denoise.velocities(latent, time)
        found = (latent - denoise(latent, sigma)) / sigma

    def scaled(difference, scale, on):
        if not on:
            return difference
        norm = difference.norm(dim=1, keepdim=True).clamp(min=1.0)
        return scale * (difference / norm**0.4 if timestep > 930 else difference)

    expected = (
        u + scaled(p - u, 2.0, pictures) + scaled(c - p, 4.5, words) if references else u + scaled(c - u, 4.5, words)
    )
    near(found, expected, 1e-5)


def test_a_branch_that_is_not_wanted_cancels_out_exactly():
    c, p = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    time = torch.tensor([950, 400])
    assert torch.equal(sampling.dual_guidance(c, c, c, 4.5, 2.0, time, False), c)
    assert torch.equal(sampling.dual_guidance(c, c, c, 4.5, 2.0, time), c)
    words_alone = sampling.dual_guidance(c, p, p, 4.5, 9.0, time)
    assert torch.equal(words_alone, sampling.dual_guidance(c, p, p, 4.5, 2.0, time))
    assert not torch.equal(words_alone, c)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.01, 1.01, "0.5", None])
@pytest.mark.parametrize("name", ["all_cfg_start", "all_cfg_end", "part_cfg_start", "part_cfg_end"])
def test_a_share_is_a_number_from_0_to_1(name, value):
    with pytest.raises(ValueError, match=f"{name} .* found, a number from 0 to 1 expected"):
        ImageRequest("x", **{name: value})


def test_an_interval_does_not_end_before_its_start():
    with pytest.raises(ValueError, match=r"part_cfg_end 0.2 found, part_cfg_start \(0.6\) or more expected"):
        ImageRequest("x", part_cfg_start=0.6, part_cfg_end=0.2)
    ImageRequest("x", part_cfg_start=0.6, part_cfg_end=0.6)


def test_a_preset_sets_what_is_left_as_it_is_and_the_default_sets_nothing():
    assert SPEEDS[QUALITY] == Speed() == ImageRequest("x").way == Speed(20, ALWAYS)
    for name, preset in SPEEDS.items():
        given = {"speed": name, "evaluations": preset.steps}
        assert ImageRequest("x", **given).way == preset
        assert ImageRequest("x", steps=17, **given).way == Speed(17, preset.intervals)
        typed = ImageRequest("x", all_cfg_start=0.1, **given).way
        assert typed == Speed(preset.steps, GuidanceIntervals(Interval(0.1, 1.0), preset.intervals.part_cfg))
    assert ImageRequest("x", speed="turbo", evaluations=4).way == SPEEDS["turbo"]._replace(steps=4)
    with pytest.raises(ValueError, match="speed 'warp' found, one of quality, balanced, fast, turbo expected"):
        ImageRequest("x", speed="warp")


def test_each_preset_costs_at_most_what_it_says_and_less_than_the_one_before():
    from benchmarks.operations import count_branches

    for mode in ("t2i", "edit"):
        costs, shares = count_branches(mode, 512), []
        for speed in SPEEDS.values():
            work = 0.0
            for sigma in sampling.flow_sigmas(speed.steps)[:-1].tolist():
                used = speed.intervals.branches_at(sigma, sampling.percent_to_sigma, mode == "edit")
                kept = {"conditional": True, "partial": used.partial, "unconditional": used.unconditional}
                work += sum(cost for name, cost in costs.items() if kept[name])
            shares.append(work / (20 * sum(costs.values())))
        assert shares[0] == pytest.approx(1.0) and shares[1] < 0.51 and shares[2] < 0.31


def test_the_command_line_takes_intervals_and_presets_and_tells_them(checkpoint, tmp_path, capsys):
    line = ["draw", "--model", str(checkpoint), "--prompt", "a cat", "--width", "32", "--height", "32"]
    texts = {}
    preset = SPEEDS["fast"]
    shares = [
        part for name, value in preset.intervals.named().items() for part in (f"--{name.replace('_', '-')}", f"{value}")
    ]
    ways = {"preset": ["--speed", "fast"], "typed": ["--steps", str(preset.steps), *shares], "plain": ["--steps", "8"]}
    for name, more in ways.items():
        assert main([*line, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
        assert f"{preset.steps}/{preset.steps}" in capsys.readouterr().err
        with Image.open(tmp_path / f"{name}.png") as image:
            texts[name] = dict(image.text), numpy.asarray(image)
    assert (texts["preset"][1] == texts["typed"][1]).all() and (texts["preset"][1] != texts["plain"][1]).any()
    told = json.loads(texts["preset"][0]["internvl_u"])
    assert told["steps"] == preset.steps and told["speed"] == "fast" and told["all_cfg_end"] == 0.5
    assert texts["preset"][0]["parameters"].startswith("a cat\nSteps: 8,")
    nodes = json.loads(texts["preset"][0]["prompt"])
    (sampler,) = [node["inputs"] for node in nodes.values() if node["class_type"] == "InternVLU_SampleLatent"]
    assert sampler["steps"] == preset.steps and sampler["scales"] == "as typed"
    assert {name: sampler[name] for name in preset.intervals.named()} == preset.intervals.named()
    (page,) = [n for n in graph.page_graph(nodes)["nodes"] if n["type"] == "InternVLU_SampleLatent"]
    assert page["widgets_values"][-5:] == ["as typed", *preset.intervals.named().values()]
    plain = json.loads(texts["plain"][0]["prompt"])
    (page,) = [n for n in graph.page_graph(plain)["nodes"] if n["type"] == "InternVLU_SampleLatent"]
    assert page["widgets_values"][-1] == 1.0 and len(page["widgets_values"]) == 6


@pytest.mark.parametrize("wrong", [["--speed", "warp"], ["--all-cfg-end", "half"]])
def test_the_command_line_refuses_other_presets_and_texts(checkpoint, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        main(["draw", "--model", str(checkpoint), "--prompt", "x", "--out", str(tmp_path / "a.png"), *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_which_branches_count():
    on, off = Interval(), OFF
    for words, pictures, references, expected in (
        (on, on, False, Branches(False, True, True)),
        (off, on, False, Branches(False, False, False)),
        (on, on, True, Branches(True, True, True)),
        (on, off, True, Branches(True, False, True)),
        (off, on, True, Branches(True, True, False)),
        (off, off, True, Branches(False, False, False)),
    ):
        assert GuidanceIntervals(words, pictures).branches_at(0.5, sampling.percent_to_sigma, references) == expected


def test_pictures_of_one_request_and_several_have_the_same_way(pipeline):
    wish = ImageRequest("a cat", 32, 32, 4, all_cfg_end=0.5)
    drawn = list(pipeline.draw_several(wish, [0, 1]))
    for seed, picture in enumerate(drawn):
        assert numpy.array_equal(numpy.asarray(picture), numpy.asarray(pipeline.draw(replace(wish, seed=seed))))
