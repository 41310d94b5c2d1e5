"""GGUF: blocks as the package `gguf` reads them, errors of each level, files written and loaded without ComfyUI."""

import hashlib
import sys

import numpy
import pytest
import torch
from pack.internvl_u import convert as module
from pack.internvl_u import dequantize as blocks
from pack.internvl_u import gguf_file, load, quantize, weights
from pack.internvl_u.__main__ import main
from pack.internvl_u.checkpoint import holds_language_model, holds_transformer, open_checkpoint, open_part
from pack.internvl_u.defaults import GGUF_DTYPES
from pack.internvl_u.encoder import Encoder
from pack.internvl_u.gguf_convert import TOKEN_MATRICES, form_of
from pack.internvl_u.gguf_header import read_header
from pack.internvl_u.mmdit import time_embedding
from pack.internvl_u.prompt import branch_prompts
from pack.internvl_u.rope import Span
from safetensors.torch import load_file

gguf = pytest.importorskip("gguf", reason="a development tool, see requirements-dev.txt")
NUMBERS = {
    "normal": lambda made: torch.randn(1 << 18, generator=made) * 0.02,
    "with outliers": lambda made: torch.randn(1 << 18, generator=made) ** 3 * 0.02,
    "of one sign": lambda made: torch.rand(1 << 18, generator=made) + 0.5,
    "ascending": lambda made: torch.linspace(-1, 1, 1 << 18),
}


def kind(form):
    return gguf.GGMLQuantizationType[form]


def theirs(packed, form):
    with numpy.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind(form)))


def packed_by(form, values):
    if form == "Q8_0":
        return torch.from_numpy(gguf.quants.quantize(values.numpy()[None], kind(form)))
    return quantize.quantize(values, form)[None]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("form", blocks.FORMATS)
def test_any_bytes_are_unpacked_bit_for_bit(form):
    packed = torch.randint(0, 256, (500, 3 * blocks.FORMATS[form].size), dtype=torch.uint8)
    ours, expected = blocks.dequantize(packed, form), theirs(packed, form)
    assert ours.shape == (500, 3 * blocks.FORMATS[form].values)
    same = (ours.view(torch.int32) == expected.view(torch.int32)) | (ours.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} values differ"
    assert expected.isfinite().float().mean() > 0.5


@pytest.mark.parametrize("form", blocks.FORMATS)
def test_formats_are_as_large_as_the_package_says(form):
    assert blocks.FORMATS[form][:2] == gguf.GGML_QUANT_SIZES[kind(form)]


@pytest.mark.parametrize("form", GGUF_DTYPES)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_real_blocks_are_unpacked_bit_for_bit(form, numbers):
    packed = packed_by(form, NUMBERS[numbers](torch.Generator().manual_seed(1)))
    assert torch.equal(blocks.dequantize(packed, form), theirs(packed, form))


def test_large_matrices_are_unpacked_in_pieces_and_the_same(monkeypatch):
    packed = torch.randint(0, 60, (64, 4 * 144), dtype=torch.uint8)
    whole, halved = blocks.dequantize(packed, "Q4_K"), blocks.dequantize(packed, "Q4_K", torch.bfloat16)
    hidden = torch.randn(2, 3, 1024)
    bias = torch.randn(64)
    product = blocks.packed_linear(hidden, packed, "Q4_K", bias)
    monkeypatch.setattr(blocks, "CPU_CHUNK", 5000)
    monkeypatch.setattr(blocks, "WHOLE", 9000)
    assert torch.equal(blocks.dequantize(packed, "Q4_K"), whole)
    assert torch.equal(blocks.dequantize(packed, "Q4_K", torch.bfloat16), halved)
    torch.testing.assert_close(blocks.packed_linear(hidden, packed, "Q4_K", bias), product, rtol=1e-4, atol=1e-2)


