"""Precisions on other machines, with doubles of their devices: what is kept, and what is computed in."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2")


@pytest.fixture
def machine(comfyui, monkeypatch):
    """Lets ComfyUI think of a machine: which arithmetic it has, and its command line."""
    import comfy.cli_args
    import comfy.model_management as mm

    def be(bf16=True, fp16=True, flag=None):
        monkeypatch.setattr(mm, "should_use_bf16", lambda *args, **how: bf16)
        monkeypatch.setattr(mm, "should_use_fp16", lambda *args, **how: fp16)
        monkeypatch.setattr(mm, "supports_fp8_compute", lambda *args, **how: False)
        if flag is not None:
            monkeypatch.setattr(comfy.cli_args.args, flag, True)

    return be


def kept(model):
    """The dtypes of the transformer's matrices, and of its arithmetic."""
    network = model.model.diffusion_model
    return network.transformer_blocks[
        0
    ].attn.to_q.weight.dtype, model.model.manual_cast_dtype or model.model.get_dtype()


@pytest.mark.parametrize(
    "bf16, fp16, flag, storage, arithmetic",
    [
        (True, True, None, torch.bfloat16, torch.bfloat16),
        (False, True, None, torch.float16, torch.float16),
        (False, False, None, torch.float32, torch.float32),
        (True, True, "fp16_unet", torch.float16, torch.float16),
        (True, True, "bf16_unet", torch.bfloat16, torch.bfloat16),
        (True, True, "fp32_unet", torch.float32, torch.float32),
        (False, False, "fp16_unet", torch.float16, torch.float32),
        (False, False, "bf16_unet", torch.bfloat16, torch.float32),
        (True, True, "fp8_e4m3fn_unet", torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_auto_fits_the_machine_and_its_command_line(
    native, machine, checkpoint, draw, golden, bf16, fp16, flag, storage, arithmetic
):
    machine(bf16, fp16, flag)
    model, mllm, _ = native.load(checkpoint)
    assert kept(model) == (storage, arithmetic)
    assert torch.isfinite(draw(model, mllm, golden("t2i_square"))).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bf16, fp16", [(True, True), (False, True), (False, False)])
def test_every_precision_draws_and_writes_on_every_machine(
    native, machine, checkpoint, draw, golden, precision, bf16, fp16
):
    from pack.internvl_u.generation import GenerationConfig

    machine(bf16, fp16)
    model, mllm, _ = native.load(checkpoint, precision)
    assert torch.isfinite(draw(model, mllm, golden("t2i_square"))).all()
    assert mllm.generate("hello", system="x", config=GenerationConfig(3))


def test_float16_draws_nearly_what_fp32_draws(native, machine, checkpoint, draw, golden, loaded, near):
    machine(bf16=False)
    case = golden("t2i_square")
    expected = draw(loaded.model, loaded.mllm, case)
    model, _, _ = native.load(checkpoint, "fp16")
    assert kept(model) == (torch.float16, torch.float16)
    near(draw(model, loaded.mllm, case), expected, 0.02)


def test_weights_beyond_float16_are_named(native, broken):
    from safetensors.torch import load_file, save_file

    file = broken / "generation_decoder" / "model.safetensors"
    weights = load_file(file)
    weights["decoder.proj_out.bias"][0] = 1e6
    save_file(weights, file)
    with pytest.raises(ValueError, match="proj_out.bias holds values up to 1e.06, 65504 at most expected for fp16"):
        native.load(broken, "fp16")


def test_fp8_is_refused_on_apples_gpus_and_the_others_are_not(comfyui, checkpoint, tmp_path):
    dtypes, parts = (importlib.import_module(f"pack.{name}") for name in ("native.dtypes", "internvl_u.checkpoint"))
    converting = importlib.import_module("pack.internvl_u.convert")
    apple, part = torch.device("mps"), parts.open_part(checkpoint, "vlm")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(ValueError, match="do not have: choose precision bf16 or fp16, or take an int8"):
            dtypes.check_device({"x": torch.zeros(1).to(dtype)}, apple, part)
        dtypes.check_device({"x": torch.zeros(1).to(dtype)}, torch.device("cpu"), part)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        dtypes.check_device({"x": torch.zeros(1, dtype=dtype)}, apple, part)
    scaled = parts.open_part(converting.convert(checkpoint, tmp_path, "fp8_scaled")[1], "vlm")
    with pytest.raises(ValueError, match="do not have: take an int8, GGUF or bf16 file"):  # no precision fits those
        dtypes.check_device(scaled.weights, apple, scaled)
    with pytest.raises(ValueError, match=r"precision bf16 found for a quantised file \(float8_e4m3fn\), auto expected"):
        dtypes.cast_weights(scaled, torch.bfloat16)


def test_fp8_by_precision_is_what_convert_writes(comfyui, broken, tmp_path):
    from safetensors.torch import load_file, save_file

    native = importlib.import_module("pack.native.load")
    converting = importlib.import_module("pack.internvl_u.convert")
    file = broken / "generation_decoder" / "model.safetensors"
    weights = load_file(file)
    weights["decoder.transformer_blocks.0.attn.to_q.weight"][0, 0] = 1e6  # beyond fp8, which would make a NaN of it
    save_file(weights, file)
    files = converting.convert(broken, tmp_path, "fp8_e4m3fn")
    chosen, converted = native.load(broken, "fp8_e4m3fn"), native.load(files[0], "auto", files[1], files[2])
    for one, other in zip(chosen[:2], converted[:2]):
        found, expected = ((getattr(x, "patcher", x).model.state_dict()) for x in (one, other))
        assert found.keys() == expected.keys()
        shrunk = {name for name, tensor in expected.items() if tensor.dtype == torch.float8_e4m3fn}
        assert shrunk == {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
        assert len(shrunk) > 20
        for name in shrunk:
            assert torch.equal(found[name].float(), expected[name].float()), name


class Without(TorchDispatchMode):
    """A device that has no arithmetic in some dtypes."""

    def __init__(self, *dtypes):
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor) and one.dtype in self.dtypes:
                raise AssertionError(f"{function} gave {one.dtype}")
        return result


@pytest.mark.parametrize("case", ["t2i_square", "edit_one"])
def test_nothing_that_runs_on_the_device_needs_float64(loaded, parts, golden, monkeypatch, case):
    """What Apple's GPUs lack: the networks, the guidance and the solver go without it."""
    from PIL import Image

    stated = golden(case)
    pictures = [Image.open(file).convert("RGB") for file in stated.images]
    sigmas = parts.sampler.flow_sigmas(2)
    monkeypatch.setattr(parts.sampler, "flow_sigmas", lambda *args: sigmas)  # made on the CPU
    with Without(torch.float64):
        vae = loaded.vae if pictures else None
        positive, negative, latent = loaded.mllm.encode(stated.prompt, images=pictures, vae=vae)
        settings = {"seed": 1, "steps": 2, "all_cfg": 4.5, "part_cfg": 2.0}
        drawn = parts.sampler.sample_latent(loaded.model, positive, negative, latent, **settings)
        parts.vae.decode(loaded.vae, drawn)
        config = importlib.import_module("pack.internvl_u.generation").GenerationConfig(3, temperature=0.7)
        loaded.mllm.generate("hello", system="x", images=pictures, config=config)
