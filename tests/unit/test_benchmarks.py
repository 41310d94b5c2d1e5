import argparse
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import all as every
from benchmarks import limits, models, page, picture, plots, text, writers
from benchmarks.operations import count
from benchmarks.random_weights import TEMPLATE, released_configs
from internvl_u.config import mmdit_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "performance.md"
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))
UNMEASURED = {"all", "page", "plots"}  # they run others, or show what others have measured
MEASURED = {("t2i", 512): 2.92, ("t2i", 1024): 14.40, ("edit", 512): 8.31, ("edit", 1024): 44.69}
ALLOWED = {("t2i", 512): 2.98, ("t2i", 1024): 14.7, ("edit", 512): 8.65, ("edit", 1024): 46.5}


@pytest.mark.parametrize(("mode", "pixels"), ALLOWED)
def test_a_step_at_the_released_size_costs_no_more_operations_than_allowed(mode, pixels):
    # The lower bound tells that the counter still sees the attention and the matrices.
    assert 0.9 * MEASURED[mode, pixels] < count(mode, pixels) <= ALLOWED[mode, pixels]


def test_the_official_configuration_of_a_transformer_is_read_back_as_the_same_sizes():
    from benchmarks import random_weights, step

    shapes = {name.removeprefix("decoder."): shape for name, shape in random_weights.mmdit_shapes(2).items()}
    size = replace(step.RELEASED, layers=2)
    assert mmdit_config(shapes, step.official_settings(size)) == size


def test_random_weights_have_the_names_and_sizes_of_the_release():
    from benchmarks import random_weights

    configs = random_weights.released_configs()
    assert len(random_weights.mllm_shapes(configs["vlm/config.json"])) == 658
    assert len(random_weights.mmdit_shapes(20)) == 654
    assert len(random_weights.vae_shapes(configs["vae/config.json"])) == 194


def test_random_weights_of_the_tiny_sizes_are_named_and_shaped_as_the_tiny_checkpoint():
    from benchmarks import random_weights

    config = json.loads((TEMPLATE / "vlm" / "config.json").read_text(encoding="utf-8"))
    stored = text.open_part(TEMPLATE, "vlm").shapes
    assert random_weights.mllm_shapes(config) == stored


def test_a_soak_has_jobs_of_every_kind_with_values_of_their_own():
    from benchmarks import soak

    found = list(soak.jobs(60))
    assert {kind for kind, _ in found} == set(soak.KINDS)
    graphs = [str(nodes) for kind, nodes in found if kind != "refused at the door"]
    assert len(set(graphs)) == len(graphs), "the same job twice is one from ComfyUI's cache"
    loaders = [nodes["1"]["inputs"] for _, nodes in found]
    models = {(inputs["model_name"], inputs["precision"]) for inputs in loaders}
    assert {(name, one) for name in soak.MODELS for one in soak.PRECISIONS[name]} <= models


