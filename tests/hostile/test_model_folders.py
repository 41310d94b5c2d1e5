"""What lies in the model folders: nothing there takes the loader from the server, and nothing foreign is offered."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from pack.internvl_u import header, places
from pack.internvl_u.checkpoint import Folder, SingleFile, holds_language_model, holds_transformer
from pack.internvl_u.defaults import NANO_CHOICE, NANO_EDGES
from pack.internvl_u.weights import weight_files

from ..hub_cache import in_hub_cache
from .conftest import FOLDERS, ODD_FILES, ODD_NAMES, SAID, entry
from .conftest import header as file_of

ROOT = Path(__file__).parent.parent.parent
GRAPH = Path(__file__).parent.parent / "workflows" / "text_to_image.api.json"


def graph(**values):
    nodes = json.loads(GRAPH.read_text(encoding="utf-8"))
    small = {"model_name": "tiny", "precision": "fp32", "preset": "custom", "width": 32, "height": 32, "steps": 1}
    for node in nodes.values():
        for key, value in (small | values).items():
            if key in node["inputs"]:
                node["inputs"][key] = value
    return nodes


def loader(server):
    return server.get("/object_info/InternVLU_LoadModel")["InternVLU_LoadModel"]["input"]


def test_the_loader_is_there_and_offers_only_models(littered):
    inputs = loader(littered)
    assert inputs["required"]["model_name"][1]["options"] == ["InternVL-U", "internvl-u-nano", "tiny", NANO_CHOICE]
    assert inputs["optional"]["mllm_name"][1]["options"] == ["auto"]


def test_files_are_shown_by_their_names_as_they_are(littered):
    offered = loader(littered)["optional"]["vae_name"][1]["options"]
    assert {f"{name}.safetensors" for name in (*ODD_NAMES, *ODD_FILES)} == set(offered) - {"auto"}


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_file_is_no_model_of_ours_and_a_clear_error_as_a_vae(littered, name):
    answer = littered.queue(graph(model_name=f"{name}.safetensors"))
    assert "no InternVL-U model" in json.dumps(answer)
    entry = littered.run(graph(vae_name=f"{name}.safetensors"))
    assert entry["status"]["status_str"] == "error"
    assert name in littered.error(entry) or "vae" in littered.error(entry).lower()
    assert littered.run(graph())["status"]["status_str"] == "success"


@pytest.mark.parametrize("name", ["dead", "itself", "a folder", "pipe", "socket", "._model", "nowhere"])
def test_what_is_no_file_is_not_found(littered, name):
    assert "no VAE" in littered.error(littered.run(graph(vae_name=f"{name}.safetensors")))
    assert littered.run(graph())["status"]["status_str"] == "success"


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_header_is_checked_before_it_is_used(tmp_path, name):
    file = tmp_path / "file.safetensors"
    file.write_bytes(ODD_FILES[name])
    assert holds_transformer(file) is False and holds_language_model(file) is False
    if name not in ("another model", "to_q of no axes") and not name.startswith("ours"):
        with pytest.raises(RuntimeError, match=re.escape(SAID.get(name, "is not readable as safetensors"))):
            header.read_header(file)


def test_other_systems_separators_find_a_file(comfyui, tmp_path):
    from pack.nodes import model_folders

    found = {"folder/file.safetensors": tmp_path, "other\\file.safetensors": tmp_path / "b"}
    assert model_folders._by_name(found, "folder\\file.safetensors") == tmp_path
    assert model_folders._by_name(found, "other/file.safetensors") == tmp_path / "b"
    assert model_folders._by_name(found, "nothing") is None


def test_what_is_no_weight_file_is_left_alone(broken):
    folder = broken / "generation_decoder"
    (folder / "._model.safetensors").write_bytes(b"\0\5\26\7")
    (folder / "Thumbs.db").write_bytes(b"")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]


def test_thousands_of_foreign_files_cost_little_once_they_are_known(comfyui, tmp_path, monkeypatch):
    import folder_paths
    from pack.nodes import model_folders

    big = file_of({f"layers.{i}.weight": entry() for i in range(1200)})
    assert 90_000 < len(big) < 130_000
    for i in range(3000):
        (tmp_path / f"{i}.safetensors").write_bytes(big)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    opened = []
    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kwargs: opened.append(self) or original(self, *args, **kwargs)
    )
    assert model_folders.transformer_files() == {}
    assert len(opened) == 3000
    looked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: looked.append(args) or stat(*args, **kwargs))
    assert model_folders.transformer_files() == {}
    assert len(opened) == 3000, "a file that has not changed is opened again"
    # One look at each, some 0.01 s in all; what it takes in seconds is no test's, which may run on a busy machine.
    assert 3000 <= len(looked) < 3050


def test_no_file_is_opened_before_the_server_answers(comfyui, monkeypatch):
    from pack.nodes import model_folders

    monkeypatch.setattr(model_folders, "transformer_files", lambda: pytest.fail("looked into files"))
    assert "tiny" not in model_folders.available()


@pytest.fixture
def empty(comfyui, tmp_path, monkeypatch):
    """ComfyUI's paths in this process: an empty folder for our models, and one for those of diffusers."""
    import folder_paths
    from pack.nodes import model_folders

    for key in (model_folders.KEY, model_folders.SHARED_KEY, model_folders.TRANSFORMER_KEY):
        (tmp_path / key).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], set()))
    return model_folders


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
def test_models_too_deep_and_in_the_hubs_cache_are_offered_and_load(empty, native, tmp_path, checkpoint):
    own, shared = tmp_path / "InternVL-U", tmp_path / "diffusers"
    shutil.copytree(checkpoint, own / "InternVL-U" / "InternVL-U")
    assert empty.folders() == {"InternVL-U": own / "InternVL-U" / "InternVL-U"}
    in_hub_cache(checkpoint, own, "models--somebody--InternVL-U")
    in_hub_cache(checkpoint, shared, "models--InternVL-U--Other")
    shutil.copytree(checkpoint, own / "zebra")
    (own / "z loop").symlink_to(own)
    found = empty.folders()
    assert list(found) == ["zebra", "InternVL-U", "models--somebody--InternVL-U/InternVL-U", "Other"]
    model, mllm, vae = native.load(empty.find("Other").transformer, "fp32")
    assert model is not None and "snapshots" in str(empty.find("Other").vae)
    assert empty.find("models--somebody--InternVL-U\\InternVL-U").transformer.parent.name == "snapshots"


