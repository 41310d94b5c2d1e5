"""docs/several_servers.md: its programs, run as they stand there, with two servers of which one is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "several_servers.md"
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "gray")
BIN = Path(sys.executable).parent


def block(language, word):
    """The one program of the page in a language that has a word."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (found,) = [text for text in blocks if word in text]
    return found


def until(true, process, timeout=300):
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def two_servers(new_server, server):
    """One to be killed, and one that other tests have as well."""
    if os.name == "nt" or not all(map(shutil.which, ("sh", "curl"))) or not shutil.which("comfy", path=BIN):
        pytest.skip("sh, curl and comfy-cli are needed")
    first = new_server("first")
    yield first, server
    first.__exit__()


@pytest.fixture
def folder(tmp_path):
    """The jobs of the page, of some prompts, and one that no server can make."""
    graph = json.loads((ROOT / "tests" / "workflows" / "first_steps_with_nano.api.json").read_text(encoding="utf-8"))
    graph["4"]["inputs"]["steps"] = 40
    (tmp_path / "workflow_api.json").write_text(json.dumps(graph), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a {colour} circle" for colour in COLOURS), encoding="utf-8")
    (tmp_path / "servers.sh").write_text(block("sh", "serve()"), encoding="utf-8")
    subprocess.run([sys.executable, "-c", block("python", "todo")], cwd=tmp_path, check=True, timeout=60)
    graph["4"]["inputs"]["steps"] = 0
    (tmp_path / "todo" / "000000_broken.json").write_text(json.dumps(graph), encoding="utf-8")
    return tmp_path


@pytest.fixture
def start(folder):
    """Starts the page's script on servers; comfy-cli has a home of its own, with files in the way by other names."""
    home = folder / "home"
    decoys = home / "comfy" / "ComfyUI" / "output"
    decoys.mkdir(parents=True)
    for number in range(len(COLOURS)):
        Image.new("RGB", (8, 8)).save(decoys / f"{number:06}_00001_.png")
    environment = os.environ | dict.fromkeys(("DO_NOT_TRACK", "COMFY_NO_TELEMETRY", "COMFY_NO_UPDATE_CHECK"), "1")
    environment |= {"HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "NO_PROXY": "127.0.0.1"}

    def run(*servers):
        line = ["sh", "servers.sh", *(server.url.removeprefix("http://") for server in servers)]
        return subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=2, text=True)

    return run


def drawn(folder):
    """The prompt and seed that each picture was drawn with, by job; one picture a job."""
    found = {}
    for place in sorted((folder / "pictures").iterdir()):
        (file,) = place.iterdir()
        with Image.open(file) as image:
            assert image.size == (256, 256)
            nodes = {node["class_type"]: node["inputs"] for node in json.loads(image.text["prompt"]).values()}
        found[place.name] = (nodes["InternVLU_EncodePrompt"]["prompt"], nodes["InternVLU_SampleLatent"]["seed"])
    return found


def test_nothing_of_a_list_is_lost_when_a_server_is_killed_and_the_next_run_makes_what_is_missing(
    two_servers, folder, start
):
    first, second = two_servers
    wanted = {f"{i:06}": (f"a {colour} circle", i) for i, colour in enumerate(COLOURS)}
    script = start(first, first, second, second)
    address, tried = first.url.removeprefix("http://"), folder / "log" / "000000_broken.tried"
    until(lambda: tried.exists() and address in tried.read_text(encoding="utf-8"), script)  # soon: it is the second job
    until(lambda: first.get("/queue")["queue_running"], script)
    os.kill(first.child.process.pid, signal.SIGKILL)
    said, _ = script.communicate(timeout=300)
    assert script.returncode == 1 and said.endswith("8 made, 1 not made\n")
    assert drawn(folder) == wanted
    lost = set(re.findall(rf"{address} did not make (\d+):", said))
    assert lost and lost <= {file.stem for file in (folder / "done").iterdir()}
    assert "steps" in (folder / "log" / "000000_broken.why").read_text(encoding="utf-8")

    shutil.copy(folder / "done" / "000004.json", folder / "failed" / "000000_broken.json")
    (folder / "done" / "000003.json").rename(folder / "doing" / "000003.json")  # as kill -9 leaves the script's job
    (folder / "doing" / "000003").mkdir()
    before = {place.name: place.stat().st_mtime_ns for place in (folder / "pictures").iterdir()}
    script = start(second)
    said, _ = script.communicate(timeout=300)
    assert (script.returncode, said) == (0, "9 made, 0 not made\n")
    assert drawn(folder) == wanted | {"000000_broken": wanted["000004"]}
    after = {place.name: place.stat().st_mtime_ns for place in (folder / "pictures").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"000003"}


def test_a_picture_is_brought_to_a_server_as_the_page_says(two_servers, tmp_path):
    assert "`comfy upload photo.png --host HOST --port PORT`" in PAGE.read_text(encoding="utf-8")
    server = two_servers[1]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photo.png")
    host, port = server.url.removeprefix("http://").split(":")
    line = [str(BIN / "comfy"), "upload", "photo.png", "--host", host, "--port", port]
    environment = os.environ | {"HOME": str(tmp_path), "DO_NOT_TRACK": "1", "COMFY_NO_UPDATE_CHECK": "1"}
    subprocess.run(line, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60)
    assert (server.base / "input" / "photo.png").read_bytes() == (tmp_path / "photo.png").read_bytes()
