"""The developers' tools: which ComfyUI is used, the demo's graphs, and where packages come from."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from pack.tools import demo, environment, fetch
from pack.tools.processes import ROOT, Child, DevError
from pack.tools.workflows import nano_graphs


@pytest.fixture
def make_comfyui(tmp_path, monkeypatch):
    """Makes a folder that looks like a ComfyUI of some version; COMFYUI_PATH is not set."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)

    def make(version, name="somewhere"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "main.py").touch()
        (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
        return folder

    return make


def test_without_a_wish_the_default_comfyui_is_taken_whatever_the_network_gives(make_comfyui, monkeypatch):
    monkeypatch.setattr(fetch, "fetched", lambda version: make_comfyui(version))
    assert fetch.version_of(fetch.choose(None)) == fetch.DEFAULT == "0.3.75"


def test_a_folder_and_comfyui_path_are_taken_as_they_are(make_comfyui, monkeypatch, capsys):
    folder, other = make_comfyui("0.9.1"), make_comfyui("0.8.0", "other")
    assert fetch.choose(str(folder)) == folder
    monkeypatch.setenv("COMFYUI_PATH", str(other))
    assert fetch.choose(None) == other and fetch.choose("0.8.0") == other
    assert fetch.choose(str(folder)) == folder
    assert "ComfyUI 0.9.1" in capsys.readouterr().out and not fetch.is_ours(folder)


def test_two_wishes_that_differ_are_told(make_comfyui, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(make_comfyui("0.9.1")))
    with pytest.raises(DevError, match=r"found ComfyUI 0\.9\.1 in COMFYUI_PATH .* expected 0\.3\.75"):
        fetch.choose("0.3.75")


@pytest.mark.parametrize("wish", ["nowhere", "v0.33.0"])
def test_a_folder_without_comfyui_is_told(make_comfyui, wish):
    with pytest.raises(DevError, match=r"no main\.py. Give a version like 0\.3\.75, or ComfyUI's folder"):
        fetch.choose(wish)


def test_a_version_from_github_is_never_replaced_by_another(make_comfyui, monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise OSError("no route")

    monkeypatch.setattr(fetch, "DEV", tmp_path / "dev")
    monkeypatch.setattr(environment, "make_venv", lambda: None)
    monkeypatch.setattr(fetch.socket, "create_connection", unreachable)
    with pytest.raises(DevError, match=r"0\.33\.0 comes from GitHub, which cannot be reached .* --comfyui"):
        fetch.choose("0.33.0")


@pytest.mark.parametrize("name", nano_graphs.TEXTS)
def test_a_nano_graph_of_the_api_has_the_values_of_the_one_in_the_page(name):
    graph = nano_graphs.api(name)
    page = json.loads((ROOT / "demo" / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    shown = {str(node["id"]): node for node in page["nodes"] if node["type"] != "MarkdownNote"}
    assert {number: node["class_type"] for number, node in graph.items()} == {i: n["type"] for i, n in shown.items()}
    for number, node in graph.items():
        if node["class_type"] == "PreviewAny":  # its widget shows a result
            continue
        values = [value for value in node["inputs"].values() if not isinstance(value, list)]
        assert [value for value in values if value not in shown[number].get("widgets_values", [])] == []


def test_the_demo_puts_its_values_into_the_graph():
    args = SimpleNamespace(prompt="a star", width=96, height=64, seed=7, steps=3)
    inputs = {node["class_type"]: node["inputs"] for node in demo.text_to_image(args).values()}
    assert inputs["InternVLU_LoadModel"]["model_name"] == demo.NANO
    assert inputs["InternVLU_EncodePrompt"]["prompt"] == "a star"
    assert (inputs["InternVLU_CreateLatent"]["width"], inputs["InternVLU_CreateLatent"]["height"]) == (96, 64)
    assert (inputs["InternVLU_SampleLatent"]["seed"], inputs["InternVLU_SampleLatent"]["steps"]) == (7, 3)
    asked = demo.ask_about_a_picture("what?", "demo.png").values()
    assert {"demo.png", "what?"} <= {value for node in asked for value in node["inputs"].values() if type(value) is str}


def test_uv_takes_the_indexes_that_pip_was_told(monkeypatch):
    told = ":env:.find-links='/a /b'\nglobal.index-url='https://one/simple'\nglobal.extra-index-url='\\nx\\ny'\n"
    monkeypatch.setattr(environment, "make_tools", lambda: sys.executable)
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=told))
    for name in [name for name in os.environ if name.startswith("UV_")]:
        monkeypatch.delenv(name)
    expected = {"UV_FIND_LINKS": "/a,/b", "UV_DEFAULT_INDEX": "https://one/simple", "UV_INDEX": "x y"}
    assert environment.uv_settings() == expected | {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://two/simple")
    assert "UV_DEFAULT_INDEX" not in environment.uv_settings()


@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX's")
def test_a_child_takes_all_that_it_started_with_it(tmp_path):
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    with Child([sys.executable, "-c", code], log=tmp_path / "log", grace=0.2) as child:
        while not (text := (tmp_path / "log").read_text()):
            time.sleep(0.05)
    assert child.process.returncode
    state = subprocess.run(["ps", "-o", "stat=", "-p", text.strip()], capture_output=True, text=True).stdout.strip()
    assert not state or state.startswith("Z")
