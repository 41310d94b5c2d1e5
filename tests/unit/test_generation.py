"""Thoughts and answers of the library."""

import copy
import pickle

import pytest
import torch
from pack.internvl_u import prompt
from pack.internvl_u.generation import GenerationConfig, distribution, penalised, sample_token
from pack.internvl_u.images import to_rgb
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.tokenizer import Thought, trim_thought
from pack.tests.plain_qwen3 import plain_qwen3, written
from PIL import Image


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline(checkpoint)


def pictures(case):
    return tuple(to_rgb(Image.open(file)) for file in case.images)


def test_answers_equal_the_official_ones(pipeline, question):
    config = GenerationConfig(question.new, beams=question.beams)
    written = pipeline.generate(question.prompt, pictures(question), prompt.SYSTEM_ANSWER, config)
    assert written == question["generated_ids"][0].tolist()
    assert pipeline.answer(question.prompt, pictures(question), config=config) == question.text


def test_thoughts_equal_the_official_ones(pipeline, thinking):
    system = prompt.SYSTEM_EDIT if thinking.images else prompt.SYSTEM_DRAW
    written = pipeline.generate(thinking.prompt, pictures(thinking), system, GenerationConfig(thinking.new))
    assert written == thinking["generated_ids"][0].tolist()


def test_each_token_is_heard_and_what_the_listener_raises_ends_the_writing(pipeline):
    heard = []
    written = pipeline.generate("hello", (), prompt.SYSTEM_ANSWER, GenerationConfig(6), heard.append)
    assert heard == [written[: i + 1] for i in range(len(written))]

    class Stopped(Exception):
        pass

    def stop(ids):
        if len(ids) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        pipeline.generate("hello", (), prompt.SYSTEM_ANSWER, GenerationConfig(50), stop)


def test_sampling_follows_the_seed_and_leaves_torchs_generator_alone(pipeline):
    def sample(seed):
        return pipeline.generate("hello", (), prompt.SYSTEM_ANSWER, GenerationConfig(12, temperature=1.5, seed=seed))

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = sample(7)
    assert torch.equal(torch.rand(3), expected)
    assert sample(7) == first
    assert any(sample(seed) != first for seed in range(5))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"beams": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"beams": 2, "temperature": 1.0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"beams": 2, "repetition_penalty": 1.1},
        {"beams": 2, "presence_penalty": 0.5},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="found, .* expected"):
        GenerationConfig(**settings)


@pytest.mark.parametrize(
    "written, expected",
    [([], []), ([9], []), ([5], []), ([5, 9], []), ([5, 6], []), ([5, 6, 9], [5]), ([5, 6, 7], [5]), ([9, 5, 6], [])],
)
def test_the_official_code_drops_the_end_and_the_token_before(written, expected):
    assert list(trim_thought(written, stops=[9])) == expected


