"""Where a model is found: in its folder, one level deeper, in the hub's cache, in the box, and as single files."""

import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from pack.internvl_u import places
from pack.internvl_u.__main__ import main
from pack.internvl_u.checkpoint import check_folder
from pack.internvl_u.convert import convert
from pack.internvl_u.defaults import FILE_DTYPES, GGUF_DTYPES
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.load import load_mmdit
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from PIL import Image
from safetensors.torch import save_file

from ..hub_cache import in_hub_cache

NANO = Path(__file__).parent.parent.parent / "demo" / "internvl-u-nano"
links = pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")


def pixels(picture):
    return numpy.asarray(picture)


@pytest.fixture
def told(capsys):
    """Runs the command line; returns its status and what it wrote to stderr."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, capsys.readouterr().err

    return run


def test_a_folder_is_found_where_it_is_and_one_level_deeper(checkpoint, tmp_path):
    assert places.checkpoint_folder(checkpoint) == checkpoint
    deep = tmp_path / "InternVL-U" / "InternVL-U"
    shutil.copytree(checkpoint, deep)
    assert places.checkpoint_folder(tmp_path / "InternVL-U") == deep
    assert places.checkpoint_folder(tmp_path) == tmp_path, "two levels are no slip any more"
    shutil.copytree(checkpoint, tmp_path / "InternVL-U" / "other")
    with pytest.raises(ValueError, match="holds 2 models, one expected: name one of InternVL-U, other"):
        places.checkpoint_folder(tmp_path / "InternVL-U")


@links
def test_a_folder_of_the_hubs_cache_draws_the_same_picture(checkpoint, tmp_path):
    cache = in_hub_cache(checkpoint, tmp_path)
    wish = ImageRequest("a cat", 32, 32, 1)
    found = Pipeline(cache)
    assert found.root == cache / "snapshots" / "0123456789abcdef"
    assert (pixels(found.draw(wish)) == pixels(Pipeline(checkpoint).draw(wish))).all()
    assert places.shown_folder(found.root) == "InternVL-U"
    assert places.checkpoint_folder(tmp_path) == found.root, "the hub's folder with this model alone"


@links
def test_of_several_snapshots_main_is_taken_and_no_half_one(checkpoint, tmp_path):
    cache = in_hub_cache(checkpoint, tmp_path, revision="aaaa")
    in_hub_cache(checkpoint, tmp_path, revision="bbbb")
    (cache / "refs" / "main").write_text("aaaa")
    assert places.snapshot(cache).name == "aaaa"
    (cache / "snapshots" / "aaaa" / "vae" / "config.json").unlink()
    assert places.snapshot(cache).name == "bbbb"
    (cache / "refs" / "main").write_text("../../..")
    assert places.snapshot(cache).name == "bbbb"
    shutil.rmtree(cache / "snapshots")
    assert places.snapshot(cache) is None and places.checkpoint_folder(cache) == cache
    with pytest.raises(FileNotFoundError, match="has no vlm/config.json"):
        check_folder(cache)


@links
def test_loops_foreign_models_and_missing_places_hold_nothing(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "foreign" / "unet").mkdir(parents=True)
    (tmp_path / "foreign" / "model_index.json").write_text("{}")
    (tmp_path / "models--x--y").mkdir()
    for name in ("", "loop", "itself", "foreign", "models--x--y", "nowhere"):
        assert list(places.inside(tmp_path / name)) == []
        assert places.checkpoint_folder(tmp_path / name) == tmp_path / name


def test_the_nano_model_goes_by_its_name_unless_a_folder_has_it(checkpoint, tmp_path, monkeypatch):
    assert places.checkpoint_folder(Path("nano")).resolve() == NANO
    assert places.is_nano(places.nano_folder()) and not places.is_nano(checkpoint)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "nano")
    assert places.checkpoint_folder(Path("nano")) == Path("nano")


def test_the_command_line_draws_with_the_nano_model_and_says_what_it_is(tmp_path, told):
    out = tmp_path / "a.png"
    status, said = told("draw", "--model", "nano", "--prompt", "a red circle", "--steps", 1, "--out", out)
    assert status == 0 and "nano model: knows flat shapes" in said, said
    assert Image.open(out).size == (64, 64)


@pytest.fixture(scope="module", params=[*FILE_DTYPES, *GGUF_DTYPES])
def converted(request, tmp_path_factory):
    if request.param in GGUF_DTYPES:
        pytest.importorskip("gguf", reason="a development tool, see requirements-dev.txt")
    return request.param, convert(NANO, tmp_path_factory.mktemp("converted"), request.param)


def test_converted_files_draw_and_answer_nearly_as_the_folder(converted):
    dtype, (model, _, _) = converted
    folder, files = Pipeline(NANO), Pipeline(model)
    wish = ImageRequest("a red circle to the left of a blue square", 64, 64, 4, seed=3)
    one, other = pixels(folder.draw(wish)).astype(int), pixels(files.draw(wish)).astype(int)
    # The nano model is bf16: there the files hold the same numbers, and the VAE's are in every case the folder's.
    most = {"bfloat16": 0, "float16": 1, "Q4_K": 20, "fp8_e5m2": 20}.get(dtype, 8)
    assert numpy.abs(one - other).mean() <= most, numpy.abs(one - other).mean()
    question, config = "what colour is the circle?", GenerationConfig(8)
    image = folder.draw(ImageRequest("a red circle on a white background", 64, 64, 8, seed=1))
    assert files.answer(question, [image], config=config) == folder.answer(question, [image], config=config)


def test_the_command_line_takes_files_and_names_what_is_missing(tmp_path, told, checkpoint):
    model, language, vae = convert(NANO, tmp_path / "models", "bfloat16")
    draw = ("draw", "--model", model, "--prompt", "a red circle", "--steps", 1, "--out", tmp_path / "a.png")
    assert told(*draw)[0] == 0
    elsewhere = language.rename(tmp_path / "mllm.safetensors")
    status, said = told(*draw)
    assert status == 1 and "no file of the language model (internvl_u_mllm_bf16.safetensors) beside" in said
    assert told(*draw, "--mllm", elsewhere)[0] == 0
    qwen = vae.rename(vae.with_name("qwen_image_vae.safetensors"))
    assert told(*draw, "--mllm", elsewhere)[0] == 0
    shutil.copy(qwen, vae)
    assert places.locate(model, elsewhere).vae == vae.absolute(), "ours before the one of another name"
    shutil.copy(vae, vae.with_name("internvl_u_vae_2.safetensors"))
    status, said = told(*draw, "--mllm", elsewhere)
    assert status == 1 and "2 files found for the VAE" in said and "--vae" in said
    assert told(*draw, "--mllm", elsewhere, "--vae", qwen)[0] == 0
    status, said = told("draw", "--model", model, "--mllm", vae, "--vae", vae, *draw[3:])
    assert status == 1 and "tokenizer" in said
    assert told("ask", "--model", model, "--mllm", elsewhere, "--prompt", "hi", "--max-new-tokens", 2)[0] == 1
    assert told("ask", "--model", model, "--mllm", elsewhere, "--vae", qwen, "--prompt", "hi")[0] == 0


@links
def test_converting_and_merging_take_a_folder_of_the_hubs_cache(checkpoint, tmp_path, told):
    cache = in_hub_cache(checkpoint, tmp_path)
    status, said = told("convert", "--model", cache, "--out", tmp_path / "converted")
    assert status == 0, said
    for file in convert(checkpoint, tmp_path / "plain"):
        assert file.read_bytes() == (tmp_path / "converted" / file.relative_to(tmp_path / "plain")).read_bytes()
    lora = tmp_path / "lora.safetensors"
    rows, columns = load_mmdit(checkpoint).transformer_blocks[0].attn.to_q.weight.shape
    name = "transformer_blocks.0.attn.to_q"
    halves = {f"{name}.lora_A.weight": torch.ones(1, columns), f"{name}.lora_B.weight": torch.ones(rows, 1)}
    save_file(halves, lora)
    status, said = told("merge", "--model", cache, "--lora", lora, "--out", tmp_path / "merged")
    assert status == 0, said
    assert places.checkpoint_folder(tmp_path / "merged") == tmp_path / "merged"
    assert not [file for file in (tmp_path / "merged").rglob("*") if file.is_symlink()]


def test_merging_and_converting_want_a_folder(tmp_path, told):
    model, *_ = convert(NANO, tmp_path / "models", "bfloat16")
    for command in ("convert", "merge"):
        status, said = told(command, "--model", model, "--out", tmp_path / "out")
        assert status == 1 and "is a file, a checkpoint folder expected" in said, said


def test_auto_is_float32_on_a_cpu():
    from pack.internvl_u.devices import chosen_device, chosen_dtype

    assert chosen_dtype("auto", torch.device("cpu")) == torch.float32
    assert chosen_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert chosen_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "cuda, mps, bfloat16, expected",
    [
        (True, True, True, ("cuda", torch.bfloat16)),
        (True, False, False, ("cuda", torch.float32)),
        (False, True, True, ("mps", torch.bfloat16)),
        (False, True, False, ("mps", torch.float32)),
        (False, False, True, ("cpu", torch.float32)),
    ],
)
def test_auto_takes_the_best_device_and_what_it_computes_in(monkeypatch, cuda, mps, bfloat16, expected):
    from pack.internvl_u import devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device = devices.chosen_device("auto")
    if device.type != "cpu":
        monkeypatch.setattr(devices, "_has_bfloat16", lambda device: bfloat16)
    assert (device.type, devices.chosen_dtype("auto", device)) == expected
