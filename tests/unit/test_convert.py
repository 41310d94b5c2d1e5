import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from pack.internvl_u import convert as module
from pack.internvl_u import fp8, int8, quantization
from pack.internvl_u.__main__ import main
from pack.internvl_u.checkpoint import SingleFile, open_checkpoint, open_part
from pack.internvl_u.defaults import FILE_DTYPES
from pack.internvl_u.encoder import Encoder
from pack.internvl_u.files import state_of
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.load import load_mllm, load_mmdit
from pack.internvl_u.pipeline import Pipeline
from pack.internvl_u.prompt import branch_prompts
from pack.internvl_u.vae import to_wan, wan_name
from safetensors import safe_open
from safetensors.torch import load_file, save_file

UNCHECKED = (
    "import sys; sys.path.insert(0, '.'); from internvl_u import convert; convert.check_part = lambda part: None\n"
    "from internvl_u.__main__ import main; sys.exit(main(sys.argv[1:]))"
)
"""The command line that takes a tensor which no model has: one that is large for its checkpoint."""


@pytest.fixture(scope="module", params=FILE_DTYPES)
def converted(request, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    return request.param, dict(zip(("drawing", "language", "vae"), module.convert(checkpoint, out, request.param)))


def originals(checkpoint):
    return {
        "drawing": open_part(checkpoint, "generation_decoder").weights,
        "language": open_part(checkpoint, "vlm").weights,
        "vae": to_wan(open_part(checkpoint, "vae").weights),
    }


def stored(file, part):
    """The tensors of a file and its quantised layers."""
    return quantization.split_layers(load_file(file), SingleFile(file).metadata(part), part)


def test_values_are_the_nearest_that_the_dtype_has(checkpoint, converted):
    choice, files = converted
    for part, original in originals(checkpoint).items():
        weights, layers = stored(files[part], part)
        assert weights.keys() == original.keys()
        assert bool(layers) == (choice.startswith(("fp8_scaled", "int8")) and part != "vae")
        for name, tensor in weights.items():
            layer = layers.get(name.removesuffix(".weight"))
            expected, limit = original[name].float(), 448.0 if tensor.dtype == fp8.DTYPE else float("inf")
            if layer is not None:
                expected = int8.rotate(expected, layer.group) if layer.group else expected
                expected = expected / layer.scale
                expected = expected.round() if layer.format == "int8_tensorwise" else expected
            assert torch.equal(tensor.float(), expected.clamp(-limit, limit).to(tensor.dtype).float()), name


@pytest.mark.parametrize("choice", ["fp8_scaled", "fp8_scaled_old"])
def test_scaled_fp8_uses_the_whole_range(checkpoint, tmp_path, choice):
    file, *_ = module.convert(checkpoint, tmp_path, choice)
    weights, layers = stored(file, file)
    assert len(layers) == 28
    for layer in layers:
        assert weights[f"{layer}.weight"].float().abs().max() == 448


@pytest.mark.parametrize("choice, rotated", [("int8", False), ("int8_convrot", True)])
def test_int8_uses_the_whole_range_of_each_row(checkpoint, tmp_path, choice, rotated):
    file, *_ = module.convert(checkpoint, tmp_path, choice)
    weights, layers = stored(file, file)
    assert len(layers) == 28 and all(bool(one.group) == rotated for one in layers.values())
    for layer, one in layers.items():
        weight = weights[f"{layer}.weight"]
        assert one.scale.shape == (len(weight), 1) and (weight.abs().amax(1) == 127).all()


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_a_rotation_is_orthogonal_and_its_own_inverse(size):
    matrix = int8.hadamard(size)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-6) and torch.equal(matrix, matrix.T)
    values = torch.randn(3, 2 * size)
    assert torch.allclose(int8.rotate(int8.rotate(values, size), size), values, atol=1e-5)


def test_a_rotation_makes_the_rounding_of_outliers_smaller():
    weight = torch.randn(64, 256)
    weight[:, 7] *= 100
    errors = []
    for group in (0, 256):
        scale = int8.scale_of(weight, group)
        rotated = int8.rotate(weight, group) if group else weight
        restored = int8.dequantize((rotated / scale).round().to(torch.int8), scale, group)
        errors.append((restored - weight)[:, :7].square().mean())
    assert errors[1] < errors[0] / 10


def test_what_is_too_large_for_float16_is_refused(broken, tmp_path):
    file = broken / "generation_decoder" / "model.safetensors"
    weights = load_file(file)
    weights["decoder.proj_out.bias"][0] = 1e6
    save_file(weights, file)
    with pytest.raises(RuntimeError, match="proj_out.bias holds values up to 1e.06, 65504 at most"):
        module.convert(broken, tmp_path / "out", "float16")
    assert not [one for one in (tmp_path / "out").rglob("*") if one.is_file()]


