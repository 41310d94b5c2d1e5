"""Training computes what inference computes: packed examples, contexts, padded batches, and what is exported."""

import csv
import itertools
import random
from pathlib import Path
from types import SimpleNamespace

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

from training import checkpointing, export, mllm, mllm_model, mmdit_model, tokenizer, trainer, vae, vae_model
from training.data import captions, edits, samples, scenes, sft_data
from training.eval import score

CHOSEN = Path(__file__).parents[2] / "demo" / "internvl-u-nano"
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def words_of():
    return Tokenizer(CHOSEN / "processor")


def test_the_tokenizer_learns_from_what_is_said_and_from_the_system_messages():
    texts = list(itertools.islice(tokenizer.corpus(), 40))
    assert f"system\n{prompt.SYSTEM_DRAW}" in texts and tokenizer.PARTIAL_PROMPT in texts
    assert len(set(texts)) > 30


@pytest.fixture(scope="module")
def model(words_of):
    """A language model with random weights, in fp32."""
    return mllm_model.new_model(words_of, tokenizer.vocabulary_size(CHOSEN / "processor"), seed=3).eval()


@pytest.fixture(scope="module")
def rows(words_of):
    return mllm_model.special_rows(words_of, tokenizer.vocabulary_size(CHOSEN / "processor"))


def example_alone(example, number):
    """A packed example with one of its turns only."""
    return sft_data.PackedExample(example.prefix, example.image_ranges, example.scenes, (example.turns[number],))


@pytest.mark.parametrize("kind", ["visual_questions", "comparisons", "edit_thoughts", "drawing_thoughts", "knowledge"])
def test_a_turn_is_read_as_if_it_stood_alone(kind, model, rows, words_of):
    builder = sft_data.ExampleBuilder(words_of, mllm_model.VISION.grid)
    example = getattr(builder, kind)(random.Random(kind))
    with torch.no_grad():
        packed = sft_data.collate([example], mllm_model.IMAGE_SIZE, random.Random(0), augment=False)
        together = mllm_model.logits(model, rows, packed)
        for number in range(max(packed.turns) + 1):
            alone = sft_data.collate(
                [example_alone(example, number)], mllm_model.IMAGE_SIZE, random.Random(0), augment=False
            )
            torch.testing.assert_close(
                together[packed.turns == number], mllm_model.logits(model, rows, alone), atol=TOLERANCE, rtol=0
            )


def test_what_does_not_fit_a_row_is_left_out_whole(words_of):
    example = sft_data.ExampleBuilder(words_of, mllm_model.VISION.grid).visual_questions(random.Random(1))
    lengths = [len(example.prefix) + sum(len(e.prompt) + len(e.target) for e in example.turns[:n]) for n in (2, 3)]
    for room, expected in ((lengths[0], 2), (lengths[1] - 1, 2), (lengths[1], 3)):
        assert len(sft_data.collate([example], mllm_model.IMAGE_SIZE, random.Random(0), room).kinds) == expected


@pytest.fixture(scope="module")
def sample_builder(model, words_of):
    return samples.SampleBuilder(model, words_of, vae_model.new_model(0).eval())


def test_contexts_are_those_of_the_shipped_encoder(sample_builder, model, words_of):
    encoder = Encoder.from_config(words_of, export.decoder_config(), export.PROCESSOR)
    rng, where = random.Random(4), {"device": torch.device("cpu"), "dtype": torch.float32}
    edit = edits.random_edit(rng, image_size=(64, 64))
    scene = scenes.random_scene(rng)
    specs = []
    for text, thought, pictures in (
        (captions.caption(rng, scene), "", 0),
        ("what is round", "A round shape is a circle. So: a red circle.", 0),
        (edit.instruction, "", 1),
        (edit.instruction, edits.thought(edit), 1),
        ("go", edits.thought(edit), 1),  # shorter than the partial prompt: padded
    ):
        ids = words_of.encode([thought])[0][:-1] if thought else None
        made = prompt.branch_prompts(words_of, text, images=pictures, grid=mllm_model.VISION.grid, thought=ids)
        for one in (made.conditional, made.partial, made.unconditional):
            specs.append(samples.SampleSpec(one, edit.after, edit.before if one.images else None))
    found = sample_builder.contexts([specs], rng)
    for spec, context in zip(specs, found, strict=True):
        pictures = [scenes.render(spec.before)] if spec.prompt.images else []
        with torch.inference_mode():
            features = encoder.image_features(model, pictures, **where)
            expected = encoder.encode(model, [(spec.prompt, features)], **where)[0]
        assert context.shape == expected.shape
        # Training computes in bf16.
        assert torch.linalg.vector_norm(context - expected) / torch.linalg.vector_norm(expected) < 0.03