def test_a_broken_folder_is_named_even_beside_a_whole_one_that_is_too_deep(empty, tmp_path, checkpoint):
    own = tmp_path / "InternVL-U"
    shutil.copytree(checkpoint, own / "downloads" / "deep")
    (own / "InternVL-U" / "vlm").mkdir(parents=True)
    assert list(empty.folders()) == ["deep", "InternVL-U"]


def test_foreign_models_are_not_looked_into(empty, tmp_path, monkeypatch):
    for number in range(100):
        for part in ("unet", "vae", "text_encoder"):
            (tmp_path / "diffusers" / f"foreign {number}" / part).mkdir(parents=True)
        (tmp_path / "diffusers" / f"foreign {number}" / "model_index.json").write_text("{}")
    looked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: looked.append(args) or stat(*args, **kwargs))
    assert empty.folders() == {}
    assert 300 <= len(looked) < 350, "of each: is it a folder, is it ours, is it another's"


def test_a_missing_model_is_told_with_the_only_one_that_is_there(empty, tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match="^Download it: choose .*There is no InternVL-U model 'InternVL-U' in "):
        empty.find("InternVL-U")
    (tmp_path / "InternVL-U" / "mine").symlink_to(checkpoint)
    with pytest.raises(FileNotFoundError, match="Or choose a model that is there: mine\\. .*no InternVL-U model 'Int"):
        empty.find("InternVL-U")