def test_files_carry_configuration_and_tokenizer(checkpoint, converted):
    _, files = converted
    ours, theirs = (
        Encoder.from_checkpoint(open_checkpoint(files["language"])),
        Encoder.from_checkpoint(open_checkpoint(checkpoint)),
    )
    text = "A red circle, 一个 <img> test!"
    assert branch_prompts(ours.tokenizer, text) == branch_prompts(theirs.tokenizer, text)
    assert (ours.layers, ours.sizes, ours.mean, ours.default_size) == (
        theirs.layers,
        theirs.sizes,
        theirs.mean,
        theirs.default_size,
    )
    stated = json.loads((checkpoint / "generation_decoder" / "config.json").read_text())
    assert open_part(files["drawing"], "generation_decoder").config == stated


def test_checksums_are_right_and_nothing_half_is_left(converted):
    for file in converted[1].values():
        digest, name = file.with_name(file.name + ".sha256").read_text().split()
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest() and name == file.name
        assert not list(file.parent.glob("*.part"))


def test_new_metadata_is_in_comfyuis_form(checkpoint, tmp_path):
    file, *_ = module.convert(checkpoint, tmp_path, "fp8_scaled")
    with safe_open(file, framework="pt") as opened:
        stated = json.loads(opened.metadata()["_quantization_metadata"])
        names = set(opened.keys())
    assert stated["format_version"] == "1.0"
    for layer, form in stated["layers"].items():
        assert form == {"format": "float8_e4m3fn"}
        assert {f"{layer}.weight", f"{layer}.weight_scale"} <= names


def test_an_existing_file_is_never_overwritten(checkpoint, tmp_path):
    first = module.convert(checkpoint, tmp_path)[0]
    before = first.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="exist already: remove them or choose another folder"):
        module.convert(checkpoint, tmp_path)
    assert first.stat().st_mtime_ns == before


@pytest.mark.parametrize("dtype", ["fp8_scaled", "Q8_0"])
def test_a_second_dtype_keeps_the_vae_of_the_first(checkpoint, tmp_path, dtype):
    *_, vae = module.convert(checkpoint, tmp_path)
    before = {state_of(file) for file in vae.parent.iterdir()}
    files = module.convert(checkpoint, tmp_path, dtype)
    assert files[2] == vae and all(file.is_file() for file in files)
    assert {state_of(file) for file in vae.parent.iterdir()} == before
    assert len([*tmp_path.rglob("internvl_u*")]) == 10  # 5 files, each with its SHA-256


def test_the_vae_of_another_version_of_this_package_is_kept(checkpoint, tmp_path, monkeypatch):
    *_, vae = module.convert(checkpoint, tmp_path)
    before = vae.read_bytes()
    monkeypatch.setattr(module, "__version__", "99.0")  # which stands in the metadata
    module.convert(checkpoint, tmp_path, "int8")
    assert vae.read_bytes() == before


@pytest.mark.parametrize("prefix", ["", "decoder.", "model.diffusion_model."])
def test_every_prefix_that_loads_is_converted(checkpoint, broken, tmp_path, prefix):
    file = broken / "generation_decoder" / "model.safetensors"
    weights = {name.removeprefix("decoder."): tensor for name, tensor in load_file(file).items()}
    save_file({prefix + name: tensor for name, tensor in weights.items()}, file)
    found = load_file(module.convert(broken, tmp_path)[0])
    assert found.keys() == load_file(module.convert(checkpoint, tmp_path / "plain")[0]).keys() and len(found) > 70


def test_layers_keep_their_kind_in_a_folder_and_under_a_prefix(checkpoint, broken, tmp_path):
    """What says that a matrix is rotated stands beside the weights, by their stored names."""
    made = module.convert(checkpoint, tmp_path, "int8_convrot")[0]
    expected = open_part(made, "generation_decoder")
    assert all(layer.group for layer in expected.layers.values())
    folder = broken / "generation_decoder"
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    shutil.copy(made, folder / "model.safetensors")
    prefixed = tmp_path / "saved.safetensors"
    with safe_open(made, framework="pt") as opened:
        metadata = opened.metadata()
    key = "_quantization_metadata"
    stated = json.loads(metadata[key])
    stated["layers"] = {f"model.diffusion_model.{name}": form for name, form in stated["layers"].items()}
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(made).items()}
    save_file(weights, prefixed, {**metadata, key: json.dumps(stated)})
    for place in (broken, prefixed):
        found = open_part(place, "generation_decoder")
        assert {name: layer.group for name, layer in found.layers.items()} == {
            name: layer.group for name, layer in expected.layers.items()
        }


