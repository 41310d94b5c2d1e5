"""LoRA files without ComfyUI: spellings, arithmetic as PEFT has it, and what is refused."""

import json

import pytest
import torch
from pack.internvl_u import adapters
from pack.internvl_u.lora import LANGUAGE, TRANSFORMER, AdapterConfig, LayerNames, read_lora, split_key
from pack.tests.lora_files import (
    LANGUAGE_LAYERS,
    LANGUAGE_SPELLINGS,
    LAYERS,
    SPELLINGS,
    STRENGTH,
    random_change,
    written,
)
from safetensors.torch import load_file, save_file

FOREIGN = {
    "Stable Diffusion": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "Stable Diffusion, its text encoder": "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "Flux or HunyuanVideo": "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "Wan": "diffusion_model.blocks.0.cross_attn.k.lora_A.weight",
    "Z-Image or Lumina": "diffusion_model.layers.0.attention.qkv.lora_A.weight",
    "Stable Diffusion 3": "transformer.joint_transformer_blocks.0.attn.to_q.lora_A.weight",
}


@pytest.fixture(scope="module")
def weights(checkpoint):
    """The plain weights by part and name of our modules."""
    drawing = load_file(checkpoint / "generation_decoder" / "model.safetensors")
    language = {}
    for file in sorted((checkpoint / "vlm").glob("*.safetensors")):
        language |= load_file(file)
    return {
        TRANSFORMER: {name.removeprefix("decoder."): tensor for name, tensor in drawing.items()},
        LANGUAGE: language,
    }


@pytest.fixture(scope="module")
def shapes(weights):
    return {part: {name: tuple(tensor.shape) for name, tensor in found.items()} for part, found in weights.items()}


@pytest.fixture
def read(tmp_path, shapes):
    def run(tensors, metadata=None, parts=(TRANSFORMER, LANGUAGE)):
        file = tmp_path / "some.safetensors"
        save_file(tensors, file, metadata)
        return read_lora(file, {part: shapes[part] for part in parts})

    return run


CASES = [(TRANSFORMER, LAYERS, *one) for one in SPELLINGS.items()]
CASES += [(LANGUAGE, LANGUAGE_LAYERS, *one) for one in LANGUAGE_SPELLINGS.items()]


@pytest.mark.parametrize("part, layers, name, spelling", CASES, ids=[f"{one[0]}, {one[2]}" for one in CASES])
def test_every_spelling_is_the_same_change(read, weights, shapes, near, part, layers, name, spelling):
    change = random_change(shapes[part], layers)
    lora = read(written(change, spelling, weights[part]))
    assert not lora.unknown and set(lora.layers) == {part} and set(lora.layers[part]) == set(layers)
    for layer, (up, down) in change.items():
        weight = weights[part][f"{layer}.weight"]
        near(adapters.merged(weight, lora.layers[part][layer], STRENGTH), weight + STRENGTH * up @ down, 1e-6)


@pytest.mark.parametrize("part", [TRANSFORMER, LANGUAGE])
def test_every_layer_is_found_by_its_name_with_dots_and_with_underscores(shapes, part):
    names = LayerNames(shapes)
    prefixes = {TRANSFORMER: ("lora_unet_", "diffusion_model."), LANGUAGE: ("lora_te_", "vlm.")}[part]
    layers = [name.removesuffix(".weight") for name in shapes[part] if name.endswith(".weight")]
    assert len(layers) > 40
    for layer in layers:
        assert names.find(prefixes[0] + layer.replace(".", "_")) == (part, layer)
        assert names.find(prefixes[1] + layer) == (part, layer)


def peft_model(kind, **settings):
    peft = pytest.importorskip("peft", reason="PEFT is a development tool, see requirements-dev.txt")
    torch.manual_seed(5)
    base = torch.nn.Sequential()
    base.add_module("img_in", torch.nn.Linear(24, 16))
    weight = base.img_in.weight.detach().clone()
    model = peft.get_peft_model(base, getattr(peft, kind)(target_modules=["img_in"], **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, weight


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("LoraConfig", {"r": 4, "lora_alpha": 6}),
        ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
        ("LoraConfig", {"r": 4, "lora_alpha": 6, "alpha_pattern": {"img_in": 3}}),
        ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
        ("LoHaConfig", {"r": 4, "alpha": 6}),
        ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_factor": 4}),
        ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_both": True}),
    ],
    ids=["LoRA", "rank-stabilised", "an alpha of its own", "DoRA", "LoHa", "LoKr", "LoKr, both decomposed"],
)
def test_what_peft_saves_is_merged_as_peft_merges_it(tmp_path, near, kind, settings):
    model, weight = peft_model(kind, **settings)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().img_in.weight.detach()
    assert not torch.allclose(merged, weight, atol=1e-2)
    file = tmp_path / "adapter_model.safetensors"
    lora = read_lora(file, {TRANSFORMER: {"img_in.weight": (16, 24), "img_in.bias": (16,)}})
    near(adapters.merged(weight, lora.layers[TRANSFORMER]["img_in"], 1.0), merged, 1e-5)


