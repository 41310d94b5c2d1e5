import hashlib
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from pack.internvl_u import convert as module
from pack.internvl_u import fp8
from pack.internvl_u.__main__ import main
from pack.internvl_u.checkpoint import SingleFile, open_checkpoint, open_part
from pack.internvl_u.defaults import FILE_DTYPES
from pack.internvl_u.encoder import Encoder
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


def test_values_are_the_nearest_that_the_dtype_has(checkpoint, converted):
    choice, files = converted
    for part, original in originals(checkpoint).items():
        weights, scales, _ = fp8.split_scales(load_file(files[part]), SingleFile(files[part]).metadata, part)
        assert weights.keys() == original.keys()
        assert bool(scales) == (choice.startswith("fp8_scaled") and part != "vae")
        for name, tensor in weights.items():
            scale = scales.get(name.removesuffix(".weight"), torch.tensor(1.0))
            expected = (
                (original[name].float() / scale).clamp(-448, 448) if tensor.dtype == fp8.DTYPE else original[name]
            )
            assert torch.equal(tensor.float(), expected.to(tensor.dtype).float()), name


@pytest.mark.parametrize("choice", ["fp8_scaled", "fp8_scaled_old"])
def test_scaled_fp8_uses_the_whole_range(checkpoint, tmp_path, choice):
    file, *_ = module.convert(checkpoint, tmp_path, choice)
    weights, scales, formats = fp8.split_scales(load_file(file), SingleFile(file).metadata, file)
    assert len(scales) == 28 and formats.keys() == scales.keys()
    for layer in scales:
        assert weights[f"{layer}.weight"].float().abs().max() == 448


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


def test_what_fails_half_way_leaves_nothing_under_the_final_name(checkpoint, tmp_path, monkeypatch):
    written = []

    def stop(count):
        written.append(count)
        if len(written) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.convert(checkpoint, tmp_path, "bfloat16", stop)
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
