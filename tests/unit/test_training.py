"""Training computes what drawing computes: packed lessons, contexts, filled-up batches, and what is exported."""

import csv
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from pack.internvl_u import prompt
from pack.internvl_u.encoder import Encoder
from pack.internvl_u.images import ReferenceSizes, reference_pixels
from pack.internvl_u.mmdit import time_embedding
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.tokenizer import Tokenizer

from training import (
    codec,
    draw,
    edits,
    export,
    lessons,
    log,
    score,
    studies,
    tokenizer,
    understand,
    vae,
    words,
    world,
)

CHOSEN = Path(__file__).parents[2] / "demo" / "internvl-u-nano"
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def words_of():
    return Tokenizer(CHOSEN / "processor")


@pytest.fixture(scope="module")
def model(words_of):
    """A language model with random weights, in fp32."""
    return understand.new_model(words_of, tokenizer.size(CHOSEN / "processor"), seed=3).eval()


@pytest.fixture(scope="module")
def rows(words_of):
    return understand.special_rows(words_of, tokenizer.size(CHOSEN / "processor"))


def lesson_alone(lesson, number):
    """A lesson with one of its endings only."""
    return lessons.Lesson(lesson.shared, lesson.places, lesson.scenes, (lesson.endings[number],))


@pytest.mark.parametrize("kind", ["look", "compare", "edit", "think", "know"])
def test_an_ending_is_read_as_if_it_stood_alone(kind, model, rows, words_of):
    teacher = lessons.Teacher(words_of, understand.VISION.grid)
    lesson = getattr(teacher, kind)(random.Random(kind))
    with torch.no_grad():
        packed = lessons.batch([lesson], understand.IMAGE, random.Random(0), clean=True)
        together = understand.logits(model, rows, packed)
        for number in range(max(packed.owners) + 1):
            alone = lessons.batch([lesson_alone(lesson, number)], understand.IMAGE, random.Random(0), clean=True)
            torch.testing.assert_close(
                together[packed.owners == number], understand.logits(model, rows, alone), atol=TOLERANCE, rtol=0
            )


def test_what_does_not_fit_a_row_is_left_out_whole(words_of):
    lesson = lessons.Teacher(words_of, understand.VISION.grid).look(random.Random(1))
    lengths = [len(lesson.shared) + sum(len(e.rest) + len(e.target) for e in lesson.endings[:n]) for n in (2, 3)]
    for room, expected in ((lengths[0], 2), (lengths[1] - 1, 2), (lengths[1], 3)):
        assert len(lessons.batch([lesson], understand.IMAGE, random.Random(0), room).kinds) == expected


@pytest.fixture(scope="module")
def studio(model, words_of):
    return studies.Studio(model, words_of, codec.new_model(0).eval())


def test_contexts_are_those_of_the_shipped_encoder(studio, model, words_of):
    encoder = Encoder.from_config(words_of, export.decoder_config(), export.PROCESSOR)
    rng, where = random.Random(4), {"device": torch.device("cpu"), "dtype": torch.float32}
    edit = edits.random_edit(rng, picture=(64, 64))
    scene = world.random_scene(rng)
    plans = []
    for text, thought, pictures in (
        (words.caption(rng, scene), "", 0),
        ("what is round", "A round shape is a circle. So: a red circle.", 0),
        (edit.instruction, "", 1),
        (edit.instruction, edits.thought(edit), 1),
        ("go", edits.thought(edit), 1),  # shorter than the partial prompt: padded
    ):
        ids = words_of.encode([thought])[0][:-1] if thought else None
        made = prompt.branch_prompts(words_of, text, images=pictures, grid=understand.VISION.grid, thought=ids)
        for one in (made.conditional, made.partial, made.unconditional):
            plans.append(studies.Plan(one, edit.after, edit.before if one.images else None))
    found = studio.contexts([plans], rng)
    for plan, context in zip(plans, found, strict=True):
        pictures = [world.draw(plan.before)] if plan.ids.images else []
        with torch.inference_mode():
            features = encoder.image_features(model, pictures, **where)
            expected = encoder.encode(model, [(plan.ids, features)], **where)[0]
        assert context.shape == expected.shape
        # Training computes in bf16.
        assert torch.linalg.vector_norm(context - expected) / torch.linalg.vector_norm(expected) < 0.03