SPECIALS = ("<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_very_short_thoughts_draw_a_picture(pipeline, golden, images, length):
    ids = [5, 6][:length]
    thought = Thought(pipeline.encoder.tokenizer.decode(ids), ids)
    seen = pictures(golden("edit_one"))[:images]
    assert pipeline.draw(ImageRequest("a cat", 32, 32, 1, thought=thought, images=seen)).size == (32, 32)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("special", SPECIALS)
def test_thoughts_with_special_tokens_draw_a_picture(pipeline, golden, special, images):
    token = pipeline.encoder.tokenizer.special[special]
    thought = Thought("x", [5, token, token, 6])
    seen = pictures(golden("edit_one"))[:images]
    drawing = ImageRequest("a cat", 32, 32, 1, thought=thought, images=seen)
    context, layout = pipeline.encode_prompt(drawing).conditional
    assert sum(span.count for span in layout) == len(context)
    assert sum(span.is_image for span in layout) == images
    assert pipeline.draw(drawing).size == (32, 32)


def test_a_thought_without_memory_is_read_as_plain_text(pipeline):
    tokenizer = pipeline.encoder.tokenizer
    special = set(tokenizer.special.values())
    assert not special & set(tokenizer.encode_thought("first <img> then <|im_end|>"))
    assert tokenizer.encode_thought("") is None
    remembered = Thought("anything", [7, 8])
    assert tokenizer.encode_thought(remembered) == tokenizer.encode_thought(copy.deepcopy(remembered)) == (7, 8)
    assert tokenizer.encode_thought(pickle.loads(pickle.dumps(remembered))) == (7, 8)
    assert tokenizer.encode_thought(str(remembered) + "") == tokenizer.encode_thought("anything")


def test_no_thought_and_an_empty_thought_are_the_same_prompt(pipeline):
    tokenizer = pipeline.encoder.tokenizer
    assert prompt.branch_prompts(tokenizer, "a cat") == prompt.branch_prompts(
        tokenizer, "a cat", thought=tokenizer.encode_thought("")
    )


def test_an_empty_thought_of_the_model_is_a_thought_and_an_empty_text_is_none(pipeline):
    """The official code draws from nothing but its padding then, with the guidance of a thought."""
    empty, written = (
        ImageRequest("a cat", 32, 32, 1),
        ImageRequest("a cat", 32, 32, 1, thought=Thought("", ())),
    )
    assert empty.guidance == (4.5, 2.0) and written.guidance == (3.5, 1.5)
    contexts = [pipeline.encode_prompt(drawing).conditional[0] for drawing in (empty, written)]
    assert contexts[0].shape == contexts[1].shape
    assert not torch.allclose(*contexts, atol=1e-2)


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("new", [1, 2, 40])
def test_writing_equals_transformers_generate(pipeline, beams, new):
    tokenizer, model = pipeline.encoder.tokenizer, pipeline._mllm()
    plain = plain_qwen3(model.language_model)
    for text in ("tell me everything", "一只猫", "x" * 200):
        opening = prompt.generation_prompt(tokenizer, text, system=prompt.SYSTEM_ANSWER)
        where = {"device": torch.device("cpu"), "dtype": torch.float32}
        with torch.inference_mode():
            embedded = pipeline.encoder.embed(model, opening, (), **where)
        expected = written(plain, embedded, tokenizer.stops, max_new_tokens=new, num_beams=beams)
        config = GenerationConfig(new, beams=beams)
        assert pipeline.generate(text, (), prompt.SYSTEM_ANSWER, config) == expected


def test_top_p_keeps_the_likeliest_tokens_only():
    logits = torch.log(torch.tensor([0.1, 0.6, 0.25, 0.05]))
    generator = torch.Generator().manual_seed(0)
    for top_p, expected in ((0.5, {1}), (0.6, {1}), (0.61, {1, 2}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        config = GenerationConfig(temperature=1.0, top_p=top_p)
        assert {sample_token(logits, config, generator) for _ in range(400)} == expected


def test_low_temperature_is_nearly_greedy(pipeline):
    greedy = pipeline.generate("hello", (), prompt.SYSTEM_ANSWER, GenerationConfig(10))
    assert (
        pipeline.generate("hello", (), prompt.SYSTEM_ANSWER, GenerationConfig(10, temperature=1e-4, seed=5)) == greedy
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50, 10**6])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_those_of_transformers_processors(temperature, top_k, min_p, top_p, dtype):
    import transformers

    logits = (3 * torch.randn(1000, generator=torch.Generator().manual_seed(3))).to(dtype)
    processors = [transformers.TemperatureLogitsWarper(temperature)]
    processors += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    processors += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    processors += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits.float()[None]
    for process in processors:
        scores = process(None, scores)
    expected = torch.softmax(scores[0], -1)
    odds, tokens = distribution(
        logits, GenerationConfig(temperature=temperature, top_k=top_k, min_p=min_p, top_p=top_p)
    )
    found = torch.zeros(1000)
    found[slice(None) if tokens is None else tokens] = odds
    found /= found.sum()
    if dtype == torch.float32 or top_p == 1:
        assert torch.allclose(found, expected, atol=1e-6)
    else:  # of equally likely tokens at the border, one may be in and one out
        assert torch.allclose(found.sort().values, expected.sort().values, atol=1e-6)


def test_draws_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.05, 0.25, 0.2]))
    for settings in ({}, {"top_k": 4}, {"top_p": 0.999999}):
        generator, config = torch.Generator().manual_seed(0), GenerationConfig(temperature=1.0, **settings)
        drawn = torch.bincount(torch.tensor([sample_token(logits, config, generator) for _ in range(4000)])) / 4000
        assert torch.allclose(drawn, logits.exp(), atol=0.03)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    import transformers

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[3, 4, 4, 49]]), logits[None])[0]
    config = GenerationConfig(repetition_penalty=penalty)
    assert torch.allclose(penalised(logits, config, (3, 4, 4, 49)), expected)


LOGITS = torch.tensor([2.0, 1.9, 1.0, -1.0, -3.0])


def sampled(written=(), **settings):
    config = GenerationConfig(**{"temperature": 2.0} | settings)
    generator = torch.Generator().manual_seed(1)
    return {sample_token(LOGITS, config, generator, written) for _ in range(400)}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 1000}, {0, 1, 2, 3, 4}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.5}, {0, 1, 2}),
        ({"top_k": 4, "min_p": 0.1}, {0, 1, 2, 3}),
    ],
)
def test_samples_are_of_the_likeliest_tokens_only(settings, expected):
    assert sampled(**settings) == expected


@pytest.mark.parametrize(
    "written, settings, expected",
    [
        ((), {"repetition_penalty": 100.0, "presence_penalty": 9.0}, 0),
        ((0,), {"repetition_penalty": 1.01}, 0),
        ((0,), {"repetition_penalty": 1.1}, 1),
        ((0, 0, 1), {"repetition_penalty": 3.0}, 2),
        ((0,), {"presence_penalty": 0.05}, 0),
        ((0, 0, 0), {"presence_penalty": 0.05}, 0),
        ((0,), {"presence_penalty": 0.2}, 1),
        ((0, 1), {"presence_penalty": 1.5}, 2),
        ((2,), {"presence_penalty": -1.5}, 2),
        ((4,), {"repetition_penalty": 0.001}, 0),
    ],
)
def test_what_is_written_already_counts(written, settings, expected):
    config, before = GenerationConfig(**settings), LOGITS.clone()
    assert sample_token(LOGITS, config, torch.Generator(), written) == expected
    assert torch.equal(LOGITS, before)


def test_penalties_count_over_all_that_the_model_has_written(pipeline):
    def write(**settings):
        return pipeline.generate("hello", (), prompt.SYSTEM_ANSWER, GenerationConfig(30, **settings))

    first = write()[0]
    assert write(presence_penalty=-1e4) == [first] * 30
    written = write(presence_penalty=1e4, temperature=3.0, seed=1)
    assert len(set(written)) == len(written) == 30
    assert write(temperature=1.5, seed=3) == write(temperature=1.5, seed=3, top_k=0, min_p=0.0, repetition_penalty=1.0)
