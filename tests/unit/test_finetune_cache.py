"""What is learned from, computed once: the pipeline's own bits, whole or not at all, and never an old one."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from pack.internvl_u import images
from pack.internvl_u.finetune import cache as cache_module
from pack.internvl_u.finetune.cache import SampleCache, dataset_fingerprint
from pack.internvl_u.finetune.examples import Example, Picture
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.prompt import SYSTEM_ANSWER, drawing_system, generation_prompt
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline(checkpoint)


def picture(folder, name, size=(64, 64), colour="red"):
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste(Image.new("RGB", (size[0] // 2, size[1] // 2), colour), (size[0] // 4, size[1] // 4))
    image.save(folder / name)
    return Picture(name, folder / name)


@pytest.fixture
def drawing(tmp_path):
    return Example("drawing", "a red square", picture(tmp_path, "a.png"))


@pytest.fixture
def edit(tmp_path):
    before, other = picture(tmp_path, "before.png", colour="blue"), picture(tmp_path, "other.png", (40, 90))
    after = picture(tmp_path, "after.png", colour="green")
    return Example("edit", "make it red", after, (before, other), "It was blue. It is red.")


@pytest.fixture
def question(tmp_path):
    return Example("question", "What colour?", references=(picture(tmp_path, "q.png", (50, 40)),), answer="Red.")


def equal(branch, other):
    (context, layout), (expected, expected_layout) = branch, other
    return context.dtype == expected.dtype and torch.equal(context, expected) and layout == expected_layout


def test_a_drawing_is_what_the_pipeline_makes_of_it(tmp_path, pipeline, drawing):
    cache = SampleCache(tmp_path / "cache", pipeline)
    samples = cache.samples([drawing])
    (sample,) = samples
    contexts = pipeline.encode_prompt(ImageRequest(drawing.text))
    assert equal(sample.conditional, contexts.conditional) and equal(sample.unconditional, contexts.unconditional)
    assert sample.partial is None and sample.references == ()
    assert torch.equal(sample.latent, pipeline._vae().encode(images.vae_pixels(drawing.image.open()))[0])
    assert sample.latent.shape == (16, 8, 8) and sample.latent.dtype == torch.float32
    assert samples.shapes == [((8, 8),)] and not sample.latent.is_inference()


def test_an_edit_is_what_the_pipeline_makes_of_it(tmp_path, pipeline, edit):
    (sample,) = SampleCache(tmp_path / "cache", pipeline).samples([edit])
    tokenizer = pipeline.encoder.tokenizer
    thought = tokenizer.decode_thought((*tokenizer.encode([edit.thought])[0], tokenizer.stops[0]))
    seen = tuple(one.open() for one in edit.references)
    contexts = pipeline.encode_prompt(ImageRequest(edit.text, images=seen, thought=thought))
    for name in ("conditional", "partial", "unconditional"):
        assert equal(getattr(sample, name), getattr(contexts, name)), name
    assert len(sample.references) == 2
    assert all(torch.equal(one, other[0]) for one, other in zip(sample.references, contexts.references))
    plain = pipeline.encode_prompt(ImageRequest(edit.text))
    assert not torch.equal(sample.unconditional[0], plain.unconditional[0])


@pytest.mark.parametrize("resolution, size", [(None, (64, 64)), (32, (32, 32)), (96, (96, 96))])
def test_pictures_are_learned_from_at_the_size_of_their_bucket(tmp_path, pipeline, edit, resolution, size):
    edit = replace(edit, references=edit.references[:1])
    cache = SampleCache(tmp_path / "cache", pipeline, resolution)
    samples = cache.samples([edit])
    side = size[0] // 8
    assert samples.shapes == [((side, side), (side, side))]
    assert samples[0].latent.shape == samples[0].references[0].shape == (16, side, side)
    drawn, (seen,) = cache.buckets.images(edit)
    assert drawn.size == seen.size == size and torch.equal(samples[0].latent, pipeline.encode(drawn)[0])
    assert torch.equal(samples[0].references[0], pipeline.encode(seen)[0])
    assert cache.request(edit).images[0].size == size


def test_nano_is_encoded_as_everywhere(tmp_path):
    from pack.internvl_u.places import nano_folder

    pipeline = Pipeline(nano_folder(), dtype=torch.bfloat16)
    wide = Example(
        "wide", "a red circle", picture(tmp_path, "w.png", (96, 64)), (picture(tmp_path, "v.png", (96, 64)),)
    )
    (sample,) = SampleCache(tmp_path / "cache", pipeline).samples([wide])
    contexts = pipeline.encode_prompt(ImageRequest(wide.text, images=(wide.references[0].open(),)))
    assert equal(sample.conditional, contexts.conditional) and sample.conditional[0].dtype == torch.bfloat16
    assert sample.latent.shape == (16, 8, 12) and torch.equal(sample.references[0], contexts.references[0][0].float())


def test_questions_and_thoughts_are_what_the_model_would_write(tmp_path, pipeline, question, edit):
    samples = SampleCache(tmp_path / "cache", pipeline).text_samples([question, edit])
    tokenizer, grid = pipeline.encoder.tokenizer, pipeline._mllm().vision.grid
    for sample, example, system, said in zip(
        samples, samples.examples, (SYSTEM_ANSWER, drawing_system(2)), (question.answer, edit.thought)
    ):
        count = len(example.references)
        prompt = generation_prompt(tokenizer, example.text, system=system, images=count, grid=grid)
        assert sample.prompt.ids[: sample.target_start] == prompt.ids and sample.prompt.images == prompt.images
        *words, end = sample.prompt.ids[sample.target_start :]
        assert tokenizer.decode(words) == said and end == tokenizer.stops[0]
        where = {"device": pipeline.device, "dtype": pipeline.dtype}
        expected = pipeline.encoder.image_features(
            pipeline._mllm(), [one.open() for one in example.references], **where
        )
        assert len(sample.features) == count
        assert all(torch.equal(one, other) for one, other in zip(sample.features, expected))
        assert pipeline.encoder.embed(pipeline._mllm(), sample.prompt, sample.features, **where).shape[1] == len(
            sample.prompt.ids
        )


def test_each_kind_of_example_is_for_what_it_teaches(tmp_path, pipeline, drawing, edit, question):
    cache = SampleCache(tmp_path / "cache", pipeline)
    assert cache.samples([question, drawing, edit]).examples == [drawing, edit]
    assert cache.text_samples([question, drawing, edit]).examples == [question, edit]
    assert len(cache.samples([question])) == len(cache.text_samples([drawing])) == 0


@pytest.fixture
def busy(monkeypatch, pipeline):
    """The names of what the pipeline computes, as it does."""
    done = []
    for name in ("encode", "encode_contexts"):
        original = getattr(Pipeline, name)
        monkeypatch.setattr(Pipeline, name, lambda self, *a, n=name, o=original: done.append(n) or o(self, *a))
    original = SampleCache._features
    monkeypatch.setattr(SampleCache, "_features", lambda self, one: done.append("features") or original(self, one))
    return done


def test_what_is_there_is_not_computed_again(tmp_path, pipeline, drawing, edit, question, busy):
    everything = [drawing, edit, question, replace(drawing, text="another text")]
    reports = []
    first = SampleCache(tmp_path / "cache", pipeline, report=lambda *told: reports.append(told))
    one = first.samples(everything)
    first.text_samples(everything)
    assert sorted(busy) == ["encode"] * 4 + ["encode_contexts"] * 3 + ["features"] * 3
    assert reports[3] == ("latents", 4, 4) and reports[-1] == ("features", 3, 3)
    assert "4 latents were" not in first.summary() and "4 were made" in first.summary()
    busy.clear()
    again = SampleCache(tmp_path / "cache", pipeline)
    two = again.samples(everything)
    again.text_samples(everything)
    assert busy == [] and not again.made
    assert all(torch.equal(a.latent, b.latent) and equal(a.conditional, b.conditional) for a, b in zip(one, two))


def test_the_unconditional_context_is_kept_once(tmp_path, pipeline, drawing, edit):
    texts = [replace(drawing, text=f"text {i}") for i in range(5)]
    cache = SampleCache(tmp_path / "cache", pipeline)
    samples = cache.samples([*texts, edit])
    assert len({one.unconditional for one in samples.files}) == 2
    assert len(list((tmp_path / "cache" / "contexts").iterdir())) == 5 + 1 + 2
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 1 + 3


def test_what_has_changed_is_made_anew(tmp_path, pipeline, drawing, busy):
    folder = tmp_path / "cache"
    before = SampleCache(folder, pipeline).samples([drawing])[0]
    busy.clear()
    changed = replace(drawing, text="a blue square")
    assert not torch.equal(SampleCache(folder, pipeline).samples([changed])[0].conditional[0], before.conditional[0])
    assert busy == ["encode_contexts"]
    busy.clear()
    other = replace(drawing, image=picture(tmp_path, "a.png", colour="green"))  # under the same name
    assert not torch.equal(SampleCache(folder, pipeline).samples([other])[0].latent, before.latent)
    assert busy == ["encode"]
    busy.clear()
    SampleCache(folder, pipeline, 32).samples([drawing])
    assert busy == ["encode"]
    busy.clear()
    SampleCache(folder, pipeline).samples([replace(drawing, thought="I see.")])
    assert busy == ["encode_contexts"]


@pytest.mark.parametrize(
    "changed, made",
    [
        ("vae/config.json", ["encode"]),
        ("vlm/config.json", ["encode_contexts"]),
        ("generation_decoder/config.json", ["encode_contexts"]),
        ("processor/tokenizer.json", ["encode_contexts"]),
        ("model_index.json", []),
    ],
)
def test_another_model_has_samples_of_its_own(tmp_path, checkpoint, drawing, busy, changed, made):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    SampleCache(tmp_path / "cache", Pipeline(model)).samples([drawing])
    busy.clear()
    file = model / changed
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    SampleCache(tmp_path / "cache", Pipeline(model)).samples([drawing])
    assert busy == made
    busy.clear()
    SampleCache(tmp_path / "cache", Pipeline(model, dtype=torch.bfloat16)).samples([drawing])
    assert busy == ["encode", "encode_contexts"]


@pytest.mark.parametrize("kind", ["latents", "contexts", "features"])
@pytest.mark.parametrize("damage", [b"", b"no file", None])
def test_a_damaged_file_is_told_of_and_made_anew(tmp_path, pipeline, edit, kind, damage, busy, caplog):
    folder = tmp_path / "cache"

    def read(cache):
        return cache.samples([edit]), cache.text_samples([edit])

    samples, texts = read(SampleCache(folder, pipeline))
    wanted, texts_wanted = samples[0], texts[0]
    broken = {"latents": samples.files[0].latent, "contexts": samples.files[0].contexts, "features": texts.files[0][0]}
    file = broken[kind]
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    with pytest.raises(RuntimeError, match="of the cache was damaged or taken away .*: run again, and it is made anew"):
        (texts if kind == "features" else samples)[0]
    busy.clear()
    again, texts_again = read(SampleCache(folder, pipeline))
    assert len(busy) == 1 and f"{file} of the cache is damaged" in caplog.text
    assert torch.equal(again[0].latent, wanted.latent) and equal(again[0].partial, wanted.partial)
    assert torch.equal(texts_again[0].features[0], texts_wanted.features[0])


def test_a_cache_that_was_interrupted_goes_on(tmp_path, pipeline, drawing, edit, busy, monkeypatch):
    def stop(kind, done, total):
        if (kind, done) == ("contexts", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SampleCache(tmp_path / "cache", pipeline, report=stop).samples([drawing, edit])
    busy.clear()
    assert len(SampleCache(tmp_path / "cache", pipeline).samples([drawing, edit])) == 2
    assert busy == ["encode_contexts"]


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path, pipeline, drawing, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="not written .*No space left"):
        SampleCache(tmp_path / "cache", pipeline).samples([drawing])
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_a_dataset_that_does_not_fit_the_disk_is_refused_before_work(tmp_path, pipeline, edit, busy, monkeypatch):
    needed = 0

    def usage(folder):
        return shutil._ntuple_diskusage(0, 0, needed)

    monkeypatch.setattr(cache_module.shutil, "disk_usage", usage)
    with pytest.raises(OSError, match="has room for 0 GB, .* GB expected .*: make room or give another folder"):
        SampleCache(tmp_path / "cache", pipeline).samples([edit])
    assert busy == []
    needed = 1 << 30
    samples = SampleCache(tmp_path / "cache", pipeline).samples([edit])
    sizes = [file for one in samples.files for file in (one.latent, *one.references, one.contexts)]
    kept = sum(tensor.nbytes for file in sizes for tensor in load_file(file).values())
    needed = kept - 1
    with pytest.raises(OSError, match="expected for what is learned from"):
        SampleCache(tmp_path / "another", pipeline).samples([edit])
    needed = kept
    SampleCache(tmp_path / "another", pipeline).samples([edit])


def test_what_cannot_be_learned_from_is_found_before_work(tmp_path, pipeline, drawing, edit, question, busy):
    cache = SampleCache(tmp_path / "cache", pipeline)
    wrong = [
        (replace(drawing, name="here", text="x y " * 20_000), "here: .* tokens found .* expected at most"),
        (replace(drawing, name="here", text="<image> <image>"), "here: the prompt has 2 <image> placeholders for 0"),
        (replace(drawing, name="here", thought="x y " * 20_000), "here: .* tokens found"),
    ]
    for example, expected in wrong:
        with pytest.raises(ValueError, match=expected):
            cache.samples([drawing, example])
    for changed in ({"text": "x y " * 20_000}, {"answer": "x y " * 20_000}, {"text": "<image><image>"}):
        with pytest.raises(ValueError, match="here: "):
            cache.text_samples([replace(question, name="here", **changed)])
    file = tmp_path / "cut.jpg"
    edit.image.open().resize((300, 300)).save(file, quality=100)
    file.write_bytes(file.read_bytes()[:2000])
    for broken in (
        replace(drawing, image=Picture("cut.jpg", file)),
        replace(edit, references=(Picture("cut.jpg", file),)),
    ):
        with pytest.raises(ValueError, match="cut.jpg is not readable as a picture .*truncated"):
            cache.samples([drawing, broken])
    with pytest.raises(ValueError, match="cut.jpg is not readable"):
        cache.text_samples([replace(question, references=(Picture("cut.jpg", file),))])
    assert busy == [] and not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_the_fingerprint_of_a_dataset_is_that_of_what_it_teaches(tmp_path, drawing, edit, question):
    first = dataset_fingerprint([drawing, edit, question])
    moved = tmp_path / "moved.png"
    shutil.copy(drawing.image.source, moved)
    same = replace(drawing, name="another", image=Picture("another", moved))
    assert dataset_fingerprint([same, edit, question]) == first and len(first) == 64
    others = [
        [edit, drawing, question],
        [drawing, edit],
        [replace(drawing, text="x"), edit, question],
        [drawing, replace(edit, thought=""), question],
        [drawing, edit, replace(question, answer="Blue.")],
        [drawing, replace(edit, references=edit.references[:1]), question],
        [replace(drawing, image=edit.image), edit, question],
    ]
    assert len({dataset_fingerprint(one) for one in others} | {first}) == len(others) + 1


def test_the_pipeline_encodes_what_it_decodes(pipeline, drawing):
    latent = pipeline.encode(drawing.image.open())
    assert latent.shape == (1, 16, 8, 8) and pipeline.decode(latent).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="a picture of 60 x 64 pixels found, multiples of 16 expected"):
        pipeline.encode(Image.new("RGB", (60, 64)))
