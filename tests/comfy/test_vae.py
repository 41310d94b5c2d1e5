"""ComfyUI's VAE object with our short way for one frame, against the same without it."""

import copy
import importlib

import pytest
import torch
from pack.internvl_u.checkpoint import open_part
from pack.internvl_u.vae import to_wan
from torch.utils.flop_counter import FlopCounterMode

WIDTH = 8


@pytest.fixture
def one_frame(native):
    return importlib.import_module("pack.native.one_frame")


@pytest.fixture(scope="module")
def weights(small_vae):
    return to_wan(small_vae)


@pytest.fixture
def make(one_frame, weights):
    """Makes a VAE of ComfyUI, as it is or with ours in it."""
    import comfy.sd

    def made(ours, dtype=torch.float32):
        vae = comfy.sd.VAE(sd=dict(weights), dtype=dtype)
        vae.not_video = True
        assert not ours or one_frame.shorten(vae)
        return vae

    return made


@pytest.fixture
def ours(make):
    return make(True)


@pytest.fixture
def core(make):
    return make(False)


def latents(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape, seed=2):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 6, 10), (1, 1, 1), (2, 5, 3)])
def test_one_frame_equals_comfyuis_own_way(ours, core, near, size):
    batch, rows, columns = size
    given = latents(batch, 16, 1, rows, columns)
    near(ours.decode(given), core.decode(given), 1e-5)
    given = pictures(batch, 8 * rows, 8 * columns, 3)
    near(ours.encode(given), core.encode(given), 1e-5)


def test_the_loader_gives_a_vae_with_the_short_way(loaded, checkpoint, near):
    import comfy.sd

    assert isinstance(loaded.vae, comfy.sd.VAE)
    core = comfy.sd.VAE(sd=to_wan(open_part(checkpoint, "vae").weights))
    network = loaded.vae.first_stage_model
    assert isinstance(network, type(core.first_stage_model)) and type(network) is not type(core.first_stage_model)
    near(loaded.vae.decode(latents(1, 16, 1, 4, 6)), core.decode(latents(1, 16, 1, 4, 6)), 1e-5)


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_several_frames_go_comfyuis_own_way_bit_for_bit(ours, core, frames):
    given = latents(1, 16, frames, 4, 6)
    assert torch.equal(ours.decode(given), core.decode(given))
    given = pictures(1, 3, 4 * frames - 3, 32, 48)
    assert torch.equal(ours.first_stage_model.encode(given), core.first_stage_model.encode(given))


def test_one_frame_costs_fewer_operations_than_in_any_comfyui(ours, core):
    given = {"decode": latents(1, 16, 1, 8, 8), "encode": pictures(1, 3, 1, 64, 64)}
    over_time = isinstance(core.first_stage_model.conv1._padding, tuple)  # 0.3.75, which convolves the zeros before it
    for way, one in given.items():
        counted = []
        for vae in (ours, core):
            with FlopCounterMode(display=False) as counter:
                getattr(vae.first_stage_model, way)(one)
            counted.append(counter.get_total_flops())
        assert 0 < counted[0] * (2 if over_time else 1) <= counted[1], way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_further_from_float32_than_its_steps_explain(make, core, near, dtype):
    vae, given = make(True, dtype), latents(1, 16, 1, 6, 8)
    assert vae.first_stage_model.decode(given.to(dtype)).dtype == dtype
    near(vae.decode(given) * 2 - 1, core.decode(given) * 2 - 1, 8 * torch.finfo(dtype).eps)
    given = pictures(1, 48, 64, 3)
    near(vae.encode(given), core.encode(given), 8 * torch.finfo(dtype).eps)


def test_weights_are_cast_to_what_comes(ours, near):
    network, given = ours.first_stage_model, latents(1, 16, 1, 4, 4)
    found = network.decode(given.bfloat16())
    assert found.dtype == torch.bfloat16
    near(found, network.decode(given), 0.05)


def test_functions_of_offloaded_weights_are_applied(ours, core, near):
    given = latents(1, 16, 1, 4, 4)
    plain = core.decode(given)
    near(ours.decode(given), plain, 1e-5)  # loading takes functions away
    for vae in (ours, core):
        layer = vae.first_stage_model.get_submodule("decoder.middle.0.residual.2")
        layer.weight_function = [lambda weight: weight * 3.0]
        layer.bias_function = [lambda bias: bias + 1.0]
    changed = core.decode(given)
    assert (changed - plain).abs().max() > 0.01
    near(ours.decode(given), changed, 1e-5)