def by_range(values, bits):
    """The error of the plain way: each 32 values from lowest to highest, scales in 6 bits as in the file."""
    top, values = 2**bits - 1, values.view(-1, 8, 32)
    low = values.amin(-1, keepdim=True).clamp(max=0)
    step = (values.amax(-1, keepdim=True).clamp(min=0) - low) / top
    scale, shift = ((one.amax(1, keepdim=True) / 63).half().float() for one in (step, -low))
    step, low = scale * (step / scale).round(), -shift * (-low / shift).nan_to_num(0).round()
    whole = ((values - low) / step).nan_to_num(0).round().clamp(0, top)
    return relative((whole * step + low).flatten(), values.flatten())


def by_largest(values):
    """The same of Q6_K: each 16 values by their largest, in steps of a 32nd of it, scales in 8 bits."""
    values = values.view(-1, 16, 16)
    step = values.abs().amax(-1, keepdim=True) / 31
    scale = (step.amax(1, keepdim=True) / 127).half().float()
    step = scale * (step / scale).round()
    return relative(((values / step).round().clamp(-32, 31) * step).flatten(), values.flatten())


@pytest.mark.parametrize("numbers", ["normal", "with outliers", "of one sign"])
@pytest.mark.parametrize("form", ["Q4_K", "Q5_K", "Q6_K"])
def test_the_search_is_better_than_plain_rounding(form, numbers):
    values = NUMBERS[numbers](torch.Generator().manual_seed(2))
    found = relative(theirs(packed_by(form, values), form)[0], values)
    plain = by_largest(values) if form == "Q6_K" else by_range(values, int(form[1]))
    assert found < 0.97 * plain, (found, plain)


@pytest.mark.parametrize("form, largest", [("Q8_0", 0.0055), ("Q6_K", 0.0168), ("Q5_K", 0.036), ("Q4_K", 0.072)])
def test_the_error_of_normal_numbers_is_that_of_the_level(form, largest):
    values = NUMBERS["normal"](torch.Generator().manual_seed(3))
    assert 0.8 * largest < relative(theirs(packed_by(form, values), form)[0], values) < largest


@pytest.mark.parametrize("form", GGUF_DTYPES)
@pytest.mark.parametrize("values", [0.0, 1e-30, -1e-30, 1.0, -3.0, 1e30, -1e30])
def test_numbers_without_a_range_stay_numbers(form, values):
    numbers = torch.full((512,), values)
    numbers[256:] = 0
    found = theirs(packed_by(form, numbers), form)[0] if abs(values) < 1e9 or form != "Q8_0" else torch.zeros(512)
    assert found.isfinite().all() and not found[256:].any()
    if values in (1.0, -3.0):
        torch.testing.assert_close(found, numbers, rtol=0.02, atol=0)


