"""The download in Load InternVL-U: offered where the model is not there, done only when it is chosen and run."""

import importlib
import json
import shutil
import socket
from pathlib import Path

import pytest
from pack.internvl_u import transfer
from pack.internvl_u.defaults import NANO_CHOICE

from .conftest import SOURCE
from .loopback_hub import HUB, Hub, status
from .test_download import contents
from .test_model_folders import graph, loader
from .test_security import HOOK

CHOICES = [f"download InternVL-U (8.2 GB) from {site} to models/InternVL-U" for site in ("Hugging Face", "ModelScope")]
ALMOST = (
    "download InternVL-U", CHOICES[0].lower(), f"{CHOICES[0]} ", f" {CHOICES[0]}", f"{CHOICES[0]}/x", f"{CHOICES[0]}\0",
    CHOICES[0].replace("models/InternVL-U", "/tmp"), CHOICES[0].replace("8.2", "8.3"), "huggingface", "modelscope", HUB,
    f"https://huggingface.co/{HUB}", f"hf://{HUB}", "InternVL-U", "no model found",
)  # fmt: skip


@pytest.fixture(scope="module")
def hub(checkpoint):
    with Hub(checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def running(new_server, hub):
    """A ComfyUI without the released model, to which our hub is Hugging Face; it writes down what it connects to."""

    def prepare(base):
        (base / "models" / "InternVL-U" / "InternVL-U").unlink()
        (base / "custom_nodes" / "tests_source.py").write_text(SOURCE)
        (base / "custom_nodes" / "a_watch.py").write_text(HOOK.format(file=str(base / "events.txt")))

    return new_server("download", prepare, env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})


@pytest.fixture
def server(running, hub):
    """The same, as it was before any download."""
    for name in ("InternVL-U", ".InternVL-U.download"):
        shutil.rmtree(running.base / "models" / "InternVL-U" / name, ignore_errors=True)
    (running.base / "events.txt").write_text("")
    hub.asked.clear()
    hub.faults.clear()
    hub.sent = hub.delay = 0
    return running


def options(server):
    return loader(server)["required"]["model_name"][1]["options"]


def chosen(name=CHOICES[0], seed=0, **values):
    return graph(model_name=name, seed=seed, **values)


def test_the_download_is_offered_last_and_what_is_missing_is_told(server, hub):
    assert options(server) == ["internvl-u-nano", "tiny", NANO_CHOICE, *CHOICES]
    told = json.dumps(server.queue(graph(model_name="InternVL-U")))  # as the shipped workflows have it
    assert "Download it: choose " in told and "no InternVL-U model 'InternVL-U' in " in told and CHOICES[0] in told
    assert f"put its folder into {server.base / 'models' / 'InternVL-U'} and press R" in told
    assert hub.asked == [] and (server.base / "events.txt").read_text() == ""


@pytest.mark.parametrize("linked", [False, True], ids=["typed", "over a link"])
def test_no_other_name_is_taken_for_the_wish_to_download(server, hub, linked):
    assert server.run(graph(seed=int(linked)))["status"]["status_str"] == "success"
    for name in ALMOST:
        nodes = graph(model_name=name)
        nodes[server.find(nodes, "InternVLU_LoadModel")]["inputs"]["model_name"] = name
        if linked:
            nodes["name"] = {"class_type": "TestsSource", "inputs": {"value": name}}
            nodes[server.find(nodes, "InternVLU_LoadModel")]["inputs"]["model_name"] = ["name", 0]
        answer = server.queue(nodes)
        entry = server.wait(answer["prompt_id"]) if "prompt_id" in answer else None
        told = server.error(entry) if entry else json.dumps(answer)
        assert "no InternVL-U model" in told, (name, told)
    assert hub.asked == [] and (server.base / "events.txt").read_text() == ""
    assert sorted(place.name for place in (server.base / "models" / "InternVL-U").iterdir()) == [
        "internvl-u-nano",
        "tiny",
    ]


def test_a_graph_that_cannot_run_downloads_nothing(server, hub):
    nodes = chosen()
    nodes[server.find(nodes, "InternVLU_LoadModel")]["inputs"]["vae_name"] = "nowhere"
    assert "no VAE 'nowhere'" in server.error(server.run(nodes))
    assert hub.asked == []


