"""Configurations and headers are data of strangers: refused by file and key, before anything is built from them."""

import json
import os
import resource
import shutil
import struct
import time

import pytest
import torch
from pack.internvl_u import files, load, schema, weights
from pack.internvl_u.checkpoint import SingleFile, open_part
from pack.internvl_u.convert import convert
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from safetensors.torch import load_file, save_file

from .test_model_folders import graph

VLM, DRAWING, PROCESSOR, VAE = (
    "vlm/config.json",
    "generation_decoder/config.json",
    "processor/processor_config.json",
    "vae/config.json",
)
HUGE, DIGITS = 10**12, 10**4000
DEEP = json.loads("[" * 200 + "]" * 200)
WHOLE = (None, "4", True, 1.5, [], {}, 0, -1, HUGE, DIGITS, float("nan"))
"""Values that no count of layers, heads or the like is."""
NUMBER = (None, "1", [], {}, float("nan"), float("inf"), -1.0, 0)


def cases():
    """Yields (file, key, value) of each change that has to be refused."""
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        yield from ((VLM, f"llm_config.{key}", value) for value in WHOLE if value is not None)
    for value in WHOLE:
        yield VLM, "llm_config.max_position_embeddings", value
        yield VLM, "vision_config.num_attention_heads", value
        yield DRAWING, "gen_image_width", value
        yield PROCESSOR, "image_gen_processor_kwargs.max_dynamic_patch", value
        yield PROCESSOR, "image_gen_processor_kwargs.vae_downsample_factor", value
    for value in (*NUMBER, 1e300):
        yield VLM, "llm_config.rms_norm_eps", value
    for key in ("num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim"):
        yield from ((DRAWING, f"decoder_config.{key}", value) for value in (0, -1, HUGE, "2", True, 1e9))
    for value in (0, 3, -2, HUGE, "2", None, 1 << 20):
        yield DRAWING, "decoder_config.patch_size", value
    for value in ([], [16], [4, 6, 6, 6], [4, 6, 7], [0, 8, 8], [-4, 10, 10], [4, 6, HUGE], "468", None, [4.0, 6, 6]):
        yield DRAWING, "decoder_config.axes_dims_rope", value
    for value in ([], "ab", [1.5], None, [HUGE], [[]], [True], [-1] * 100):
        yield DRAWING, "vlm_select_layer", value
    for value in (*NUMBER[1:], 1e-300, 1e300):
        yield DRAWING, "vlm_cond_position_scale_factor", value
    for value in ("llama", None, 5, [], ""):
        yield VLM, "llm_config.model_type", value
    for value in ({"rope_type": "yarn", "factor": -1.0}, {"rope_type": "x"}, {"factor": float("nan")}, [], "yarn", 5):
        yield VLM, "llm_config.rope_scaling", value
    for key in ("llm_config", "vision_config"):
        yield from ((VLM, key, value) for value in (None, [], "x", 5, DEEP))
    for value in (0, -1, 1.5, "0.5", None, float("nan"), 1e-300):
        yield VLM, "downsample_ratio", value
    for value in (1, 13, -112, HUGE, "112", 113):
        yield VLM, "force_image_size", value
    for value in ([0.5, 0.5], [0.5] * 4, ["a"] * 3, None, 5, [float("nan")] * 3):
        yield PROCESSOR, "image_processor_kwargs.image_mean", value
    for value in ([0.0] * 3, [-1.0] * 3, [0.5, 0.5], None):
        yield PROCESSOR, "image_processor_kwargs.image_std", value
    for value in (0, -5, 10**9, "1024", 1.5):
        yield PROCESSOR, "image_gen_processor_kwargs.max_length", value
    for value in ([0.0] * 15, None, [float("nan")] * 16, ["a"] * 16):
        yield VAE, "latents_mean", value
    for value in ([0.0] * 16, [-1.0] * 16, []):
        yield VAE, "latents_std", value
    yield from ((VAE, "base_dim", value) for value in (0, HUGE, 5, "4"))
    yield from ((VAE, "num_res_blocks", value) for value in (0, 10**9, None))
    yield from ((VAE, "temperal_downsample", value) for value in ([], [True] * 3, [0, 1, 1], "no"))
    yield from ((VAE, "dim_mult", value) for value in ([], [1, 2, 4], [10**9] * 4))


