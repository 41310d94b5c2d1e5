"""LoRAs on the library's pipeline: added to the weights when they are loaded, the files left as they are."""

import logging
from pathlib import Path

import pytest
import torch
from pack.internvl_u.__main__ import main
from pack.internvl_u.arguments import lora_argument
from pack.internvl_u.convert import convert
from pack.internvl_u.load import load_mllm, load_mmdit
from pack.internvl_u.lora import LANGUAGE, TRANSFORMER
from pack.internvl_u.merge import merge
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.weights import shapes_of
from pack.tests.lora_files import LANGUAGE_LAYERS, LANGUAGE_SPELLINGS, LAYERS, SPELLINGS, random_change, written
from PIL import Image
from safetensors.torch import load_file, save_file

NANO = Path(__file__).parents[2] / "demo" / "internvl-u-nano"
WISH = ImageRequest("a red circle", 32, 32, steps=2)


@pytest.fixture(scope="module")
def lora(checkpoint, tmp_path_factory):
    """A file for both halves."""
    file = tmp_path_factory.mktemp("lora") / "some.safetensors"
    tensors = {}
    for load, layers, how in (
        (load_mmdit, LAYERS, SPELLINGS["kohya, musubi"]),
        (load_mllm, LANGUAGE_LAYERS, LANGUAGE_SPELLINGS["PEFT of the language model"]),
    ):
        weights = load(checkpoint).state_dict()
        tensors |= written(random_change(shapes_of(weights), layers, 0.5), how, weights)
    save_file(tensors, file)
    return file


def pixels(pipeline, wish=WISH):
    return pipeline.draw(wish).tobytes()


def test_a_lora_draws_and_writes_as_the_folder_with_it_merged(checkpoint, lora, tmp_path):
    merge(checkpoint, tmp_path / "new", [(lora, 0.5)])
    with_lora, folder = Pipeline(checkpoint, loras=[(lora, 0.5)]), Pipeline(tmp_path / "new")
    assert pixels(with_lora) == pixels(folder) != pixels(Pipeline(checkpoint))
    assert with_lora.generate("what is this") == folder.generate("what is this")


def test_strengths_add_up_and_none_changes_nothing(checkpoint, lora):
    whole = pixels(Pipeline(checkpoint, loras=[(lora, 0.25), (lora, 0.25)]))
    assert whole == pixels(Pipeline(checkpoint, loras=[(lora, 0.5)]))
    assert pixels(Pipeline(checkpoint, loras=[(lora, 0.0)])) == pixels(Pipeline(checkpoint))


def test_the_files_stay_as_they_are_and_the_weights_keep_their_dtype(checkpoint, lora):
    before = load_mmdit(checkpoint).state_dict()
    pipeline = Pipeline(checkpoint, dtype=torch.bfloat16, loras=[(lora, 1.0)])
    pipeline.draw(WISH)
    assert {weight.dtype for weight in pipeline._networks["mmdit"].parameters()} == {torch.bfloat16}
    after = load_mmdit(checkpoint).state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_what_was_taken_is_told(checkpoint, lora, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "internvl_u"):
        Pipeline(checkpoint, loras=[(lora, 0.5)])
    assert "some.safetensors: 4 layers of the MODEL at 0.5, 2 layers of the MLLM at 0.5; all" in caplog.text
    save_file(load_file(lora) | {"foreign.lora_up.weight": torch.zeros(1, 1)}, tmp_path / "more.safetensors")
    caplog.clear()
    Pipeline(checkpoint, loras=[(tmp_path / "more.safetensors", 1.0)])
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "1 of" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_scaled", "int8"])
def test_single_files_take_a_lora_where_their_weights_are_numbers(checkpoint, lora, tmp_path, dtype):
    transformer = next(file for file in convert(checkpoint, tmp_path, dtype) if file.parent.name == "diffusion_models")
    if dtype != "int8":
        assert pixels(Pipeline(transformer, loras=[(lora, 1.0)])) != pixels(Pipeline(transformer))
        return
    with pytest.raises(RuntimeError, match="2 of its layers are packed in .*plain weights expected: give a MLLM in"):
        Pipeline(transformer, loras=[(lora, 1.0)])


def test_packed_matrices_are_named_before_any_work(checkpoint, lora, tmp_path):
    pytest.importorskip("gguf")
    weights = load_mmdit(NANO).state_dict()
    change = random_change(shapes_of(weights), LAYERS)
    save_file(written(change, SPELLINGS["kohya, musubi"], weights), tmp_path / "nano.safetensors")
    files = convert(NANO, tmp_path / "models", "Q8_0")
    transformer = next(file for file in files if file.parent.name == "diffusion_models")
    with pytest.raises(RuntimeError, match="layers are packed in .*gguf .*, plain weights expected"):
        Pipeline(transformer, loras=[(tmp_path / "nano.safetensors", 1.0)])


def test_errors_come_before_any_work(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA .*none.safetensors found"):
        Pipeline(checkpoint, loras=[(tmp_path / "none.safetensors", 1.0)])
    save_file({"img_in.oft_blocks": torch.zeros(4, 16, 16)}, tmp_path / "oft.safetensors")
    with pytest.raises(RuntimeError, match="no LoRA, DoRA, LoHa or LoKr|do not fit"):
        Pipeline(checkpoint, loras=[(tmp_path / "oft.safetensors", 1.0)])


def test_a_weight_beyond_its_dtype_is_named(checkpoint, lora):
    pipeline = Pipeline(checkpoint, loras=[(lora, 1e38)])
    with pytest.raises(RuntimeError, match="with the LoRA is beyond what float32 holds"):
        pipeline.draw(WISH)


@pytest.mark.parametrize(
    "text, file, strength",
    [("a.safetensors", "a.safetensors", 1.0), ("a:0.5", "a", 0.5), ("a:-1", "a", -1.0), ("C:/a.b", "C:/a.b", 1.0)],
)
def test_a_strength_stands_behind_the_file(text, file, strength):
    assert lora_argument(text) == (Path(file), strength)


def test_a_file_with_a_colon_in_its_name_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").touch()
    assert lora_argument("a:2") == (Path("a:2"), 1.0)
    assert lora_argument("a:2:0.5") == (Path("a:2"), 0.5)


def test_the_command_line_draws_with_a_lora(checkpoint, lora, tmp_path, capsys):
    line = ["draw", "--model", str(checkpoint), "--prompt", "a red circle", "--steps", "2", "--width", "32"]
    line += ["--height", "32", "--device", "cpu"]
    for name, more in (("with", ["--lora", f"{lora}:0.5"]), ("without", [])):
        assert main([*line, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
    assert Image.open(tmp_path / "with.png").tobytes() == pixels(Pipeline(checkpoint, loras=[(lora, 0.5)]))
    assert Image.open(tmp_path / "with.png").tobytes() != Image.open(tmp_path / "without.png").tobytes()
    with pytest.raises(SystemExit):
        main([*line, "--lora", f"{lora}:nan", "--out", str(tmp_path / "x.png")])
    assert "strength nan found, a number expected" in capsys.readouterr().err


def test_a_lora_for_one_half_leaves_the_other(checkpoint, lora, tmp_path):
    one = {name: tensor for name, tensor in load_file(lora).items() if name.startswith("lora_unet")}
    save_file(one, tmp_path / "one.safetensors")
    pipeline = Pipeline(checkpoint, loras=[(tmp_path / "one.safetensors", 1.0)])
    assert set(pipeline.loras[0][0].layers) == {TRANSFORMER} and LANGUAGE not in pipeline.loras[0][0].layers
    assert pipeline.generate("what") == Pipeline(checkpoint).generate("what")