def test_biases_and_norms_get_their_differences(read, weights, near):
    tensors = {
        "diffusion_model.img_in.diff_b": torch.ones(64),
        "diffusion_model.txt_norm.diff": torch.ones_like(weights[TRANSFORMER]["txt_norm.weight"]),
    }
    layers = read(tensors).layers[TRANSFORMER]
    bias, norm = weights[TRANSFORMER]["img_in.bias"], weights[TRANSFORMER]["txt_norm.weight"]
    near(adapters.merged_bias(bias, layers["img_in"], 0.5), bias + 0.5)
    near(adapters.merged(norm, layers["txt_norm"], 0.5), norm + 0.5)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_lora_of_another_model_is_refused_with_what_it_looks_like(read, name):
    with pytest.raises(RuntimeError, match="none of its 1 keys fits the MODEL or MLLM of InternVL-U") as error:
        read({FOREIGN[name]: torch.zeros(4, 8)})
    assert FOREIGN[name] in str(error.value) and f"looks like one of {name.split(',')[0]}" in str(error.value)


def test_a_lora_of_qwen_image_is_refused_by_its_sizes(read):
    key = "transformer.transformer_blocks.0.attn.to_q"
    with pytest.raises(RuntimeError, match=r"1 of 1 layers do not fit: .*to_q: \[3072, 3072\] found, \[128, 64\] exp"):
        read({f"{key}.lora_A.weight": torch.zeros(4, 3072), f"{key}.lora_B.weight": torch.zeros(3072, 4)})


UP, DOWN = torch.zeros(128, 4), torch.zeros(4, 64)
BROKEN = {
    "half of it": ({"lora_A.weight": DOWN}, r"lora_up.weight is missing beside lora_down.weight"),
    "ranks differ": ({"lora_A.weight": DOWN, "lora_B.weight": torch.zeros(128, 3)}, "which do not go together"),
    "alpha of two": ({"lora_A.weight": DOWN, "lora_B.weight": UP, "alpha": torch.ones(2)}, "alpha of 2 values"),
    "alpha alone": ({"alpha": torch.ones(())}, "alpha found and nothing else"),
    "magnitudes": (
        {"lora_A.weight": DOWN, "lora_B.weight": UP, "dora_scale": torch.ones(5, 1)},
        r"dora_scale \[5, 1\] found, \[128, 1\] or \[1, 64\] expected",
    ),
    "magnitudes alone": ({"dora_scale": torch.ones(128, 1)}, "nothing that they belong to"),
    "a bias of another size": ({"diff_b": torch.ones(5)}, r"a bias of \[5\] found, \[128\] expected"),
    "no axes": ({"lora_A.weight": torch.zeros(()), "lora_B.weight": torch.zeros(())}, "do not"),
    "a middle": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "lora_mid.weight": torch.zeros(4, 4, 1, 1)},
        "only convolutions have",
    ),
    "two kinds": ({"lora_A.weight": DOWN, "lora_B.weight": UP, "diff": torch.zeros(128, 64)}, "one kind of change"),
    "a difference of another size": ({"diff": torch.zeros(64, 128)}, r"\[64, 128\] found, \[128, 64\] expected"),
    "a rank of nothing": (
        {"lora_A.weight": torch.zeros(0, 64), "lora_B.weight": torch.zeros(128, 0), "alpha": torch.ones(())},
        r"lora_down.weight \[0, 64\] found, which is empty|lora_up.weight \[128, 0\] found, which is empty",
    ),
    "rotations of another size": ({"oft_blocks": torch.zeros(8, 9, 9)}, r"oft_blocks \[8, 9, 9\] found, square blocks"),
    "a rotation of two axes": ({"oft_blocks": torch.zeros(128, 128)}, "square blocks of 128 rows together expected"),
    "rotations with magnitudes of another size": (
        {"oft_blocks": torch.zeros(8, 16, 16), "dora_scale": torch.ones(5, 1)},
        r"dora_scale \[5, 1\] found",
    ),
    "Kronecker factors": ({"lokr_w1": torch.ones(3, 3), "lokr_w2": torch.ones(5, 5)}, r"\[15, 15\] found"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_adapters_that_are_not_whole_or_do_not_fit_are_named(read, name):
    tensors, told = BROKEN[name]
    key = "diffusion_model.transformer_blocks.0.attn.to_q"
    with pytest.raises(RuntimeError, match=f"1 of 1 layers do not fit: transformer_blocks.0.attn.to_q: .*{told}"):
        read({f"{key}.{suffix}": tensor for suffix, tensor in tensors.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_told(read, value):
    bad = UP.clone()
    bad[3, 2] = value
    key = "transformer_blocks.0.attn.to_q"
    with pytest.raises(RuntimeError, match=f"1 of 2 tensors hold values that are infinite .*: {key}.lora_B.weight"):
        read({f"{key}.lora_A.weight": DOWN, f"{key}.lora_B.weight": bad})


def test_what_is_left_out_may_hold_anything(read):
    tensors = {"img_in.diff": torch.zeros(64, 64), "step": torch.tensor([5]), "loss": torch.tensor([torch.nan])}
    assert read(tensors).unknown == ("loss", "step")


def test_whole_numbers_are_refused(read):
    key = "transformer_blocks.0.attn.to_q"
    with pytest.raises(RuntimeError, match="of an unknown dtype .*lora_A.weight: int8"):
        read({f"{key}.lora_A.weight": DOWN.to(torch.int8), f"{key}.lora_B.weight": UP})


def test_two_adapters_in_one_file_are_refused(read):
    key = "transformer_blocks.0.attn.to_q"
    with pytest.raises(RuntimeError, match="it holds several adapters"):
        read({f"{key}.lora_A.{name}.weight": DOWN.clone() for name in ("first", "second")})


@pytest.mark.parametrize(
    "data, told",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\x80\2}q\0.", "is a pickle of PyTorch, which is never opened"),
        (b"\x40\0\0\0\0\0\0\0{" + b"x" * 63, "is not readable as safetensors"),
        (b"\xff" * 64, "is not readable as safetensors"),
    ],
)
def test_a_broken_header_is_told(tmp_path, shapes, data, told):
    file = tmp_path / "some.safetensors"
    file.write_bytes(data)
    with pytest.raises(RuntimeError, match=told):
        read_lora(file, shapes)


def test_what_metadata_says_of_the_scale_is_checked(read):
    key = "transformer.img_in"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 64), f"{key}.lora_B.weight": torch.ones(64, 4)}
    stated = {"transformer.lora_alpha": "many"}
    with pytest.raises(RuntimeError, match="lora_adapter_metadata in its metadata: lora_alpha 'many' found"):
        read(tensors, {"lora_adapter_metadata": json.dumps(stated)})