def change(folder, file, key, value):
    """Writes a value into a JSON file, at a key of keys with points between."""
    place = folder / file
    whole = json.loads(place.read_text(encoding="utf-8"))
    *outer, last = key.split(".")
    inner = whole
    for name in outer:
        inner = inner[name]
    inner[last] = value
    place.write_text(json.dumps(whole), encoding="utf-8")


def shown(value):
    return repr(value)[:30]


@pytest.fixture(scope="module")
def scratch(checkpoint, tmp_path_factory):
    """A copy of the checkpoint whose JSON files are put back after each test."""
    return shutil.copytree(checkpoint, tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("file, key, value", [*cases()], ids=lambda value: shown(value))
def test_a_value_that_cannot_be_is_refused_by_file_and_key_and_costs_nothing(scratch, checkpoint, file, key, value):
    change(scratch, file, key, value)
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(RuntimeError) as error:
            pipeline = Pipeline(scratch)
            part, loader = {VLM: ("mllm", load.load_mllm), DRAWING: ("mmdit", load.load_mmdit)}.get(
                file, ("vae", load.load_vae)
            )
            loader(scratch)
            if key == "vlm_select_layer":
                pipeline.encode_prompt(ImageRequest("x", 16, 16, 1))
    finally:
        shutil.copy(checkpoint / file, scratch / file)
    told = str(error.value)
    last = key.rpartition(".")[2]
    related = {"force_image_size": "image size", "downsample_ratio": "downsample", "base_dim": "vae"}
    assert last in told or related.get(last, last) in told or "axes_dims_rope" in told, told
    assert str(scratch) in told or "vae" in told or "vlm_select_layer" in told, told
    assert "expected" in told or "add up" in told, told
    assert len(told) < 1000, "an error repeats what a file says"
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "memory was taken"


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
@pytest.mark.parametrize("file", [VLM, DRAWING, PROCESSOR, VAE, "model_index.json"])
def test_deep_nesting_is_refused_by_the_name_of_the_file(broken, file, text):
    (broken / file).write_text(text)
    with pytest.raises(RuntimeError, match=f"{file.replace('.', '[.]')} is not readable as JSON"):
        pipeline = Pipeline(broken)
        pipeline.draw(ImageRequest("x", 16, 16, 1))


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"  <html>", "is a web page"),
        (b'{"error":"Invalid username or password."}', "llm_config nothing found, a value expected"),
        (bytes(100), "begins with zeros"),
        (b"\xff\xfe{\0}\0", "is not readable as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not readable as JSON"),
        (b"null", "holds a NoneType, a JSON object expected"),
        (b"5", "holds a int, a JSON object expected"),
        (b'"x"', "holds a str, a JSON object expected"),
        (b"[]", "holds a list, a JSON object expected"),
        (b"{}", "llm_config nothing found, a value expected"),
        (b"{'a': 1}", "is not readable as JSON"),
        (b"NaN", "holds a float, a JSON object expected"),
    ],
)
def test_a_configuration_that_is_another_file_is_named_for_what_it_is(broken, content, sentence):
    (broken / VLM).write_bytes(content)
    with pytest.raises(RuntimeError, match=sentence) as error:
        load.load_mllm(broken)
    assert VLM in str(error.value) and "download again" not in str(error.value).lower()


def test_a_file_without_the_right_to_be_read_is_named(broken, monkeypatch):
    def refuse(*args, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(broken), "read_text", refuse)
    with pytest.raises(RuntimeError, match="config.json may not be read by this user: change its rights"):
        load.load_mllm(broken)
    monkeypatch.undo()
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(RuntimeError, match="vlm cannot be listed .Permission denied.: change its rights"):
        load.load_mllm(broken)


