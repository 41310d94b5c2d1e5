"""The language model beside transformers' Qwen3, whose arithmetic it has."""

import contextlib
import dataclasses
import types

import pytest
import torch
from pack.internvl_u import int8, qwen3_graph
from pack.internvl_u.config import LanguageConfig
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.linear import LARGE, fitting_threads, row_product, without_onednn
from pack.internvl_u.qwen3 import Qwen3
from pack.internvl_u.qwen3_graph import GraphedStep
from pack.internvl_u.qwen3_step import TokenStep
from pack.tests.plain_qwen3 import plain_qwen3
from torch.backends import mkldnn
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
SMALL = LanguageConfig(48, 80, 3, 6, 2, 16, 100, 1e6, max_position_embeddings=512)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS = {
    "grouped heads": SMALL,
    "one head of keys": dataclasses.replace(SMALL, num_key_value_heads=1),
    "a key for each head": dataclasses.replace(SMALL, num_key_value_heads=6),
    "biases": dataclasses.replace(SMALL, attention_bias=True),
    "one layer": dataclasses.replace(SMALL, num_hidden_layers=1),
    "yarn": dataclasses.replace(SMALL, rope_scaling=YARN),
    "linear": dataclasses.replace(SMALL, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "dynamic": dataclasses.replace(SMALL, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
}


def make(config, dtype=torch.float32, seed=0):
    model = Qwen3(config, dtype=dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.1 * noise if "norm" in name else noise * weight.shape[-1] ** -0.5)
    return model


def embeddings(config, tokens, dtype=torch.float32, batch=1):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, config.hidden_size, generator=generator).to(dtype)


def cache_for(model, tokens, dtype=torch.float32, **more):
    return model.new_cache(tokens, device=CPU, dtype=dtype, **more)


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_logits_equal_those_of_transformers(name, near):
    model, embedded = make(CONFIGS[name]), embeddings(SMALL, 20)
    expected = plain_qwen3(model)(inputs_embeds=embedded, output_hidden_states=True)
    layers = range(len(expected.hidden_states))
    for cache in (None, cache_for(model, 20)):
        last, states = model(embedded, cache, layers)
        near(states, torch.cat(expected.hidden_states, -1), 1e-5)
        near(model.lm_head(last), expected.logits, 1e-5)
        _, negative = model(embedded, cache_for(model, 20), (-1, -2))
        assert torch.equal(negative, torch.cat([states.chunk(len(layers), -1)[i] for i in (-1, -2)], -1))


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [(20,), (7, 13), (1, 1, 17, 1), (5, 5, 5, 5)])
def test_a_text_in_pieces_is_the_same_text(name, lengths, near):
    model, embedded = make(CONFIGS[name]), embeddings(SMALL, 20)
    cache = cache_for(model, 25)
    pieces = [model(piece, cache, (-1, -2))[1] for piece in embedded.split(lengths, dim=1)]
    near(torch.cat(pieces, 1), model(embedded, None, (-1, -2))[1], 1e-5)
    assert cache.length == 20


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "biases"])
def test_the_lean_step_equals_transformers_with_a_cache(name, near):
    model, embedded = make(CONFIGS[name]), embeddings(SMALL, 30)
    cache = cache_for(model, 30)
    model(embedded[:, :20], cache)
    step = TokenStep.of(model, cache)
    logits = torch.stack([step(token) for token in embedded[0, 20:]])
    near(logits, plain_qwen3(model)(inputs_embeds=embedded).logits[0, 20:], 1e-5)
    assert cache.length == 30


@torch.inference_mode()
def test_bf16_is_as_near_as_that_of_transformers():
    exact, model = make(SMALL), make(SMALL, torch.bfloat16)
    embedded = embeddings(SMALL, 30)
    expected = exact.lm_head(exact(embedded)[0])[0, 20:]
    cache = cache_for(model, 30, torch.bfloat16)
    rounded = embedded.bfloat16()
    model(rounded[:, :20], cache)
    step = TokenStep.of(model, cache)
    ours = torch.stack([step(token) for token in rounded[0, 20:]])
    theirs = plain_qwen3(model)(inputs_embeds=rounded).logits[0, 20:]

    def error(logits):
        return ((logits.float() - expected).norm() / expected.norm()).item()

    assert ours.dtype == torch.bfloat16 and 0 < error(ours) < 1.5 * error(theirs)


