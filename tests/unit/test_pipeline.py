import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from pack.internvl_u import images, sampling
from pack.internvl_u.__main__ import main
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.load import load_mmdit
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from PIL import Image


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline(checkpoint)


def drawing(case):
    return ImageRequest(case.prompt, case.width, case.height, case.steps, seed=1234)


def test_noise_equals_the_official_noise(case, near):
    """torch's normal numbers differ in their last bit between processors with and without AVX2."""
    noise = images.noise(*images.drawn_size(case.width, case.height), 1234)
    near(noise, case["noise"], 1e-6)
    generator = torch.Generator().manual_seed(1234)
    assert torch.equal(noise, torch.randn(case["noise"].shape, generator=generator))


def test_final_latent_and_decoded_picture_equal_the_official_ones(pipeline, case, near):
    wish = drawing(case)
    latent = pipeline.sample(
        pipeline.encode_prompt(wish), case["noise"], sampling.flow_sigmas(case.steps), wish.guidance
    )
    near(latent, case["final_latents"])
    near(pipeline.decode(latent), case["decoded"])


def test_the_picture_equals_the_official_one(pipeline, case, same_picture):
    steps = []
    drawn = pipeline.draw(drawing(case), steps.append)
    same_picture(numpy.asarray(drawn), case["image_u8"])
    assert steps == list(range(1, case.steps + 1))


def pictures(case):
    return tuple(images.to_rgb(Image.open(file)) for file in case.images)


def test_edits_equal_the_official_ones(pipeline, edit, near, same_picture):
    wish = replace(drawing(edit), images=pictures(edit))
    contexts = pipeline.encode_prompt(wish)
    for i, (context, _) in enumerate((contexts.conditional, contexts.partial, contexts.unconditional)):
        near(context, edit.context(i), 1e-5)
    near(contexts.references[0], edit["ref_latents_0"], 1e-5)
    latent = pipeline.sample(contexts, edit["noise"], sampling.flow_sigmas(edit.steps), wish.guidance)
    near(latent, edit["final_latents"])
    same_picture(pipeline.draw(wish), edit["image_u8"])


def test_pictures_after_a_thought_equal_the_official_ones(pipeline, thinking, near, same_picture):
    wish = replace(drawing(thinking), images=pictures(thinking))
    wish = replace(wish, thought=pipeline.think(wish, config=GenerationConfig(thinking.new)))
    assert wish.guidance == (3.5, 1.5)
    contexts = pipeline.encode_prompt(wish)
    for i, branch in enumerate((contexts.conditional, contexts.partial, contexts.unconditional)):
        if branch is not None:
            near(branch[0], thinking.context(i), 1e-5)
    latent = pipeline.sample(contexts, thinking["noise"], sampling.flow_sigmas(thinking.steps), wish.guidance)
    near(latent, thinking["final_latents"])
    same_picture(pipeline.draw(wish), thinking["image_u8"])


@pytest.mark.parametrize("count", [2, 3])
def test_several_references_have_frames_of_their_own_and_all_count(pipeline, golden, count):
    case = golden("edit_one")
    seen = (pictures(case) + pictures(golden("edit_placeholder")) + pictures(golden("edit_large_ref")))[:count]
    wish = ImageRequest("put them together", 64, 64, 2, images=seen)
    contexts = pipeline.encode_prompt(wish)
    assert [span.is_image for span in contexts.conditional[1]].count(True) == count
    assert len(contexts.references) == count
    sigmas, noise = sampling.flow_sigmas(2), images.noise(64, 64, 0)
    whole = pipeline.sample(contexts, noise, sigmas, wish.guidance)
    for i in range(count):
        changed = tuple(r + (j == i) for j, r in enumerate(contexts.references))
        other = pipeline.sample(contexts._replace(references=changed), noise, sigmas, wish.guidance)
        assert not torch.allclose(other, whole)


def test_a_negative_prompt_changes_the_unconditional_branch_alone(pipeline, golden):
    wish = ImageRequest("a cat", 64, 64, 2, images=pictures(golden("edit_one")))
    plain, other = (pipeline.encode_prompt(replace(wish, negative_prompt=text)) for text in ("", "a dog"))
    assert torch.equal(plain.conditional[0], other.conditional[0]) and torch.equal(plain.partial[0], other.partial[0])
    assert plain.unconditional[0].shape != other.unconditional[0].shape
    assert (
        numpy.asarray(pipeline.draw(wish)).tobytes()
        != numpy.asarray(pipeline.draw(replace(wish, negative_prompt="a dog"))).tobytes()
    )