def test_the_nano_model_is_never_taken_unasked(empty, tmp_path, checkpoint, monkeypatch):
    assert empty.choices()[:2] == [empty.NONE_FOUND, NANO_CHOICE]
    (tmp_path / "InternVL-U" / "mine").symlink_to(checkpoint)
    assert empty.choices()[:2] == ["mine", NANO_CHOICE] and empty.choices()[2].startswith("download")
    for name in (NANO_CHOICE, "nano InternVL-U (as an older version called it)"):
        assert empty.find(name).transformer.resolve() == ROOT / "demo" / "internvl-u-nano"
    for name in ("nano", NANO_CHOICE.lower(), f" {NANO_CHOICE}"):
        with pytest.raises(FileNotFoundError, match="no InternVL-U model"):
            empty.find(name)
    monkeypatch.setattr(empty, "nano_folder", lambda: None)
    assert NANO_CHOICE not in empty.choices()
    with pytest.raises(FileNotFoundError, match="This copy of the pack comes without it"):
        empty.find(NANO_CHOICE)


def test_the_nano_models_lora_is_offered_last_and_a_users_own_comes_before_it(empty, tmp_path, monkeypatch):
    import folder_paths

    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert empty.lora_choices() == [empty.NO_LORA, NANO_EDGES]
    shipped = empty.find_lora(NANO_EDGES)
    assert shipped.parent.parent.samefile(places.nano_folder()) and shipped.stat().st_size < 400_000
    for name in ("mine.safetensors", NANO_EDGES):
        (folder / name).write_bytes(b"own")
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert sorted(empty.lora_choices()) == [NANO_EDGES, "mine.safetensors"]
    assert empty.find_lora(NANO_EDGES) == folder / NANO_EDGES
    (folder / NANO_EDGES).unlink()
    (folder / "mine.safetensors").unlink()
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(places, "nano_folder", lambda: None)
    assert empty.lora_choices() == [empty.NO_LORA]


def test_only_what_is_loaded_counts_as_a_change(broken):
    before = Folder(broken).files()
    (broken / ".cache").mkdir()
    (broken / ".cache" / "x.json").write_text("{}")
    (broken / "notes.txt").write_text("x")
    (broken / "vae" / "preview.png").write_text("x")
    assert Folder(broken).files() == before
    names = {str(file.relative_to(broken)) for file in before}
    assert {
        "model_index.json",
        "vlm/config.json",
        "processor/tokenizer.json",
        "vlm/model.safetensors.index.json",
    } <= names
    assert SingleFile(broken / "x").files() == [broken / "x"]


@pytest.mark.parametrize("linked", ["model_name", "mllm_name", "vae_name"])
def test_a_name_over_a_link_is_loaded_once(littered, linked):
    values = {"model_name": "tiny", "mllm_name": "auto", "vae_name": "auto"}
    cached = []
    for seed in (1, 2):
        nodes = graph(seed=seed)
        load = littered.find(nodes, "InternVLU_LoadModel")
        nodes["name"] = {"class_type": "TestsSource", "inputs": {"value": values[linked]}}
        nodes[load]["inputs"] |= values | {linked: ["name", 0]}
        entry = littered.run(nodes)
        assert entry["status"]["status_str"] == "success", entry["status"]
        cached.append(next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"))
    assert load in cached[1]


def test_every_folder_is_littered(littered):
    """So that the tests above do not pass for want of litter."""
    for key in FOLDERS:
        assert len(os.listdir(littered.base / "models" / key)) > len(ODD_FILES)


def test_the_twin_of_a_name_from_windows_is_found(comfyui, checkpoint, tmp_path, monkeypatch):
    import folder_paths
    from pack.internvl_u.convert import convert
    from pack.nodes import model_folders

    kinds = {"diffusion_models": {".safetensors"}, "text_encoders": {".safetensors"}, "vae": {".safetensors"}}
    for kind, endings in kinds.items():
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], endings))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for dtype in ("bfloat16", "int8"):
        for file in convert(checkpoint, tmp_path / "made", dtype)[:2]:
            place = tmp_path / file.parent.name / "internvl_u_mine" / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            file.rename(place)
    (tmp_path / "vae").mkdir()
    vae = "internvl_u_vae_bf16.safetensors"
    (tmp_path / "made" / "vae" / vae).rename(tmp_path / "vae" / vae)
    for name in (r"internvl_u_mine\internvl_u_int8.safetensors", "internvl_u_mine/internvl_u_int8.safetensors"):
        found = model_folders.find(name)
        assert found.transformer.name == "internvl_u_int8.safetensors"
        assert found.language.name == "internvl_u_mllm_int8.safetensors"