def test_which_tensors_are_packed():
    wide = (512, 2048)
    assert form_of("transformer_blocks.0.attn.to_q.weight", wide, "Q4_K") == "Q4_K"
    assert form_of("transformer_blocks.0.img_mod.1.weight", wide, "Q5_K") == "Q5_K"
    assert form_of("vision_model.encoder.layers.0.mlp.fc1.weight", wide, "Q6_K") == "Q6_K"
    assert {form_of(name, wide, "Q4_K") for name in TOKEN_MATRICES} == {"Q6_K"}
    assert {form_of(name, wide, "Q8_0") for name in TOKEN_MATRICES} == {"Q8_0"}
    for name in ("img_in", "txt_in", "proj_out", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1"):
        assert form_of(f"{name}.weight", wide, "Q4_K") == "BF16"
    assert form_of("special_token_embedding.weight", wide, "Q4_K") == "BF16"
    assert form_of("vision_model.embeddings.patch_embedding.weight", (64, 3, 14, 14), "Q4_K") == "BF16"
    assert form_of("transformer_blocks.0.attn.to_q.bias", (512,), "Q4_K") == "BF16"
    assert form_of("transformer_blocks.0.attn.to_q.weight", (512, 192), "Q4_K") == "Q8_0"
    assert form_of("transformer_blocks.0.attn.to_q.weight", (512, 40), "Q4_K") == "BF16"


@pytest.fixture(scope="module", params=GGUF_DTYPES)
def converted(request, checkpoint, tmp_path_factory):
    files = module.convert(checkpoint, tmp_path_factory.mktemp("gguf"), request.param)
    return request.param, dict(zip(("drawing", "language", "vae"), files))


PARTS = {"drawing": "generation_decoder", "language": "vlm"}


def test_files_have_their_names_and_checksums(converted):
    dtype, files = converted
    assert [file.name for file in files.values()] == [
        f"internvl_u_{dtype}.gguf",
        f"internvl_u_mllm_{dtype}.gguf",
        "internvl_u_vae_bf16.safetensors",
    ]
    for file in files.values():
        digest, name = file.with_name(file.name + ".sha256").read_text().split()
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest() and name == file.name
        assert not list(file.parent.glob("*.part"))


def test_the_package_reads_what_we_write_and_finds_the_same(converted, checkpoint):
    dtype, files = converted
    for name, part in PARTS.items():
        read = gguf.GGUFReader(files[name])
        assert read.get_field("general.architecture").contents() == "internvl_u"
        ours, original = open_part(files[name], part), open_part(checkpoint, part)
        assert {tensor.name for tensor in read.tensors} == ours.weights.keys() == original.weights.keys()
        assert ours.shapes == original.shapes and ours.config == original.config
        for tensor in read.tensors:
            found, form = ours.weights[tensor.name], tensor.tensor_type.name
            assert numpy.array_equal(found.view(torch.uint8).numpy().ravel(), tensor.data.view(numpy.uint8).ravel())
            if form == "BF16":
                assert torch.equal(found, original.weights[tensor.name].to(torch.bfloat16)), tensor.name
            else:
                error = relative(blocks.dequantize(found, form), original.weights[tensor.name].float())
                assert error < {"Q8_0": 0.008, "Q6_K": 0.022, "Q5_K": 0.05, "Q4_K": 0.1}[form], tensor.name


def test_files_carry_configuration_and_tokenizer(checkpoint, converted):
    file = converted[1]["language"]
    ours, original = (Encoder.from_checkpoint(open_checkpoint(one)) for one in (file, checkpoint))
    text = "A red circle, 一个 <img> test!"
    assert branch_prompts(ours.tokenizer, text) == branch_prompts(original.tokenizer, text)
    assert (ours.layers, ours.sizes, ours.mean) == (original.layers, original.sizes, original.mean)


def test_a_listing_tells_the_parts_apart(converted):
    files = converted[1]
    assert [holds_transformer(file) for file in files.values()] == [True, False, False]
    assert [holds_language_model(file) for file in files.values()] == [False, True, False]
    with pytest.raises(RuntimeError, match="holds the vlm of InternVL-U, generation_decoder expected"):
        load.load_mmdit(files["language"])


def velocity(model, tokens=9):
    made = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 8, 8, generator=made)
    context = torch.randn(tokens, model.config.context_width, generator=made)
    branch = model.branch(context, (Span(tokens),), (8, 8), [])
    with torch.inference_mode():
        return model(latents, time_embedding(torch.tensor([500.0])), [branch])


@pytest.mark.parametrize("source", ["tiny", "nano"])
def test_a_velocity_is_nearly_that_of_the_folder(source, checkpoint, tmp_path, converted):
    from tests.conftest import NANO

    folder = NANO if source == "nano" else checkpoint
    dtype, files = converted
    if source == "nano":
        files = {"drawing": module.convert(folder, tmp_path, dtype)[0]}
    found = velocity(load.load_mmdit(files["drawing"], dtype=torch.float32))
    error = relative(found, velocity(load.load_mmdit(folder, dtype=torch.float32)))
    assert 1e-4 < error < LARGEST[source][dtype], error


LARGEST = {
    "tiny": {"Q8_0": 0.02, "Q6_K": 0.02, "Q5_K": 0.03, "Q4_K": 0.05},
    "nano": {"Q8_0": 0.04, "Q6_K": 0.05, "Q5_K": 0.1, "Q4_K": 0.2},
}
"""Relative errors. Rows of 64, 128 and 192 values are Q8_0 at every level: only the widest matrices are K-quants."""


