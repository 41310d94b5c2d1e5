"""LoRA files that nobody should send: each ends in a sentence, and soon."""

import json
import re
import time

import pytest
import torch
from pack.internvl_u.lora import TRANSFORMER, LayerNames, read_lora
from safetensors.torch import save_file

from .conftest import ODD_FILES, SAID

SHAPES = {TRANSFORMER: {"img_in.weight": (64, 64), "img_in.bias": (64,)}}


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_file_is_told(tmp_path, name):
    file = tmp_path / "some.safetensors"
    file.write_bytes(ODD_FILES[name])
    expected = SAID.get(name, "is not readable as safetensors|none of its 1 keys fits the MODEL")
    with pytest.raises(RuntimeError, match=expected):
        read_lora(file, SHAPES)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", "."])
def test_a_lora_is_never_a_path_out_of_the_registered_folders(comfyui, tmp_path, monkeypatch, name):
    import folder_paths
    from pack.nodes import model_folders

    (tmp_path / "loras").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "loras" / "inside.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert model_folders.find_lora("inside.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match=re.escape(f"no LoRA {name!r} in {tmp_path / 'loras'}")):
        model_folders.find_lora(name)


def test_names_without_end_take_no_time_and_fill_no_page(tmp_path):
    key = "model." * 200_000 + "img_in"
    start = time.monotonic()
    assert LayerNames(SHAPES).find(key) is None
    assert time.monotonic() - start < 30
    save_file({f"{key}.diff": torch.zeros(64, 64), "img_in.diff": torch.zeros(64, 64)}, tmp_path / "some.safetensors")
    assert len(read_lora(tmp_path / "some.safetensors", SHAPES).summary({TRANSFORMER: 1.0})) < 500


@pytest.mark.parametrize(
    "tensors",
    [
        {"lokr_w1": torch.zeros(60_000, 1), "lokr_w2": torch.zeros(1, 60_000)},
        {"lora_A.weight": torch.zeros(1, 10**6), "lora_B.weight": torch.zeros(10**6, 1)},
        {"hada_w1_a": torch.zeros(10**6, 1), **{f"hada_w{n}": torch.zeros(1, 10**6) for n in ("1_b", "2_b")}},
    ],
    ids=["LoKr", "LoRA", "half a LoHa"],
)
def test_small_factors_of_a_huge_product_are_never_multiplied(tmp_path, tensors):
    save_file({f"img_in.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "some.safetensors")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="1 of 1 layers do not fit: img_in: "):
        read_lora(tmp_path / "some.safetensors", SHAPES)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("text", ["[]", "{", '{"transformer.lora_alpha": [1]}', '{"transformer.alpha_pattern": 5}'])
def test_metadata_that_is_none_is_told(tmp_path, text):
    save_file({"img_in.diff": torch.zeros(64, 64)}, tmp_path / "some.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(RuntimeError, match="lora_adapter_metadata in its metadata"):
        read_lora(tmp_path / "some.safetensors", SHAPES)


@pytest.mark.parametrize("content", [{"lora_alpha": "x"}, {"lora_alpha": 1e300}, {"alpha_pattern": {"(a+)+$": "x"}}])
def test_a_configuration_that_is_none_is_told(tmp_path, content):
    save_file({"img_in.diff": torch.zeros(64, 64)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match=r"adapter_config\.json: .* found"):
        read_lora(tmp_path / "adapter_model.safetensors", SHAPES)