def test_latents_are_those_that_references_of_the_shipped_inference_have(sample_builder):
    shown = [scenes.random_scene(random.Random(i), 2, size) for i, size in enumerate(scenes.IMAGE_SIZES)]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (vae_model.LATENTS_MEAN, vae_model.LATENTS_STD))
    sizes = ReferenceSizes.from_config(export.PROCESSOR)
    for scene, latent in zip(shown, sample_builder.latents(shown), strict=True):
        pixels = reference_pixels(scenes.render(scene), sizes)
        assert min(pixels.shape[-2:]) <= 64 and pixels.shape[-2] * pixels.shape[-1] <= 64 * 96
        with torch.inference_mode():
            expected = (sample_builder.vae.encode(pixels[:, :, None]).latent_dist.mode()[0, :, 0] - mean) / std
        # Training computes in bf16.
        assert torch.linalg.vector_norm(latent - expected) / torch.linalg.vector_norm(expected) < 0.03


@pytest.mark.parametrize("referring", [False, True])
def test_velocities_of_padded_batches_are_those_of_the_transformer(referring):
    transformer = mmdit_model.new_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    scene = scenes.random_scene(random.Random(0), 1, (64, 96))
    made = []
    for length in (7, 19, 30):
        latent = torch.randn(16, 12, 8)
        layout = (prompt.Span(length),)
        reference = torch.randn(16, 12, 8) if referring else None
        made.append(samples.Sample(latent, reference, torch.randn(length, 384).bfloat16(), layout, scene))
    data = mmdit_model.collate(made, mmdit_model.RotaryCache(transformer))
    noisy, timestep = torch.randn_like(data.latents), torch.tensor([990.0, 500.0, 20.0])
    with torch.no_grad():
        found, _ = mmdit_model.predict_velocity(transformer, noisy, timestep, data)
        branches = [
            transformer.branch(sample.context.float(), sample.layout, (12, 8), [(12, 8)] * referring) for sample in made
        ]
        expected = transformer(noisy, time_embedding(timestep), branches, data.references)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_three_branches_are_learnt_in_their_shares(sample_builder):
    counts = {}
    rng = random.Random(0)
    for _ in range(1000):
        ids = sample_builder._prompt(rng, "make it red", images=1)
        text = sample_builder.tokenizer.decode(ids.ids[ids.user_start :])
        counts[text] = counts.get(text, 0) + 1
    conditional, partial, unconditional = (
        next(number for text, number in counts.items() if part in text) for part in ("make it", "based on", "random")
    )
    assert conditional > 750 and 60 < partial < 140 and 60 < unconditional < 140


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch 2.9")
def test_training_goes_on_where_it_was_left(tmp_path, monkeypatch):
    def options(steps):
        monkeypatch.setattr("sys.argv", ["mllm.py", "--tokenizer", str(CHOSEN / "processor"), "--work", "x"])
        parsed = mllm.parse()
        parsed.__dict__.update(
            steps=steps, batch_size=1, vision_warmup_steps=1, aux_images=1, threads=1, compile=False, log_every=1
        )
        return parsed

    whole = options(3)
    whole.work = tmp_path / "whole"
    at_once = mllm.train(whole).state_dict()
    for steps in (2, 3):
        # The learning rate depends on the number of steps, so the run is cut, not shortened.
        part = options(3)
        part.work, part.stop_after = tmp_path / "parts", steps
        resumed = mllm.train(part).state_dict()
    for name, weight in at_once.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-5, rtol=1e-4)
    rows = list(csv.DictReader((tmp_path / "parts" / "mllm.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]


def test_only_the_first_process_writes_into_the_work_folder(tmp_path):
    for rank, written in ((1, []), (0, ["x.csv", "x.safetensors"])):
        stage = SimpleNamespace(network=torch.nn.Linear(1, 1), losses=None, report=None)
        schedule = trainer.StepSchedule(max_lr=1e-3, steps=1, log_every=1)
        run = trainer.Trainer(stage, (), schedule, ema_decay=0.9, work=tmp_path, name="x", columns=("loss",), rank=rank)
        run.record({"loss": 1.0})
        assert sorted(file.name for file in tmp_path.iterdir()) == written


def test_a_state_comes_back_whole(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    checkpointing.save_state(tmp_path / "x.safetensors", tensors, {"step": 7})
    found, metadata = checkpointing.load_state(tmp_path / "x.safetensors")
    assert metadata == {"step": 7} and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert checkpointing.load_state(tmp_path / "y.safetensors") is None


def test_an_edit_is_judged_by_what_was_asked_and_by_the_rest():
    rng = random.Random(2)
    for kind in edits.KINDS:
        edit = edits.random_edit(rng, kind, (96, 96))
        assert score._edited(score.detector.detect(scenes.render(edit.after)), edit), kind
        assert not score._edited(score.detector.detect(scenes.render(edit.before)), edit), kind
    edit = edits.random_edit(rng, "background", (96, 96), count=1)
    thing = edit.after.things[0]
    aside = scenes.replace(edit.after, things=(scenes.replace(thing, x=1 - thing.x, y=1 - thing.y),))
    assert abs(thing.x - 0.5) + abs(thing.y - 0.5) > 0.06
    assert not score._edited(score.detector.detect(scenes.render(aside)), edit)


def test_a_relation_is_judged():
    rng = random.Random(3)
    for wished in ("left", "right", "above", "below", "inside"):
        scene = scenes.related_scene(rng, wished, (96, 96))
        assert score._shown(score.detector.detect(scenes.render(scene)), scene), wished
        if wished != "inside":
            one, other = scene.things
            turned = scenes.replace(
                scene, things=(scenes.replace(one, x=other.x, y=other.y), scenes.replace(other, x=one.x, y=one.y))
            )
            assert not score._shown(score.detector.detect(scenes.render(turned)), scene), wished


def test_what_is_exported_opens_and_draws(tmp_path, words_of, model):
    (tmp_path / "work").mkdir()
    weights = {f"ema/model.{name}": value for name, value in model.state_dict().items()}
    checkpointing.save_state(tmp_path / "work" / "mllm.safetensors", weights, {"step": 1})
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
    pictures = vae.image_set("test", 36)
    latent_target = vae.LatentTarget(pictures)
    for some in pictures:
        shown = latent_target(some).movedim(1, -1) @ torch.tensor(vae.PREVIEW) + torch.tensor(vae.PREVIEW_BIAS)
        means = torch.nn.functional.avg_pool2d(some, 8).movedim(1, -1)
        torch.testing.assert_close(shown, vae.CONTRAST * means, atol=1e-3, rtol=0)


def test_a_single_frame_goes_through_the_vae_as_through_diffusers():
    autoencoder = vae_model.new_model(1).eval()
    pictures = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = vae_model.encode_frame(autoencoder, pictures)
        expected = autoencoder.encode(pictures[:, :, None]).latent_dist.mode()[:, :, 0]
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-3)
        drawn = autoencoder.decode(expected[:, :, None], return_dict=False)[0][:, :, 0]
        torch.testing.assert_close(
            vae_model.decode_frame(autoencoder, latents).clamp(-1, 1), drawn, atol=1e-4, rtol=1e-3
        )


def test_folding_brings_latents_to_the_released_scale_and_changes_no_picture():
    autoencoder = vae_model.new_model(1).eval()
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (vae_model.LATENTS_MEAN, vae_model.LATENTS_STD))
    with torch.no_grad():
        before = vae_model.encode_frame(autoencoder, pictures)
        drawn = vae_model.decode_frame(autoencoder, before)
        vae_model.fold_statistics(autoencoder)
        after = vae_model.encode_frame(autoencoder, pictures)
        torch.testing.assert_close((after - mean) / std, before, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(vae_model.decode_frame(autoencoder, after), drawn, atol=1e-3, rtol=1e-2)


def test_training_the_decoder_on_leaves_what_latents_say(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "image_set", lambda name, count: [vae.render_batch(random.Random(name), (64, 64), 8)])
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
