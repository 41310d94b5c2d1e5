"""Formats that ComfyUI alone knows: handed on to it, or refused by name; and files as other tools write them."""

import json

import pytest
import torch
from pack.internvl_u import fp8, int8
from pack.internvl_u.checkpoint import open_part
from pack.internvl_u.convert import convert
from safetensors.torch import load_file, save_file

HOSTS = {  # format: what from_float and the description take for a matrix of 64 columns, and the error of a velocity
    "mxfp8": ({}, {}, 0.12),
    "nvfp4": ({}, {}, 0.4),
    "convrot_w4a4": ({"convrot_groupsize": 64}, {"convrot_groupsize": 64}, 0.6),
    "asym_w4a8_int8": ({"convrot_groupsize": 64}, {"convrot_groupsize": 64}, 0.4),
}


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    """The checkpoint's three files in bf16."""
    return convert(checkpoint, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def check_velocity(parts, golden, near):
    """Compares the first velocity of a golden case with the official one."""

    def check(model, mllm, tolerance):
        from pack.internvl_u.mmdit import time_embedding

        case = golden("t2i_square")
        positive, *_ = mllm.encode(case.prompt)
        network = model.model.diffusion_model
        context = parts.model.PromptContext(network, case.context(0), positive[0][1][parts.model.LAYOUT], [])
        latents = case["mmdit_in"][0].to(model.model.manual_cast_dtype or network.dtype)
        velocity = network(latents, time_embedding(case["mmdit_t"][0][:1]), contexts=[context])
        near(velocity, case["mmdit_out"][0][:1], tolerance)

    return check


def rewritten(source, target, quantize):
    """Writes a file with `quantize(weight)` in place of each matrix: tensors by the ends of names, and a format."""
    part = open_part(source, "generation_decoder")
    weights = {}
    for name, tensor in part.weights.items():
        if not fp8.shrinks(name, tuple(tensor.shape)):
            weights[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        tensors, form = quantize(tensor.float())
        weights |= {f"{layer}.{end}": one.contiguous() for end, one in tensors.items()}
        weights[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
    save_file(weights, target, part.checkpoint.metadata(part.name))
    return target


def by_the_host(name):
    import comfy.quant_ops as host

    arguments, described, _ = HOSTS[name]
    algorithm = host.QUANT_ALGOS[name]

    def quantize(weight):
        made = host.QuantizedTensor.from_float(weight, algorithm["comfy_tensor_layout"], **arguments)
        tensors = {key.removeprefix("x."): one for key, one in made.state_dict("x.weight").items()}
        tensors = {
            key: one.view(torch.uint8) if one.dtype == torch.float8_e8m0fnu else one for key, one in tensors.items()
        }
        return tensors, {"format": name, **described}

    return quantize


@pytest.mark.parametrize("name", HOSTS)
def test_a_format_of_comfyuis_draws_where_comfyui_has_it_and_is_refused_by_name_where_not(
    native, plain, tmp_path, check_velocity, name
):
    from pack.native import compat

    if name not in compat.known_formats():
        file = rewritten(plain[0], tmp_path / "x.safetensors", lambda weight: unknown(name, weight))
        with pytest.raises(RuntimeError, match=f"in {name}, which this ComfyUI does not know"):
            native.load(file, "auto", plain[1], plain[2])
        return
    model, mllm, _ = native.load(rewritten(plain[0], tmp_path / "x.safetensors", by_the_host(name)), "auto", *plain[1:])
    check_velocity(model, mllm, HOSTS[name][2])


def unknown(name, weight):
    from pack.internvl_u.quantization import STORED

    columns = weight.shape[1] // (1 if name == "mxfp8" else 2)
    return {"weight": torch.zeros(len(weight), columns).to(STORED[name])}, {"format": name}


def test_the_language_model_in_a_format_of_comfyuis_is_refused_by_name(native, plain, tmp_path):
    weights, file = load_file(plain[1]), tmp_path / "x.safetensors"
    layer = "language_model.model.layers.0.self_attn.q_proj"
    matrix = weights[f"{layer}.weight"]
    weights[f"{layer}.weight"] = torch.zeros(len(matrix), matrix.shape[1] // 2, dtype=torch.uint8)
    weights[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file(weights, file, open_part(plain[1], "vlm").checkpoint.metadata("vlm"))
    with pytest.raises(RuntimeError, match="q_proj is a Linear in nvfp4, linear layers and .* expected here"):
        native.load(plain[0], "auto", file, plain[2])


SPELLINGS = {
    "per tensor": (lambda weight: (None, 0), {}),
    "per row": (lambda weight: (1, 0), {}),
    "per row, flat": (lambda weight: (2, 0), {}),
    "rotated": (lambda weight: (1, 64), {"convrot": True, "convrot_groupsize": 64}),
    "rotated, in params": (lambda weight: (1, 64), {"params": {"convrot": True, "convrot_groupsize": 64}}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_int8_as_the_tools_of_the_field_write_it(native, plain, tmp_path, check_velocity, spelling):
    """One scale or one per row, [rows] or [rows, 1], with the rotation in the format or in its `params`."""
    shape, described = SPELLINGS[spelling]

    def quantize(weight):
        axis, group = shape(weight)
        rotated = int8.rotate(weight, group) if group else weight
        scale = int8.scale_of(weight, group) if axis else rotated.abs().max() / 127
        stored = (rotated / scale).round().clamp(-127, 127).to(torch.int8)
        scale = scale.flatten() if axis == 2 else scale
        return {"weight": stored, "weight_scale": scale}, {"format": "int8_tensorwise", **described}

    model, mllm, _ = native.load(rewritten(plain[0], tmp_path / "x.safetensors", quantize), "auto", *plain[1:])
    check_velocity(model, mllm, 0.05)


@pytest.mark.parametrize("dtype", ["fp8_scaled", "int8", "int8_convrot"])
def test_a_lora_on_our_quantised_layers_adds_what_it_adds_to_plain_ones(native, checkpoint, tmp_path, dtype):
    """Our own arithmetic, as the language model has it, whole on the device and cast when used."""
    from pack.native.quantized import QuantizedLinear

    files = convert(checkpoint, tmp_path, dtype)
    _, mllm, _ = native.load(files[0], "auto", files[1], files[2])
    layer = mllm.model.language_model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantizedLinear)
    hidden, delta = torch.randn(5, 64), torch.randn(64, 64) / 10
    before = layer(hidden)
    dense = layer.convert_weight(layer.weight)
    assert torch.allclose(torch.nn.functional.linear(hidden, dense), before, atol=2e-2, rtol=1e-2)
    patched = layer.set_weight(dense + delta, return_weight=True)
    original = layer.weight
    layer.weight = torch.nn.Parameter(patched, requires_grad=False)
    assert torch.allclose(layer(hidden) - before, hidden @ delta.T, atol=1e-3)
    layer.weight = original
    layer.set_weight(dense + 10 * delta)
    assert layer.weight.dtype == original.dtype, "what has been patched takes no more memory"
    change, expected = layer(hidden) - before, 10 * hidden @ delta.T
    assert (change - expected).norm() < 0.06 * expected.norm()


TABLES = {
    "fp8, one scale": (torch.float8_e4m3fn, 0, 0),
    "e5m2, one scale": (torch.float8_e5m2, 0, 0),
    "int8, one scale": (torch.int8, 0, 0),
    "int8, one per row": (torch.int8, 1, 0),
    "int8, rotated": (torch.int8, 1, 64),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_of_embeddings_that_a_tool_has_quantised_is_read(native, plain, tmp_path, near, case):
    """convert_to_quant takes the embeddings with the rest, unless it is told not to."""
    dtype, axis, group = TABLES[case]
    weights, file = load_file(plain[1]), tmp_path / "x.safetensors"
    for layer in ("language_model.model.embed_tokens", "special_token_embedding"):
        table = weights[f"{layer}.weight"].float()
        table = int8.rotate(table, group) if group else table
        limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        scale = (table.abs().amax(1, keepdim=True) if axis else table.abs().max()) / limit
        scaled = (table / scale).round() if dtype == torch.int8 else table / scale
        weights[f"{layer}.weight"], weights[f"{layer}.weight_scale"] = scaled.to(dtype), scale
        (name,) = (name for name, stored in FORMATS.items() if stored == dtype)
        form = {"format": name, **({"convrot": True, "convrot_groupsize": group} if group else {})}
        weights[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
    save_file(weights, file, open_part(plain[1], "vlm").checkpoint.metadata("vlm"))
    mllms = [native.load(plain[0], "auto", one, plain[2])[1] for one in (file, plain[1])]
    found, expected = (one.encode("a cat")[0][0][0] for one in mllms)
    near(found, expected, 0.15 if dtype == torch.float8_e5m2 else 0.08)


FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}


def test_a_model_whose_scales_comfyui_would_leave_away_is_not_saved(checkpoint, comfyui, tmp_path):
    import comfy.sd
    from pack.internvl_u.convert import convert
    from pack.native import load as native

    model, *_ = native.load(convert(checkpoint, tmp_path, "fp8_e5m2")[0], "auto", *[checkpoint] * 2)
    comfy.sd.save_checkpoint(str(tmp_path / "plain.safetensors"), model)  # without scales: nothing is lost
    for dtype in ("int8", "int8_convrot"):
        files = convert(checkpoint, tmp_path / dtype, dtype)
        model, *_ = native.load(files[0], "auto", files[1], files[2])
        if not any(type(layer).__name__ == "QuantizedLinear" for layer in model.model.modules()):
            continue
        with pytest.raises(ValueError, match="saving the model: a quantised model found"):
            comfy.sd.save_checkpoint(str(tmp_path / "never.safetensors"), model)
        assert not (tmp_path / "never.safetensors").exists()