def test_an_alpha_in_the_file_counts_and_not_what_metadata_says(read):
    key = "transformer.img_in"
    tensors = {f"{key}.lora_down.weight": torch.ones(4, 64), f"{key}.lora_up.weight": torch.ones(64, 4)}
    tensors[f"{key}.alpha"] = torch.tensor(2.0)
    lora = read(tensors, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 400})})
    assert adapters.delta(lora.layers[TRANSFORMER]["img_in"])[0, 0] == 2.0


def test_patterns_are_of_whole_names():
    config = AdapterConfig(lora_alpha=8, alpha_pattern={"to_q": 2})
    assert config.alpha_of("blocks.0.to_q", 4) == 2 and config.alpha_of("blocks.0.not_to_q", 4) == 8
    # PEFT's names begin at the model that was wrapped.
    config = AdapterConfig(lora_alpha=8, alpha_pattern={"decoder.blocks.0.to_q": 2})
    assert config.alpha_of("blocks.0.to_q", 4) == 2 and config.alpha_of("blocks.10.to_q", 4) == 8


def test_a_pattern_that_is_a_regular_expression_is_refused_by_name(tmp_path, shapes):
    key = "transformer_blocks.0.attn.to_q"
    save_file({f"{key}.lora_A.weight": DOWN, f"{key}.lora_B.weight": UP}, tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {r"blocks\\.\\d+\\.to_q": 64}}))
    with pytest.raises(RuntimeError, match="adapter_config.json.*alpha_pattern"):
        read_lora(tmp_path / "adapter_model.safetensors", shapes)


def test_a_half_that_is_not_connected_is_named(read, shapes):
    drawing, language = "transformer_blocks.0.attn.to_q", LANGUAGE_LAYERS[0]
    up, down = random_change(shapes[LANGUAGE], [language])[language]
    tensors = {f"{drawing}.lora_A.weight": DOWN, f"{drawing}.lora_B.weight": UP}
    tensors |= {f"{language}.lora_A.weight": down, f"{language}.lora_B.weight": up}
    told = read(tensors, parts=(TRANSFORMER,)).summary({TRANSFORMER: 1.0})
    assert "2 of 4 keys fit nothing here and are left out (connect the MLLM too if they are its)" in told
    assert "all 4 keys fit" in read(tensors).summary({TRANSFORMER: 1.0, LANGUAGE: 1.0})


@pytest.mark.parametrize("key", ["img_in.weight", "img_in.bias", "lora_up", "x.lora_B.bias", "", ".", "alpha"])
def test_other_tensors_are_no_adapters(key):
    assert split_key(key)[1] == ""
