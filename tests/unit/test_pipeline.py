import json
import subprocess
import sys

import numpy
import pytest
import torch
from pack.internvl_u import picture, sampling
from pack.internvl_u.pipeline import Drawing, Pipeline
from PIL import Image


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline(checkpoint)


def drawing(case):
    return Drawing(case.prompt, case.width, case.height, case.steps, seed=1234)


def test_noise_equals_the_official_noise(case):
    assert torch.equal(picture.noise(*picture.drawn_size(case.width, case.height), 1234), case["noise"])


def test_final_latent_and_decoded_picture_equal_the_official_ones(pipeline, case, near):
    wish = drawing(case)
    latent = pipeline.sample(pipeline.contexts(wish), case["noise"], sampling.flow_sigmas(case.steps), wish)
    near(latent, case["final_latents"])
    near(pipeline.decode(latent), case["decoded"])


def test_the_picture_equals_the_official_one(pipeline, case, same_picture):
    steps = []
    drawn = pipeline.draw(drawing(case), steps.append)
    same_picture(numpy.asarray(drawn), case["image_u8"])
    assert steps == list(range(1, case.steps + 1))


@pytest.mark.parametrize("width, height", [(15, 64), (64, 4097), (0, 0), (-16, 64)])
def test_sizes_out_of_range_are_refused(pipeline, width, height):
    with pytest.raises(ValueError, match="found, 16 to 4096 pixels expected"):
        pipeline.draw(Drawing("a cat", width, height, steps=1))


def test_bfloat16_draws_nearly_the_same(checkpoint, golden):
    case = golden("t2i_square")
    drawn = numpy.asarray(Pipeline(checkpoint, dtype=torch.bfloat16).draw(drawing(case))).astype(int)
    assert numpy.abs(drawn - case["image_u8"].numpy()).mean() < 12


def command(*arguments, cwd):
    line = [sys.executable, "-m", "internvl_u", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def root(checkpoint):
    return checkpoint.parent.parent.parent


def test_command_line_draws_the_official_picture_and_tells_how(root, checkpoint, golden, same_picture, tmp_path):
    case, out = golden("t2i_odd_size"), tmp_path / "picture.png"
    wish = ["--model", checkpoint, "--prompt", case.prompt, "--width", case.width, "--height", case.height]
    done = command("draw", *wish, "--steps", case.steps, "--seed", 1234, "--out", out, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr
    with Image.open(out) as image:
        same_picture(numpy.asarray(image), case["image_u8"])
        told = json.loads(image.text["internvl_u"])
    assert told["prompt"] == case.prompt and told["seed"] == 1234 and told["width"] == 100
    assert told["all_cfg"] == 4.5 and told["version"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--model", "nowhere"], "no model folder"),
        (["--width", "8"], "width 8 found, 16 to 4096 pixels expected"),
        (["--steps", "0"], "0 steps asked for"),
        (["--out", "picture.jpg"], "a name ending in .png expected"),
        (["--out", "no/such/folder/picture.png"], "no folder"),
        (["--device", "nothing"], "nothing"),
    ],
)
def test_command_line_errors_are_one_line(root, checkpoint, tmp_path, wrong, message):
    options = {"--model": checkpoint, "--prompt": "x", "--width": 16, "--height": 16, "--steps": 1}
    options["--out"] = tmp_path / "p.png"
    options[wrong[0]] = wrong[1]
    done = command("draw", *(part for pair in options.items() for part in pair), cwd=root)
    lines = [line for line in done.stderr.splitlines() if line.startswith("internvl_u: ")]
    assert done.returncode == 1 and len(lines) == 1 and message in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p.png").exists()