def test_a_mask_and_positions_are_obeyed_and_gradients_flow(near):
    model = make(SMALL).requires_grad_(True)
    embedded = embeddings(SMALL, 12, batch=2).requires_grad_(True)
    allowed = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    allowed[1, :, 6:, :6] = False  # two texts in a row, which do not see each other
    positions = torch.stack([torch.arange(12), torch.cat([torch.arange(6), torch.arange(6)])])
    last, _ = model(embedded, mask=allowed, positions=positions)
    near(last[0], model(embedded[:1])[0][0], 1e-5)
    near(last[1, 6:], model(embedded[1:, 6:])[0][0], 1e-5)
    last.square().sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if name.startswith("model.layers"))
    assert torch.isfinite(embedded.grad).all() and embedded.grad.abs().sum() > 0


@torch.inference_mode()
def test_sequences_of_a_cache_are_repeated_and_put_into_another_order(near):
    model, embedded = make(SMALL), embeddings(SMALL, 9)
    cache = cache_for(model, 12)
    model(embedded, cache)
    several = cache.repeated(3)
    different = embeddings(SMALL, 3).transpose(0, 1)
    model(different, several)
    swapped = several.reordered(torch.tensor([2, 0]))
    end = embeddings(SMALL, 1)
    for row, origin in enumerate((2, 0)):
        whole = torch.cat([embedded, different[origin, None], end], 1)
        near(model(end.expand(2, -1, -1), swapped)[0][row], model(whole)[0][0, -1:], 1e-5)
        swapped.length -= 1
    assert cache.length == 9


class Calls(TorchDispatchMode):
    """Counts torch's operations, and the bytes of new tensors that they make."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.count += 1
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.bytes += result.nbytes
        return result


@torch.inference_mode()
def test_a_token_costs_the_same_calls_and_copies_however_long_the_text_is():
    model = make(SMALL)
    cache = cache_for(model, 400)
    step = TokenStep.of(model, cache)
    counts = []
    for token in embeddings(SMALL, 400)[0]:
        with Calls() as calls:
            step(token)
        counts.append((calls.count, calls.bytes))
    assert len({count for count, _ in counts}) == 1
    assert counts[-1][1] == counts[0][1] < 200 * SMALL.hidden_size * 4  # nothing as long as the text is copied


@torch.inference_mode()
def test_a_step_makes_at_most_half_of_the_calls_of_transformers():
    model, embedded = make(SMALL), embeddings(SMALL, 9)
    plain, cache = plain_qwen3(model), cache_for(model, 9)
    model(embedded[:, :8], cache)
    read = plain(inputs_embeds=embedded[:, :8], use_cache=True)
    name = "cache" if "cache" in read else "past_key_values"  # since 5.24
    step = TokenStep.of(model, cache)
    with Calls() as ours:
        step(embedded[0, 8])
    with Calls() as theirs:
        plain(inputs_embeds=embedded[:, 8:], use_cache=True, **{name: read[name]})
    assert 0 < ours.count <= 0.55 * theirs.count


class Replayed:
    """Stands for CUDA's graphs: what is recorded runs again at each replay, and its result lies where it lay."""

    def __init__(self, monkeypatch):
        self.recordings = self.replays = 0
        nothing = contextlib.nullcontext
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda one: nothing()}
        fakes |= {"CUDAGraph": lambda: types.SimpleNamespace(replay=None), "graph": lambda graph: nothing()}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        record = GraphedStep._record

        def recorded(step, span):
            self.recordings += 1
            _, logits = record(step, span)

            def replay():
                self.replays += 1
                logits.copy_(step.run(span))

            return replay, logits

        monkeypatch.setattr(GraphedStep, "_record", recorded)


@torch.inference_mode()
@pytest.mark.parametrize("capacity", [40, 25])
def test_a_recorded_step_gives_what_the_step_gives(capacity, monkeypatch, near):
    """The order of reads and writes, and the mask; a GPU is not asked."""
    monkeypatch.setattr(qwen3_graph, "SPAN", 16)
    replayed = Replayed(monkeypatch)
    model, embedded = make(SMALL), embeddings(SMALL, 25)
    caches = [cache_for(model, capacity) for _ in range(2)]
    for cache in caches:
        cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)  # what is not written yet counts nothing
        model(embedded[:, :5], cache)
    step, graphed = TokenStep.of(model, caches[0]), GraphedStep(TokenStep.of(model, caches[1]))
    for token in embedded[0, 5:]:
        near(graphed(token), step(token), 1e-5)
    assert caches[0].length == caches[1].length == 25
    assert (replayed.recordings, replayed.replays) == (2, 20)