def test_a_configuration_is_not_larger_than_it_can_be(broken, monkeypatch):
    monkeypatch.setattr(schema, "LARGEST_JSON", 100)
    with pytest.raises(RuntimeError, match="bytes, 100 expected at most"):
        load.load_mllm(broken)


def test_settings_that_transformers_would_obey_are_not_handed_on(broken):
    """Such as 10 ** 12 labels, of which it would make a table, or a number of beams: it reads stretched positions."""
    config = json.loads((broken / VLM).read_text())
    config["llm_config"] |= {"num_labels": HUGE, "pruned_heads": {"0": [0]}, "pad_token_id": HUGE, "num_beams": 7}
    config["llm_config"] |= {"quantization_config": {"quant_method": "x"}, "auto_map": {"AutoConfig": "x.Y"}}
    config["llm_config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0}
    (broken / VLM).write_text(json.dumps(config))
    language = load.load_mllm(broken).language_model
    assert not {"num_labels", "pruned_heads", "num_beams", "auto_map"} & vars(language.config).keys()
    assert torch.isfinite(language(torch.zeros(1, 3, language.config.hidden_size))[0]).all()


@pytest.mark.parametrize(
    "name",
    ["transformer_blocks.999999999.x", "transformer_blocks.3.x", f"transformer_blocks.{HUGE}.x", "a\nb", "x" * 5000],
)
def test_no_layer_is_built_for_the_name_of_a_tensor(broken, name):
    file = broken / "generation_decoder" / "model.safetensors"
    save_file(load_file(file) | {f"decoder.{name}": torch.zeros(1)}, file)
    begun = time.process_time()
    with pytest.raises(RuntimeError, match="layers transformer_blocks.N found|1 unexpected"):
        load.load_mmdit(broken)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("count", ["99999999999", "9" * 200])
def test_no_list_is_made_for_the_number_of_shards_that_a_name_announces(broken, count):
    folder = broken / "vlm"
    (folder / "model.safetensors.index.json").unlink()
    os.rename(folder / "model-00001-of-00003.safetensors", folder / f"model-00001-of-{count}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"weight files are missing: .*model-00002-of-9"):
        load.load_mllm(broken)


@pytest.mark.parametrize("value", [None, [], "x", {"a": 1}, {"a": None}, {"a": ["b"]}])
def test_an_index_of_shards_that_is_none_is_named(broken, value):
    (broken / "vlm" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with pytest.raises(RuntimeError, match=r"index.json: weight_map\S* .* found, .* expected"):
        load.load_mllm(broken)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.uint8, torch.int64, torch.int16])
@pytest.mark.parametrize("part", ["vlm", "generation_decoder", "vae"])
def test_weights_of_another_dtype_are_named(broken, part, dtype):
    file = sorted((broken / part).glob("*.safetensors"))[0]
    stored = load_file(file)
    name = sorted(stored)[0]
    stored[name] = stored[name].to(dtype)
    save_file(stored, file)
    sentence = f"{part}: 1 of .* tensors are of an unknown dtype .{name.removeprefix('decoder.')}: {str(dtype)[6:]}"
    with pytest.raises(
        RuntimeError, match=sentence if part != "vae" else "vae: 1 of .* tensors are of an unknown dtype"
    ):
        open_part(broken, part)


HEADERS = {
    "overlapping": {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])},
    "a hole": {"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [8, 12])},
    "a shape too small": {"a": ("F32", [1], [0, 12])},
    "a shape too large": {"a": ("F32", [100], [0, 12])},
    "a shape that overflows": {"a": ("F32", [2**62, 2**62], [0, 12])},
    "a negative shape": {"a": ("F32", [-3], [0, 12])},
    "an unknown dtype": {"a": ("X9", [3], [0, 12])},
    "backwards": {"a": ("F32", [3], [12, 0])},
    "bytes left over": {"a": ("F32", [1], [0, 4])},
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("how", ["load", "native", "convert"])
def test_a_header_whose_tensors_do_not_fit_is_refused_everywhere(broken, native, tmp_path, case, how):
    entries = {f"decoder.{n}": {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in HEADERS[case].items()}
    text = json.dumps(entries).encode()
    file = broken / "generation_decoder" / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    act = {
        "load": lambda: load.load_mmdit(broken),
        "native": lambda: native.load(broken, "fp32"),
        "convert": lambda: convert(broken, tmp_path / "out"),
    }[how]
    with pytest.raises(RuntimeError, match="model.safetensors is (not readable as safetensors|shorter than)"):
        act()
    assert not (tmp_path / "out").exists()


def strange(broken, part, edit):
    """Rewrites the first weight file of a part."""
    file = sorted((broken / part).glob("*.safetensors"))[0]
    stored = load_file(file)
    edit(stored)
    save_file(stored, file)


def drop(stored):
    del stored[sorted(stored)[0]]


def add(stored):
    stored["foreign.weight"] = torch.zeros(3)


def reshape(stored):
    name = sorted(stored)[0]
    stored[name] = torch.zeros(*stored[name].shape, 1)


def infinite(stored):
    name = sorted(stored)[0]
    stored[name] = torch.full_like(stored[name], float("inf"))


def not_a_number(stored):
    name = sorted(name for name in stored if name != "encoder_padding_token")[-1]
    stored[name].view(-1)[-1] = float("nan")


CONVERTED = {
    drop: "1 missing|not an InternVL-U",
    add: "1 unexpected",
    reshape: "1 of another shape|not an InternVL-U",
    infinite: "infinite or not a number",
    not_a_number: "infinite or not a number",
}


@pytest.mark.parametrize("part", ["vlm", "generation_decoder", "vae"])
@pytest.mark.parametrize("edit", CONVERTED, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_scaled"])
def test_convert_checks_what_it_reads_as_strictly_as_loading_does(broken, tmp_path, part, edit, dtype):
    strange(broken, part, edit)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match=CONVERTED[edit]):
        convert(broken, out, dtype)
    assert not [file for file in out.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "metadata, sentence",
    [
        ({"internvl_u": "5"}, "holds a int"),
        ({"internvl_u": "{"}, "is not readable as JSON"),
        ({"internvl_u": '{"part": "vaes"}'}, "part 'vaes' found"),
        ({"internvl_u": '{"config": 5}'}, "config 5 found, a valid dictionary expected"),
        ({"internvl_u": '{"tokenizer": []}'}, "tokenizer \\[\\] found, a valid string expected"),
        ({"internvl_u": '{"drawing": null}'}, "drawing None found"),
        ({"internvl_u": "[" * 100_000}, "is not readable as JSON"),
        ({"_quantization_metadata": "{"}, "is not readable as JSON"),
        ({"_quantization_metadata": '{"layers": 5}'}, "layers 5 found"),
        ({"_quantization_metadata": '{"layers": {"a": 5}}'}, "layers.a 5 found"),
        ({"_quantization_metadata": '{"layers": {"a": {"format": "int8_tensorwise"}}}'}, "a.weight is float32"),
        ({"_quantization_metadata": '{"layers": {"a": {"format": "int3"}}}'}, "a is int3, one of float8_e4m3fn, "),
        ({"_quantization_metadata": '{"layers": {"a": {"format": "mxfp8", "convrot_groupsize": 7}}}'}, "groupsize 7"),
        ({"_quantization_metadata": '{"layers": {"a": {"format": null}}}'}, "layers.a.format None found"),
    ],
)
def test_metadata_that_are_none_of_ours_are_named(tmp_path, metadata, sentence):
    file = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.zeros(1)}, file, metadata)
    with pytest.raises(RuntimeError, match=sentence) as error:
        open_part(file, "generation_decoder")
    assert str(file) in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, [1.0, 2.0], []])
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
def test_a_scale_that_is_none_is_named(tmp_path, name, value):
    file = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), f"a.{name}": torch.tensor(value)}, file)
    with pytest.raises(RuntimeError, match="the scale of a is .*, one number above 0 expected"):
        open_part(file, "generation_decoder")