def test_a_reference_size_limits_what_the_transformer_sees_of_each_picture(pipeline, golden):
    wish = ImageRequest("x", 64, 64, 1, images=pictures(golden("edit_large_ref")))
    shapes = {}
    for side in (None, 1024, 64, 32, 16):
        contexts = pipeline.encode_prompt(replace(wish, reference_size=side))
        shapes[side] = contexts.references[0].shape[-2:]
        assert pipeline.size(replace(wish, width=None, height=None)) == pipeline.encoder.sizes.fit(*wish.images[0].size)
    areas = [64 * rows * columns for rows, columns in shapes.values()]
    assert areas[0] == areas[1] > areas[2] > areas[3] > areas[4] and areas[4] >= 16 * 16
    assert areas[2] <= 64 * 64 and areas[3] <= 32 * 32
    for wrong in (15, 4097, 0, 64.5, "64"):
        with pytest.raises(ValueError, match="reference_size .* expected"):
            pipeline.draw(replace(wish, reference_size=wrong))


def test_command_line_takes_a_negative_prompt_and_a_reference_size(checkpoint, golden, tmp_path):
    line = ["draw", "--model", checkpoint, "--prompt", "x", "--image", golden("edit_large_ref").images[0], "--steps", 1]
    drawn = []
    for more in ([], ["--negative-prompt", ""], ["--negative-prompt", "a dog"], ["--reference-size", 32]):
        out = tmp_path / f"{len(drawn)}.png"
        done = command(*line, *more, "--out", out)
        assert done.returncode == 0, done.stderr
        with Image.open(out) as image:
            drawn.append(image.tobytes())
            told = json.loads(image.text["internvl_u"])
    assert (told["negative_prompt"], told["reference_size"]) == ("", 32)
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    wrong = command(*line, "--reference-size", 5, "--out", tmp_path / "no.png")
    assert wrong.returncode == 1 and "reference_size 5 found, 16 to 4096 pixels expected" in wrong.stderr


def test_the_size_of_an_edit_is_the_first_pictures_by_default(pipeline, golden):
    case = golden("edit_placeholder")
    assert pipeline.size(ImageRequest("x", images=pictures(case))) == (case.width, case.height)
    assert pipeline.size(ImageRequest("x", width=32, images=pictures(case))) == (32, case.height)


def test_more_placeholders_than_pictures_are_refused(pipeline, golden):
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 pictures"):
        pipeline.draw(ImageRequest("<image> and <image>", 32, 32, 1, images=pictures(golden("edit_one"))))
    with pytest.raises(ValueError, match="1 <image> placeholders for 0 pictures"):
        pipeline.draw(ImageRequest("a cat like <image>", 32, 32, 1))


@pytest.mark.parametrize("width, height", [(15, 64), (64, 4097), (0, 0), (-16, 64)])
def test_sizes_out_of_range_are_refused(pipeline, width, height):
    with pytest.raises(ValueError, match="found, 16 to 4096 pixels expected"):
        pipeline.draw(ImageRequest("a cat", width, height, steps=1))


def test_bfloat16_draws_nearly_the_same(checkpoint, golden):
    case = golden("t2i_square")
    drawn = numpy.asarray(Pipeline(checkpoint, dtype=torch.bfloat16).draw(drawing(case))).astype(int)
    assert numpy.abs(drawn - case["image_u8"].numpy()).mean() < 12