@torch.inference_mode()
def test_a_step_without_a_place_in_its_code_compiles_once_for_all_tokens(near):
    model, embedded = make(SMALL), embeddings(SMALL, 12)
    caches = [cache_for(model, 16) for _ in range(2)]
    for cache in caches:
        cache.keys.zero_(), cache.values.zero_()
        model(embedded[:, :5], cache)
    step, graphed = TokenStep.of(model, caches[0]), GraphedStep(TokenStep.of(model, caches[1]))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda: graphed.run(16), backend="eager", fullgraph=True)
    for place, token in enumerate(embedded[0, 5:], 5):
        graphed.hidden.copy_(token)
        graphed.place.fill_(place)
        near(compiled(), step(token), 1e-5)
    counters = torch._dynamo.utils.counters["stats"]
    assert counters["unique_graphs"] == 1


def test_graphs_are_for_cuda_alone(checkpoint):
    from pack.internvl_u.pipeline import Pipeline

    written = [
        Pipeline(checkpoint).generate("hello", config=GenerationConfig(5, cuda_graphs=graphs))
        for graphs in (False, True)
    ]
    assert written[0] == written[1]  # on a processor


@torch.inference_mode()
@pytest.mark.parametrize(
    "change", ["a bias", "a patch", "another dtype", "several sequences", "a forward", "a hook", "a move"]
)
def test_the_lean_step_is_for_plain_weights_only(change):
    model = make(dataclasses.replace(SMALL, attention_bias=change == "a bias"))
    if change == "a patch":
        model.model.layers[1].mlp.up_proj.weight_function = [lambda weight: weight]
    layer = model.model.layers[1]
    if change == "a forward":
        layer.self_attn.q_proj.forward = lambda hidden: hidden
    if change == "a hook":
        layer.mlp.register_forward_hook(lambda *args: None)
    if change == "a move":
        layer.post_attention_layernorm.comfy_cast_weights = True
    if change == "another dtype":
        model.model.layers[2].mlp.down_proj.double()
    cache = cache_for(model, 5, batch=2 if change == "several sequences" else 1)
    assert TokenStep.of(model, cache) is None
    assert TokenStep.of(make(SMALL), cache_for(model, 5)) is not None


@torch.inference_mode()
@pytest.mark.parametrize("rows", [64, LARGE // 4 // 512 + 3])
@pytest.mark.parametrize("stored, given", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_products_of_one_row_are_those_of_linear(rows, stored, given, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # with one, nothing is gained by another kernel
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(512, rows, bias=False)
    layer.weight.copy_(torch.randn(rows, 512, generator=generator))
    row = torch.randn(512, generator=generator)
    exact = layer(row)
    layer.to(getattr(torch, stored))
    row = row.to(getattr(torch, given))
    with without_onednn(CPU):
        product = row_product(layer, CPU, row.dtype)(row)
    assert product.dtype == row.dtype and mkldnn.enabled
    assert (product.float() - exact).norm() / exact.norm() < (1e-5 if stored == "float32" else 6e-3)


def test_onednn_is_on_again_after_an_error_and_stays_off_where_it_was_off():
    with pytest.raises(KeyError), without_onednn(CPU):
        assert not mkldnn.enabled
        raise KeyError
    assert mkldnn.enabled
    mkldnn.enabled = False
    try:
        with without_onednn(CPU):
            assert not mkldnn.enabled
        assert not mkldnn.enabled
    finally:
        mkldnn.enabled = True


@torch.inference_mode()
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("scales", ["a row", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_are_what_the_matrix_stands_for(group, scales, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix, row = torch.randn(48, 64, generator=generator), torch.randn(64, generator=generator).to(dtype)
    scale = int8.scale_of(matrix, group)
    scale = scale.max().reshape(1, 1) if scales == "one" else scale
    layer = torch.nn.Linear(64, 48, bias=False)
    rotated = int8.rotate(matrix, group) if group else matrix
    layer.weight = torch.nn.Parameter((rotated / scale).round().to(torch.int8), requires_grad=False)
    int8.keep_packed(layer, scale, group)
    exact = int8.dequantize(layer.weight, scale, group) @ row.float()
    for product in (layer(row), layer(row[None, None])[0, 0], row_product(layer, CPU, dtype)(row)):
        assert product.dtype == dtype and (product.float() - exact).norm() / exact.norm() < 8e-3


def test_small_matrices_have_one_thread_and_what_was_set_comes_back(monkeypatch):
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with fitting_threads(torch.empty(LARGE // 4)):
        assert threads == [4]
    with fitting_threads(torch.empty(LARGE // 4, device="meta")):
        assert threads == [4]
    with fitting_threads(torch.empty(LARGE // 8), 32):
        assert threads == [4]
    with pytest.raises(KeyError), fitting_threads(torch.empty(LARGE // 8), 31):
        assert threads == [4, 1]
        raise KeyError
    assert threads == [4, 1, 4]