def test_a_scale_of_nothing_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a.weight_scale": torch.tensor(1.0)}, file)
    with pytest.raises(RuntimeError, match="a.weight_scale scales nothing"):
        open_part(file, "generation_decoder")
    save_file({"a.comfy_quant": torch.tensor(list(b'{"format": "int8"}'), dtype=torch.uint8)}, file)
    with pytest.raises(RuntimeError, match="a is int8, one of float8_e4m3fn"):
        open_part(file, "generation_decoder")


def test_tokens_that_the_language_model_does_not_know_are_refused_before_they_are_looked_up(broken):
    file = broken / "processor" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["q"] = 100_000
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    pipeline = Pipeline(broken)
    pipeline.draw(ImageRequest("a cat", 16, 16, 1))
    with pytest.raises(RuntimeError, match=r"token 100000 found, 485 tokens .0 to 484. known"):
        pipeline.draw(ImageRequest("a q", 16, 16, 1))
    with pytest.raises(RuntimeError, match="485 tokens"):
        pipeline.answer("a q")


def test_a_language_model_and_a_transformer_of_other_widths_are_named(broken):
    change(broken, DRAWING, "vlm_select_layer", [-1])
    with pytest.raises(ValueError, match="a context of 64 values per token found, 128 expected"):
        Pipeline(broken).draw(ImageRequest("x", 16, 16, 1))


