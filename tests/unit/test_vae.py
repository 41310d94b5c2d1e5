import json

import pytest
import torch
from pack.internvl_u.checkpoint import open_part
from pack.internvl_u.load import load_vae
from pack.internvl_u.vae import to_wan
from safetensors.torch import load_file


@torch.inference_mode()
def test_decode_and_encode_equal_the_official_vae(checkpoint, near):
    vae = load_vae(checkpoint)
    expected = load_file(checkpoint.parent / "golden" / "vae.safetensors")
    mean, std = vae._statistics(expected["z"][:, :, 0])
    near(vae.decode((expected["z"][:, :, 0] - mean) / std), expected["decoded"][:, :, 0], 1e-5)
    near(vae.encode(expected["x"][:, :, 0]) * std + mean, expected["encoded_mean"][:, :, 0], 1e-5)


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
