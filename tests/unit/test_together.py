"""Several pictures or texts at once: the same as alone, by fewer calls."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from pack.internvl_u import distilled, images, sampling
from pack.internvl_u.batch_generation import generate_batch
from pack.internvl_u.chat import History, Turn
from pack.internvl_u.files import state_of
from pack.internvl_u.generation import GenerationConfig, generate
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.prompt import SYSTEM_ANSWER
from pack.internvl_u.qwen3 import KeyValueCache
from pack.internvl_u.together import (
    Question,
    answer_together,
    draw_together,
    sample_together,
    shape_of,
    think_together,
)
from PIL import Image

SPOKEN = History((Turn("user", "a red circle"), Turn("assistant", "here it is")))
TEXTS = ("a cat", "two red dogs on a very green lawn", "", "a cat", "a bird")


@pytest.fixture(scope="module")
def tiny(checkpoint):
    return Pipeline(checkpoint)


@pytest.fixture(scope="module")
def nano():
    return Pipeline(Path(__file__).parents[2] / "demo" / "internvl-u-nano")


def picture(*size, colour="red"):
    return Image.new("RGB", size or (32, 32), colour)


def wishes(kind, steps=3):
    """Pictures of one shape whose contexts have several lengths, in no order."""
    drawn = [ImageRequest(text, 32, 48, steps, seed=seed) for seed, text in enumerate(TEXTS)]
    drawn[1] = replace(drawn[1], width=33, height=50)
    if kind == "edits":
        seen = [(picture(colour=colour), picture(32, 64)) for colour in ("red", "blue", "black", "white", "green")]
        return [replace(one, images=some) for one, some in zip(drawn, seen, strict=True)]
    if kind == "conversations":
        return [replace(one, negative_prompt="a dog" * (i % 2), history=SPOKEN) for i, one in enumerate(drawn)]
    if kind == "thoughts":
        return [replace(one, thought="it is red " * (i + 1), part_cfg_end=0.3) for i, one in enumerate(drawn)]
    if kind == "intervals":
        return [replace(one, images=(picture(),), all_cfg_end=0.6, part_cfg_end=0.3) for one in drawn]
    return drawn


KINDS = ("texts", "edits", "conversations", "thoughts", "intervals")


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_picture_has_the_very_bits_of_the_one_that_is_drawn_alone(tiny, kind):
    wish = wishes(kind)[1]
    drawn = images.noise(*images.drawn_size(*tiny.size(wish)), wish.seed)
    contexts, sigmas = tiny.encode_prompt(wish), sampling.flow_sigmas(wish.way.steps)
    alone = tiny.sample(contexts, drawn, sigmas, wish.guidance, intervals=wish.way.intervals)
    assert torch.equal(sample_together(tiny, [wish]), alone)
    (found,) = draw_together(tiny, [wish])
    assert found.size == (33, 50) and found.tobytes() == tiny.draw(wish).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_several_pictures_are_those_that_are_drawn_alone(tiny, kind, near):
    several = wishes(kind)
    assert len({shape_of(tiny, wish) for wish in several}) == 1
    latents = sample_together(tiny, several)
    pictures = draw_together(tiny, several)
    for wish, latent, found in zip(several, latents, pictures, strict=True):
        near(latent[None], sample_together(tiny, [wish]), 1e-5)
        expected = tiny.draw(wish)
        assert found.size == expected.size
        assert abs(numpy.asarray(found).astype(int) - numpy.asarray(expected)).max() <= 1


@pytest.fixture
def calls(tiny, monkeypatch):
    """The samples of each call of the transformer."""
    tiny.draw(wishes("texts", 1)[0])
    model, seen = tiny._networks["mmdit"], []
    forward = model.forward

    def counted(latents, *rest, **more):
        seen.append(len(latents))
        return forward(latents, *rest, **more)

    monkeypatch.setattr(model, "forward", counted)
    return seen


@pytest.mark.parametrize(
    ("kind", "expected"), [("texts", [10] * 3), ("edits", [10, 5] * 3), ("intervals", [10, 5, 10, 5])]
)
def test_all_branches_of_all_pictures_share_the_calls_of_one(tiny, calls, kind, expected):
    draw_together(tiny, wishes(kind))
    assert calls == expected
    calls.clear()
    tiny.draw(wishes(kind)[0])
    assert calls == [count // len(TEXTS) for count in expected]


def test_pictures_of_contexts_that_are_equally_long_share_the_calls_of_the_attention(tiny, monkeypatch):
    asked, attend = Counter(), torch.nn.functional.scaled_dot_product_attention
    several = wishes("texts", 1)
    draw_together(tiny, several)

    def counted(query, *rest, **more):
        asked[len(query)] += 1
        return attend(query, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    sample_together(tiny, several)
    layers = len(tiny._networks["mmdit"].transformer_blocks)
    # Two pictures have the same text; the unconditional branch is equally long for all.
    assert asked[2] >= layers and asked[5] == layers


def test_guidance_damps_each_picture_by_its_own_norms(near):
    generator = torch.Generator().manual_seed(0)
    branches = [torch.randn(3, 16, 4, 4, generator=generator) * 5 for _ in range(3)]
    branches[0][1] *= 100
    timestep = torch.tensor([950])
    together = sampling.dual_guidance(*branches, 4.5, 2.0, timestep)
    for i, one in enumerate(together):
        alone = sampling.dual_guidance(*(branch[i : i + 1] for branch in branches), 4.5, 2.0, timestep)
        near(one[None], alone, 1e-6)


def test_the_shape_is_all_that_pictures_must_share_and_loads_nothing(checkpoint):
    fresh = Pipeline(checkpoint)
    plain = ImageRequest("a cat", 64, 48)
    shape = shape_of(fresh, plain)
    same = [
        replace(plain, prompt="a dog", seed=9, negative_prompt="x", system="y", history=SPOKEN),
        replace(plain, width=65, height=63),
        replace(plain, all_cfg=4.5),
    ]
    assert {shape_of(fresh, one) for one in same} == {shape}
    edit = replace(plain, images=(picture(),))
    others = [
        replace(plain, width=80),
        replace(plain, steps=7),
        replace(plain, steps=1, speed="turbo"),
        replace(plain, speed="turbo"),
        replace(plain, speed="turbo", evaluations=1),
        replace(plain, speed="fast"),
        replace(plain, all_cfg_end=0.5),
        replace(plain, part_cfg_start=0.5),
        replace(plain, all_cfg=3.0),
        replace(plain, part_cfg=3.0),
        replace(plain, thought="it is red"),
        edit,
        replace(edit, images=(picture(), picture())),
        replace(edit, images=(picture(32, 64),)),
        replace(edit, reference_size=16),
    ]
    shapes = [shape_of(fresh, one) for one in others]
    assert len({shape, *shapes}) == len(others) + 1
    assert shape_of(fresh, replace(edit, images=(picture(colour="blue"),))) == shape_of(fresh, edit)
    assert not fresh._networks
    with pytest.raises(ValueError, match="pictures of 2 shapes found, one expected"):
        draw_together(fresh, [plain, others[0]])
    for wrong in (replace(plain, width=5), replace(edit, reference_size=5)):
        with pytest.raises(ValueError, match="5 found, 16 to 4096 pixels expected"):
            shape_of(fresh, wrong)
    assert not fresh._networks and draw_together(fresh, []) == answer_together(fresh, []) == []


def test_what_one_picture_is_refused_for_is_said_of_several(tiny):
    with pytest.raises(ValueError, match="placeholders for 0 pictures"):
        draw_together(tiny, [wishes("texts")[0], replace(wishes("texts")[1], prompt="<image> <image>")])


def test_a_distilled_transformer_draws_several_in_its_few_evaluations(checkpoint):
    marked = Pipeline(checkpoint)
    several = [ImageRequest(text, 32, 32, speed="turbo") for text in TEXTS[:2]]
    with pytest.raises(ValueError, match="was not distilled"):
        draw_together(marked, several)
    model = marked._mmdit()
    bias = model.get_parameter(f"{distilled.marked_layer(model.state_dict())}.bias")
    with torch.inference_mode():
        bias += distilled.mark(len(bias), 2)
    typed = [replace(one, speed="quality", steps=2, all_cfg_end=0.0, part_cfg_end=0.0) for one in several]
    turbo = [one.tobytes() for one in draw_together(marked, several)]
    assert turbo == [one.tobytes() for one in draw_together(marked, typed)]


QUESTIONS = (
    Question("What is in the picture?", (picture(64, 64),)),
    Question("What colour is it?", (picture(64, 64, colour="blue"),)),
    Question("Hello"),
    Question("What is different?", (picture(64, 64), picture(64, 64, colour="green"))),
    Question("And now?", (), "You answer.", history=SPOKEN),
    Question("What is in the picture?", (picture(64, 64, colour="black"),)),
)


def asked(config):
    return [replace(one, config=config) for one in QUESTIONS]


def alone(pipeline, questions):
    return [pipeline.answer(one.text, one.images, one.system, one.config, history=one.history) for one in questions]


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(40),
        GenerationConfig(5),
        GenerationConfig(1),
        GenerationConfig(30, temperature=1.0, seed=3, top_k=20),
        GenerationConfig(20, repetition_penalty=1.3, presence_penalty=0.2),
        GenerationConfig(8, beams=2),
    ],
    ids=lambda config: f"{config.max_new_tokens} {config.temperature} {config.repetition_penalty} {config.beams}",
)
@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_answers_of_prompts_of_any_length_are_those_that_are_written_alone(request, model, config):
    pipeline = request.getfixturevalue(model)
    questions = asked(config)
    assert answer_together(pipeline, questions) == alone(pipeline, questions)


def test_prompts_that_are_equally_long_need_no_mask(nano, monkeypatch):
    questions = [replace(one, config=GenerationConfig(40)) for one in (QUESTIONS[0], QUESTIONS[5])]
    expected = alone(nano, questions)
    forward, masks = nano._mllm().language_model.model.forward, []

    def seen(embedded, *rest, **more):
        if len(embedded) > 1:
            masks.append(more.get("mask"))
        return forward(embedded, *rest, **more)

    monkeypatch.setattr(nano._mllm().language_model.model, "forward", seen)
    assert answer_together(nano, questions) == expected
    assert masks and set(masks) == {None}


def test_a_step_is_one_call_for_all_open_texts_and_those_that_have_ended_leave(nano, monkeypatch):
    questions = asked(GenerationConfig(40))
    lengths = [
        len(nano.generate(one.text, one.images, one.system or SYSTEM_ANSWER, one.config, history=one.history))
        for one in questions
    ]
    assert len(set(lengths)) > 2  # else the test shows nothing
    forward, rows = nano._mllm().language_model.model.forward, []

    def seen(embedded, *rest, **more):
        rows.append(len(embedded))
        return forward(embedded, *rest, **more)

    monkeypatch.setattr(nano._mllm().language_model.model, "forward", seen)
    answer_together(nano, questions)
    open_texts = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert [count for count in rows if count > 1] == [count for count in open_texts if count > 1]
    assert open_texts[-1] == 1 < rows[-1]  # the last one goes on as a text that is written alone does


def test_thoughts_are_those_that_are_thought_alone(nano):
    several = [ImageRequest("two red circles and a blue star"), ImageRequest("a ring"), ImageRequest("x", system="y")]
    several.append(ImageRequest("make it blue", images=(picture(64, 64),)))
    config = GenerationConfig(30)
    found, expected = think_together(nano, several, config), [nano.think(one, config) for one in several]
    assert found == expected and [one.ids for one in found] == [one.ids for one in expected]
    assert think_together(nano, several[:1]) == [nano.think(several[0])]


def test_texts_that_a_limit_has_cut_are_told_of_each(tiny, caplog):
    answer_together(tiny, [replace(one, config=GenerationConfig(2)) for one in QUESTIONS[:3]])
    assert sum("cut after 2 tokens" in record.message for record in caplog.records) == 3


def test_each_text_ends_where_its_own_prompt_leaves_no_room(tiny, monkeypatch):
    prompts = [tiny.question(text, (), SYSTEM_ANSWER, GenerationConfig(1)) for text in ("a", "red " * 20, "ab")]
    language = tiny._mllm().language_model
    room = len(prompts[1][0].ids) + 3
    monkeypatch.setattr(language, "config", replace(language.config, max_position_embeddings=room))
    with torch.inference_mode():
        inputs = (tiny.encoder, tiny._mllm(), prompts, GenerationConfig(30))
        written = generate_batch(*inputs, **tiny.reading)
        expected = [generate(*inputs[:2], *prompt, GenerationConfig(30), **tiny.reading) for prompt in prompts]
    assert written == expected
    assert len(written[1]) <= 3 < min(len(written[0]), len(written[2]))


def test_questions_of_several_configs_or_one_that_is_refused_begin_nothing(tiny, monkeypatch):
    with pytest.raises(ValueError, match="2 configs found, one for all questions expected"):
        answer_together(tiny, [QUESTIONS[0], replace(QUESTIONS[1], config=GenerationConfig(3))])
    monkeypatch.setattr(tiny._mllm().language_model.model, "forward", lambda *_, **__: pytest.fail("began to work"))
    with pytest.raises(ValueError, match="tokens found .* 4096 expected at most"):
        answer_together(tiny, [QUESTIONS[2], replace(QUESTIONS[2], text="word " * 20_000)])


def test_a_file_that_changes_while_texts_are_written_ends_them(checkpoint, tmp_path, monkeypatch):
    pipeline, file = Pipeline(checkpoint), tmp_path / "weights"
    file.write_bytes(b"1")
    model = pipeline._mllm()
    model.mapped = (state_of(file),)
    logits = model.language_model.logits

    def changed(hidden):
        file.write_bytes(b"22")
        return logits(hidden)

    monkeypatch.setattr(model.language_model, "logits", changed)
    with pytest.raises(RuntimeError, match="weights"):
        answer_together(pipeline, QUESTIONS[:3])


def test_caches_are_joined_at_their_ends_and_what_stands_before_is_no_nan(tiny):
    config = tiny._mllm().language_model.config
    caches = []
    for length in (3, 5):
        cache = KeyValueCache(config, 8, device=torch.device("cpu"), dtype=torch.float32)
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        cache.keys[..., :length, :], cache.values[..., :length, :], cache.length = length, -length, length
        caches.append(cache)
    joined = KeyValueCache.joined(caches, config, 2)
    assert (joined.length, joined.capacity) == (5, 7)
    assert joined.keys[0, :, 0, :5, 0].tolist() == [[0, 0, 3, 3, 3], [5] * 5]
    assert joined.values[0, :, 0, :5, 0].tolist() == [[0, 0, -3, -3, -3], [-5] * 5]


def test_without_offload_every_part_stays_whole_on_the_device(checkpoint):
    parts = {}
    for offload in (True, False):
        pipeline = Pipeline(checkpoint, offload=offload)
        pipeline.draw(ImageRequest("a cat", 32, 32, 1))
        pipeline.device = torch.device("meta")
        model = pipeline._on_device("mmdit", lambda: pytest.fail("loaded again"))
        parts[offload] = {weight.device.type for weight in model.parameters()}
        if offload:
            with pytest.raises(NotImplementedError, match="out of meta"):  # it is to go back, from where nothing does
                pipeline._on_device("vae", lambda: pytest.fail("loaded again"))
    for name in ("vae", "mllm"):
        pipeline._on_device(name, lambda: pytest.fail("loaded again"))
    assert parts == {True: {"meta", "cpu"}, False: {"meta"}}  # modulation is computed where it lies
    assert {weight.device.type for one in pipeline._networks.values() for weight in one.parameters()} == {"meta"}
