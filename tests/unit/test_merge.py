"""Checkpoint folders with LoRAs merged into them: of files, and as trainers leave them inside."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from pack.internvl_u import merge as merging
from pack.internvl_u.__main__ import main
from pack.internvl_u.checkpoint import open_part
from pack.internvl_u.load import load_mllm, load_mmdit
from pack.internvl_u.lora import LANGUAGE, TRANSFORMER
from pack.internvl_u.merge import merge
from pack.internvl_u.weights import shapes_of
from pack.tests.lora_files import LANGUAGE_LAYERS, LANGUAGE_SPELLINGS, LAYERS, SPELLINGS, random_change, written
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def plain(checkpoint):
    return {part: open_part(checkpoint, part).weights for part in (TRANSFORMER, LANGUAGE)}


@pytest.fixture(scope="module")
def changes(plain):
    return {
        TRANSFORMER: random_change(shapes_of(plain[TRANSFORMER]), LAYERS),
        LANGUAGE: random_change(shapes_of(plain[LANGUAGE]), LANGUAGE_LAYERS),
    }


@pytest.fixture
def lora(tmp_path, plain, changes):
    """A file for both halves."""
    tensors = written(changes[TRANSFORMER], SPELLINGS["kohya, musubi"], plain[TRANSFORMER])
    tensors |= written(changes[LANGUAGE], LANGUAGE_SPELLINGS["PEFT of the language model"], plain[LANGUAGE])
    save_file(tensors, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def check_merged(near, folder, plain, changes, strength, tolerance=1e-6):
    for part, weights in plain.items():
        found = open_part(folder, part).weights
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            change = changes.get(part, {}).get(name.removesuffix(".weight"))
            if change is None:
                assert torch.equal(found[name], weight) and found[name].dtype == weight.dtype, name
            else:
                near(found[name], weight.float() + strength * change[0] @ change[1], tolerance)
                assert found[name].dtype == weight.dtype


def trainer_folder(folder, part, change, prefix="", adapter="default", alpha=1.0):
    """Makes a folder what PEFT saves of it in the middle of training."""
    left = dict(change)
    for file in sorted((folder / part).glob("*.safetensors")):
        tensors = {}
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        for name, tensor in load_file(file).items():
            stem = "decoder." if name.startswith("decoder.") else ""
            layer = name.removeprefix(stem).removesuffix(".weight")
            inner = name.replace("language_model.", f"language_model.{prefix}", 1) if prefix else name
            if layer not in left or name.endswith(".bias"):
                tensors[inner] = tensor
                continue
            up, down = left.pop(layer)
            inner = inner.removesuffix(".weight")
            tensors[f"{inner}.base_layer.weight"] = tensor
            tensors[f"{inner}.lora_A.{adapter}.weight"] = down.contiguous()
            tensors[f"{inner}.lora_B.{adapter}.weight"] = (up / alpha).contiguous()
        save_file(tensors, file, metadata)
    for index in (folder / part).glob("*.index.json"):
        places = {name: file.name for file in (folder / part).glob("*.safetensors") for name in load_file(file)}
        index.write_text(json.dumps({"weight_map": places}))
    assert not left


def test_files_are_merged_at_their_strengths(checkpoint, tmp_path, lora, plain, changes, near):
    done = merge(checkpoint, tmp_path / "new", [(lora, 0.5), (lora, 0.25)])
    check_merged(near, tmp_path / "new", plain, changes, 0.75)
    assert len(done.reports) == 2 and "4 layers of the MODEL at 0.25, 2 layers of the MLLM at 0.25" in done.reports[1]
    names = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    found = {str(file.relative_to(tmp_path / "new")) for file in (tmp_path / "new").rglob("*") if file.is_file()}
    assert found == names | {"SHA256SUMS"}
    for line in (tmp_path / "new" / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((tmp_path / "new" / name).read_bytes()).hexdigest() == digest
    assert {
        tmp_path / "new" / line.split("  ")[1] for line in (tmp_path / "new" / "SHA256SUMS").read_text().splitlines()
    } == set(done.files)


def test_the_merged_folder_draws_and_writes_with_the_lora(checkpoint, tmp_path, lora, changes):
    merge(checkpoint, tmp_path / "new", [(lora, 1.0)])
    network = load_mmdit(tmp_path / "new")
    up, down = changes[TRANSFORMER]["img_in"]
    assert torch.allclose(network.img_in.weight, load_mmdit(checkpoint).img_in.weight + up @ down, atol=1e-6)
    assert load_mllm(tmp_path / "new").language_model.config.hidden_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_stored_dtype_is_kept_and_the_arithmetic_is_fp32(broken, tmp_path, lora, changes, near, dtype):
    file = broken / "generation_decoder" / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    plain = {part: open_part(broken, part).weights for part in (TRANSFORMER, LANGUAGE)}
    merge(broken, tmp_path / "new", [(lora, 1.0)])
    found = open_part(tmp_path / "new", TRANSFORMER).weights
    for layer, (up, down) in changes[TRANSFORMER].items():
        exact = plain[TRANSFORMER][f"{layer}.weight"].float() + up @ down
        assert found[f"{layer}.weight"].dtype == dtype
        near(found[f"{layer}.weight"], exact.to(dtype), 1e-6 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_trainers_folder_with_the_lora_inside_is_merged(broken, checkpoint, tmp_path, plain, changes, near, prefix):
    change = changes[LANGUAGE]
    trainer_folder(broken, "vlm", change, prefix, alpha=2.0)
    config = broken / "vlm" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_llm_lora": 4}))
    with pytest.raises(
        RuntimeError, match=r"tensors of a LoRA that is not merged found .* `python -m internvl_u merge"
    ):
        load_mllm(broken)
    done = merge(broken, tmp_path / "new")
    assert done.reports == [f"{broken / 'vlm'}: 2 layers with a LoRA inside, merged at 1"]
    check_merged(near, tmp_path / "new", plain, {LANGUAGE: change}, 1.0)
    assert json.loads((tmp_path / "new" / "vlm" / "config.json").read_text())["use_llm_lora"] == 0
    (index,) = (tmp_path / "new" / "vlm").glob("*.index.json")
    (original,) = (checkpoint / "vlm").glob("*.index.json")
    assert json.loads(index.read_text())["weight_map"] == json.loads(original.read_text())["weight_map"]


def test_the_transformers_lora_inside_takes_the_alpha_of_peft(broken, tmp_path, plain, changes, near):
    trainer_folder(broken, "generation_decoder", changes[TRANSFORMER], alpha=3.0)
    (broken / "generation_decoder" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    merge(broken, tmp_path / "new")
    check_merged(near, tmp_path / "new", plain, {TRANSFORMER: changes[TRANSFORMER]}, 1.0)
    assert not (tmp_path / "new" / "generation_decoder" / "adapter_config.json").exists()


def test_an_adapter_that_lies_beside_the_weights_is_merged(broken, tmp_path, plain, changes, near):
    tensors = written(changes[LANGUAGE], LANGUAGE_SPELLINGS["PEFT of the language model"], plain[LANGUAGE])
    save_file(tensors, broken / "vlm" / "adapter_model.safetensors")
    (broken / "vlm" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    merge(broken, tmp_path / "new")
    check_merged(near, tmp_path / "new", plain, {LANGUAGE: changes[LANGUAGE]}, 0.5)
    assert not list((tmp_path / "new" / "vlm").glob("adapter*"))


def test_a_lora_that_is_not_there_is_named(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.safetensors for --lora"):
        merge(checkpoint, tmp_path / "new", [(tmp_path / "nowhere.safetensors", 1.0)])


def test_a_scale_that_stands_nowhere_is_asked_for(broken, tmp_path, plain, changes, near):
    trainer_folder(broken, "generation_decoder", changes[TRANSFORMER], alpha=5.0)
    with pytest.raises(ValueError, match="is scaled stands nowhere, .* give --alpha"):
        merge(broken, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))
    merge(broken, tmp_path / "new", alpha=20.0)
    check_merged(near, tmp_path / "new", plain, {TRANSFORMER: changes[TRANSFORMER]}, 1.0)


def test_layers_that_were_trained_whole_replace_the_original(broken, tmp_path, lora):
    file = broken / "generation_decoder" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop("decoder.img_in.weight")
    tensors["decoder.img_in.original_module.weight"] = weight
    tensors["decoder.img_in.modules_to_save.default.weight"] = weight + 1
    save_file(tensors, file)
    save_file({"txt_norm.diff": torch.zeros(load_file(file)["decoder.txt_norm.weight"].shape)}, lora)
    merge(broken, tmp_path / "new", [(lora, 1.0)])
    assert torch.equal(open_part(tmp_path / "new", TRANSFORMER).weights["img_in.weight"], weight + 1)


@pytest.mark.parametrize("missing", ["image_processor_kwargs", "the file"])
def test_folders_that_do_not_say_how_images_are_prepared_are_read_as_released(broken, checkpoint, missing):
    from pack.internvl_u.checkpoint import Folder
    from pack.internvl_u.encoder import Encoder

    file = broken / "processor" / "processor_config.json"
    if missing == "the file":
        file.unlink()
    else:
        stated = json.loads(file.read_text())
        del stated["image_processor_kwargs"]
        file.write_text(json.dumps(stated))
    found, released = (Encoder.from_checkpoint(Folder(folder)) for folder in (broken, checkpoint))
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) == (released.mean, released.std)


def test_nothing_to_merge_and_bad_targets_are_refused(checkpoint, tmp_path, lora):
    with pytest.raises(ValueError, match="no --lora given and none found"):
        merge(checkpoint, tmp_path / "new")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        merge(checkpoint, tmp_path / "there", [(lora, 1.0)])
    inside = shutil.copytree(checkpoint, tmp_path / "model")
    with pytest.raises(ValueError, match="lies in the checkpoint folder"):
        merge(inside, inside / "new", [(lora, 1.0)])
    (tmp_path / "a file").touch()
    with pytest.raises(OSError, match="nothing can be written there"):
        merge(checkpoint, tmp_path / "a file" / "new", [(lora, 1.0)])
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("stage", ["write_file", "_copy_texts", "check_part", "_put"])
def test_a_failure_at_any_stage_leaves_nothing(checkpoint, tmp_path, lora, monkeypatch, stage):
    original, calls = getattr(merging, stage), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == {"write_file": 2, "check_part": 4}.get(stage, 1):
            raise RuntimeError("the disk is gone")
        return original(*args, **kwargs)

    monkeypatch.setattr(merging, stage, fail)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        merge(checkpoint, tmp_path / "new", [(lora, 1.0)])
    assert {file.name for file in tmp_path.iterdir()} == {lora.name}


def test_a_folder_that_appears_meanwhile_is_kept(checkpoint, tmp_path, lora, monkeypatch):
    original = merging._put

    def race(partial, out):
        out.mkdir()
        original(partial, out)

    monkeypatch.setattr(merging, "_put", race)
    with pytest.raises(FileExistsError, match="meanwhile"):
        merge(checkpoint, tmp_path / "new", [(lora, 1.0)])
    assert list((tmp_path / "new").iterdir()) == [] and not list(tmp_path.glob("*.part"))


def test_a_source_that_is_written_to_meanwhile_is_noticed(broken, tmp_path, lora, monkeypatch):
    original = merging._copy_texts

    def touch(source, target):
        os.utime(lora, ns=(1, 1))
        original(source, target)

    monkeypatch.setattr(merging, "_copy_texts", touch)
    with pytest.raises(RuntimeError, match="has been written to"):
        merge(broken, tmp_path / "new", [(lora, 1.0)])
    assert not (tmp_path / "new").exists()


def test_kinds_that_cannot_be_merged_are_refused(checkpoint, tmp_path):
    save_file({"diffusion_model.img_in.oft_blocks": torch.zeros(8, 8, 8)}, tmp_path / "oft.safetensors")
    with pytest.raises(RuntimeError, match=r"1 of 1 layers are no LoRA, .* img_in \(oft_blocks\)\. They cannot be"):
        merge(checkpoint, tmp_path / "new", [(tmp_path / "oft.safetensors", 1.0)])


def test_a_result_beyond_the_dtype_is_told(broken, tmp_path):
    file = broken / "generation_decoder" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    large = {"img_in.diff": torch.full((64, 64), 60000.0)}
    save_file(large, tmp_path / "large.safetensors")
    with pytest.raises(RuntimeError, match="decoder.img_in.weight with the LoRA is beyond what float16 holds"):
        merge(broken, tmp_path / "new", [(tmp_path / "large.safetensors", 2.0)])


def test_the_command_line_merges_and_tells_what_fitted(checkpoint, tmp_path, lora, plain, changes, near, capsys):
    line = ["merge", "--model", str(checkpoint), "--out", str(tmp_path / "new"), "--lora", str(lora), str(lora)]
    assert main([*line, "--strength", "0.5", "-0.25"]) == 0
    out, err = capsys.readouterr()
    assert "2 layers of the MLLM at -0.25; all" in err and len(out.splitlines()) == 5
    check_merged(near, tmp_path / "new", plain, changes, 0.25)


@pytest.mark.parametrize(
    "more, told",
    [
        (["--strength", "1", "2"], "2 of --strength found for 1 of --lora, one each expected"),
        (["--strength", "nan"], "a number expected"),
        (["--alpha", "inf"], "a number expected"),
    ],
)
def test_wrong_numbers_on_the_command_line_are_told(checkpoint, tmp_path, lora, capsys, more, told):
    line = ["merge", "--model", str(checkpoint), "--out", str(tmp_path / "new"), "--lora", str(lora), *more]
    assert main(line) == 1 and told in capsys.readouterr().err
