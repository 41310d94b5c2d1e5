"""What training takes, counted before it starts, against what real passes on the CPU keep and compute."""

import dataclasses

import pytest
import torch
from pack.internvl_u.attention import scaled_dot_product
from pack.internvl_u.finetune import estimate as module
from pack.internvl_u.finetune.estimate import (
    Estimate,
    block_runner,
    count,
    estimate,
    estimate_language,
    measured_arithmetic,
)
from pack.internvl_u.load import load_mllm, load_mmdit
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

SHAPES = {"drawing": [(8, 8)], "wide": [(6, 10)], "edit": [(8, 8), (8, 6)]}
CONTEXTS = {"one": [21], "equal": [21, 21], "mixed": [21, 33, 21]}


def lora(model):
    """LoRA by PEFT, as a trainer puts it in, in fp32 whatever the weights are."""
    peft = pytest.importorskip("peft", reason="of the extra `train`")
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "q_proj", "v_proj", "gate_proj"]
    meta = next(model.parameters()).is_meta
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), model, low_cpu_mem_usage=meta)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def everything(model):
    model.requires_grad_(True)


ADAPTERS = {"LoRA": lora, "all weights": everything}


@pytest.fixture(params=ADAPTERS)
def adapters(request):
    return ADAPTERS[request.param]


@pytest.fixture
def model(checkpoint, adapters):
    """The tiny transformer, trained as the estimate is told."""
    loaded = load_mmdit(checkpoint).requires_grad_(False)
    adapters(loaded)
    return loaded


def storages(tensors):
    """Storages by identity: what views share counts once."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def kept_by(model, inputs, loss):
    """Returns the bytes that a forward pass saves for the backward pass, weights left out, inputs among them."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        given = inputs()
        value = loss(given)
    held = storages(tensors_in(given)) | storages(saved)
    own = storages(model.parameters())
    return sum(storage.nbytes() for key, storage in held.items() if key not in own), value