def test_hidden_states_are_nearly_those_of_the_folder(checkpoint, converted):
    dtype, files = converted
    states = []
    for source in (files["language"], checkpoint):
        model = load.load_mllm(source, dtype=torch.float32)
        with torch.inference_mode():
            embedded = model.embed([5, 6, 7, 8, 9], {}, torch.device("cpu"))
            states.append(model.language_model(embedded, None, (-1, -2))[1])
    assert states[0].dtype == torch.float32 and relative(*states) < {"Q4_K": 0.1}.get(dtype, 0.05)


def test_matrices_stay_packed_in_the_files_dtype_and_in_bf16(converted):
    for dtype in (None, torch.bfloat16):
        model = load.load_mmdit(converted[1]["drawing"], dtype=dtype)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.uint8, torch.bfloat16}
        layer = model.transformer_blocks[0].attn.to_q
        assert layer(torch.randn(2, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model = load.load_mllm(converted[1]["language"])
    assert model.embed([5], {}, torch.device("cpu")).dtype == torch.bfloat16


def test_large_files_stay_mapped_and_are_not_copied(converted, monkeypatch):
    monkeypatch.setattr(weights, "SMALL", 0)
    monkeypatch.setattr(gguf_file, "SMALL", 0)
    file = converted[1]["drawing"]
    model = load.load_mmdit(file)
    assert [state.path for state in model.mapped] == [file]
    with open("/proc/self/maps") as maps:
        assert file.name in maps.read()


def test_a_packed_tensor_that_is_no_matrix_is_refused(converted, tmp_path):
    def edit(name, form, shape):
        return "Q8_0" if name == "txt_norm.weight" else form

    file = rewritten(converted[1]["drawing"], tmp_path / "odd.gguf", edit)
    with pytest.raises(
        RuntimeError, match=r"1 of \d+ packed tensors are no matrices of layers \(txt_norm.weight: Q8_0"
    ):
        load.load_mmdit(file)


def rewritten(source, target, form_for, description=None):
    """Writes a GGUF file again, some tensors in another format, through the package."""
    writer = gguf.GGUFWriter(target, "internvl_u")
    writer.add_string("internvl_u.description", description or read_header(source).description)
    for name, stored in read_header(source).tensors.items():
        form = form_for(name, stored.form, stored.shape)
        part = open_part(source, open_checkpoint(source).description.part)
        values = part.weights[name]
        if form != stored.form:
            values = torch.zeros(blocks.PackedMatrix(form, stored.shape).stored_shape, dtype=torch.uint8)
        data = values.view(torch.uint8).numpy()
        if form == "BF16":
            writer.add_tensor(name, data.reshape(*stored.shape[:-1], -1), raw_dtype=kind(form))
        else:
            writer.add_tensor(name, data, raw_dtype=kind(form))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_numbers_that_are_none_are_not_converted(broken, tmp_path):
    from safetensors.torch import save_file

    file = broken / "generation_decoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["decoder.transformer_blocks.0.attn.to_q.weight"][3, 4] = torch.nan
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match=r"to_q.weight holds values that are infinite or not a number"):
        module.convert(broken, tmp_path / "out", "Q8_0")
    assert not [one for one in (tmp_path / "out").rglob("*") if one.is_file()]


def test_without_the_package_files_are_read_but_not_written(converted, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        module.convert(checkpoint, tmp_path, "Q8_0")
    assert not list(tmp_path.iterdir())
    assert velocity(load.load_mmdit(converted[1]["drawing"], dtype=torch.float32)).isfinite().all()


def test_the_command_line_tells_what_was_packed(checkpoint, tmp_path, capsys):
    assert main(["convert", "--model", str(checkpoint), "--out", str(tmp_path), "--dtype", "Q4_K"]) == 0
    told = capsys.readouterr()
    assert told.out.count(".gguf") == 2 and "internvl_u_Q4_K.gguf: " in told.err and " Q8_0" in told.err
    assert main(["convert", "--model", str(checkpoint), "--out", str(tmp_path), "--dtype", "Q4_K"]) == 1
    assert "exist already" in capsys.readouterr().err