def test_a_cancelled_download_is_gone_on_with_and_the_same_run_draws(server, hub, checkpoint):
    hub.delay = 0.02
    heard = []

    def cancel(kind, data):
        if kind == "progress" and data["value"] > 300_000:
            heard.append(data["value"])
            server.post("/interrupt", {})

    events, _ = server.listen(chosen(), cancel)
    assert events[-1][0] == "execution_interrupted" and heard and hub.sent < 2_000_000
    assert options(server) == ["internvl-u-nano", "tiny", NANO_CHOICE, *CHOICES]
    hub.delay, sent = 0, hub.sent
    nodes = chosen()
    events, _ = server.listen(nodes)
    assert events[-1][0] == "execution_success"
    load = server.find(nodes, "InternVLU_LoadModel")
    size = sum(map(len, contents(checkpoint).values()))
    moved = [data["value"] for kind, data in events if kind == "progress" and data["node"] == load]
    assert moved and moved == sorted(moved) and moved[-1] == size
    assert any("Range" in headers for _, headers in hub.asked) and hub.sent - sent <= size - heard[0] + 10_000
    target = server.base / "models" / "InternVL-U" / "InternVL-U"
    assert contents(target) == contents(checkpoint)
    assert "of 0.0 GB downloaded" in server.log.read_text()


def test_later_runs_find_the_model_and_use_no_network(server, hub, checkpoint):
    shutil.copytree(checkpoint, server.base / "models" / "InternVL-U" / "InternVL-U")
    assert options(server) == ["InternVL-U", "internvl-u-nano", "tiny", NANO_CHOICE]
    (server.base / "events.txt").write_text("")
    for seed, name in enumerate((CHOICES[0], CHOICES[1], "InternVL-U"), 1):
        assert server.run(chosen(name, seed))["status"]["status_str"] == "success"
    assert hub.asked == [] and (server.base / "events.txt").read_text() == ""


def test_a_download_that_fails_is_a_sentence_at_the_node(server, hub):
    hub.fault("/resolve/", status(404))
    entry = server.run(chosen())
    told = server.error(entry)
    assert "is not there (404): look at the revision, or take another source" in told
    assert options(server) == ["internvl-u-nano", "tiny", NANO_CHOICE, *CHOICES]


@pytest.fixture
def folders(comfyui, tmp_path, monkeypatch):
    """ComfyUI's paths in this process: our key with a folder of extra_model_paths.yaml, and no model anywhere."""
    import folder_paths

    module = importlib.import_module("pack.nodes.model_folders")
    for key in (module.SHARED_KEY, module.TRANSFORMER_KEY, module.LANGUAGE_KEY, module.VAE_KEY):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], set()))
    own = [str(tmp_path / "disk" / "our models"), str(Path(folder_paths.models_dir) / "InternVL-U")]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, module.KEY, (own, set()))
    return module


def test_the_download_goes_to_the_first_of_comfyuis_folders(folders, tmp_path, monkeypatch):
    import folder_paths

    assert folders.target() == tmp_path / "disk" / "our models" / "InternVL-U"
    assert list(folders.downloads())[0].endswith(f"from Hugging Face to {tmp_path / 'disk' / 'our models'}")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "disk"))
    assert list(folders.downloads())[1].endswith("from ModelScope to disk/our models")


def test_the_choice_of_a_new_node_is_never_the_download(folders):
    assert folders.choices() == ["no model found", NANO_CHOICE, *folders.downloads()]


def test_listing_validating_and_fingerprints_use_no_network(folders, monkeypatch):
    def forbidden(*arguments):
        raise AssertionError(f"network: {arguments}")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    node = importlib.import_module("pack.nodes.load").LoadModel
    (combo,) = [one for one in node.define_schema().inputs if one.id == "model_name"]
    assert combo.options == folders.choices()
    for choice in folders.downloads():
        assert node.validate_inputs(choice) is True
        assert node.fingerprint_inputs(choice, "auto") == []
    assert "Download it: choose " in node.validate_inputs("InternVL-U")
    monkeypatch.setattr(transfer, "WAITS", ())
    with pytest.raises(RuntimeError, match="cannot be reached|HF_HUB_OFFLINE is set"):
        node.execute(model_name=next(iter(folders.downloads())), precision="auto")
