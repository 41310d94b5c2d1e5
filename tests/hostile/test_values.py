"""Numbers and texts that nobody expects: a clear refusal at our node, and the next good job runs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from pack.internvl_u import sampling
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.load import load_vae
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file

from .test_model_folders import graph


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline(checkpoint)


def refused(server, nodes, sentence):
    """The job ends with an error that says `sentence`, or is not taken at all; then a good one runs."""
    answer = server.queue(nodes)
    told = server.error(server.wait(answer["prompt_id"])) if "prompt_id" in answer else json.dumps(answer)
    assert sentence in told, told
    assert "Traceback" not in told
    assert server.run(graph())["status"]["status_str"] == "success"


@pytest.mark.parametrize("denoise", [1e-7, 1e-15, 5e-324])
def test_a_schedule_is_not_longer_than_it_can_be(littered, denoise):
    refused(littered, graph(denoise=denoise, steps=20), f"denoise {denoise} found for 20 steps")


@pytest.mark.parametrize("name", ["all_cfg", "part_cfg", "denoise"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_no_strength(littered, name, value):
    refused(littered, graph(**{name: float(value)}), name)


def with_sampler(littered, **values):
    nodes = graph()
    nodes[littered.find(nodes, "InternVLU_SampleLatent")]["inputs"] |= values
    return nodes


@pytest.mark.parametrize("name", ["all_cfg_start", "all_cfg_end", "part_cfg_start", "part_cfg_end"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 1.5])
def test_what_is_no_share_of_a_schedule_is_no_end_of_an_interval(littered, name, value):
    refused(littered, with_sampler(littered, **{name: value}), name)


def test_an_interval_does_not_end_before_its_start_and_a_preset_is_one_of_the_list(littered):
    ends = with_sampler(littered, part_cfg_start=0.7, part_cfg_end=0.3, speed="fast")
    refused(littered, ends, "part_cfg_end 0.3 found, part_cfg_start (0.7) or more expected")
    late = with_sampler(littered, all_cfg_start=0.7, speed="quality (official)")
    assert littered.run(late)["status"]["status_str"] == "success"
    refused(littered, with_sampler(littered, speed="turbo"), "turbo")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["all_cfg", "part_cfg"])
def test_the_library_refuses_a_strength_that_is_no_number(name, value):
    with pytest.raises(ValueError, match=f"{name} .* found, a number expected"):
        ImageRequest("x", **{name: value})


@pytest.mark.parametrize("seed", [2**64, 10**30, -(2**63) - 1])
def test_a_seed_is_within_64_bits(seed):
    for make in (lambda: ImageRequest("x", seed=seed), lambda: GenerationConfig(seed=seed)):
        with pytest.raises(ValueError, match="seed .* found"):
            make()


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -1.0])
def test_a_temperature_is_a_number_from_0(temperature):
    with pytest.raises(ValueError, match="temperature .* found"):
        GenerationConfig(temperature=temperature)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_vae_of_values_that_are_no_numbers_is_not_loaded(broken, native, value):
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"][0] = value
    save_file(weights, file)
    for load in (load_vae, lambda root: native.load(root, "fp32")):
        with pytest.raises(RuntimeError, match=r"vae: 1 of 194 tensors hold .*decoder\.(conv_out|head\.2)\.bias"):
            load(broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["mllm", "mmdit"])
def test_weights_that_are_no_numbers_are_named_and_draw_no_black_image(checkpoint, part, value):
    pipeline = Pipeline(checkpoint)
    request = ImageRequest("a cat", 32, 32, 1)
    pipeline.draw(request)
    network = pipeline._networks[part]
    name, cause = {
        "mllm": ("language_model.model.norm.weight", "the language model"),
        "mmdit": ("proj_out.bias", "the transformer"),
    }[part]
    with torch.inference_mode():  # the weights were loaded in it
        dict(network.named_parameters())[name].data[:] = value
    pipeline._kept.clear()
    with pytest.raises(RuntimeError, match=f"infinite or not a number .*{cause}"):
        pipeline.draw(request)


def test_finite_values_pass():
    sampling.check_finite(torch.zeros(3), "x", "y")


@pytest.mark.parametrize("field", ["prompt", "system", "thought"])
def test_a_text_that_does_not_fit_the_context_is_refused_before_any_work(pipeline, monkeypatch, field):
    monkeypatch.setattr(pipeline._mllm().language_model.model, "forward", lambda *args: pytest.fail("began to work"))
    words = "word " * 20_000
    request = ImageRequest(**{"prompt": "a cat", field: words}, width=32, height=32, steps=1)
    with pytest.raises(ValueError, match=r"\d+ tokens found .*, 4096 expected at most"):
        pipeline.draw(request)
    if field != "thought":
        with pytest.raises(ValueError, match="4096 expected at most"):
            pipeline.think(request)


def test_writing_ends_where_the_context_does(pipeline):
    room = 4096 - len(pipeline.encoder.tokenizer.encode(["x" * 4000])[0])
    assert 0 < room < 200
    written = pipeline.generate("x" * 3900, (), "", GenerationConfig(8192, temperature=1.0))
    assert 1 <= len(written) < 300


@pytest.mark.parametrize("text", ["\ud800", "a cat \udfff", "\udc00" * 3])
@pytest.mark.parametrize("field", ["prompt", "system", "thought"])
def test_half_a_character_is_named(pipeline, field, text):
    request = ImageRequest(**{"prompt": "a cat", field: text}, width=32, height=32, steps=1)
    with pytest.raises(ValueError, match="half a character"):
        pipeline.draw(request)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_character_ends_no_server(littered, text):
    refused(littered, graph(prompt=text), "half a character")


class PanicException(BaseException):
    """As the tokenizers library has it."""


@pytest.mark.parametrize("data", [b"\xff\xfe{}", b"", b"{}", b"[" * 100_000])
def test_a_tokenizer_that_is_no_text_or_no_json_is_unreadable(broken, data):
    (broken / "processor" / "tokenizer.json").write_bytes(data)
    with pytest.raises(RuntimeError, match="the tokenizer in .* is unreadable"):
        Tokenizer(broken / "processor")


def test_a_panic_of_the_tokenizers_library_is_an_error(checkpoint, monkeypatch):
    tokenizer = Tokenizer(checkpoint / "processor")

    class Panics:
        def encode(self, *args, **how):
            raise PanicException("index out of bounds")

        decode = encode

    tokenizer._tokenizer = Panics()
    with pytest.raises(RuntimeError, match="cannot be encoded .index out of bounds"):
        tokenizer.encode(["a cat"])
    with pytest.raises(RuntimeError, match="cannot be decoded .index out of bounds"):
        tokenizer.decode([1])
    import tokenizers

    class Library:
        @staticmethod
        def from_str(text):
            raise PanicException("no regex")

    monkeypatch.setattr(tokenizers, "Tokenizer", Library)
    with pytest.raises(RuntimeError, match="the tokenizer in .* is unreadable .no regex"):
        Tokenizer(checkpoint / "processor")


@pytest.mark.parametrize(
    "setting",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 4000},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
    ],
)
def test_a_tokenizers_own_settings_change_no_prompt(broken, checkpoint, setting):
    file = broken / "processor" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | setting), encoding="utf-8")
    text = ["a red circle on a white background, and more words"]
    assert Tokenizer(broken / "processor").encode(text) == Tokenizer(checkpoint / "processor").encode(text)


@pytest.mark.parametrize("how", ["", "nothing", "Greedy"])
def test_a_way_to_write_that_is_none_is_refused(comfyui, how):
    from pack.nodes.inputs import generation_config

    with pytest.raises(ValueError, match="how .* found, one of greedy, sampling, beams expected"):
        generation_config(10, how, 0.7, 0.9, 3, 0)


def test_a_precision_that_is_none_is_refused(native, checkpoint):
    with pytest.raises(ValueError, match="precision 'fp7' found, one of auto, fp32"):
        native.load(checkpoint, "fp7")


def test_millions_of_characters_are_not_even_cut_into_tokens(pipeline, monkeypatch):
    library = SimpleNamespace(encode=lambda *args, **how: pytest.fail("began to work"))
    monkeypatch.setattr(pipeline.encoder.tokenizer, "_tokenizer", library)
    with pytest.raises(ValueError, match="5000000 characters found, 1000000 expected at most"):
        pipeline.encoder.tokenizer.encode(["x" * 5_000_000])


@pytest.mark.parametrize("text", [b"a cat", 5, ["a cat"], 1.5])
def test_what_is_no_text_is_named(pipeline, text):
    with pytest.raises(ValueError, match=f"a {type(text).__name__} found, a text expected"):
        pipeline.encoder.tokenizer.encode([text])