def test_latents_are_those_that_references_of_the_shipped_inference_have(studio):
    scenes = [world.random_scene(random.Random(i), 2, size) for i, size in enumerate(world.PICTURES)]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (codec.LATENTS_MEAN, codec.LATENTS_STD))
    sizes = ReferenceSizes.from_config(export.PROCESSOR)
    for scene, latent in zip(scenes, studio.latents(scenes), strict=True):
        pixels = reference_pixels(world.draw(scene), sizes)
        assert min(pixels.shape[-2:]) <= 64 and pixels.shape[-2] * pixels.shape[-1] <= 64 * 96
        with torch.inference_mode():
            expected = (studio.coder.encode(pixels[:, :, None]).latent_dist.mode()[0, :, 0] - mean) / std
        # Training computes in bf16.
        assert torch.linalg.vector_norm(latent - expected) / torch.linalg.vector_norm(expected) < 0.03


@pytest.mark.parametrize("referring", [False, True])
def test_velocities_of_filled_up_batches_are_those_of_the_transformer(referring):
    transformer = draw.new_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    scene = world.random_scene(random.Random(0), 1, (64, 96))
    made = []
    for length in (7, 19, 30):
        latent = torch.randn(16, 12, 8)
        layout = (prompt.Span(length),)
        reference = torch.randn(16, 12, 8) if referring else None
        made.append(studies.Study(latent, reference, torch.randn(length, 384).bfloat16(), layout, scene))
    data = draw.load(made, draw.Tables(transformer))
    noisy, timestep = torch.randn_like(data.latents), torch.tensor([990.0, 500.0, 20.0])
    with torch.no_grad():
        found, _ = draw.velocity(transformer, noisy, timestep, data)
        branches = [
            transformer.branch(study.context.float(), study.layout, (12, 8), [(12, 8)] * referring) for study in made
        ]
        expected = transformer(noisy, time_embedding(timestep), branches, data.references)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_three_branches_are_learnt_in_their_shares(studio):
    counts = {}
    rng = random.Random(0)
    for _ in range(1000):
        ids = studio._prompt(rng, "make it red", pictures=1)
        text = studio.tokenizer.decode(ids.ids[ids.user_start :])
        counts[text] = counts.get(text, 0) + 1
    conditional, partial, unconditional = (
        next(number for text, number in counts.items() if part in text) for part in ("make it", "based on", "random")
    )
    assert conditional > 750 and 60 < partial < 140 and 60 < unconditional < 140


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
def test_training_goes_on_where_it_was_left(tmp_path, monkeypatch):
    def options(steps):
        monkeypatch.setattr("sys.argv", ["understand.py", "--tokenizer", str(CHOSEN / "processor"), "--work", "x"])
        parsed = understand.parse()
        parsed.__dict__.update(steps=steps, batch=1, look=1, glance=1, threads=1, compile=False, log_every=1)
        return parsed

    whole = options(3)
    whole.work = tmp_path / "whole"
    at_once = understand.train(whole).state_dict()
    for steps in (2, 3):
        # The learning rate depends on the number of steps, so the run is cut, not shortened.
        part = options(3)
        part.work, part.until = tmp_path / "parts", steps
        resumed = understand.train(part).state_dict()
    for name, weight in at_once.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-5, rtol=1e-4)
    rows = list(csv.DictReader((tmp_path / "parts" / "understand.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]


def test_a_state_comes_back_whole(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    log.save_state(tmp_path / "x.safetensors", tensors, {"step": 7})
    found, facts = log.load_state(tmp_path / "x.safetensors")
    assert facts == {"step": 7} and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert log.load_state(tmp_path / "y.safetensors") is None


def test_an_edit_is_judged_by_what_was_asked_and_by_the_rest():
    rng = random.Random(2)
    for kind in edits.KINDS:
        edit = edits.random_edit(rng, kind, (96, 96))
        assert score._edited(score.judge.read(world.draw(edit.after)), edit), kind
        assert not score._edited(score.judge.read(world.draw(edit.before)), edit), kind
    edit = edits.random_edit(rng, "background", (96, 96), count=1)
    thing = edit.after.things[0]
    aside = world.replace(edit.after, things=(world.replace(thing, x=1 - thing.x, y=1 - thing.y),))
    assert abs(thing.x - 0.5) + abs(thing.y - 0.5) > 0.06
    assert not score._edited(score.judge.read(world.draw(aside)), edit)


def test_a_relation_is_judged():
    rng = random.Random(3)
    for wished in ("left", "right", "above", "below", "inside"):
        scene = world.related_scene(rng, wished, (96, 96))
        assert score._shown(score.judge.read(world.draw(scene)), scene), wished
        if wished != "inside":
            one, other = scene.things
            turned = world.replace(
                scene, things=(world.replace(one, x=other.x, y=other.y), world.replace(other, x=one.x, y=one.y))
            )
            assert not score._shown(score.judge.read(world.draw(turned)), scene), wished


def test_what_is_exported_opens_and_draws(tmp_path, words_of, model):
    (tmp_path / "work").mkdir()
    weights = {f"average/model.{name}": value for name, value in model.state_dict().items()}
    log.save_state(tmp_path / "work" / "understand.safetensors", weights, {"step": 1})
    out = tmp_path / "model"
    tokenizer.save(words_of._tokenizer, out / "processor")
    folder = CHOSEN / "vae"
    (out / "vae").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (out / "vae" / name).write_bytes((folder / name).read_bytes())
    export.export(tmp_path / "work", out)
    pipeline = Pipeline(out)
    picture = pipeline.draw(ImageRequest("a red circle", steps=1))
    assert picture.size == (export.SIDE, export.SIDE)
    edited = pipeline.draw(ImageRequest("make it blue", steps=1, images=(Image.new("RGB", (96, 64)),)))
    assert edited.size == (96, 64)
    for file in (folder.parent / "processor").iterdir():
        if file.name != "processor_config.json":
            assert (out / "processor" / file.name).read_bytes() == file.read_bytes(), file.name


def test_previews_of_latents_show_the_mean_colours():
    pictures = vae.picture_set("test", 36)
    meaning = vae.Meaning(pictures)
    for some in pictures:
        shown = meaning(some).movedim(1, -1) @ torch.tensor(vae.PREVIEW) + torch.tensor(vae.PREVIEW_BIAS)
        means = torch.nn.functional.avg_pool2d(some, 8).movedim(1, -1)
        torch.testing.assert_close(shown, vae.CONTRAST * means, atol=1e-3, rtol=0)


def test_a_single_frame_goes_through_the_vae_as_through_diffusers():
    coder = codec.new_model(1).eval()
    pictures = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = codec.encode_flat(coder, pictures)
        expected = coder.encode(pictures[:, :, None]).latent_dist.mode()[:, :, 0]
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-3)
        drawn = coder.decode(expected[:, :, None], return_dict=False)[0][:, :, 0]
        torch.testing.assert_close(codec.decode_flat(coder, latents).clamp(-1, 1), drawn, atol=1e-4, rtol=1e-3)


def test_folding_brings_latents_to_the_released_scale_and_changes_no_picture():
    coder = codec.new_model(1).eval()
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (codec.LATENTS_MEAN, codec.LATENTS_STD))
    with torch.no_grad():
        before = codec.encode_flat(coder, pictures)
        drawn = codec.decode_flat(coder, before)
        codec.fold(coder)
        after = codec.encode_flat(coder, pictures)
        torch.testing.assert_close((after - mean) / std, before, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(codec.decode_flat(coder, after), drawn, atol=1e-3, rtol=1e-2)


def test_training_the_decoder_on_leaves_what_latents_say(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "picture_set", lambda name, count: [vae.draw_batch(random.Random(name), (64, 64), 8)])
    published, out = CHOSEN / "vae", tmp_path / "vae"
    flags = ("--out", out, "--work", tmp_path / "work", "--decoder-of", published, "--minutes", "0.001", "--no-compile")
    torch.manual_seed(0)
    vae.main(vae.parse([str(flag) for flag in flags]))
    before, after = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (published, out))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "decoder" in changed
    assert changed <= {"decoder", "post_quant_conv"}
    # One step changes little: what was folded in has been taken out, and folded in again.
    for name in ("post_quant_conv.weight", "post_quant_conv.bias"):
        torch.testing.assert_close(after[name].float(), before[name].float(), atol=0.05, rtol=0.1)
