"""The benchmark of judged quality over counted work: its batches, its differences and its picture."""

import xml.etree.ElementTree

import pytest
import torch
from PIL import Image

from benchmarks import curve, curve_plot
from benchmarks.operations import count, count_branches
from internvl_u import images, sampling
from internvl_u.defaults import STEPS
from internvl_u.pipeline import ImageRequest, Pipeline
from internvl_u.rope import grid_of
from internvl_u.speed import GuidanceIntervals, Interval, Speed


@pytest.mark.parametrize("edit", [False, True])
def test_scenes_of_a_batch_are_drawn_as_alone(checkpoint, near, edit):
    pipeline = Pipeline(checkpoint)
    given = {"images": (Image.new("RGB", (32, 32), "red"),)} if edit else {}
    requests = [ImageRequest(text, 32, 32, seed=seed, **given) for seed, text in enumerate(("a cat", "two red dogs"))]
    scenes = [curve.Scene(i, request, pipeline.encode_prompt(request)) for i, request in enumerate(requests)]
    intervals = GuidanceIntervals(Interval(end=0.75), Interval(end=0.25))
    noise = torch.cat([images.noise(32, 32, request.seed) for request in requests])
    sigmas = sampling.flow_sigmas(4)
    alone = [
        pipeline.sample(scene.contexts, one, sigmas, scene.request.guidance, intervals=intervals)
        for scene, one in zip(scenes, noise.split(1), strict=True)
    ]
    with torch.inference_mode():
        denoise = curve.BatchDenoiser(pipeline._networks["mmdit"], scenes, grid_of(noise), intervals)
        near(sampling.sample(denoise, noise, sigmas), torch.cat(alone), 1e-4)
    expected = {"conditional": 4, "unconditional": 1, "partial": 3} if edit else {"conditional": 4, "unconditional": 3}
    assert denoise.counts == expected


@pytest.mark.parametrize("mode", ["t2i", "edit"])
def test_the_branches_of_a_step_cost_what_the_step_does(mode):
    assert sum(count_branches(mode, 512).values()) == pytest.approx(count(mode, 512), rel=0.01)


def result(point, right, task="one thing", steps=STEPS, **evaluations):
    counts = {"conditional": steps, "unconditional": steps} | evaluations
    found = {"point": point, "curve": curve.PLAIN, "steps": steps, "task": task, "right": right, "evaluations": counts}
    return found | {"psnr": 30.0, "ssim": 0.9}


def test_points_are_held_to_20_steps_on_the_same_scenes():
    full, half = result(curve.FULL, [1, 1, 1, 0]), result("10 steps", [1, 0, 0, 1], steps=10)
    rows = curve.summarise([full, half])
    assert (rows[0]["work %"], rows[0]["against full"], rows[0]["+-"]) == (pytest.approx(100), 0, 0)
    assert (rows[1]["work %"], rows[1]["against full"]) == (pytest.approx(50), -25)
    assert rows[1]["+-"] == pytest.approx(100 * 3**0.5 / 4)
    one_branch = curve.summarise([full, result("x", [1] * 4, unconditional=0)])[1]
    assert one_branch["work %"] == pytest.approx(52, abs=1)


def test_the_picture_is_an_svg_that_names_its_points():
    several = [
        result(curve.FULL, [1] * 10),
        result("a < b", [1] * 9 + [0], steps=4),
        result("worst", [0] * 10, steps=2),
    ]
    rows = curve.summarise(several)
    root = xml.etree.ElementTree.fromstring(curve_plot.plot(rows))
    texts = [element.text for element in root.iter() if element.text]
    assert "a < b" in texts and "worst" not in texts and curve.PLAIN in texts and root.tag.endswith("svg")


def test_the_points_are_of_other_names_and_the_first_is_20_steps():
    points = curve.points()
    assert points[0].name == curve.FULL and points[0].speed == Speed()
    assert len({point.name for point in points}) == len(points)
    assert {"balanced", "fast", "EasyCache 0.1", "LazyCache 0.1"} <= {point.name for point in points}
