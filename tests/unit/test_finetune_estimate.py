"""What training takes, counted before it starts, against what real passes on the CPU keep and compute."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("peft")

from pack.internvl_u.checkpoint import open_part
from pack.internvl_u.config import mllm_config, mmdit_config
from pack.internvl_u.finetune import timing
from pack.internvl_u.finetune.adapter import AdapterSettings, add_adapter
from pack.internvl_u.finetune.cache import SampleCache
from pack.internvl_u.finetune.counting import count
from pack.internvl_u.finetune.estimate import (
    BatchSize,
    DrawnSize,
    Estimate,
    LearningStep,
    Networks,
    TextSize,
    estimate,
    forward_seconds,
    networks_to_time,
    step_seconds,
)
from pack.internvl_u.finetune.examples import Example, Picture
from pack.internvl_u.finetune.settings import TrainSettings
from pack.internvl_u.finetune.train_estimate import estimate_run
from pack.internvl_u.load import load_mllm, load_mmdit
from pack.internvl_u.mmdit import Block
from pack.internvl_u.packing import Packing
from pack.internvl_u.pipeline import Pipeline
from pack.internvl_u.qwen3 import Layer
from PIL import Image

CPU = torch.device("cpu")
DRAWING, WIDE, EDIT = ((8, 8),), ((6, 10),), ((8, 8), (8, 6))
BATCHES = {
    "a drawing": BatchSize((DrawnSize(DRAWING, 21),)),
    "wide ones": BatchSize((DrawnSize(WIDE, 21),) * 2),
    "edits": BatchSize((DrawnSize(EDIT, 33), DrawnSize(EDIT, 21), DrawnSize(EDIT, 21))),
}
TEXTS = {
    "a text": BatchSize(texts=(TextSize(40, 7),)),
    "texts": BatchSize(texts=(TextSize(40, 7), TextSize(31, 1))),
    "both": BatchSize((DrawnSize(DRAWING, 21, (60, 50)),) * 2, (TextSize(40, 7),)),
}
LEARNING = {"LoRA": AdapterSettings(rank=4), "all weights": None}


@pytest.fixture(scope="module")
def configs(checkpoint):
    mllm, mmdit = (open_part(checkpoint, part) for part in ("vlm", "generation_decoder"))
    return mmdit_config(mmdit.shapes, mmdit.config), mllm_config(mllm.shapes, mllm.config)


@pytest.fixture(params=LEARNING)
def learning(request):
    return LEARNING[request.param]


def networks(configs, batch, learning, checkpointing=False, dtype=torch.float32):
    """The networks that a batch needs, with adapters as a run puts them in."""
    transformer, language = configs
    reads = batch.texts or batch.drawn[0].prompts
    add = None if learning is None else lambda network, part: add_adapter(network, part, learning)
    return Networks(transformer if batch.drawn else None, language if reads else None, dtype, checkpointing, add)


def kept_by(step, batch):
    """Returns the bytes that are kept for the backward pass: what torch saves, and what goes into a checkpoint."""
    saved = {}

    def see(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = weakref.ref(storage)
        return tensor.detach()  # a result that is saved itself would hold what made it for ever

    def remember(module, inputs):
        packed = [(one.rotary_image, one.rotary_text, one.sample) for one in inputs if isinstance(one, Packing)]
        for tensor in tree_leaves([inputs, packed]):
            if isinstance(tensor, torch.Tensor):
                see(tensor)

    if step.networks.checkpointing:
        for module in step.modules():
            if isinstance(module, (Block, Layer)):
                module.register_forward_pre_hook(remember)
    with torch.autograd.graph.saved_tensors_hooks(see, lambda one: one):
        loss = step.loss(batch)
    assert loss.requires_grad
    own = {weight.untyped_storage()._cdata for weight in step.parameters()}
    held = {key: one() for key, one in saved.items() if key not in own}  # what is saved may be let go again
    return sum(storage.nbytes() for storage in held.values() if storage is not None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_activations_are_what_a_pass_keeps(configs, learning, batch, checkpointing):
    wanted = networks(configs, BATCHES[batch], learning, checkpointing)
    kept = kept_by(LearningStep(wanted, CPU), BATCHES[batch])
    assert estimate(wanted, BATCHES[batch]).memory["activations"] == kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", TEXTS)
def test_activations_of_the_language_model_are_what_a_pass_keeps(configs, learning, batch, checkpointing):
    """But for the ids to learn, eight bytes each, which are kept on the CPU alone."""
    batch = TEXTS[batch]
    wanted = networks(configs, batch, learning, checkpointing)
    kept = kept_by(LearningStep(wanted, CPU), batch)
    ids = sum(8 * text.targets for text in batch.texts)
    assert kept - ids - 64 <= estimate(wanted, batch).memory["activations"] <= kept


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_activations_of_other_adapters_are_what_a_pass_keeps(configs, kind):
    wanted = networks(configs, BATCHES["edits"], AdapterSettings(kind, 4))
    kept = kept_by(LearningStep(wanted, CPU), BATCHES["edits"])
    assert estimate(wanted, BATCHES["edits"]).memory["activations"] == kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", ["edits", "texts", "both"])
def test_the_worst_moment_is_that_of_a_real_pass(configs, learning, batch, checkpointing):
    batch = (BATCHES | TEXTS)[batch]
    wanted = networks(configs, batch, learning, checkpointing)
    step = LearningStep(wanted, CPU)
    real = count(step, lambda: step.loss(batch))
    memory = estimate(wanted, batch).memory
    assert memory["activations"] + memory["working"] == pytest.approx(real.activations + real.working, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_is_counted_as_a_gpu_has_it(configs, learning, checkpointing):
    """A norm's mean and spread are fp32 then, which the CPU keeps in bf16; what is kept is otherwise the same."""
    batch = BATCHES["edits"]
    wanted = networks(configs, batch, learning, checkpointing, torch.bfloat16)
    kept = kept_by(LearningStep(wanted, CPU), batch)
    memory = estimate(wanted, batch).memory
    assert 0 < memory["activations"] - kept < 0.02 * kept
    step = LearningStep(wanted, CPU)
    real = count(step, lambda: step.loss(batch))
    assert memory["activations"] + memory["working"] == pytest.approx(real.activations + real.working, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(configs, learning, checkpointing):
    """torch does not count the CPU's attention: two products forward, and five more backward."""
    batch = BATCHES["edits"]
    wanted = networks(configs, batch, learning, checkpointing)
    step = LearningStep(wanted, CPU)
    with FlopCounterMode(display=False) as counter:
        step.loss(batch).backward()
    config = wanted.transformer
    keys = [16 + 12 + one.context_tokens for one in batch.drawn]
    once = sum(4 * config.width * ((config.layers - 1) * tokens + 16) * tokens for tokens in keys)
    assert not any("attention" in str(name) for name in counter.get_flop_counts()["Global"])
    times = 2 + 2.5 if checkpointing else 1 + 2.5
    assert estimate(wanted, batch).operations == counter.get_total_flops() + once * times


def test_weights_gradients_and_the_optimizers_state_are_counted(configs, checkpoint):
    batch = BATCHES["a drawing"]
    transformer = load_mmdit(checkpoint)
    values = sum(weight.numel() for weight in transformer.parameters())
    whole = estimate(networks(configs, batch, None, dtype=torch.bfloat16), batch).memory
    assert (whole["weights"], whole["learning weights"], whole["gradients"]) == (0, 2 * values, 2 * values)
    assert whole["optimizer"] == 8 * values
    add_adapter(transformer, "transformer", LEARNING["LoRA"])
    added = sum(weight.numel() for weight in transformer.parameters()) - values
    wanted = networks(configs, batch, LEARNING["LoRA"], dtype=torch.bfloat16)
    for optimizer, times in (("adamw", 8), ("adamw8bit", 2 + 8 / 256)):
        memory = estimate(wanted, batch, optimizer).memory
        assert (memory["weights"], memory["adapters"], memory["gradients"]) == (2 * values, 4 * added, 4 * added)
        assert memory["optimizer"] == round(times * added)
    with pytest.raises(ValueError, match="optimizer 'adam' found, one of adamw, adamw8bit expected"):
        estimate(wanted, batch, "adam")
    language = sum(weight.numel() for weight in load_mllm(checkpoint).parameters())
    both = networks(configs, TEXTS["both"], LEARNING["LoRA"])
    assert estimate(both, TEXTS["both"]).memory["weights"] == 4 * (values + language)


def test_checkpointing_saves_memory_for_more_operations(configs):
    batch = BatchSize((DrawnSize(((16, 16),), 50),))
    deep = (replace(configs[0], layers=8), None)
    plain, saving = (estimate(networks(deep, batch, LEARNING["LoRA"], one), batch) for one in (False, True))
    peak = [one.memory["activations"] + one.memory["working"] for one in (plain, saving)]
    assert peak[1] < 0.45 * peak[0] and 1.2 < saving.operations / plain.operations < 1.7
    language = replace(configs[1], language=replace(configs[1].language, num_hidden_layers=8))
    batch, deep = BatchSize(texts=(TextSize(60, 5),)), (None, language)
    plain, saving = (estimate(networks(deep, batch, LEARNING["LoRA"], one), batch) for one in (False, True))
    peak = [one.memory["activations"] + one.memory["working"] for one in (plain, saving)]
    assert peak[1] < 0.45 * peak[0] and 1.2 < saving.operations / plain.operations < 1.7


def test_torchs_attention_is_as_it_was_after_counting(configs):
    before = torch.nn.functional.scaled_dot_product_attention
    estimate(networks(configs, BATCHES["edits"], None), BATCHES["edits"])
    with pytest.raises(ZeroDivisionError):
        count(torch.nn.Linear(1, 1), lambda: 1 / 0)
    assert torch.nn.functional.scaled_dot_product_attention is before


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to: `clock(seconds)`."""
    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return wait


@pytest.mark.parametrize(
    "seconds, found",
    [
        ([2.5, 1.5, 1, 2, 1.2, 1.1, 50], (1, 2)),
        ([0.1, 20, 1], (20, 20)),
        ([30, 20, 1], (20, 20)),
        ([1, 6, 5, 1], (5, 6)),
    ],
)
def test_the_first_run_warms_up_and_none_is_begun_when_patience_is_over(clock, seconds, found):
    left = iter(seconds)
    assert timing.time_of(lambda: clock(next(left)), CPU) == found


@pytest.mark.parametrize("timed", [step_seconds, forward_seconds])
def test_a_small_step_is_timed_whole_and_of_a_large_one_two_layers(configs, monkeypatch, timed):
    deep = networks((replace(configs[0], layers=8), None), BATCHES["edits"], LEARNING["LoRA"])
    layers = []

    def time_of(compute, device):
        compute()
        step = next(cell.cell_contents for cell in compute.__closure__ if isinstance(cell.cell_contents, LearningStep))
        layers.append(len(step.flow.model.transformer_blocks))
        return 1.0, 3.0

    monkeypatch.setattr("pack.internvl_u.finetune.estimate.time_of", time_of)
    assert timed(deep, BATCHES["edits"], CPU, networks_to_time(deep, 10**9)) == (1.0, 3.0)
    fastest, slowest = timed(deep, BATCHES["edits"], CPU, networks_to_time(deep, 10**10))
    assert layers == [8, 2] and 4 <= fastest < 7 and slowest == pytest.approx(3 * fastest)


def test_the_pace_is_that_of_the_usual_step(clock):
    pace = timing.Pace()
    for seconds in (40.0, 0.25, 0.25, 9.0):
        with pace.step():
            clock(seconds)
        if seconds == 40.0:
            assert pace.told(3) == "40 s a step, 2 minutes left"
    assert pace.told(100) == "0.25 s a step, 25 s left" and pace.told(0) == "0.25 s a step"


def picture(folder, name, size=(64, 64)):
    Image.new("RGB", size).save(folder / name)
    return Picture(name, folder / name)


@pytest.fixture
def examples(tmp_path):
    small, large = picture(tmp_path, "a.png"), picture(tmp_path, "b.png", (96, 64))
    return [
        Example("a", "a cat", small),
        Example("b", "a cat on a mat", small),
        Example("c", "move the cat to the left", large, (large,), "It moves."),
        Example("d", "What is it?", references=(small,), answer="A cat."),
    ]


@pytest.mark.parametrize("train, checkpointing", [("transformer", True), ("language", False), ("both", True)])
def test_a_run_is_estimated_from_its_examples(tmp_path, checkpoint, examples, train, checkpointing):
    """By the largest of them: what its samples have, and what the language model reads of them, is what is counted."""
    settings = TrainSettings(
        checkpoint, (tmp_path,), tmp_path / "x.safetensors", train=train, checkpointing=checkpointing, dtype="float32"
    )
    cache = SampleCache(tmp_path / "cache", Pipeline(checkpoint))
    if train == "transformer":
        examples = examples[:3]
    found = estimate_run(settings, cache, examples)
    assert found.seconds is None and found.operations > 0
    largest = cache.samples(examples[2:3])[0]
    context = max(len(one[0]) for one in (largest.conditional, largest.partial, largest.unconditional))
    shape = cache.samples(examples[2:3]).shapes[0]
    prompts = ()
    if train != "transformer":
        read = cache.pipeline.branch_prompts(cache.request(examples[2]))
        prompts = tuple(len(one.ids) for one in (read.conditional, read.partial, read.unconditional))
    texts = [
        TextSize(len(one.prompt.ids), len(one.prompt.ids) - one.target_start) for one in cache.text_samples(examples)
    ]
    text = () if train == "transformer" else (max(texts, key=lambda one: one.tokens),)
    batch = BatchSize((DrawnSize(shape, context, prompts),), text)

    def add(network, part):
        if part in settings.parts:
            add_adapter(network, part, settings.adapter)

    mllm, mmdit = (open_part(checkpoint, part) for part in ("vlm", "generation_decoder"))
    language = mllm_config(mllm.shapes, mllm.config) if train != "transformer" else None
    wanted = Networks(mmdit_config(mmdit.shapes, mmdit.config), language, torch.float32, checkpointing, add)
    assert found.memory == estimate(wanted, batch).memory


def test_batch_and_accumulation_count(tmp_path, checkpoint, examples):
    cache = SampleCache(tmp_path / "cache", Pipeline(checkpoint))
    settings = TrainSettings(checkpoint, (tmp_path,), tmp_path / "x.safetensors", dtype="float32")
    one = estimate_run(settings, cache, examples[:2])
    more = estimate_run(replace(settings, batch=4), cache, examples[:2])
    again = estimate_run(replace(settings, accumulate=4), cache, examples[:2])
    assert more.memory["activations"] > 3.5 * one.memory["activations"] and again.memory == one.memory
    assert again.operations == 4 * one.operations < 1.1 * more.operations
    timed = estimate_run(settings, cache, examples[:2], CPU)
    assert timed.memory == one.memory and 0 < timed.seconds[0] <= timed.seconds[1]


def test_an_estimate_is_told_in_a_sentence():
    memory = {"weights": 3_600_000_000, "adapters": 40_000_000, "working": 0}
    told = Estimate(memory, 2.5e12).describe()
    assert told == "about 3.64 GB of memory (weights 3.6 GB, adapters 40 MB), 2.5 TFLOP a step"
    timed = Estimate(memory, 2.5e12, (1.5, 1.5))
    assert timed.describe(60).endswith("2.5 TFLOP a step, 1.5 s a step as timed just now, 90 s for 60 steps")
    assert timed.describe(1000).endswith("25 minutes for 1000 steps")
    assert timed.describe(10**4).endswith("4.2 hours for 10000 steps")
    ranged = Estimate(memory, 2.5e12, (0.31, 1.5))
    assert ranged.describe(1000).endswith("0.31 to 1.5 s a step as timed just now, 5 to 25 minutes for 1000 steps")
