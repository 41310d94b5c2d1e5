import json
import re
import shutil

import pytest
import torch
from pack.internvl_u import checkpoint as module
from pack.internvl_u import weights
from pack.internvl_u.config import mllm_config
from pack.internvl_u.load import load_mllm, load_mmdit
from pack.internvl_u.mllm import MLLM
from pack.internvl_u.pipeline import Pipeline
from safetensors.torch import load_file, save_file


def change(folder, edit):
    """Rewrites the one weight file of a part."""
    (file,) = (folder).glob("*.safetensors")
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


def test_a_missing_folder_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model folder .*Download InternVL-U/InternVL-U"):
        module.check_folder(tmp_path / "nothing")


def test_a_missing_part_is_named(broken):
    shutil.rmtree(broken / "vae")
    with pytest.raises(FileNotFoundError, match=r"has no vae/config.json"):
        module.check_folder(broken)


def test_a_folder_of_another_model_is_refused(broken):
    (broken / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(RuntimeError, match="holds a FluxPipeline, InternVLUPipeline expected"):
        Pipeline(broken)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff".encode("utf-8", "surrogateescape")])
def test_an_unreadable_json_is_named(broken, content):
    file = broken / "generation_decoder" / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RuntimeError, match=re.escape(str(file))):
        load_mmdit(broken)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(broken, with_index):
    (broken / "vlm" / "model-00002-of-00003.safetensors").unlink()
    if not with_index:
        (broken / "vlm" / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 weight files are missing: model-00002-of-00003.safetensors"):
        load_mllm(broken)


def test_no_weights_at_all_are_refused(broken):
    (broken / "generation_decoder" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no .safetensors file"):
        load_mmdit(broken)


def test_a_truncated_file_is_named(broken):
    file = broken / "generation_decoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RuntimeError, match=r"is shorter than its header says \(\d+ bytes found, \d+ expected"):
        load_mmdit(broken)


def test_the_same_tensors_in_two_files_are_refused(broken):
    folder = broken / "generation_decoder"
    shutil.copy(folder / "model.safetensors", folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RuntimeError, match=r"\d+ tensors stand in both diffusion_pytorch_model.safetensors and "):
        load_mmdit(broken)


def test_missing_and_extra_tensors_are_counted_with_the_first_five(broken):
    def edit(weights):
        for name in [name for name in weights if ".img_mlp." in name]:
            weights["other." + name] = weights.pop(name)

    change(broken / "generation_decoder", edit)
    with pytest.raises(RuntimeError) as error:
        load_mmdit(broken)
    text = str(error.value)
    assert "8 missing (" in text and "8 unexpected (" in text
    assert text.count("transformer_blocks.0.img_mlp") + text.count("transformer_blocks.1.img_mlp") == 10


def test_misshapen_tensors_are_named_with_both_shapes(broken):
    def edit(weights):
        weights["decoder.proj_out.bias"] = torch.zeros(3)

    change(broken / "generation_decoder", edit)
    with pytest.raises(RuntimeError, match=r"1 of another shape \(proj_out.bias: \[3\] found, \[64\] expected\)"):
        load_mmdit(broken)


def test_a_configuration_that_contradicts_the_weights_is_refused(broken):
    file = broken / "generation_decoder" / "config.json"
    config = json.loads(file.read_text())
    config["decoder_config"]["num_layers"] = 20
    file.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="config.json says num_layers = 20, 2 expected"):
        load_mmdit(broken)


def test_other_file_names_and_one_shard_load_alike(broken, checkpoint):
    folder = broken / "vlm"
    weights = module.open_part(checkpoint, "vlm").weights
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "weights.safetensors")
    loaded = load_mllm(broken).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_large_weights_stay_mapped_and_are_not_copied(checkpoint, monkeypatch):
    monkeypatch.setattr(weights, "SMALL", 0)
    part = module.open_part(checkpoint, "vlm")
    model = MLLM(mllm_config(part.shapes, part.config), device="meta")
    weights.load_weights(model, part.weights, "vlm")
    assert all(tensor.data_ptr() == part.weights[name].data_ptr() for name, tensor in model.state_dict().items())
    with open("/proc/self/maps") as maps:
        assert "model-00001-of-00003.safetensors" in maps.read()
