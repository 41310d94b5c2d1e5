"""The registry's archive in a clean ComfyUI: it starts, its workflows run, the nano model draws; two copies at once."""

import importlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from pack.internvl_u.__main__ import main
from pack.internvl_u.defaults import NANO_CHOICE, NANO_NOTE
from PIL import Image

from .test_graph import SERIES

OTHER_FILES = {"controlnet_of_another_model", "upscale_with_a_model", "with_a_lora"} | {
    "train_a_lora",
    "load_a_trained_lora",
    "two_gpus",
}
"""Workflows that want models of others as well, a newer ComfyUI, or what another one has made; see test_graph."""
WORKFLOWS = [
    file
    for file in sorted((Path(__file__).parent.parent / "workflows").glob("*.api.json"))
    if file.name.partition(".")[0] not in OTHER_FILES
]
SMALL = {"model_name": NANO_CHOICE, "steps": 1, "max_new_tokens": 2, "largest_size": 64}


@pytest.fixture(scope="module")
def clean(new_server, archive):
    """A ComfyUI with nothing but the archive, whose folder is read-only, and a second copy of it; and no model."""

    def prepare(base):
        shutil.rmtree(base / "models" / "InternVL-U")
        (base / "custom_nodes" / "internvl-u").unlink()
        for name in ("internvl-u", "ComfyUI-InternVL-U"):
            pack = Path(shutil.copytree(archive, base / "custom_nodes" / name))
            for place in (pack, *pack.rglob("*")):
                place.chmod(place.stat().st_mode & ~0o222)
        for picture in (archive / "web" / "pictures").iterdir():  # the page does that when a template is opened
            shutil.copy(picture, base / "input" / picture.name)
        shutil.copytree(archive / "web" / "pictures", base / "input" / SERIES)

    return new_server("clean", prepare, env={"PYTHONDONTWRITEBYTECODE": "1"})


def small(file):
    nodes = json.loads(file.read_text(encoding="utf-8"))
    for node in nodes.values():
        for key, value in SMALL.items():
            if key in node["inputs"] and not isinstance(node["inputs"][key], list):
                node["inputs"][key] = value
        if node["class_type"] == "InternVLU_CreateLatent":
            node["inputs"] |= {"preset": "custom", "width": 64, "height": 64}
    return nodes


def options(server):
    return server.get("/object_info/InternVLU_LoadModel")["InternVLU_LoadModel"]["input"]["required"]["model_name"][1]


def test_a_new_node_has_no_model_then_comes_the_nano_and_last_the_downloads(clean):
    assert options(clean)["options"][:2] == ["no model found", NANO_CHOICE]
    assert [name.partition(" ")[0] for name in options(clean)["options"][2:]] == ["download", "download"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name.partition(".")[0])
def test_each_workflow_runs_from_the_archive_with_the_nano_model(clean, file):
    nodes = small(file)
    foreign = {node["class_type"] for node in nodes.values()} - set(clean.get("/object_info"))
    assert not foreign
    clean.outputs(clean.run(nodes))


def test_the_templates_of_the_archive_are_listed(clean):
    assert clean.get("/workflow_templates")["internvl-u"]


def test_of_two_copies_the_second_steps_back_with_one_warning(clean):
    log = clean.log.read_text()
    (line,) = [line for line in log.splitlines() if "is installed twice" in line]
    first = re.search(r"The nodes are those of ([\w-]+)\.", line)[1]
    assert "internvl-u and" in line or "and internvl-u" in line
    assert "ComfyUI-InternVL-U" in line and "Error while calling comfy_entrypoint" not in log
    assert not [line for line in log.splitlines() if "IMPORT FAILED" in line and "nternvl" in line.lower()]
    assert (
        clean.get("/object_info/InternVLU_LoadModel")["InternVLU_LoadModel"]["python_module"] == f"custom_nodes.{first}"
    )
    pages = {path.split("/")[2] for path in clean.get("/extensions") if "nternvl" in path.lower()}
    assert pages == {first}


def test_nothing_was_written_into_the_pack(clean, archive):
    held = sorted(file.relative_to(archive) for file in archive.rglob("*"))
    pack = clean.base / "custom_nodes" / "internvl-u"
    assert sorted(file.relative_to(pack) for file in pack.rglob("*")) == held


def test_the_nano_model_says_on_the_node_what_it_is(native, monkeypatch):
    from comfy_execution.utils import CurrentNodeContext

    progress, load = (importlib.import_module(f"pack.{name}") for name in ("native.progress", "nodes.load"))
    sent = []
    page = SimpleNamespace(client_id="page", send_progress_text=lambda *event: sent.append(event))
    monkeypatch.setattr(progress.PromptServer, "instance", page, raising=False)
    load.LoadModel.execute(model_name=NANO_CHOICE, precision="auto")
    assert sent == [], "no node runs"
    with CurrentNodeContext("job", "7"):
        load.LoadModel.execute(model_name=NANO_CHOICE, precision="auto")
    assert sent == [(NANO_NOTE, "7", "page")]


@pytest.mark.parametrize("kind", ["text", "edit", "thought"])
def test_the_graph_in_a_picture_of_the_command_line_draws_the_same(server, tmp_path, same_picture, kind):
    out, reference = tmp_path / "a.png", tmp_path / "before of a test.png"
    Image.new("RGB", (64, 64), "white").save(reference)
    shutil.copy(reference, server.base / "input" / reference.name)
    more = {
        "text": ("--width", 96, "--height", 72),
        "edit": ("--image", reference),
        "thought": ("--thought", "a blue square on white", "--seed", 3),
    }[kind]
    line = ("draw", "--model", "nano", "--prompt", "a red circle", "--steps", 4, *more, "--out", out)
    assert main([str(part) for part in line]) == 0
    with Image.open(out) as image:
        drawn, nodes = numpy.asarray(image.convert("RGB")), json.loads(image.text["prompt"])
    entry = server.run(nodes)
    server.outputs(entry)
    same_picture(server.picture(entry, server.find(nodes, "SaveImage")), drawn)