def test_a_job_of_a_soak_that_ends_in_an_unexpected_way_stops_it():
    from benchmarks import soak

    class Server:
        log = "server.log"

        def queue(self, nodes):
            return {"prompt_id": "1"}

        def wait(self, number):
            return {"status": {"messages": [["execution_error", {}]]}}

    assert soak.run(Server(), "refused at work", {}) == "error"
    with pytest.raises(RuntimeError, match="a job of the kind 'edit' ended with error. See server.log"):
        soak.run(Server(), "edit", {})


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_soak_reads_the_memory_of_a_process():
    import os

    from benchmarks import soak

    found = soak.memory(os.getpid())
    assert set(found) == {"resident MiB", "own MiB"} and 50 < found["own MiB"] <= found["resident MiB"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_benchmark_explains_itself(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{script}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    assert ended.value.code == 0
    assert ("--json" in capsys.readouterr().out) == (script not in UNMEASURED)


def test_each_benchmark_has_its_paragraph_in_the_readme():
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) > 10
    assert [script for script in SCRIPTS if f"**{script}.py**" not in readme] == []


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    return models.silent_copy(TEMPLATE, tmp_path_factory.mktemp("work") / "tiny")


def test_ours_and_transformers_write_the_same_tokens_and_never_end(silent):
    weights = writers.language_weights(silent, torch.float32)
    stops = text.Tokenizer(text.open_checkpoint(silent).tokenizer()).stops
    plain = writers.make_transformers(writers.language_config(silent), weights, stops)
    ours = writers.make_ours(silent, dtype=torch.float32, device=torch.device("cpu"))
    prompts = text.random_prompts(silent, 9, 3)
    found, _ = text.measure({("a", ""): plain, ("b", ""): ours}, prompts, 30, torch.device("cpu"))
    first, second = found.values()
    assert [one.ids for one in first] == [one.ids for one in second] and len(first) == 2
    assert len(first[0].ids) == 30 and first[0].ids != first[1].ids
    assert all(0 < one.first < one.last for one in (*first, *second))


def test_a_text_that_ends_early_is_no_measurement(silent):
    def short(ids, tokens):
        return writers.Written([1], 0.1, 0.1)

    with pytest.raises(ValueError, match=r"quick: \[1, 1\] tokens written, 5 each expected"):
        text.measure({("quick", ""): short}, text.random_prompts(silent, 4, 3), 5, torch.device("cpu"))


def test_random_prompts_differ_from_their_first_tokens_on_and_hold_no_special_ones(silent):
    prompts = text.random_prompts(silent, 64, 4)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 4
    tokenizer = text.Tokenizer(text.open_checkpoint(silent).tokenizer())
    special = {*tokenizer.stops, *tokenizer.special_token_rows}
    assert not special & {token for prompt in prompts for token in prompt}


def test_a_token_reads_all_weights_but_the_table_and_the_cache_of_those_before(silent):
    config = writers.language_config(silent)
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, pairs, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layer = width * size * (2 * heads + 2 * pairs) + 3 * width * inner + 2 * width + 2 * size
    weights = layers * layer + width + width * config["vocab_size"]
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert text.token_bytes(silent, dtype, 0) == weights * itemsize
        assert text.token_bytes(silent, dtype, 10) == (weights + 10 * layers * 2 * pairs * size) * itemsize


def test_the_operations_until_the_first_token_are_those_that_torch_counts(silent):
    from torch.utils.flop_counter import FlopCounterMode

    ours = writers.make_ours(silent, dtype=torch.float32, device=torch.device("cpu"))
    (ids,) = text.random_prompts(silent, 40, 1)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ours(ids, 1)
    # It counts attention as if each token attended to all, where it counts it at all.
    config = writers.language_config(silent)
    whole = 4 * 40 * 40 * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    half = whole * 41 // 80
    matrices = text.read_operations(silent, 40) - half
    assert matrices <= counter.get_total_flops() <= matrices + whole


def test_the_arithmetic_that_was_measured_before_is_handed_to_the_texts(tmp_path):
    rows = [{"limit": "memory, a", "GB/s": 3.0}, {"limit": "memory, b", "GB/s": 5.0}]
    rows += [{"limit": "float32 product a", "TFLOP/s": 0.1}, {"limit": "bfloat16 product a", "TFLOP/s": 0.4}]
    (tmp_path / "limits.json").write_text(json.dumps({"results": rows}), encoding="utf-8")
    arguments = SimpleNamespace(**vars(ALL) | {"out": tmp_path})
    for name, speed in (("text_nano", "0.100"), ("text_released", "0.400")):
        line = every.command(name, arguments)
        assert line[line.index("--arithmetic") + 1] == speed


def test_what_is_timed_beside_the_texts_reads_all_weights_and_multiplies_all_matrices(silent, monkeypatch):
    reading = text.Reading(silent, torch.bfloat16, torch.device("cpu"))
    assert sum(flat.nbytes for flat in reading._flat) == text.token_bytes(silent, torch.bfloat16, 0)
    layers = writers.language_config(silent)["num_hidden_layers"]
    multiplied, multiply = [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda matrix, row: multiplied.append(matrix.shape) or multiply(matrix, row))
    reading.multiply()
    assert len(multiplied) == 7 * layers + 1


def test_what_takes_turns_with_the_texts_is_timed_with_them(silent):
    def slow(ids, tokens):
        return writers.Written(list(range(tokens)), 0.1, 0.1)

    done = []
    prompts = text.random_prompts(silent, 4, 3)
    _, seconds = text.measure(
        {("a", "x"): slow}, prompts, 5, torch.device("cpu"), {("read", "x"): lambda: done.append(0)}
    )
    assert seconds.keys() == {("read", "x")} and len(done) == (1 + 2) * text.TOGETHER


def test_a_token_of_a_packed_model_reads_it_as_it_is_stored(silent, tmp_path):
    pytest.importorskip("gguf")
    whole = text.token_bytes(silent, torch.float32, 0)
    packed = models.converted(silent, tmp_path, "Q8_0")
    assert 34 / 128 * 0.95 < text.token_bytes(packed, torch.float32, 0) / whole < 34 / 128 * 1.1


def test_a_model_for_llama_cpp_has_its_names_and_our_numbers(silent, tmp_path):
    gguf = pytest.importorskip("gguf")
    from benchmarks.llama_cpp import write_gguf

    packed = models.converted(silent, tmp_path, "Q8_0")
    write_gguf(packed, tmp_path / "a.gguf", torch.bfloat16)
    written = {one.name: one for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    ours = {one.name: one for one in gguf.GGUFReader(packed).tensors}
    layers = writers.language_config(silent)["num_hidden_layers"]
    assert len(written) == 3 + 11 * layers
    query, stored = written["blk.1.attn_q.weight"], ours["language_model.model.layers.1.self_attn.q_proj.weight"]
    assert query.tensor_type == gguf.GGMLQuantizationType.Q8_0 and bytes(query.data) == bytes(stored.data)
    norm = written["output_norm.weight"]
    weights = writers.language_weights(silent, torch.bfloat16)
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert torch.equal(torch.from_numpy(norm.data.copy()), weights["model.norm.weight"].float())


def test_llama_cpp_writes_the_same_tokens(silent, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    from benchmarks.llama_cpp import make_llama_cpp, write_gguf

    write_gguf(silent, tmp_path / "a.gguf", torch.float32)
    theirs = make_llama_cpp(tmp_path / "a.gguf", 1, 64)
    ours = writers.make_ours(silent, dtype=torch.float32, device=torch.device("cpu"))
    (ids,) = text.random_prompts(silent, 20, 1)
    assert theirs(ids, 20).ids == ours(ids, 20).ids


def test_a_contestant_that_cannot_be_imported_is_left_out_and_said(capsys):
    def missing():
        raise ImportError("no such package")

    found = {("llama.cpp", "x"): (Path(), missing), ("ours", "x"): (Path(), lambda: str)}
    assert text.make_all(found) == {("ours", "x"): str}
    assert "llama.cpp is left out: no such package" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="none of llama.cpp can be had here"):
        text.make_all({("llama.cpp", "x"): (Path(), missing)})


def test_rows_of_a_text_tell_the_overhead_over_the_products_and_the_share_of_the_limit():
    texts = {("transformers", "a"): [writers.Written([1, 2, 3], 1.0, 5.0)], ("ours", "b"): []}
    texts["ours", "b"] = [writers.Written([1, 2, 9], 1.0, 1.0 + 2 * second) for second in (0.5, 1.0, 4.0)]
    texts["transformers", "a"] *= 3
    first, second = text.to_rows(texts, 64, {("transformers", "a"): 0.25, ("ours", "b"): 0.5}, {"b": 0.75})
    assert first["ms a token"] == 2000 and first["times transformers"] == 1
    assert (second["ms a token"], second["from"], second["to"]) == (1000, 500, 4000)
    assert second["limit ms"] == 500 and second["of the limit"] == "50%" and second["times transformers"] == 2
    assert (second["products ms"], second["overhead ms"]) == (750, 250)
    assert first["products ms"] == first["overhead ms"] == ""
    assert second["same tokens"] == "2 of 3"


def test_the_limits_of_the_machine_are_positive():
    ways = limits.bandwidth(size=1 << 16, repeats=1)
    assert len(ways) == 5 and min(ways.values()) > 0
    assert min(limits.arithmetic(torch.bfloat16, shapes=((2, 4, 8),), repeats=1).values()) > 0


def test_other_work_runs_until_the_block_ends():
    from benchmarks import busy

    with busy.busy(2) as others:
        assert len(others) == 2 and all(one.poll() is None for one in others)
    assert all(one.poll() is not None for one in others)


def test_a_narrow_model_is_one_whose_weights_are_next_to_nothing():
    narrow = released_configs(1, 28, 1, "float32", models.language_sizes(256))["vlm/config.json"]["llm_config"]
    assert narrow["hidden_size"] == 256 and narrow["num_hidden_layers"] == 28
    assert narrow["num_attention_heads"] * narrow["head_dim"] == 256
    assert models.language_sizes(None) == models.language_sizes(2048) == {}


def test_a_model_is_written_once_and_not_kept_when_writing_fails(tmp_path):
    made = []

    def write(folder):
        made.append(folder)
        folder.mkdir()
        if len(made) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        models._once(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []
    assert models._once(tmp_path / "a", write) == models._once(tmp_path / "a", write) == tmp_path / "a"
    assert len(made) == 2


def test_pictures_take_turns_and_their_stages_add_up():
    def contestant(scale):
        return lambda drawing: {"encode s": 1.0 * scale, "steps s": 4.0 * scale, "decode s": 2.0 * scale}

    drawing = picture.make_drawing("edit", 64, 4)
    ours, official = picture.measure(
        {"ours": contestant(1), "official": contestant(2)}, drawing, 3, torch.device("cpu")
    )
    assert ours["step s"] == 1.0 and official["step s"] == 2.0 and official["times official"] == 1.0
    assert drawing.images[0].size == (64, 64) and picture.make_drawing("t2i", 64, 4).images == ()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_peak_of_a_stage_does_not_count_those_before():
    from benchmarks.memory import memory, reset_peak

    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = memory("VmHWM")
    del block
    reset_peak()
    assert memory("VmHWM") < high - 32


ALL = SimpleNamespace(work=Path("/work"), out=Path("/results"), comfyui=Path("/comfyui"), official=Path("/official"))


@pytest.mark.parametrize("name", [*every.QUICK, *every.FULL])
def test_each_table_of_all_has_its_place_on_the_page_and_a_command_that_is_understood(name, monkeypatch):
    class Understood(Exception):
        pass

    def understand(parser):
        parse(parser)
        raise Understood

    line, parse = every.command(name, ALL), argparse.ArgumentParser.parse_args
    monkeypatch.setattr(sys, "argv", [*line, "--json", "x.json"])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understand)
    monkeypatch.delitem(sys.modules, f"benchmarks.{line[0]}", raising=False)
    with pytest.raises(Understood):
        runpy.run_module(f"benchmarks.{line[0]}", run_name="__main__")
    shown = page.shown_command("python -m benchmarks." + " ".join(line) + " --json x.json")
    assert " /" not in shown and "--json" not in shown, "a folder of this machine"
    assert len(re.findall(f"<!-- /?{name} -->", PAGE.read_text(encoding="utf-8"))) == 2


def test_every_plot_is_of_a_table_and_every_picture_on_the_page_is_there():
    assert set(plots.PLOTS) <= {*every.QUICK, *every.FULL}
    shown = re.findall(r"\]\((plots/[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert [place for place in shown if not (PAGE.parent / place).is_file()] == []


RESULT = {
    "date": "2026-01-02",
    "machine": {"cpu": "A processor", "cores": 2},
    "versions": {"torch": "2.0", "transformers": None},
    "command": "python -m benchmarks.text --work /tmp/a --comfyui /home/b --json /tmp/c.json",
    "settings": {"threads": 2, "GB/s": 50.0, "TFLOP/s": 0.25},
    "results": [
        {
            "context": 64,
            "contestant": "ours",
            "weights": "bf16",
            "ms a token": 2.0,
            "from": 1.5,
            "to": 3.0,
            "limit ms": 1.0,
        },
        {"context": 64, "contestant": "llama.cpp", "weights": "bf16", "ms a token": 1234.0, "from": 4.0, "to": 5.0}
        | {"limit ms": 1.0, "more": ""},
    ],
}


def test_results_become_tables_with_their_command_and_machine_and_can_be_written_again(tmp_path):
    place = tmp_path / "page.md"
    place.write_text("# A\n<!-- text_nano -->\n<!-- /text_nano -->\nend\n", encoding="utf-8")
    for name in ("text_nano", "unknown"):
        (tmp_path / f"{name}.json").write_text(json.dumps(RESULT), encoding="utf-8")
    assert page.write(place, tmp_path) == ["unknown"]
    first = place.read_text(encoding="utf-8")
    assert "`python -m benchmarks.text --work FOLDER --comfyui PATH`" in first
    assert "(A processor, 2 cores; 2026-01-02; torch 2.0; threads: 2; limits from 50 GB/s and 0.25 TFLOP/s)" in first
    assert "| 64 | ours | bf16 | 2 (1.5 to 3) | 1 |  |" in first and "1234 (4 to 5)" in first
    assert first.endswith("<!-- /text_nano -->\nend\n")
    page.write(place, tmp_path)
    assert place.read_text(encoding="utf-8") == first
    plots.write(tmp_path, tmp_path / "plots")
    page.write(place, tmp_path)
    assert "](plots/text_nano.svg)\n" in place.read_text(encoding="utf-8")


def test_a_plot_has_a_bar_for_each_row_and_a_line_at_each_limit(tmp_path):
    (tmp_path / "text_nano.json").write_text(json.dumps(RESULT), encoding="utf-8")
    (file,) = plots.write(tmp_path, tmp_path / "plots")
    drawn = file.read_text(encoding="utf-8")
    assert drawn.count("<rect") == drawn.count("<line") == 2 and drawn.startswith("<svg")
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert widths[1] == max(widths) <= plots.WIDTH
