"""The developers' tools: which ComfyUI is used, the demo's graphs, and where packages come from."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from pack.tools import demo, environment, fetch
from pack.tools.comfyui import Server
from pack.tools.processes import ROOT, Child, DevError, lock
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


@pytest.mark.parametrize("name", sorted({*nano_graphs.TEXTS} & {*nano_graphs.HINTS}))  # the others are nano graphs
def test_a_nano_graph_of_the_api_has_the_values_of_the_one_in_the_page(name):
    graph = nano_graphs.api(name)
    page = json.loads((ROOT / "demo" / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    shown = {str(node["id"]): node for node in page["nodes"] if node["type"] != "MarkdownNote"}
    assert {number: node["class_type"] for number, node in graph.items()} == {i: n["type"] for i, n in shown.items()}
    for number, node in graph.items():
        if node["class_type"] == "PreviewAny":  # its widget shows a result
            continue
        given = dict(node["inputs"])
        if given.get("how") in ("greedy", "beams"):  # the page sends no seed where it changes nothing
            assert given.pop("seed") == 0
        values = [value for value in given.values() if not isinstance(value, list)]
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


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """A folder that stands for .dev."""
    for module in (demo, environment):
        monkeypatch.setattr(module, "DEV", tmp_path / "dev")
    (tmp_path / "dev").mkdir()
    return tmp_path / "dev"


class PretendedServer:
    """A ComfyUI that draws its prompt as text, and answers with what stands in the picture that it is asked about."""

    turns = threading.Barrier(2)

    def __init__(self, comfyui, base):
        demo.prepare_base(comfyui, base)
        self.base, self.log = base, base / "server.log"

    def __enter__(self):
        self.turns.wait(10)
        return self

    def __exit__(self, *exc):
        pass

    def run(self, graph):
        inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
        if "SaveImage" in inputs:
            prompt = inputs["InternVLU_EncodePrompt"]["prompt"]
            (self.base / "output" / "demo_00001_.png").write_text(prompt)
            return {}
        self.turns.wait(10)  # by now the other one's picture is where it is asked about
        return (self.base / "input" / inputs["LoadImage"]["image"]).read_text()

    def files(self, entry, node):
        return [self.base / "output" / "demo_00001_.png"]

    def find(self, graph, kind):
        return "save"

    def outputs(self, entry):
        return {"show": {"text": [entry]}}


def test_two_demos_at_once_answer_about_their_own_pictures(dev, tmp_path, monkeypatch):
    said = {}
    monkeypatch.setattr(demo, "say", lambda text: said.setdefault(threading.current_thread().name, []).append(text))
    monkeypatch.setattr(demo, "prepare", lambda comfyui: tmp_path)
    monkeypatch.setattr(demo, "server", PretendedServer)

    def run(prompt):
        size = {"width": 64, "height": 64, "seed": 1, "steps": 1}
        return demo.demo(SimpleNamespace(comfyui=None, out=None, prompt=prompt, question="what?", **size))

    prompts = ("a star", "a moon")
    threads = [threading.Thread(target=run, args=(prompt,), name=prompt) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    pictures = {line.partition(": ")[2]: prompt for prompt in prompts for line in said[prompt] if "Picture" in line}
    assert len(pictures) == 2 and all(f"Answer: {prompt}" in said[prompt] for prompt in prompts), said
    assert all(Path(file).read_text() == prompt for file, prompt in pictures.items())
    assert sorted(os.listdir(dev)) == ["pictures"] and all(Path(file).parent == dev / "pictures" for file in pictures)


@pytest.mark.parametrize("error", [DevError("ComfyUI stopped"), OSError("disk full")])
def test_a_failed_demo_keeps_its_log_and_says_where(dev, error):
    with pytest.raises(DevError, match=f"{error}\nThe log and all else of this run: ") as told:
        with demo.base_of_one_run() as base:
            raise error
    assert str(base) in str(told.value) and base.is_dir() and base.parent == dev


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, SystemExit])
def test_a_demo_that_ends_or_is_stopped_leaves_nothing(dev, stop):
    with pytest.raises(stop) if stop else contextlib.nullcontext():
        with demo.base_of_one_run() as base:
            (base / "server.log").touch()
            if stop:
                raise stop
    assert os.listdir(dev) == []


def test_pictures_of_many_runs_at_once_never_share_a_name(tmp_path):
    picture, folder = tmp_path / "drawn.png", tmp_path / "pictures"
    picture.write_bytes(b"whole" * 1000)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: demo.put_picture(picture, folder), range(40)))
    assert sorted(files) == [folder / f"demo_{number:05}.png" for number in range(1, 41)]
    assert all(file.read_bytes() == picture.read_bytes() for file in files)


def test_a_second_page_has_a_base_of_its_own_and_the_first_ones_stays(dev):
    with demo.base_that_stays() as first:
        (first / "user.txt").write_text("saved")
        with demo.base_that_stays() as second:
            assert (first, second) == (dev / "base", dev / "base-2")
    with demo.base_that_stays() as again:
        assert again == first and (again / "user.txt").read_text() == "saved"


def test_only_one_sets_up_at_a_time(dev):
    inside, most = [], []

    def set_up(_):
        with environment.alone():
            inside.append(1)
            time.sleep(0.02)
            most.append(len(inside))
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(set_up, range(8)))
    assert most == [1] * 8


def test_a_lock_ends_with_its_process(dev):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from tools import environment\n"
    )
    code += "environment.DEV = Path(sys.argv[2])\nwith environment.alone(): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, ROOT, dev], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"held"
        with (dev / "setup.lock").open("a") as file:
            assert not lock(file)
        process.kill()
    with environment.alone():
        pass


def test_another_comfyui_on_the_same_port_is_not_taken_for_ours(tmp_path):
    one = Server(sys.executable, tmp_path, tmp_path)
    assert one.is_ours({"system": {"argv": ["main.py", "--base-directory", str(one.base)]}})
    assert not one.is_ours({"system": {"argv": ["main.py", "--base-directory", str(one.base / "other")]}})
    assert one.is_ours({"system": {}}), "a ComfyUI that does not tell is believed"


TAKEN = """
import http.server, json, sys
port = int(sys.argv[-1].partition("=")[2])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"system": {"argv": sys.argv}}).encode())

class Listening(http.server.HTTPServer):
    allow_reuse_address = False

Listening(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_port_that_is_taken_at_the_last_moment_is_left_to_the_other(tmp_path):
    (tmp_path / "main.py").write_text(TAKEN)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = Server(sys.executable, tmp_path, tmp_path / "first")
    second = Server(sys.executable, tmp_path, tmp_path / "second", port=first.port)
    assert second.port == first.port, "it was free for both"
    with first, second:
        assert second.port != first.port
        assert all(one.is_ours(one.get("/system_stats")) for one in (first, second))


def test_a_comfyui_that_stops_for_another_reason_is_started_once(tmp_path):
    (tmp_path / "main.py").write_text("open('starts', 'a').write('x')\nraise SystemExit(3)")
    with pytest.raises(DevError, match="stopped by itself with exit status 3"):
        with Server(sys.executable, tmp_path, tmp_path):
            pass
    assert (tmp_path / "starts").read_text() == "x"


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
