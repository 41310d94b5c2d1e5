"""Training: the objective, the adapters and their files, runs that are killed and go on, and what is refused."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from pack.internvl_u import adapters, sampling
from pack.internvl_u.__main__ import main
from pack.internvl_u.arguments import make_parser
from pack.internvl_u.checkpoint import open_part
from pack.internvl_u.convert import convert
from pack.internvl_u.finetune import adapter, command, log, objective, sheet, state
from pack.internvl_u.finetune.settings import TrainSettings
from pack.internvl_u.finetune.task import Task
from pack.internvl_u.finetune.trainer import check_loss, seed_of
from pack.internvl_u.load import load_mllm, load_mmdit
from pack.internvl_u.lora import LANGUAGE, TRANSFORMER, read_lora
from pack.internvl_u.mmdit import time_embedding
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.rope import grid_of
from pack.internvl_u.weights import save_weights

ROOT = Path(__file__).parents[2]
NANO = ROOT / "demo" / "internvl-u-nano"
SHAPES = {part: open_part(NANO, part).shapes for part in (TRANSFORMER, LANGUAGE)}
COLOURS = {"red": (225, 35, 45), "blue": (35, 75, 225), "green": (30, 150, 60), "yellow": (250, 220, 40)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of plain pictures with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"zorp of {name}")
    return folder


def train(*arguments, told=None):
    """Runs the command in this process; `told` is what its error says, None: there is none."""
    line = ["train", "--model", NANO, "--device", "cpu", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(list(map(str, line)))
    assert status == (told is not None), said.getvalue()
    assert told is None or told in said.getvalue().splitlines()[-1], said.getvalue()
    return said.getvalue()


SHORT = ("--steps", 8, "--batch", 2, "--lr", "1e-3", "--rank", 4, "--dtype", "float32", "--save-every", 3)
VALIDATED = ("--log-every", 2, "--validation", 0.25, "--validate-every", 4, "--trigger", "zorp")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """What an unbroken short run writes."""
    target = tmp_path_factory.mktemp("trained") / "zorp.safetensors"
    train("--data", pictures, "--out", target, *SHORT, *VALIDATED)
    return target


@pytest.fixture(scope="module")
def learnt(pictures, tmp_path_factory):
    """What a run writes that is long enough to be seen."""
    target = tmp_path_factory.mktemp("learnt") / "learnt.safetensors"
    more = ("--dtype", "float32", "--sample-every", 60, "--sample", "zorp of red")
    train("--data", pictures, "--out", target, "--steps", 60, "--batch", 4, "--lr", "2e-3", *more)
    return target


# The objective


def test_noise_levels_are_logit_normal_and_shifted():
    levels = objective.noise_levels(200_000, torch.Generator().manual_seed(0))
    unshifted = levels / (3 - 2 * levels)
    logits = torch.logit(unshifted.double())
    assert abs(float(logits.mean())) < 0.01 and abs(float(logits.std()) - 1) < 0.01


def test_the_target_is_what_the_solver_takes_the_velocity_for():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 16, 4, 4, generator=generator)
    levels = torch.tensor([0.2, 0.5, 0.9])
    noisy = objective.add_noise(latents, levels, generator)
    clean = noisy.latents - levels.view(-1, 1, 1, 1) * noisy.target
    assert torch.allclose(clean, latents, atol=1e-6)
    assert noisy.timestep.tolist() == [200.0, 500.0, 900.0]


def samples_of(pipeline, count=1):
    """Samples with contexts of several lengths, with and without references."""
    made = []
    generator = torch.Generator().manual_seed(2)
    picture = Image.new("RGB", (64, 64), "red")
    for number in range(count):
        images = (picture,) if number % 2 else ()
        contexts = pipeline.encode_prompt(ImageRequest("a red circle" + " indeed" * number, 64, 64, images=images))

        def plain(branch):
            return None if branch is None else (branch[0].clone(), branch[1])

        made.append(
            SimpleNamespace(
                latent=torch.randn(16, 8, 8, generator=generator),
                references=tuple(one[0].clone() for one in contexts.references),
                conditional=plain(contexts.conditional),
                partial=plain(contexts.partial),
                unconditional=plain(contexts.unconditional),
            )
        )
    return made


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(NANO)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_that_of_the_velocity_that_inference_computes(pipeline, checkpointing):
    samples = samples_of(pipeline, 4)
    model = load_mmdit(NANO, dtype=torch.float32)
    flow = objective.FlowObjective(model, dtype=torch.float32, checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(3)
    for batch in objective.drawn_batches(samples, objective.Dropout(0, 0), generator):
        noisy = objective.add_noise(batch.latents, objective.noise_levels(2, generator), generator)
        found = flow(batch, noisy)
        for i, (context, layout) in enumerate(batch.contexts):
            references = [one[i : i + 1] for one in batch.references]
            branch = model.branch(context, layout, grid_of(batch.latents), [grid_of(one) for one in references])
            time = time_embedding(noisy.timestep[i : i + 1])
            velocity = model(noisy.latents[i : i + 1], time, [branch], references)
            expected = (velocity - noisy.target[i : i + 1]).square().mean()
            assert torch.allclose(found[i], expected, rtol=1e-4, atol=1e-6)


def test_prompts_are_dropped_as_often_as_is_said_and_pictures_go_with_the_words(pipeline):
    samples = samples_of(pipeline, 2) * 2000
    batches = objective.drawn_batches(samples, objective.Dropout(0.1, 0.2), torch.Generator().manual_seed(4))
    seeing, blind = batches
    assert len(seeing.references) == 1 and blind.references == ()
    total, words = len(samples), {"partial": 0, "unconditional": 0, "conditional": 0}
    empty = [id(sample.unconditional[0]) for sample in samples]
    for context, _ in (*seeing.contexts, *blind.contexts):
        without = "partial" if context is samples[1].partial[0] else "conditional"
        words["unconditional" if id(context) in empty else without] += 1
    assert abs(words["unconditional"] / total - 0.1) < 0.02
    assert abs(words["partial"] / (total / 2) - 0.2) < 0.03
    assert sum(words.values()) == total
    assert not any(id(context) in empty for context, _ in seeing.contexts)


def test_checkpointing_changes_no_gradient(pipeline):
    samples, found = samples_of(pipeline, 2)[:1], []
    for checkpointing in (False, True):
        model = load_mmdit(NANO, dtype=torch.float32)
        adapter.add_adapter(model, "transformer", adapter.AdapterSettings(rank=2))
        flow = objective.FlowObjective(model, dtype=torch.float32, checkpointing=checkpointing)
        generator = torch.Generator().manual_seed(5)
        (batch,) = objective.drawn_batches(samples, objective.Dropout(0, 0), generator)
        flow(batch, objective.add_noise(batch.latents, torch.tensor([0.7]), generator)).mean().backward()
        found.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_the_groups_of_noise_levels_are_quarters_of_the_timesteps():
    assert objective.noise_group(torch.tensor([0.0, 249, 250, 499, 500, 999])).tolist() == [0, 0, 1, 1, 2, 3]


def test_seeds_of_neighbours_have_nothing_in_common():
    seeds = {seed_of(seed, number) for seed in range(50) for number in range(-1, 50)}
    assert len(seeds) == 50 * 51 and all(0 <= one < 2**63 for one in seeds)


# Adapters and their files


@pytest.mark.parametrize("kind", adapter.KINDS)
def test_the_files_say_to_everybody_what_was_learnt(kind, tmp_path):
    import peft

    settings = adapter.AdapterSettings(kind, 4, None if kind == "lokr" else 8.0)
    networks = {"transformer": load_mmdit(NANO, dtype=torch.float32), "language": load_mllm(NANO, dtype=torch.float32)}
    layers, parts = {}, {}
    torch.manual_seed(0)
    for part, network in networks.items():
        layers[part] = adapter.add_adapter(network, part, settings)
        for weight in network.parameters():
            if weight.requires_grad:
                weight.data.normal_(0, 0.05)
        weights = adapter.adapter_weights(network)
        parts[part] = {name.removeprefix("language_model."): tensor for name, tensor in weights.items()}
    target = tmp_path / "a.safetensors"
    adapter.write_adapter(target, parts, settings, {"base": "nano", "trigger": "zorp"})
    lora = read_lora(target, SHAPES)
    assert not lora.unknown and len(lora.layers[TRANSFORMER]) == 72 and len(lora.layers[LANGUAGE]) == 28
    with safe_open(target, "pt") as file:
        assert file.metadata()["trigger"] == "zorp"
    before = {"transformer": load_mmdit(NANO, dtype=torch.float32), "language": load_mllm(NANO, dtype=torch.float32)}
    inner = {"transformer": before["transformer"], "language": before["language"].language_model}
    for part, name in (("transformer", TRANSFORMER), ("language", LANGUAGE)):
        wrapped = peft.PeftModel.from_pretrained(inner[part], adapter.peft_folder(target) / adapter.PEFT_FOLDER[part])
        for layer in layers[part]:
            learnt = networks[part].get_submodule(layer)
            within = layer.removeprefix("language_model.")
            loaded = wrapped.base_model.model.get_submodule(within)
            rows = torch.eye(learnt.in_features)
            with torch.no_grad():
                bias = 0 if learnt.base_layer.bias is None else learnt.base_layer.bias
                weight = (learnt(rows) - bias).T
                ours = adapters.merged(learnt.base_layer.weight, lora.layers[name][layer], 1.0)
                assert torch.allclose(loaded(rows), learnt(rows), atol=1e-6), layer
            assert torch.allclose(ours, weight, atol=2e-6), layer
            assert not torch.allclose(weight, learnt.base_layer.weight, atol=1e-4), layer


def test_layers_that_learn_can_be_chosen_and_others_stay(tmp_path):
    model = load_mmdit(NANO)
    names = adapter.add_adapter(model, "transformer", adapter.AdapterSettings(rank=2, layers=r".*\.img_mlp\.net\.2"))
    assert len(names) == 6
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(learning) == 12 and all("img_mlp.net.2.lora_" in name for name in learning)
    assert all(model.get_parameter(name).dtype == torch.float32 for name in learning)
    with pytest.raises(ValueError, match="--layers nothing found, which no layer of the transformer fits: img_in"):
        adapter.add_adapter(load_mmdit(NANO), "transformer", adapter.AdapterSettings(layers="nothing"))


def test_an_adapter_begins_as_nothing_and_a_seed_gives_the_same_one():
    first, second, other = (load_mmdit(NANO) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        adapter.add_adapter(model, "transformer", adapter.AdapterSettings(), seed)
    weights = [adapter.adapter_weights(model) for model in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert all(not tensor.any() for name, tensor in weights[0].items() if "lora_B" in name)


# Runs


def rows_of(file):
    with (file.with_name(f"{file.stem}-training") / "log.csv").open() as log_file:
        return list(csv.DictReader(log_file))


def test_a_run_writes_its_file_its_folder_its_log_and_its_sheets(trained, pictures):
    with safe_open(trained, "pt") as file:
        said = file.metadata()
    assert said["steps"] == "8" and said["trigger"] == "zorp" and said["rank"] == "4" and said["examples"] == "4"
    assert len(said["dataset"]) == 64 and "internvl-u-nano" in said["base"]
    rows = rows_of(trained)
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert all(float(row["loss"]) > 0 and float(row["lr"]) > 0 for row in rows)
    assert [bool(row["validation_loss"]) for row in rows] == [False, True, False, True]
    config = json.loads((trained.with_name("zorp-peft") / "transformer" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["peft_type"] == "LORA"


def test_its_files_have_the_rights_of_any_new_file(trained):
    written = [trained, *trained.parent.rglob("*.safetensors"), *trained.parent.rglob("adapter_config.json")]
    assert len(written) > 6 and len({file.stat().st_mode for file in written}) == 1
    save_weights(trained.with_name("again.safetensors"), {"a": torch.ones(2)})
    again = trained.with_name("again.safetensors")
    again.chmod(0o640)
    save_weights(again, {"b": torch.zeros(3)}, {"said": "yes"})
    assert os.name == "nt" or again.stat().st_mode & 0o777 == 0o640, "a file that is there keeps its own"
    assert load_file(again).keys() == {"b"}


def test_numbers_are_written_in_the_wished_dtype_and_draw_alike(trained, pictures, tmp_path):
    target = tmp_path / "half.safetensors"
    shutil.copytree(trained.with_name("zorp-training"), tmp_path / "half-training")
    said = train("--data", pictures, "--out", target, *SHORT, *VALIDATED, "--save-dtype", "float16")
    assert "going on after step 8" in said
    whole, half = load_file(trained), load_file(target)
    inner = tmp_path / "half-peft" / "transformer" / "adapter_model.safetensors"
    assert {one.dtype for one in load_file(inner).values()} == {torch.float16}
    for name, tensor in half.items():
        assert name.endswith(".alpha") or tensor.dtype == torch.float16
        assert torch.equal(tensor, whole[name].to(tensor.dtype))
    request = ImageRequest("zorp of red", 64, 64, steps=4)
    assert apart(*(Pipeline(NANO, loras=[(file, 1.0)]).draw(request) for file in (trained, target))) < 0.5


def test_numbers_beyond_a_dtype_are_told():
    model = load_mmdit(NANO)
    (name, *_) = adapter.add_adapter(model, "transformer", adapter.AdapterSettings(rank=2))
    model.get_submodule(name).lora_B["default"].weight.data.fill_(1e6)
    assert torch.isfinite(adapter.adapter_weights(model, "bfloat16")[f"{name}.lora_B.weight"]).all()
    with pytest.raises(RuntimeError, match=f"{name}.lora_B.weight: .* beyond what float16 holds, .*: write bfloat16"):
        adapter.adapter_weights(model, "float16")


def test_converted_files_are_learned_from_as_their_folder_is(trained, pictures, tmp_path):
    drawing, language, vae = convert(NANO, tmp_path, "bfloat16")
    assert language.parent.parent == vae.parent.parent == tmp_path
    target = tmp_path / "converted.safetensors"
    train("--model", drawing, "--data", pictures, "--out", target, *SHORT, *VALIDATED)
    ours, theirs = load_file(target), load_file(trained)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with safe_open(target, "pt") as file:
        assert drawing.name in file.metadata()["base"]


def test_the_file_changes_the_picture_as_the_contact_sheet_shows(learnt):
    folder = learnt.with_name("learnt-training")
    assert sorted(file.name for file in folder.glob("sheet_*.png")) == ["sheet_000000.png", "sheet_000060.png"]
    before, after = (Image.open(folder / f"sheet_{step}.png") for step in ("000000", "000060"))
    request = ImageRequest("zorp of red", 64, 64, seed=0)
    assert apart(Pipeline(NANO).draw(request), before) < 0.5
    assert apart(Pipeline(NANO, loras=[(learnt, 1.0)]).draw(request), after) < 0.5
    assert apart(before, after) > 20


def apart(one, other):
    """How far two pictures are apart on the mean, in levels of 255."""
    first, second = (torch.from_numpy(numpy.asarray(picture.convert("RGB")).astype(float)) for picture in (one, other))
    return float((first - second).abs().mean())


def test_the_loss_falls(learnt):
    losses = [float(row["loss"]) for row in rows_of(learnt)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(trained, pictures, tmp_path):
    target = tmp_path / "zorp.safetensors"
    given = ("--data", pictures, "--out", target, *SHORT, *VALIDATED)
    line = [sys.executable, "-m", "internvl_u", "train", "--model", NANO, "--device", "cpu", *given]
    process = subprocess.Popen(list(map(str, line)), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    saved = tmp_path / "zorp-training" / state.STATE
    deadline = time.monotonic() + 120
    while not saved.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert "going on after step" in train(*given)
    ours, theirs = load_file(target), load_file(trained)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [row["step"] for row in rows_of(target)] == ["2", "4", "6", "8"]


@pytest.mark.parametrize(
    "more",
    [
        ("--adapter", "dora"),
        ("--adapter", "lokr"),
        ("--schedule", "cosine"),
        ("--gradient-checkpointing",),
        ("--accumulate", 2),
    ],
)
def test_other_ways_run(more, pictures, tmp_path):
    target = tmp_path / "other.safetensors"
    train("--data", pictures, "--out", target, "--steps", 2, "--rank", 2, *more)
    lora = read_lora(target, SHAPES)
    assert not lora.unknown and len(lora.layers[TRANSFORMER]) == 72


@pytest.mark.parametrize("part", ["language", "both"])
def test_the_language_model_learns_through_the_pictures_and_from_answers(part, pictures, tmp_path):
    target = tmp_path / "told.safetensors"
    rows = [{"question": "What is a zorp?", "answer": "a red circle"}]
    rows += [
        {
            "file_name": str(pictures / "red.png"),
            "text": "zorp of red",
            "thought": "a blue square on a white background.",
        }
    ]
    (tmp_path / "red.png").write_bytes((pictures / "red.png").read_bytes())
    rows[1]["file_name"] = "red.png"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ("--steps", 50, "--batch", 2, "--lr", "2e-3", "--text-weight", 4, "--dtype", "float32")
    train("--data", tmp_path, "--out", target, "--train", part, *more)
    losses = rows_of(target)
    assert float(losses[-1]["text_loss"]) < 0.3 * float(losses[0]["text_loss"])
    lora = read_lora(target, SHAPES)
    assert not lora.unknown and len(lora.layers[LANGUAGE]) == 28
    assert (TRANSFORMER in lora.layers) == (part == "both")
    learnt = Pipeline(NANO, loras=[(target, 1.0)])
    assert learnt.answer("What is a zorp?") == "a red circle"
    assert str(learnt.think(ImageRequest("zorp of red"))) == "a blue square on a white background"


def test_examples_that_are_repeated_come_as_often_as_is_said(pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (64, 64), "white").save(other / "white.png")
    (other / "white.txt").write_text("white")
    settings = TrainSettings(
        NANO, (pictures, other), tmp_path / "a.safetensors", repeats=(1, 3), batch=2, dtype="float32", validation=0.2
    )
    task = Task(settings, torch.device("cpu"), lambda line: None)
    task.prepare()
    round_of_all = [index for number in range(3) for index in task.pictures_at(number)]
    often = [round_of_all.count(index) for index in range(5)]
    assert len(task.held_back) == 1 and often[task.held_back[0]] == 0
    assert sum(often) == 6 and (often[4] == 3 or task.held_back == [4])


def test_an_estimate_trains_nothing(pictures, tmp_path):
    target = tmp_path / "none.safetensors"
    said = train("--data", pictures, "--out", target, *SHORT, "--estimate")
    assert "of memory (weights " in said and "for 8 steps" in said and not target.exists()
    more = train("--data", pictures, "--out", target, *SHORT, "--estimate", "--train", "both")
    sizes = [float(re.search(r"weights ([\d.]+) MB", one)[1]) for one in (said, more)]
    assert sizes[1] > 1.3 * sizes[0]


def test_answers_are_not_for_the_transformer(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "What?", "answer": "That."}))
    told = "a question with an answer found, which the transformer does not learn from: add --train language"
    train("--data", tmp_path / "a.jsonl", "--out", tmp_path / "a.safetensors", told=told)


def test_a_state_of_another_run_is_not_gone_on_from(trained, pictures):
    told = "is of a run with other settings, data or model: give another --out, or delete"
    train("--data", pictures, "--out", trained, *SHORT, *VALIDATED, "--seed", 3, told=told)


def test_a_broken_state_is_told(tmp_path):
    (tmp_path / state.STATE).write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="cannot be read .* delete it to begin anew"):
        state.load_state(tmp_path, "x", [], SimpleNamespace())


def test_a_loss_that_is_no_number_ends_the_run():
    with pytest.raises(RuntimeError, match="a loss of nan found at step 3, a number expected: try a lower --lr"):
        check_loss(torch.tensor(float("nan")), 3)


# What is refused


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"steps": 0}, "steps 0 found, 1 to 1000000 expected"),
        ({"batch": 0}, "batch 0 found"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": -1.0}, "lr -1.0 found, 0 to 10 expected"),
        ({"train": "vae"}, "--train vae found, one of transformer, language, both expected"),
        ({"validation": 0.9}, "validation 0.9 found, 0 to 0.5 expected"),
        ({"dropout": objective.Dropout(0.8, 0.5)}, "reference-dropout 0.5 found, 0 to 0.2 expected"),
        ({"data": ()}, "no --data found"),
        ({"repeats": (1, 2)}, "2 of --repeats found for 1 of --data, one each expected"),
        ({"repeats": (0,)}, "repeats 0 found, 1 to 10000 expected"),
        ({"adapter": adapter.AdapterSettings("lokr", 4, 8.0)}, "--alpha with lokr found, none expected"),
        ({"adapter": adapter.AdapterSettings("loha")}, "--adapter loha found"),
        ({"adapter": adapter.AdapterSettings(rank=0)}, "rank 0 found"),
    ],
)
def test_settings_that_cannot_be_are_told(changed, told):
    with pytest.raises(ValueError, match=told):
        TrainSettings(**{"model": NANO, "data": (NANO,), "out": Path("a.safetensors")} | changed)


def test_what_changes_nothing_learnt_is_not_in_a_states_fingerprint():
    plain = TrainSettings(Path("m"), (Path("d"),), Path("o.safetensors"))
    assert plain.fingerprint("x") == "cf6d2cbc2108c20339a86a63aedf917ed6a51ac49d6954dcfd6d46f9b213e70c", (
        "states that were written before are not gone on from"
    )
    told = {"validate_every": 7, "save_every": 7, "log_every": 7, "save_dtype": "float16", "sample_every": 7}
    assert replace(plain, out=Path("p.safetensors"), sample_prompts=("a",), **told).fingerprint("x") == (
        plain.fingerprint("x")
    )
    for changed in ({"lr": 1e-3}, {"seed": 1}, {"validation": 0.1}, {"checkpointing": True}):
        assert replace(plain, **changed).fingerprint("x") != plain.fingerprint("x")


def test_the_rate_warms_up_and_goes_down():
    settings = TrainSettings(NANO, (NANO,), Path("a.safetensors"), lr=1.0, warmup=10, steps=100, schedule="cosine")
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] < 0.11 and max(rates) < 1.0 and rates[99] < 0.001 and rates[50] == pytest.approx(0.5)
    assert TrainSettings(NANO, (NANO,), Path("a.safetensors"), lr=1.0, warmup=0).rate(0) == 1.0


@pytest.mark.parametrize("out, told", [("a.bin", "ending in .safetensors"), ("none/a.safetensors", "no folder")])
def test_a_target_that_cannot_be_written_is_told_before_any_work(out, told, pictures, tmp_path):
    assert len(train("--data", pictures, "--out", tmp_path / out, told=told).splitlines()) == 1


def test_the_device_is_chosen_where_none_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    given = ["train", "--model", str(NANO), "--data", "pictures", "--out", "a.safetensors"]
    assert command.settings_of(make_parser().parse_args(given)).device == "cpu"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(ImportError, match="training needs peft, which is not installed: pip install peft"):
        command.settings_of(SimpleNamespace(out=Path("a.safetensors")))


def test_the_log_drops_what_a_stopped_run_wrote_after_its_state(tmp_path):
    one = log.CSVLog(tmp_path / "log.csv", ("loss",))
    one.start(0)
    for step in (2, 4, 6):
        one.append(step, {"loss": step / 10})
    with one.file.open("a") as file:
        file.write("8,")  # half a row
    one.start(4)
    assert [row["step"] for row in one.rows()] == ["2", "4"]


def test_a_contact_sheet_shows_all_pictures():
    pictures = [Image.new("RGB", size, "red") for size in ((64, 64), (32, 64), (64, 32), (8, 8), (64, 64))]
    assert sheet.contact_sheet(pictures).size == (4 * 68 - 4, 2 * 68 - 4)
    assert sheet.contact_sheet(pictures[:1]).size == (64, 64)


def test_sampling_constants_are_those_of_the_decoders_configuration():
    stated = json.loads((NANO / "generation_decoder" / "config.json").read_text())
    assert stated["flow_shift"] == sampling.SHIFT and (stated["logit_mean"], stated["logit_std"]) == (0.0, 1.0)