def tensors_in(given):
    latents, sinusoids, branches = given
    return [*latents, sinusoids, *(one for branch in branches for one in (branch.context, branch.rotary))]


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_a_forward_pass_saves(model, adapters, shape, contexts):
    step = module._DrawingStep(model, SHAPES[shape], CONTEXTS[contexts], torch.float32)
    run_block = block_runner(scaled_dot_product, False)
    kept, _ = kept_by(model, step.inputs, lambda given: step.loss(given, run_block))
    counted = estimate(
        model.config,
        shape=SHAPES[shape],
        context_tokens=CONTEXTS[contexts],
        dtype=torch.float32,
        checkpointing=False,
        add_adapters=adapters,
    )
    assert counted.memory["activations"] == kept


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_checkpointing_they_are_what_is_outside_the_blocks_and_their_inputs(model, adapters, shape, contexts):
    step = module._DrawingStep(model, SHAPES[shape], CONTEXTS[contexts], torch.float32)
    run, outside, into = block_runner(scaled_dot_product, True), [], []

    def run_block(index, block, image, text, modulation, packing, image_tokens):
        into.extend((image, text, modulation, packing.rotary_image, packing.rotary_text, packing.sample))
        return run(index, block, image, text, modulation, packing, image_tokens)

    with torch.autograd.graph.saved_tensors_hooks(lambda one: outside.append(one) or one, lambda one: one):
        given = step.inputs()
        value = step.loss(given, run_block)
    held = storages([*outside, *into, *tensors_in(given)])
    assert value.requires_grad
    own = storages(model.parameters())
    counted = estimate(
        model.config,
        shape=SHAPES[shape],
        context_tokens=CONTEXTS[contexts],
        dtype=torch.float32,
        checkpointing=True,
        add_adapters=adapters,
    )
    assert counted.memory["activations"] == sum(one.nbytes() for key, one in held.items() if key not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_worst_moment_is_that_of_a_real_pass(checkpoint, adapters, checkpointing, dtype):
    """In bf16 the meta device keeps a norm's mean and spread in fp32, as a GPU does, and the CPU in bf16."""
    model = load_mmdit(checkpoint, dtype=dtype).requires_grad_(False)
    adapters(model)
    step = module._DrawingStep(model, SHAPES["edit"], CONTEXTS["mixed"], dtype)
    run_block = block_runner(scaled_dot_product, checkpointing)
    real = count(model, step.inputs, lambda given: step.loss(given, run_block))
    counted = estimate(
        model.config,
        shape=SHAPES["edit"],
        context_tokens=CONTEXTS["mixed"],
        dtype=dtype,
        checkpointing=checkpointing,
        add_adapters=adapters,
    ).memory
    assert counted["activations"] == pytest.approx(real.activations, rel=0 if dtype == torch.float32 else 0.01)
    found = counted["activations"] + counted["working"]
    assert found == pytest.approx(real.activations + real.working, rel=0.03)


def test_what_is_counted_on_the_cpu_is_what_torch_keeps(model):
    step = module._DrawingStep(model, SHAPES["edit"], CONTEXTS["mixed"], torch.float32)
    run_block = block_runner(scaled_dot_product, False)
    kept, _ = kept_by(model, step.inputs, lambda given: step.loss(given, run_block))
    assert count(model, step.inputs, lambda given: step.loss(given, run_block)).activations == kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(model, adapters, checkpointing):
    step = module._DrawingStep(model, SHAPES["edit"], CONTEXTS["mixed"], torch.float32)
    run_block = block_runner(scaled_dot_product, checkpointing)
    with FlopCounterMode(display=False) as counter:
        step.loss(step.inputs(), run_block).backward()
    counted = estimate(
        model.config,
        shape=SHAPES["edit"],
        context_tokens=CONTEXTS["mixed"],
        dtype=torch.float32,
        checkpointing=checkpointing,
        add_adapters=adapters,
    )
    config, image, references = model.config, 16, 12
    asked = [[image + references + text] * (config.layers - 1) + [image] for text in CONTEXTS["mixed"]]
    keys = [image + references + text for text in CONTEXTS["mixed"]]
    once = sum(4 * config.width * query * key for queries, key in zip(asked, keys) for query in queries)
    assert not any("attention" in str(name) for name in counter.get_flop_counts()["Global"])  # not on the CPU
    assert counted.operations == counter.get_total_flops() + once * (2 + 2.5 if checkpointing else 1 + 2.5)


def test_weights_gradients_and_the_optimizers_state_are_counted(checkpoint):
    config = load_mmdit(checkpoint).config
    wanted = {"shape": [(8, 8)], "context_tokens": [20], "checkpointing": True}
    loaded = load_mmdit(checkpoint)
    values = sum(weight.numel() for weight in loaded.parameters())
    whole = estimate(config, dtype=torch.bfloat16, **wanted).memory
    assert (whole["weights"], whole["trained weights"], whole["gradients"]) == (0, 2 * values, 2 * values)
    lora(loaded.requires_grad_(False))
    added = sum(weight.numel() for weight in loaded.parameters()) - values
    for optimizer, times in (("adamw", 8), ("adamw8bit", 2 + 8 / 256), ("sgd", 0), ("momentum", 4)):
        memory = estimate(config, dtype=torch.float32, optimizer=optimizer, add_adapters=lora, **wanted).memory
        assert (memory["weights"], memory["adapters"], memory["gradients"]) == (4 * values, 4 * added, 4 * added)
        assert memory["optimizer"] == round(times * added)
    with pytest.raises(ValueError, match="optimizer 'adam' found, one of adamw, adamw8bit, sgd, momentum expected"):
        estimate(config, dtype=torch.float32, optimizer="adam", **wanted)


def test_checkpointing_saves_memory_for_more_operations(checkpoint, adapters):
    config = dataclasses.replace(load_mmdit(checkpoint).config, layers=12)
    wanted = {"shape": [(16, 16)], "context_tokens": [50], "dtype": torch.float32, "add_adapters": adapters}
    plain, saving = (estimate(config, checkpointing=one, **wanted) for one in (False, True))
    peak = [one.memory["activations"] + one.memory["working"] for one in (plain, saving)]
    assert peak[1] < 0.35 * peak[0] and 1.2 < saving.operations / plain.operations < 1.6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_language_model_is_counted_as_well(checkpoint, adapters, checkpointing):
    language = load_mllm(checkpoint).language_model.requires_grad_(False)
    adapters(language)
    if checkpointing:
        for layer in language.model.layers:
            layer.forward = module._checkpointed(layer.forward)
    config = language.config

    def inputs():
        return torch.randn(1, 40, config.hidden_size)

    def loss(embedded):
        hidden, _ = language(embedded)
        return functional.cross_entropy(language.lm_head(hidden[0, -8:-1]).float(), torch.zeros(7, dtype=torch.long))

    real = count(language, inputs, loss)
    counted = estimate_language(
        config, tokens=40, targets=7, dtype=torch.float32, checkpointing=checkpointing, add_adapters=adapters
    )
    assert counted.memory["activations"] == real.activations
    whole = counted.memory["activations"] + counted.memory["working"]
    assert whole == pytest.approx(real.activations + real.working, rel=0.03)
    assert counted.operations > real.operations * 0.9


def test_time_is_operations_by_what_the_processor_does(checkpoint):
    config = load_mmdit(checkpoint).config
    wanted = {"shape": [(8, 8)], "context_tokens": [20], "dtype": torch.float32}
    arithmetic = measured_arithmetic(config, device=torch.device("cpu"), **wanted)
    assert 1e6 < arithmetic < 1e14
    step = estimate(config, checkpointing=False, arithmetic=arithmetic, **wanted)
    assert step.seconds_a_step == step.operations / arithmetic
    assert estimate(config, checkpointing=False, **wanted).seconds_a_step is None


def test_an_estimate_is_told_in_a_sentence():
    memory = {"weights": 3_600_000_000, "adapters": 40_000_000, "working": 0}
    told = Estimate(memory, 2.5e12).describe()
    assert told == "about 3.64 GB of memory (weights 3.6 GB, adapters 40 MB), 2.5 TFLOP a step"
    timed = Estimate(memory, 2.5e12, 1.5)
    assert timed.describe(60).endswith("about 1.5 s a step, 90 s for 60 steps")
    assert timed.describe(1000).endswith("25 minutes for 1000 steps") and timed.describe(10**4).endswith(
        "4.2 hours for 10000 steps"
    )