# A real server: each model folder is wrong in another way, and the next good job runs.

SERVED = {
    "layers of a billion": (lambda f: change(f, VLM, "llm_config.num_hidden_layers", 10**9), "num_hidden_layers"),
    "heads of nothing": (lambda f: change(f, VLM, "vision_config.num_attention_heads", 0), "num_attention_heads"),
    "gigapixels": (
        lambda f: change(f, PROCESSOR, "image_gen_processor_kwargs.max_dynamic_patch", 10**9),
        "max_dynamic_patch",
    ),
    "a deep file": (lambda f: (f / DRAWING).write_text("[" * 10**5), "is not readable as JSON"),
    "digits": (lambda f: (f / DRAWING).write_text('{"a": ' + "9" * 5000 + "}"), "is not readable as JSON"),
    "an lfs pointer": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1"
        ),
        "is a Git LFS pointer",
    ),
    "a page": (
        lambda f: (f / "generation_decoder/model.safetensors").write_text("<!DOCTYPE html>" + "x" * 1000),
        "is a web page",
    ),
    "an empty file": (lambda f: (f / "generation_decoder/model.safetensors").write_bytes(b""), "is empty"),
    "a cut file": (
        lambda f: os.truncate(f / "vlm/model-00002-of-00003.safetensors", 9000),
        "is shorter than its header",
    ),
    "int8": (
        lambda f: strange(f, "generation_decoder", lambda s: s.update({k: s[k].to(torch.int8) for k in list(s)[:1]})),
        "are of an unknown dtype",
    ),
    "a block too many": (
        lambda f: strange(
            f, "generation_decoder", lambda s: s.update({"decoder.transformer_blocks.999999999.x": torch.zeros(1)})
        ),
        "layers transformer_blocks.N found",
    ),
    "an empty tokenizer": (lambda f: (f / "processor/tokenizer.json").write_bytes(b""), "is empty"),
    "a tokenizer that is a list": (lambda f: (f / "processor/tokenizer.json").write_text("[]"), "is unreadable"),
    "a tokenizer that is a page": (
        lambda f: (f / "processor/tokenizer.json").write_text("<html>"),
        "is a web page",
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_a_wrong_model_folder_is_told_and_the_next_good_job_runs(littered, checkpoint, case):
    harm, sentence = SERVED[case]
    folder = littered.base / "models" / "InternVL-U" / "wrong"
    shutil.copytree(checkpoint, folder)
    try:
        harm(folder)
        entry = littered.run(graph(model_name="wrong"))
        assert entry["status"]["status_str"] == "error"
        told = littered.error(entry)
        assert sentence in told and "wrong" in told and "download again" not in told.lower(), told
    finally:
        shutil.rmtree(folder)
    assert littered.run(graph())["status"]["status_str"] == "success"


# Files that change while they are in use


def test_a_file_that_was_written_to_is_noticed_and_one_that_was_replaced_is_not(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"1" * 100)
    before = files.state_of(file)
    files.check_unchanged([before])
    os.utime(file, ns=(1, 1))
    with pytest.raises(RuntimeError, match="has been written to since it was loaded .100 bytes found, 100 before"):
        files.check_unchanged([before])
    (tmp_path / "y").write_bytes(b"2" * 50)
    os.replace(tmp_path / "y", file)
    files.check_unchanged([before])
    file.unlink()
    files.check_unchanged([before])


CHANGES = {
    "cut": lambda file: os.truncate(file, 20_000),
    "written over": lambda file: file.write_bytes(b"x" * file.stat().st_size),
    "an older time": lambda file: os.utime(file, (1, 1)),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("part", ["vlm", "generation_decoder"])
def test_mapped_weights_that_change_in_the_middle_of_a_job_end_it_with_a_sentence(broken, monkeypatch, part, how):
    monkeypatch.setattr(weights, "SMALL", 0)
    pipeline = Pipeline(broken)
    pipeline.draw(ImageRequest("x", 16, 16, 1))
    file = sorted((broken / part).glob("*.safetensors"))[0]

    def act(done):
        if done == 1 and how != "cut":  # what has been cut is no longer there: a test process would end by a signal
            CHANGES[how](file)

    with pytest.raises(RuntimeError, match=f"{file.name} has been written to since it was loaded"):
        if how == "cut":
            CHANGES[how](file)
        pipeline.draw(ImageRequest("y", 16, 16, 3), act)
        pipeline.draw(ImageRequest("y", 16, 16, 3))


@pytest.mark.parametrize("how", [*CHANGES, "deleted"])
def test_weights_of_small_files_are_in_memory_whatever_happens_to_the_files(broken, how):
    pipeline = Pipeline(broken)
    request = ImageRequest("x", 16, 16, 2)
    expected = pipeline.draw(request)
    for file in broken.rglob("*.safetensors"):
        (CHANGES | {"deleted": lambda file: file.unlink()})[how](file)
    assert pipeline.draw(request).tobytes() == expected.tobytes()


def test_a_server_lives_on_when_weights_are_cut_in_the_middle_of_a_job(littered, checkpoint):
    folder = littered.base / "models" / "InternVL-U" / "changing"
    shutil.copytree(checkpoint, folder)

    def act(kind, data):
        if kind == "progress" and data["value"] == 2:
            for file in folder.rglob("*.safetensors"):
                os.truncate(file, 1000)

    try:
        events, _ = littered.listen(graph(model_name="changing", steps=30, seed=5), act)
        assert events[-1][0] in ("execution_success", "execution_error")
        entry = littered.run(graph(model_name="changing", steps=2, seed=6))
        assert "is shorter than its header says" in littered.error(entry)
    finally:
        shutil.rmtree(folder)
    assert littered.run(graph())["status"]["status_str"] == "success"


def test_a_conversion_whose_source_changes_writes_nothing(broken, tmp_path):
    state = {"bytes": 0}

    def act(count):
        state["bytes"] += count
        if state["bytes"] == count:
            os.utime(broken / "vae" / "diffusion_pytorch_model.safetensors", (1, 1))

    with pytest.raises(RuntimeError, match="model.safetensors has been written to, replaced or removed meanwhile"):
        convert(broken, tmp_path / "out", on_bytes=act)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_a_description_is_read_once(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.zeros(1)}, file, {"internvl_u": '{"part": "vlm"}'})
    one = SingleFile(file)
    assert one.description.part == "vlm"
    file.unlink()
    assert one.description.part == "vlm"