@pytest.mark.parametrize("dtype", ["fp8_scaled", "int8", "int8_convrot"])
def test_quantised_files_load_without_comfyui_as_the_values_that_they_stand_for(checkpoint, tmp_path, dtype):
    file = module.convert(checkpoint, tmp_path, dtype)[0]
    expected = load_mmdit(checkpoint, dtype=torch.float32).state_dict()
    for name, tensor in load_mmdit(file, dtype=torch.float32).state_dict().items():
        near = (tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert near < 0.05, (name, near)


@pytest.mark.parametrize("dtype", ["int8", "int8_convrot"])
def test_the_language_model_stays_int8_without_comfyui_and_writes(checkpoint, tmp_path, dtype):
    files = module.convert(checkpoint, tmp_path, dtype)
    language = load_mllm(files[1], dtype=torch.bfloat16)
    packed = [weight for weight in language.state_dict().values() if weight.dtype == torch.int8]
    assert len(packed) > 10 and not any(weight.requires_grad for weight in language.parameters())
    config = GenerationConfig(4)
    plain, ours = (Pipeline(root).generate("hello", config=config) for root in (checkpoint, files[0]))
    assert len(ours) == len(plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "Q8_0"])
def test_a_source_that_is_replaced_meanwhile_is_noticed(broken, tmp_path, dtype):
    file = broken / "generation_decoder" / "model.safetensors"
    other = tmp_path / "other.safetensors"
    save_file({name: tensor * 3 for name, tensor in load_file(file).items()}, other)
    told = []

    def replace(_):
        if not told:
            os.replace(other, file)  # under the name, which is opened again for each tensor
        told.append(1)

    with pytest.raises(RuntimeError, match="model.safetensors"):
        module.convert(broken, tmp_path / "out", dtype, replace)
    assert not [one for one in (tmp_path / "out").rglob("*") if one.is_file()]


def test_another_vae_is_neither_replaced_nor_taken_for_ours(checkpoint, tmp_path):
    vae = tmp_path / "vae" / "internvl_u_vae_bf16.safetensors"
    vae.parent.mkdir()
    save_file({"another": torch.zeros(2)}, vae)
    before = vae.read_bytes()
    with pytest.raises(FileExistsError, match="holds another VAE: rename it or choose another folder"):
        module.convert(checkpoint, tmp_path)
    assert vae.read_bytes() == before
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [vae]


@pytest.mark.parametrize("dtype", ["bfloat16", "Q8_0"])
def test_what_fails_half_way_leaves_nothing_under_the_final_name(checkpoint, tmp_path, dtype):
    written = []

    def stop(count):
        written.append(count)
        if len(written) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.convert(checkpoint, tmp_path, dtype, stop)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_killed_conversion_leaves_no_file_under_the_final_name(checkpoint, broken, tmp_path):
    weights = load_file(broken / "generation_decoder" / "model.safetensors")
    weights["decoder.big.weight"] = torch.zeros(10000, 10000)
    save_file(weights, broken / "generation_decoder" / "model.safetensors")
    root, out = checkpoint.parent.parent.parent, tmp_path / "out"
    line = [sys.executable, "-c", UNCHECKED, "convert", "--model", str(broken), "--out", str(out)]
    process = subprocess.Popen(line, cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.rglob("*.part")) and not list(out.rglob("*.safetensors"))


def test_bad_folders_are_refused(broken, tmp_path):
    with pytest.raises(ValueError, match="one of bfloat16"):
        module.convert(broken, tmp_path, "int4")
    (broken / "vlm" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 weight files are missing"):
        module.convert(broken, tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        module.convert(tmp_path / "nothing", tmp_path)


def test_memory_stays_small(checkpoint, broken, tmp_path):
    """600 MB of weights are converted in pieces."""
    file = broken / "generation_decoder" / "model.safetensors"
    weights = load_file(file)
    weights["decoder.big.weight"] = torch.zeros(15000, 10000)
    save_file(weights, file)
    code = UNCHECKED.rpartition("sys.exit")[0] + "import resource\n"
    code += "import torch, tokenizers; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += f"main(['convert', '--model', {str(broken)!r}, '--out', {str(tmp_path)!r}, '--dtype', 'fp8_scaled'])\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    root = checkpoint.parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert int(done.stdout.split()[-1]) < 450_000, done.stderr


def test_command_line_converts(checkpoint, tmp_path, capsys):
    assert main(["convert", "--model", str(checkpoint), "--out", str(tmp_path), "--dtype", "fp8_e4m3fn"]) == 0
    assert capsys.readouterr().out.count(".safetensors") == 3
    assert main(["convert", "--model", str(checkpoint), "--out", str(tmp_path), "--dtype", "fp8_e4m3fn"]) == 1
    assert "exist already" in capsys.readouterr().err


def test_wan_names_are_left_alone(checkpoint):
    names = to_wan(open_part(checkpoint, "vae").weights).keys()
    assert {wan_name(name) for name in names} == set(names)