def command(*arguments):
    """Runs the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def test_command_line_draws_the_official_picture_and_tells_how(checkpoint, golden, same_picture, tmp_path):
    case, out = golden("t2i_odd_size"), tmp_path / "picture.png"
    wish = ["--model", checkpoint, "--prompt", case.prompt, "--width", case.width, "--height", case.height]
    done = command("draw", *wish, "--steps", case.steps, "--seed", 1234, "--out", out)
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
        (["--steps", "0"], "steps 0 found, 1 to 100000 expected"),
        (["--out", "picture.jpg"], "a name ending in .png expected"),
        (["--out", "no/such/folder/picture.png"], "no folder"),
        (["--device", "nothing"], "nothing"),
    ],
)
def test_command_line_errors_are_one_line(checkpoint, tmp_path, wrong, message):
    options = {"--model": checkpoint, "--prompt": "x", "--width": 16, "--height": 16, "--steps": 1}
    options["--out"] = tmp_path / "p.png"
    options[wrong[0]] = wrong[1]
    done = command("draw", *(part for pair in options.items() for part in pair))
    lines = [line for line in done.stderr.splitlines() if line.startswith("internvl_u: ")]
    assert done.returncode == 1 and len(lines) == 1 and message in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize("name", ["cot_edit", "cot_short", "cot_edit_short"])
def test_command_line_draws_after_a_thought_as_the_official_pipeline(checkpoint, golden, same_picture, tmp_path, name):
    case, out = golden(name), tmp_path / "picture.png"
    wish = ["--model", checkpoint, "--prompt", case.prompt, "--width", case.width, "--height", case.height]
    wish += [part for file in case.images for part in ("--image", file)]
    wish += ["--think", "--max-new-tokens", case.new]
    done = command("draw", *wish, "--steps", case.steps, "--seed", 1234, "--out", out)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        same_picture(image, case["image_u8"])
        told = json.loads(image.text["internvl_u"])
    assert told["thought"] in done.stderr and told["thought"]
    assert (told["all_cfg"], told["part_cfg"]) == (3.5, 1.5)
    assert told["images"] == [file.name for file in case.images]


def test_command_line_edits_at_the_pictures_size_and_takes_a_thought(checkpoint, golden, tmp_path):
    out = tmp_path / "picture.png"
    wish = ["--model", checkpoint, "--prompt", "x", "--image", golden("edit_one").images[0], "--steps", 1]
    done = command("draw", *wish, "--thought", "a blue circle", "--out", out)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        assert image.size == (96, 64)
        assert json.loads(image.text["internvl_u"])["thought"] == "a blue circle"


def test_command_line_answers_as_the_official_pipeline(checkpoint, golden):
    for case in (golden("qa_two"), golden("qa_beam")):
        pictures = [part for file in case.images for part in ("--image", file)]
        how = ["--max-new-tokens", case.new, "--beams", case.beams]
        done = command("ask", "--model", checkpoint, "--prompt", case.prompt, *pictures, *how)
        assert done.returncode == 0, done.stderr
        assert done.stdout == case.text + "\n"


def test_command_line_refuses_what_is_no_picture(checkpoint, tmp_path):
    file = tmp_path / "text.png"
    file.write_text("no picture")
    for wrong in (file, tmp_path / "nothing.png"):
        done = command("ask", "--model", checkpoint, "--prompt", "x", "--image", wrong)
        assert done.returncode == 1 and "is not readable as a picture" in done.stderr, done.stderr


def test_the_command_line_runs_from_a_clone(checkpoint, tmp_path):
    root = checkpoint.parent.parent.parent
    line = [sys.executable, "-m", "internvl_u", "draw", "--model", checkpoint, "--prompt", "x", "--steps", "1"]
    line += ["--width", "32", "--height", "32", "--out"]
    done = subprocess.run([*line, tmp_path / "p.png"], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "p.png").exists(), done.stderr
    done = subprocess.run([*line, "p.jpg"], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_networks_that_are_given_stay_where_they_are(checkpoint, monkeypatch):
    moved, to = [], torch.nn.Module.to

    def recorded(self, *given, **more):
        moved.append(self)
        return to(self, *given, **more)

    transformer, pipeline = load_mmdit(checkpoint), Pipeline(checkpoint)
    monkeypatch.setattr(torch.nn.Module, "to", recorded)
    pipeline.use({"mmdit": transformer})
    assert moved == [transformer], "to where the pipeline is"
    moved.clear()
    for seed in (1, 2):
        pipeline.draw(ImageRequest("a cat", 32, 32, steps=1, seed=seed))
    assert moved and not set(moved) & set(transformer.modules()), "nor in part"
    pipeline.forget()
    pipeline.draw(ImageRequest("a cat", 32, 32, steps=1))
    assert any(type(one) is torch.nn.Linear for one in moved), "its own are"
