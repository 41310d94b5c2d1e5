import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.operations import count

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = (
    "fidelity",
    "limits",
    "load",
    "operations",
    "picture",
    "quality",
    "random_weights",
    "soak",
    "step",
    "text",
    "weights",
)
MEASURED = {("t2i", 512): 2.92, ("t2i", 1024): 14.40, ("edit", 512): 8.31, ("edit", 1024): 44.69}
ALLOWED = {("t2i", 512): 2.98, ("t2i", 1024): 14.7, ("edit", 512): 8.65, ("edit", 1024): 46.5}


@pytest.mark.parametrize(("mode", "pixels"), ALLOWED)
def test_a_step_at_the_released_size_costs_no_more_operations_than_allowed(mode, pixels):
    # The lower bound tells that the counter still sees the attention and the matrices.
    assert 0.9 * MEASURED[mode, pixels] < count(mode, pixels) <= ALLOWED[mode, pixels]


def test_random_weights_have_the_names_and_sizes_of_the_release():
    pytest.importorskip("diffusers")
    from benchmarks import random_weights

    configs = random_weights.released_configs()
    assert len(random_weights.mllm_shapes(configs["vlm/config.json"])) == 658
    assert len(random_weights.mmdit_shapes(20)) == 654
    assert len(random_weights.vae_shapes(configs["vae/config.json"])) == 194


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
    assert "--json" in capsys.readouterr().out


def test_no_benchmark_is_missing_above():
    runnable = {file.stem for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text(encoding="utf-8")}
    assert runnable == set(SCRIPTS)