def test_weights_in_a_lent_buffer_are_not_read_after_they_are_given_back(ours, one_frame, near, monkeypatch):
    """ComfyUI's buffers for offloaded weights are few, and hold the next layer's as soon as one is given back."""
    import comfy.ops

    given = latents(1, 16, 1, 4, 4)
    expected = ours.first_stage_model.decode(given)
    lent = []

    def cast(layer, like):
        lent.append((layer.weight.detach().clone(), layer.bias.detach().clone()))
        return *lent[-1], "stream"

    def give_back(layer, weight, bias, stream):
        assert stream == "stream"
        weight.fill_(torch.nan), bias.fill_(torch.nan)

    monkeypatch.setattr(one_frame.compat, "cast_weight", cast)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", give_back)
    near(ours.first_stage_model.decode(given), expected, 1e-6)
    assert lent and all(weight.isnan().all() for weight, _ in lent)


def test_a_vae_that_does_not_fit_is_offloaded_in_part(ours, near):
    given = latents(1, 16, 1, 4, 4)
    expected = ours.decode(given)
    ours.patcher.unpatch_model()
    ours.patcher.load(ours.device, lowvram_model_memory=1)
    network = ours.first_stage_model
    assert any(getattr(module, "comfy_cast_weights", False) for module in network.modules())
    near(network.decode(given)[:, :, 0].clamp(-1, 1), expected.flatten(0, 1).movedim(-1, 1) * 2 - 1, 1e-5)


def test_tiles_are_decoded_and_encoded_as_comfyui_does(ours, core, near):
    given = latents(1, 16, 1, 12, 20)
    tiles = {"tile_x": 8, "tile_y": 8, "overlap": 2}
    near(ours.decode_tiled(given, **tiles), core.decode_tiled(given, **tiles), 1e-5)
    given = pictures(1, 96, 160, 3)
    tiles = {"tile_x": 64, "tile_y": 64, "overlap": 16}
    near(ours.encode_tiled(given, **tiles), core.encode_tiled(given, **tiles), 1e-5)


def test_copies_and_clones_have_the_short_way(ours, near):
    given = latents(1, 16, 1, 4, 4)
    expected = ours.first_stage_model.decode(given)
    for network in (copy.deepcopy(ours.first_stage_model), ours.patcher.clone().model):
        assert type(network) is type(ours.first_stage_model)
        near(network.decode(given), expected, 1e-6)


def test_a_vae_that_is_made_again_has_the_short_way(loaded, native):
    factory, arguments = loaded.vae.patcher.cached_patcher_init
    again = factory(*arguments)
    assert type(again.model) is type(loaded.vae.first_stage_model)


def test_a_network_with_something_unknown_in_it_is_left_alone(core, one_frame):
    network = core.first_stage_model
    kind, memory = type(network), core.memory_used_decode
    network.decoder.head.add_module("3", torch.nn.Tanh())
    assert not one_frame.shorten(core)
    assert type(network) is kind and core.memory_used_decode is memory


def test_a_network_of_other_shapes_is_left_alone(core, one_frame):
    network = core.first_stage_model
    network.decoder.head[2] = torch.nn.Conv2d(WIDTH, 12, 3)
    assert not one_frame.shorten(core)
    core.first_stage_model = None
    assert not one_frame.shorten(core)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_arguments_that_are_unknown_here_go_to_comfyuis_own_way(one_frame, way):
    class Network(torch.nn.Module):
        def encode(self, x, *args, **kwargs):
            return args, kwargs

        decode = encode

    network = Network()
    network.__class__ = one_frame._shortened(Network)
    given = torch.zeros(1, 3, 1, 8, 8)
    assert getattr(network, way)(given, 1) == ((1,), {})
    assert getattr(network, way)(given, feature=2) == ((), {"feature": 2})


@torch.inference_mode(False)
def test_gradients_go_comfyuis_own_way(make):
    network = make(True).first_stage_model.requires_grad_(False)
    given = latents(1, 16, 1, 2, 2).requires_grad_()
    network.decode(given).sum().backward()
    assert given.grad.abs().sum() > 0


def test_one_frame_asks_for_no_more_memory_than_it_needs(ours, core):
    for way, shape in (("memory_used_decode", (1, 16, 1, 64, 64)), ("memory_used_encode", (1, 3, 1, 512, 512))):
        asked, own = (getattr(vae, way)(torch.Size(shape), torch.bfloat16) for vae in (ours, core))
        video = torch.Size((*shape[:2], 9, *shape[3:]))
        # 400 values a pixel are what tensors of one frame come to, without attention and a GPU's workspaces.
        assert 400 * 512 * 512 * 2 < asked <= own
        assert getattr(ours, way)(video, torch.bfloat16) == getattr(core, way)(video, torch.bfloat16)
