"""Few steps: the student's target, the run and its state, the file, its mark, and the preset that draws with it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from pack.internvl_u import distilled, sampling
from pack.internvl_u.__main__ import main
from pack.internvl_u.convert import convert
from pack.internvl_u.defaults import GUIDANCE
from pack.internvl_u.images import noise
from pack.internvl_u.load import load_mllm, load_mmdit
from pack.internvl_u.merge import merge
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.speed import NOT_DISTILLED
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("peft", reason="distill needs it: the extra [train]")
from pack.internvl_u.finetune.distill import Distillation  # noqa: E402
from pack.internvl_u.finetune.distill_estimate import estimate_distillation  # noqa: E402
from pack.internvl_u.finetune.distill_settings import DistillSettings  # noqa: E402
from pack.internvl_u.finetune.pool import Pool  # noqa: E402
from pack.internvl_u.finetune.processes import Processes  # noqa: E402
from pack.internvl_u.finetune.prompts import PromptSource, read_prompts  # noqa: E402
from pack.internvl_u.finetune.sheet import contact_sheet  # noqa: E402
from pack.internvl_u.finetune.state import STATE  # noqa: E402
from pack.internvl_u.finetune.trajectory import Velocities, student_schedule, teacher_schedule  # noqa: E402

ROOT = Path(__file__).parents[2]
EVALUATIONS, SUBSTEPS, SIDE = 4, 3, 32
SHAPE = (SIDE // 8, SIDE // 8)
TEXTS = ("a red circle", "a blue square on a white background", "two stars", "a cross")


@pytest.fixture
def data(tmp_path):
    """Texts, one a line, and edits with their pictures."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    rows = []
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (SIDE, SIDE), colour).save(tmp_path / f"{colour}.png")
        rows.append({"prompt": f"make it {number}", "source": f"{colour}.png"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def settings(checkpoint, data):
    def make(out="few.safetensors", **more):
        given = {"model": checkpoint, "data": (data / "texts.txt", data / "edits.jsonl"), "out": data / out}
        given |= {"evaluations": EVALUATIONS, "teacher_steps": EVALUATIONS * 2, "rank": 4, "batch": 4, "lr": 1e-2}
        return DistillSettings(**(given | {"steps": 6, "save_every": 2, "log_every": 2, "resolution": SIDE} | more))

    return make


@pytest.fixture
def source(checkpoint, data):
    wishes = [*read_prompts(data / "texts.txt"), *read_prompts(data / "edits.jsonl")]
    return PromptSource(Pipeline(checkpoint), wishes, SIDE)


def denoiser(model, prompt):
    return sampling.Denoiser(model, prompt.contexts, prompt.size, prompt.guidance, torch.float32)


def quiet(line):
    pass


@pytest.fixture(autouse=True)
def no_estimate(monkeypatch):
    """Runs begin at once; what they would say is asked for by the tests of that."""
    monkeypatch.setattr(Distillation, "estimate", quiet)


# What is learned


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_schedule_steps_as_the_official_solver(steps):
    schedule, generator = student_schedule(steps), torch.Generator().manual_seed(steps)
    start = torch.randn(2, 16, 4, 4, generator=generator)

    def clean(latent, sigma):
        return torch.sin(3 * latent) * (1 - sigma) + 0.1

    latent = previous = start
    for i in range(steps):
        seen = clean(latent, schedule.levels[i])
        latent, previous = schedule.step((torch.tensor([i, i]),), latent, seen, previous), seen
    expected = sampling.sample(clean, start, sampling.flow_sigmas(steps))
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)


def test_the_teachers_levels_are_the_official_ones_and_meet_the_students():
    teacher, student = teacher_schedule(EVALUATIONS, SUBSTEPS), student_schedule(EVALUATIONS)
    assert teacher.levels.shape == (EVALUATIONS, SUBSTEPS + 1)
    torch.testing.assert_close(teacher.levels[:, 0], student.levels[:-1])
    torch.testing.assert_close(teacher.levels[:, -1], student.levels[1:])
    whole = torch.cat([teacher.levels[:, :-1].flatten(), teacher.levels[-1, -1:]])
    torch.testing.assert_close(whole, sampling.flow_sigmas(EVALUATIONS * SUBSTEPS))


@pytest.mark.parametrize("edits", [False, True])
def test_a_batch_is_guided_as_each_picture_alone(checkpoint, source, edits):
    model = load_mmdit(checkpoint)
    prompts = [source[number] for number in next(n for s, n in source.buckets.items() if (len(s) > 1) == edits)]
    prompts[0] = type(prompts[0])(prompts[0].contexts, prompts[0].size, type(GUIDANCE)(3.5, 1.5))
    levels = torch.tensor([0.97, 0.5, 0.99, 0.1])[: len(prompts)]
    latents = torch.randn(len(prompts), 16, *prompts[0].size, generator=torch.Generator().manual_seed(1))
    found = Velocities(model, torch.float32).guided(latents, levels, prompts)
    for number, prompt in enumerate(prompts):
        latent, level = latents[number : number + 1], levels[number]
        with torch.no_grad():
            expected = (latent - denoiser(model, prompt)(latent, level)) / level
        torch.testing.assert_close(found[number : number + 1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("index", range(EVALUATIONS))
def test_with_the_target_the_students_solver_arrives_where_guided_steps_do(settings, edits, index):
    run = Distillation(settings(teacher_steps=EVALUATIONS * SUBSTEPS), quiet)
    run._load()
    shapes = next(shapes for shapes in run.shapes if (len(shapes) > 1) == edits)
    prompt = run.source[run.source.buckets[shapes][0]]
    latents, previous = noise(SIDE, SIDE, 1), noise(SIDE, SIDE, 2)
    velocity = run.target(torch.tensor([index]), latents, previous, [prompt])
    clean = latents - run.student.levels[index] * velocity
    reached = run.student.step((torch.tensor([index]),), latents, clean, previous)
    with torch.no_grad():
        expected = sampling.sample(denoiser(load_mmdit(run.settings.model), prompt), latents, run.teacher.levels[index])
    torch.testing.assert_close(reached, expected, rtol=1e-3, atol=1e-3)


def test_the_teacher_does_not_learn(settings):
    run = Distillation(settings(), quiet)
    run._load()
    index, latents = torch.tensor([0]), noise(SIDE, SIDE, 1)
    prompts = [run.source[0]]
    before = run.target(index, latents, latents, prompts)
    for step in range(3):
        run.learn(step)
    assert torch.equal(run.target(index, latents, latents, prompts), before)
    levels = run.student.levels[index]
    assert not torch.equal(run.velocities.conditional(latents, levels, prompts), before)


# The pool


def test_every_batch_of_the_pool_has_all_steps_and_no_step_is_left_out():
    pool = Pool([3, 5], (4, 4), 8, EVALUATIONS, torch.Generator().manual_seed(0))
    assert set(pool.wishes.tolist()) <= {3, 5}
    seen = []
    for _ in range(3 * EVALUATIONS):
        seen.append(pool.index.tolist())
        old = pool.latents
        pool.move(old + 1, old)
        going = pool.index > 0
        torch.testing.assert_close(pool.latents[going], (old + 1)[going])
        torch.testing.assert_close(pool.previous[going], old[going])
    for indices in seen[EVALUATIONS:]:
        assert sorted(set(indices)) == list(range(EVALUATIONS))


# The run


def test_the_loss_falls(settings, data):
    run = Distillation(settings(data=(data / "texts.txt",), steps=60, batch=8, log_every=1), quiet)
    run.run()
    losses = [float(row["loss"]) for row in run.log.rows()]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.5 * sum(losses[4:14])


def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(settings, monkeypatch):
    whole = load_file(Distillation(settings("whole.safetensors"), quiet).run()[0])
    learn = Distillation.learn

    def killed(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return learn(self, step)

    monkeypatch.setattr(Distillation, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        Distillation(settings("part.safetensors"), quiet).run()
    monkeypatch.undo()
    told = []
    again = load_file(Distillation(settings("part.safetensors"), told.append).run()[0])
    assert "going on after step 4" in told
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_blocks_computed_twice_change_no_weight(settings):
    once, twice = (
        load_file(Distillation(settings(f"{kept}.safetensors", steps=2, checkpointing=kept), quiet).run()[0])
        for kept in (False, True)
    )
    assert all(torch.allclose(once[name], twice[name], atol=1e-6) for name in once)


def test_it_runs_in_bfloat16(settings):
    tensors = load_file(Distillation(settings(steps=2, dtype="bfloat16"), quiet).run()[0])
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in tensors.values())


def test_sheets_show_what_the_file_draws_and_what_the_teacher_does(settings, checkpoint, data):
    more = {"steps": 4, "sample_every": 3, "sample_prompts": ("a red circle", "two stars")}
    run = Distillation(settings(**more), quiet)
    file, _ = run.run()
    sheets = sorted(one.name for one in run.settings.folder.glob("sheet_*.png"))
    assert sheets == ["sheet_000000.png", "sheet_000003.png", "sheet_000004.png", "sheet_teacher.png"]
    turbo = {"speed": "turbo", "evaluations": EVALUATIONS}
    for name, loras, way in (
        ("sheet_000004", [(file, 1.0)], turbo),
        ("sheet_000000", (), turbo),
        ("sheet_teacher", (), {}),
    ):
        pipeline = Pipeline(checkpoint, loras=loras)
        drawn = [
            pipeline.draw(ImageRequest(text, SIDE, SIDE, seed=i, **way))
            for i, text in enumerate(more["sample_prompts"])
        ]
        with Image.open(run.settings.folder / f"{name}.png") as sheet:
            assert apart(contact_sheet(drawn), sheet) < 0.5, name
    unseen = load_file(Distillation(settings("without.safetensors", steps=4), quiet).run()[0])
    assert all(torch.equal(tensor, unseen[name]) for name, tensor in load_file(file).items()), "sheets change no weight"


def apart(one, other):
    """How far two pictures are apart on the mean, in levels of 255."""
    first, second = (numpy.asarray(picture.convert("RGB")).astype(float) for picture in (one, other))
    return float(abs(first - second).mean())


def test_without_prompts_for_them_sheets_show_the_first_ones(settings):
    run = Distillation(settings(), quiet)
    assert [(wish.prompt, wish.seed) for wish in run.source.samples()] == [(text, i) for i, text in enumerate(TEXTS)]
    edits = Distillation(settings(data=settings().data[1:]), quiet).source.samples()
    assert [len(wish.images) for wish in edits] == [1, 1, 1] and {(wish.width, wish.height) for wish in edits} == {
        (32, 32)
    }


# The estimate


@pytest.mark.parametrize("data_of", [0, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_a_step(settings, data_of, checkpointing):
    """torch does not count the CPU's attention: two products forward, five more backward."""
    run = Distillation(settings(data=settings().data[data_of:][:1], checkpointing=checkpointing), quiet)
    wishes = [replace(wish, text="a red circle") for wish in run.source.wishes]
    run.source = PromptSource(run.pipeline, wishes, SIDE)
    run._load()
    prompt = run.source[0]  # made before it is counted
    run._prompts(run._chosen_pool())
    with FlopCounterMode(display=False) as counter:
        run.learn(0)
    config, image = run.model.config, SHAPE[0] * SHAPE[1] // 4

    def attention(context, references):
        tokens = image * (1 + references) + len(context[0])
        return 4 * config.width * ((config.layers - 1) * tokens + image) * tokens

    contexts, seen = prompt.contexts, len(prompt.contexts.references)
    guided = attention(contexts.conditional, seen) + attention(contexts.unconditional, 0)
    guided += attention(contexts.partial, seen) if seen else 0
    student = attention(contexts.conditional, seen) * (4.5 if checkpointing else 3.5)
    expected = counter.get_total_flops() + run.settings.batch * (student + run.settings.substeps * guided)
    assert estimate_distillation(run.settings, run.source).operations == expected


def test_memory_is_counted_for_the_longest_prompt(settings, checkpoint):
    run = Distillation(settings(), quiet)
    memory = estimate_distillation(run.settings, run.source).memory
    run._load()
    learning = sum(weight.nbytes for weight in run.weights)
    assert (memory["adapters"], memory["gradients"], memory["optimizer"]) == (learning, learning, 2 * learning)
    assert memory["weights"] == sum(weight.nbytes for weight in load_mmdit(checkpoint).parameters())
    assert memory["language model"] == sum(weight.nbytes for weight in load_mllm(checkpoint).parameters())
    texts = Distillation(settings(data=run.settings.data[:1]), quiet)
    alone = estimate_distillation(texts.settings, texts.source).memory
    assert alone["activations"] < memory["activations"] and alone["weights"] == memory["weights"]
    twice = estimate_distillation(settings(batch=8), run.source).memory
    assert 1.9 < twice["activations"] / memory["activations"] <= 2.01


def test_the_command_says_what_it_will_take(settings, data, checkpoint, capsys, monkeypatch):
    monkeypatch.undo()
    line = [
        "distill",
        "--model",
        str(checkpoint),
        "--data",
        str(data / "texts.txt"),
        "--out",
        str(data / "x.safetensors"),
    ]
    assert main([*line, "--resolution", "32", "--batch", "2", "--device", "cpu", "--estimate", "--steps", "40"]) == 0
    said = capsys.readouterr().err
    assert "language model" in said and "TFLOP a step" in said and "for 40 steps" in said
    assert not (data / "x.safetensors").exists() and not (data / "x-training").exists()


# Several processes


def test_two_processes_learn_the_mean_of_what_each_would(settings, data, checkpoint, monkeypatch, tmp_path):
    given = {
        "model": checkpoint,
        "data": data / "texts.txt",
        "out": tmp_path / "two.safetensors",
        "evaluations": EVALUATIONS,
    }
    given |= {"teacher-steps": 2 * EVALUATIONS, "rank": 4, "batch": 4, "lr": 1e-2, "resolution": SIDE, "device": "cpu"}
    given |= {"save-every": 1, "sample-every": 2, "sample": "a cross", "dtype": "float32"}

    def command(steps):
        options = [str(part) for name, value in {**given, "steps": steps}.items() for part in (f"--{name}", value)]
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*line, "-m", "internvl_u", "distill", *options],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = command(2)
    assert said.count("step 2 of 2") == said.count("language model") == 1, "one of them speaks"
    state = torch.load(tmp_path / "two-training" / STATE, weights_only=True)
    assert len(state["optimizer"]["others"]) == 1
    # The same in one process, one after the other.
    gradients = []

    def average(self, weights):
        weights = list(weights)
        if self.rank:
            gradients.append([weight.grad.clone() for weight in weights])
        else:
            for weight, other in zip(weights, gradients[-1], strict=True):
                weight.grad = (weight.grad + other) / 2

    monkeypatch.setattr(Processes, "average_gradients", average)
    runs = []
    for rank in (1, 0):
        run = Distillation(settings("one.safetensors", data=(data / "texts.txt",), steps=2), quiet)
        run.processes.rank = rank
        run._load()
        runs.append(run)
    other, first = runs
    for step in range(2):
        other.learn(step)
        first.learn(step)
        with torch.no_grad():
            for own, shared in zip(other.weights, first.weights, strict=True):
                own.copy_(shared)
    for found, expected in zip(state["weights"], first.weights, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)
    assert not torch.equal(other.generator.get_state(), first.generator.get_state())
    assert torch.equal(state["optimizer"]["others"][0]["generator"], other.generator.get_state())
    assert sorted(one.name for one in (tmp_path / "two-training").glob("sheet_*.png"))[1:] == [
        "sheet_000002.png",
        "sheet_teacher.png",
    ]


def test_edits_come_as_often_as_is_wished(settings):
    run = Distillation(settings(edits=1.0), quiet)
    run._load()
    assert all(run._chosen_pool() is run._pool(run.shapes.index((SHAPE, SHAPE))) for _ in range(8))
    run = Distillation(settings(edits=0.0), quiet)
    run._load()
    assert all(run._chosen_pool() is run._pool(run.shapes.index((SHAPE,))) for _ in range(8))


def test_a_state_of_other_prompts_or_settings_is_refused(settings, data):
    Distillation(settings(), quiet).run()
    with pytest.raises(RuntimeError, match="other settings, data or model"):
        Distillation(settings(rank=8), quiet).run()
    (data / "texts.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(RuntimeError, match="other settings, data or model"):
        Distillation(settings(), quiet).run()


def test_what_changes_nothing_learnt_is_not_in_a_states_fingerprint():
    plain = DistillSettings(Path("m"), (Path("d"),), Path("o.safetensors"))
    assert plain.fingerprint("x") == "0825256c94a4b6d1313e948f085f0d8887eaf2104e9209cf933dbf13d67f004a", (
        "states that were written before are not gone on from"
    )
    told = {"save_every": 7, "log_every": 7, "save_dtype": "float16", "sample_every": 7, "checkpointing": True}
    assert replace(plain, **told).fingerprint("x") == plain.fingerprint("x")
    assert len({plain.fingerprint("x", processes) for processes in (1, 2, 3)}) == 3


@pytest.mark.parametrize(
    "more, message",
    [
        ({"evaluations": 0}, "evaluations 0 found"),
        ({"rank": 0}, "rank 0 found"),
        ({"lr": 0.0}, "--lr 0.0 found"),
        ({"edits": 1.5}, "1.5 found"),
        ({"data": ()}, "no --data found"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, more, message):
    with pytest.raises(ValueError, match=message):
        settings(**more)


# Prompts


def test_prompts_are_read_from_lines_and_rows(data):
    assert [wish.text for wish in read_prompts(data / "texts.txt")] == list(TEXTS)
    edits = read_prompts(data / "edits.jsonl")
    assert [wish.text for wish in edits] == ["make it 0", "make it 1", "make it 2"]
    assert all(wish.references[0].size == (SIDE, SIDE) for wish in edits)
    rows = [{"text": "a cat", "file_name": "red.png"}, {"question": "what?", "answer": "red", "images": ["red.png"]}]
    (data / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [wish.text for wish in read_prompts(data / "examples.jsonl")] == ["a cat"]


def test_the_prompts_of_the_nano_world_are_read(tmp_path):
    from training.data.prompts import write_prompts

    wishes = read_prompts(write_prompts(tmp_path / "data", 30, 20))
    assert [len(wish.references) for wish in wishes] == [0] * 30 + [1] * 20
    assert len({wish.text for wish in wishes}) > 40 and 0 < sum(bool(wish.thought) for wish in wishes) < 15


@pytest.mark.parametrize(
    "name, text, error",
    [
        ("none.txt", "\n\n", FileNotFoundError),
        ("none.jsonl", "", FileNotFoundError),
        ("row.jsonl", '{"source": "red.png"}', ValueError),
        ("picture.jsonl", '{"prompt": "a", "source": "no.png"}', ValueError),
        ("bytes.txt", None, ValueError),
    ],
)
def test_prompts_that_cannot_be_are_named(data, name, text, error):
    file = data / name
    file.write_bytes(b"\xff\xfe\xfa" if text is None else text.encode())
    with pytest.raises(error, match=name):
        read_prompts(file)


# The file


def test_the_mark_is_read_from_what_is_added_and_from_what_it_was_added_to():
    generator = torch.Generator().manual_seed(0)
    for width in (6, 64, 1536):
        bias = 3 * torch.randn(width, generator=generator)
        assert distilled.evaluations_of(bias) is None
        for evaluations in (1, 4, 8, 50, 255):
            added = distilled.mark(width, evaluations)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert distilled.evaluations_of(added.to(dtype)) == evaluations
                merged = (bias + added).to(dtype)
                assert torch.isfinite(merged).all() and distilled.evaluations_of(merged) == evaluations
            assert distilled.evaluations_of(bias + 0.7 * added) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e9, -256.0, 0.0, 256.5 * 256])
def test_a_mark_of_no_number_of_evaluations_is_none(bad):
    added = distilled.mark(16, 8)
    added[len(distilled.MARK)] = bad
    assert distilled.evaluations_of(added) is None


def test_the_marked_bias_changes_no_velocity(checkpoint, source):
    model = load_mmdit(checkpoint)
    prompt, latents = source[0], noise(SIDE, SIDE, 1)
    velocities = Velocities(model, torch.float32)
    with torch.no_grad():
        before = velocities.guided(latents, torch.tensor([0.5]), [prompt])
        bias = model.get_submodule(distilled.marked_layer(model.state_dict())).bias
        bias += distilled.mark(len(bias), 8)
        assert distilled.evaluations_in(model.state_dict()) == 8
        assert torch.equal(velocities.guided(latents, torch.tensor([0.5]), [prompt]), before)


@pytest.fixture
def written(settings):
    """A LoRA of few steps, and its folder for PEFT."""
    return Distillation(settings(), quiet).run()


def test_merged_it_draws_in_its_evaluations_on_one_branch(written, checkpoint, data, monkeypatch):
    file, _ = written
    merge(checkpoint, data / "merged", [(file, 1.0)])
    pipeline, calls = Pipeline(data / "merged"), []
    request = ImageRequest("a red circle", SIDE, SIDE, speed="turbo")
    velocities = sampling.Denoiser.velocities

    def counted(self, latent, timestep, wanted):
        calls.append(wanted)
        return velocities(self, latent, timestep, wanted)

    monkeypatch.setattr(sampling.Denoiser, "velocities", counted)
    turbo = pipeline.draw(request)
    assert len(calls) == EVALUATIONS and not any(one.partial or one.unconditional for one in calls)
    typed = ImageRequest("a red circle", SIDE, SIDE, steps=EVALUATIONS, all_cfg_end=0.0, part_cfg_end=0.0)
    assert turbo.tobytes() == pipeline.draw(typed).tobytes()


@pytest.mark.parametrize("kind", ["bfloat16", "fp8_scaled", "int8", "Q8_0"])
def test_converted_it_still_says_so(written, checkpoint, data, kind):
    if kind == "Q8_0":
        pytest.importorskip("gguf", reason="the package that writes GGUF files, see requirements-dev.txt")
    merge(checkpoint, data / "merged", [(written[0], 1.0)])
    drawing, language, vae = convert(data / "merged", data / "files", kind)
    pipeline = Pipeline(drawing, mllm=language, vae=vae)
    assert pipeline.settled(ImageRequest("a cat", speed="turbo")).evaluations == EVALUATIONS


def test_on_the_command_line_it_is_given_beside_the_model(written, checkpoint, data):
    file, _ = written
    line = ["draw", "--model", str(checkpoint), "--prompt", "a cat", "--width", "32", "--height", "32"]
    line += ["--lora", str(file), "--device", "cpu"]
    assert main([*line, "--speed", "turbo", "--out", str(data / "turbo.png")]) == 0
    typed = ["--steps", str(EVALUATIONS), "--all-cfg-end", "0", "--part-cfg-end", "0"]
    assert main([*line, *typed, "--out", str(data / "typed.png")]) == 0
    with Image.open(data / "turbo.png") as turbo, Image.open(data / "typed.png") as same:
        assert turbo.tobytes() == same.tobytes()
        settings = json.loads(turbo.info["internvl_u"])
    assert settings["speed"] == "turbo" and settings["steps"] == EVALUATIONS and settings["all_cfg_end"] == 0.0


def test_merged_it_has_the_velocity_that_was_trained(settings, checkpoint, data):
    run = Distillation(settings(), quiet)
    file, _ = run.run()
    merge(checkpoint, data / "merged", [(file, 1.0)])
    latents, levels, prompts = noise(SIDE, SIDE, 1), torch.tensor([0.7]), [run.source[0]]
    with torch.no_grad():
        expected = run.velocities.conditional(latents, levels, prompts)
        found = Velocities(load_mmdit(data / "merged"), torch.float32).conditional(latents, levels, prompts)
        plain = Velocities(load_mmdit(checkpoint), torch.float32).conditional(latents, levels, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2


def test_peft_loads_its_folder(written, checkpoint):
    from peft import PeftModel

    _, folder = written
    model = PeftModel.from_pretrained(load_mmdit(checkpoint), folder / "transformer")
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_the_metadata_says_what_it_is(written):
    from safetensors import safe_open

    with safe_open(written[0], "pt") as opened:
        metadata = opened.metadata()
    assert metadata["evaluations"] == str(EVALUATIONS) and metadata["teacher_steps"] == str(2 * EVALUATIONS)
    assert len(metadata["dataset"]) == 64


# The preset


def test_turbo_without_the_lora_is_refused_in_one_sentence(checkpoint, tmp_path, capsys):
    line = ["draw", "--model", str(checkpoint), "--prompt", "a cat", "--speed", "turbo"]
    assert main([*line, "--width", "32", "--height", "32", "--out", str(tmp_path / "a.png")]) == 1
    assert NOT_DISTILLED in capsys.readouterr().err and not (tmp_path / "a.png").exists()
    with pytest.raises(ValueError, match="distill"):
        _ = ImageRequest("a cat", speed="turbo").way


def test_the_command_distils(checkpoint, data, capsys):
    line = ["distill", "--model", str(checkpoint), "--data", str(data / "texts.txt"), "--evaluations", "2"]
    more = ["--steps", "2", "--batch", "2", "--rank", "2", "--resolution", "32", "--device", "cpu"]
    assert main([*line, *more, "--out", str(data / "few.safetensors")]) == 0
    assert (data / "few-peft" / "transformer" / "adapter_config.json").is_file()
    told = capsys.readouterr()
    assert "few.safetensors" in told.out and "in 2" in told.err


def test_the_command_names_what_is_wrong(checkpoint, data, capsys):
    line = ["distill", "--model", str(checkpoint), "--out", str(data / "few.safetensors"), "--data"]
    assert main([*line, str(data / "no.txt")]) == 1 and "no.txt" in capsys.readouterr().err
    assert main([*line, str(data / "texts.txt"), "--evaluations", "99"]) == 1
    assert "99 found" in capsys.readouterr().err
