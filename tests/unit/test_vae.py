import json
import sys

import pytest
import torch
from pack.internvl_u import autoencoder, bands
from pack.internvl_u.checkpoint import open_part
from pack.internvl_u.load import load_vae
from pack.internvl_u.vae import StandaloneVAE, to_wan
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

WIDTH = 8


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def weights(small_vae):
    return small_vae


@pytest.fixture(scope="module")
def judge(weights):
    """diffusers' network of the same weights, [B, channels, h, w] in and out, latents normalised."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKLQwenImage(base_dim=WIDTH).eval().requires_grad_(False)
    model.load_state_dict(weights, strict=True)
    mean, std = StandaloneVAE({})._statistics(torch.zeros(1))

    class Judge:
        def decode(self, latents):
            return model.decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0]

        def encode(self, images):
            return (model.encode(images[:, :, None], return_dict=False)[0].mode()[:, :, 0] - mean) / std

    return Judge()


def inputs(batch, rows, columns):
    generator = torch.Generator().manual_seed(rows)
    latents = torch.randn(batch, 16, rows, columns, generator=generator)
    return latents, torch.rand(batch, 3, 8 * rows, 8 * columns, generator=generator) * 2 - 1


def test_decode_and_encode_equal_the_official_vae(checkpoint, near):
    vae = load_vae(checkpoint)
    expected = load_file(checkpoint.parent / "golden" / "vae.safetensors")
    mean, std = vae._statistics(expected["z"][:, :, 0])
    near(vae.decode((expected["z"][:, :, 0] - mean) / std), expected["decoded"][:, :, 0], 1e-5)
    near(vae.encode(expected["x"][:, :, 0]) * std + mean, expected["encoded_mean"][:, :, 0], 1e-5)


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 6, 10), (1, 2, 14), (3, 7, 3), (1, 1, 1), (1, 18, 4)])
@pytest.mark.parametrize("band", [1, 300, 10_000, 1 << 30])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["a CPU's way", "a GPU's way"])
def test_bands_of_any_height_equal_diffusers_whole_frame(weights, judge, near, monkeypatch, size, band, on_cpu):
    monkeypatch.setattr(bands, "on_cpu", lambda x: on_cpu)
    monkeypatch.setattr(bands, "band_bytes", lambda x: band)
    vae, (latents, images) = StandaloneVAE(weights), inputs(*size)
    near(vae.decode(latents), judge.decode(latents), 1e-5)
    near(vae.encode(images), judge.encode(images), 1e-5)


@pytest.mark.parametrize("rows, columns", [(9, 10), (21, 12), (31, 33)])
def test_pictures_of_odd_sizes_are_encoded_as_by_diffusers(weights, judge, near, monkeypatch, rows, columns):
    monkeypatch.setattr(bands, "band_bytes", lambda x: 1000)
    images = inputs(1, 5, 5)[1][:, :, :rows, :columns]
    near(StandaloneVAE(weights).encode(images), judge.encode(images), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_further_from_float32_than_its_steps_explain(weights, judge, near, dtype):
    vae, (latents, images) = StandaloneVAE(weights).to(dtype), inputs(1, 8, 8)
    found = vae.decode(latents.to(dtype)), vae.encode(images.to(dtype))
    assert all(one.dtype == dtype for one in found)
    near(found[0], judge.decode(latents), 8 * torch.finfo(dtype).eps)
    near(found[1], judge.encode(images), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 3e4])
def test_values_of_any_size_are_normalised_without_overflow(near, dtype, size):
    band = (torch.randn(1, 384, 3, 5, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) * size).to(dtype)
    expected = functional.normalize(band.double(), dim=1) * 384**0.5
    found = bands.normalised(band, torch.ones(384, 1, 1, dtype=dtype))
    assert torch.isfinite(found).all()
    assert (found.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * max(1, expected.abs().max())


def test_a_frame_costs_less_than_half_of_the_operations_over_time(weights, judge):
    vae, (latents, images) = StandaloneVAE(weights), inputs(1, 8, 8)
    for way, given in (("decode", latents), ("encode", images)):
        counted = []
        for one in (vae, judge):
            with FlopCounterMode(display=False) as counter:
                getattr(one, way)(given)
            counted.append(counter.get_total_flops())
        assert 0 < 2 * counted[0] < counted[1], way


class Largest(TorchDispatchMode):
    """The number of values in the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.values = max(self.values, out.numel())
        return out


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_no_map_is_held_whole(weights, monkeypatch, way):
    monkeypatch.setattr(bands, "band_bytes", lambda x: 16_000)
    latents, images = inputs(1, 64, 4)
    with Largest() as largest:
        getattr(StandaloneVAE(weights), way)(latents if way == "decode" else images)
    # The picture itself is whole, its maps are not.
    assert images.numel() <= largest.values < WIDTH * images[:, 0].numel()


def test_a_picture_is_decoded_where_diffusers_is_not_installed(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert load_vae(checkpoint).decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 16, 16)


def test_what_is_given_is_not_written_to(weights):
    vae, given = StandaloneVAE(weights), inputs(1, 4, 4)
    kept = [one.clone() for one in given]
    vae.decode(given[0]), vae.encode(given[1])
    autoencoder.decode(given[0], vae), autoencoder.encode(given[1], vae)
    assert all(map(torch.equal, given, kept))


def test_names_and_shapes_are_those_of_diffusers(weights):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        expected = diffusers.AutoencoderKLQwenImage(base_dim=WIDTH).state_dict()
    assert {name: one.shape for name, one in weights.items()} == {name: one.shape for name, one in expected.items()}


def test_only_the_last_slice_of_a_kernel_is_kept(weights):
    vae = StandaloneVAE(weights)
    assert all(parameter.ndim != 5 and parameter.is_contiguous() for parameter in vae.parameters())
    assert not [name for name, _ in vae.named_parameters() if "time_conv" in name]
    whole = sum(tensor.numel() for tensor in weights.values())
    assert 2 * sum(parameter.numel() for parameter in vae.parameters()) < whole


def test_the_name_table_is_one_to_one(checkpoint):
    weights = open_part(checkpoint, "vae").weights
    renamed = to_wan(weights)
    assert len(weights) == len(renamed) == 194
    assert {id(tensor) for tensor in weights.values()} == {id(tensor) for tensor in renamed.values()}


def test_another_vae_is_refused(broken):
    config = broken / "vae" / "config.json"
    config.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(RuntimeError, match="holds a AutoencoderKL, AutoencoderKLQwenImage expected"):
        load_vae(broken)
