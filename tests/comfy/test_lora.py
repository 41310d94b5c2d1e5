"""LoRA on MODEL and MLLM: every spelling changes them as merged weights do, through our node and through ComfyUI's."""

import importlib
import json

import pytest
import torch
from pack.internvl_u.convert import convert
from pack.internvl_u.defaults import GGUF_DTYPES
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.mmdit import time_embedding
from pack.tests.lora_files import (
    LANGUAGE_LAYERS,
    LANGUAGE_SPELLINGS,
    LAYERS,
    ONLY_OURS,
    SPELLINGS,
    STRENGTH,
    random_change,
    written,
)
from safetensors.torch import save_file


@pytest.fixture
def apply_lora(native):
    return importlib.import_module("pack.native.lora").apply_lora


@pytest.fixture
def velocity(parts, golden):
    """The transformer's answer to a golden case, with the patches of a MODEL."""
    import comfy.model_management as mm

    def compute(model, context=None):
        case = golden("t2i_square")
        mm.load_models_gpu([model])
        network = model.model.diffusion_model
        layout = case.layout(0)
        compute = model.model.manual_cast_dtype or network.dtype
        prompt = parts.model.PromptContext(network, case.context(0), layout, [])
        return network(case["mmdit_in"][0].to(compute), time_embedding(case["mmdit_t"][0][:1]), contexts=[prompt])

    return compute


def hidden(mllm, **inputs):
    return mllm.encode("a red circle", **inputs)[0][0][0]


def weights_of(network):
    return dict(network.named_parameters())


def shapes_of(network):
    return {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}


def merge_into(network, change, strength=STRENGTH):
    for layer, (up, down) in change.items():
        module = network.get_submodule(layer)
        module.weight = torch.nn.Parameter(module.weight + strength * up @ down, requires_grad=False)


@pytest.fixture
def change(loaded):
    return random_change(shapes_of(loaded.model.model.diffusion_model), LAYERS)


@pytest.fixture
def language_change(loaded):
    return random_change(shapes_of(loaded.mllm.model), LANGUAGE_LAYERS)


@pytest.fixture
def save(tmp_path):
    def write(tensors, metadata=None, name="some"):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file, metadata)
        return file

    return write


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_changes_the_velocity_as_merged_weights_do(
    native, checkpoint, loaded, apply_lora, velocity, near, save, change, spelling
):
    plain = velocity(loaded.model)
    tensors = written(change, SPELLINGS[spelling], weights_of(loaded.model.model.diffusion_model))
    changed, _, report = apply_lora(loaded.model, None, save(tensors), STRENGTH, 1.0)
    assert report.endswith(f"{len(LAYERS)} layers of the MODEL at 0.7; all {len(tensors)} keys fit")
    result = velocity(changed)
    assert (result - plain).norm() / plain.norm() > 1e-2
    assert torch.equal(velocity(loaded.model), plain)
    merged = native.load(checkpoint, "fp32")[0]
    merge_into(merged.model.diffusion_model, change)
    near(result, velocity(merged), 1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_comfyuis_own_loader_takes_these_and_no_others(
    native, checkpoint, loaded, velocity, change, spelling, monkeypatch
):
    import comfy.lora
    import comfy.sd

    dropped = []
    monkeypatch.setattr(comfy.lora.logging, "warning", dropped.append)
    tensors = written(change, SPELLINGS[spelling], weights_of(loaded.model.model.diffusion_model))
    changed = velocity(comfy.sd.load_lora_for_models(loaded.model, None, tensors, STRENGTH, 0.0)[0])
    monkeypatch.undo()
    merged = native.load(checkpoint, "fp32")[0]
    merge_into(merged.model.diffusion_model, change)
    expected = velocity(merged)
    agrees = ((changed - expected).norm() / expected.norm()).item() < 1e-5
    assert (agrees and not dropped) == (spelling not in ONLY_OURS)
    assert all("lora key not loaded" in line for line in dropped)
    # DoRA: PEFT's magnitudes are dropped, those of LyCORIS are divided by other norms.
    left = {"PEFT DoRA": len(LAYERS), "LyCORIS DoRA": 0}.get(spelling, len(tensors))
    assert len(dropped) == (left if spelling in ONLY_OURS else 0)


@pytest.mark.parametrize("spelling", LANGUAGE_SPELLINGS)
def test_every_spelling_changes_the_hidden_states_as_merged_weights_do(
    native, checkpoint, loaded, apply_lora, near, save, language_change, spelling
):
    plain = hidden(loaded.mllm)
    tensors = written(language_change, LANGUAGE_SPELLINGS[spelling], weights_of(loaded.mllm.model))
    _, changed, report = apply_lora(None, loaded.mllm, save(tensors), 1.0, STRENGTH)
    assert report.endswith(f"{len(LANGUAGE_LAYERS)} layers of the MLLM at 0.7; all {len(tensors)} keys fit")
    result = hidden(changed)
    assert (result - plain).norm() / plain.norm() > 1e-2
    assert torch.equal(hidden(loaded.mllm), plain)
    merged = native.load(checkpoint, "fp32")[1]
    merge_into(merged.model, language_change)
    near(result, hidden(merged), 1e-5)


def test_one_file_for_both_halves_changes_both_at_their_own_strengths(
    native, checkpoint, loaded, apply_lora, velocity, near, save, change, language_change
):
    tensors = written(change, SPELLINGS["the checkpoint's"], weights_of(loaded.model.model.diffusion_model))
    tensors |= written(language_change, LANGUAGE_SPELLINGS["the checkpoint's"], weights_of(loaded.mllm.model))
    model, mllm, report = apply_lora(loaded.model, loaded.mllm, save(tensors), 0.5, -0.25)
    assert report == "some.safetensors: 4 layers of the MODEL at 0.5, 2 layers of the MLLM at -0.25; all 12 keys fit"
    merged, language, _ = native.load(checkpoint, "fp32")
    merge_into(merged.model.diffusion_model, change, 0.5)
    merge_into(language.model, language_change, -0.25)
    near(velocity(model), velocity(merged), 1e-5)
    near(hidden(mllm), hidden(language), 1e-5)


def test_loras_in_a_row_add_up_in_any_order(native, checkpoint, loaded, apply_lora, near, save, language_change):
    other = random_change(shapes_of(loaded.mllm.model), LANGUAGE_LAYERS[:1], seed=9)
    spelling, weights = LANGUAGE_SPELLINGS["transformers"], weights_of(loaded.mllm.model)
    files = [save(written(one, spelling, weights), name=f"f{i}") for i, one in enumerate((language_change, other))]
    merged = native.load(checkpoint, "fp32")[1]
    merge_into(merged.model, language_change, 0.5)
    merge_into(merged.model, other, 0.8)
    for order in ((0, 1), (1, 0)):
        mllm = loaded.mllm
        for which in order:
            mllm = apply_lora(None, mllm, files[which], 1.0, (0.5, 0.8)[which])[1]
        near(hidden(mllm), hidden(merged), 1e-5)


def test_strength_0_gives_the_very_same_objects(loaded, apply_lora, save, change, tmp_path):
    file = save(written(change, SPELLINGS["bare"], weights_of(loaded.model.model.diffusion_model)))
    model, mllm, report = apply_lora(loaded.model, loaded.mllm, tmp_path / "not there", 0.0, 0.0)
    assert model is loaded.model and mllm is loaded.mllm and "nothing is changed" in report
    model, mllm, _ = apply_lora(loaded.model, loaded.mllm, file, 0.0, 1.0)
    assert model is loaded.model and mllm is loaded.mllm
    model, mllm, _ = apply_lora(loaded.model, loaded.mllm, file, 1.0, 0.0)
    assert model is not loaded.model and model.model is loaded.model.model and mllm is loaded.mllm


def test_the_empty_context_is_never_one_of_another_lora_or_strength(
    native, checkpoint, loaded, apply_lora, save, language_change
):
    """Encode keeps the context of the empty prompt, which the negative conditioning is made of."""
    file = save(written(language_change, LANGUAGE_SPELLINGS["kohya"], weights_of(loaded.mllm.model)))

    def negative(mllm):
        return mllm.encode("a cat")[1][0][0]

    plain = negative(loaded.mllm)
    first = apply_lora(None, loaded.mllm, file, 1.0, 0.5)[1]
    second = apply_lora(None, first, file, 1.0, 0.5)[1]
    results = [plain, negative(first), negative(second), negative(loaded.mllm), negative(first)]
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert not torch.allclose(results[1], results[2], atol=1e-3)
    assert torch.equal(results[3], plain) and torch.equal(results[4], results[1])
    fresh = native.load(checkpoint, "fp32")[1]
    assert torch.equal(negative(apply_lora(None, fresh, file, 1.0, 0.5)[1]), results[1])


def test_the_copy_counts_as_the_original_does(loaded, apply_lora, save, language_change):
    file = save(written(language_change, LANGUAGE_SPELLINGS["kohya"], weights_of(loaded.mllm.model)))
    changed = apply_lora(None, loaded.mllm, file, 1.0, 0.5)[1]
    assert changed.get_ram_usage() == loaded.mllm.get_ram_usage() and changed.is_dynamic() is False
    assert changed.model is loaded.mllm.model and not loaded.mllm.patcher.patches


def test_text_is_written_with_the_lora_and_without_it_again(loaded, apply_lora, save):
    change = random_change(shapes_of(loaded.mllm.model), LANGUAGE_LAYERS, size=1.0)
    file = save(written(change, LANGUAGE_SPELLINGS["transformers"], weights_of(loaded.mllm.model)))

    def text(mllm):
        return mllm.generate("hello", system="x", config=GenerationConfig(12))

    plain = text(loaded.mllm)
    changed = apply_lora(None, loaded.mllm, file, 1.0, 1.0)[1]
    assert text(changed) != plain and text(loaded.mllm) == plain


def test_a_lora_on_the_vision_tower_changes_what_is_seen(native, checkpoint, loaded, apply_lora, near, save, golden):
    from PIL import Image

    layers = ("vision_model.encoder.layers.0.attn.qkv", "mlp1.1")
    change = random_change(shapes_of(loaded.mllm.model), layers)
    picture = Image.open(golden("edit_one").images[0]).convert("RGB")
    inputs = {"images": [picture], "vae": loaded.vae}
    tensors = written(change, LANGUAGE_SPELLINGS["PEFT of the whole checkpoint"], weights_of(loaded.mllm.model))
    changed = apply_lora(None, loaded.mllm, save(tensors), 1.0, STRENGTH)[1]
    merged = native.load(checkpoint, "fp32")[1]
    merge_into(merged.model, change)
    result = hidden(changed, **inputs)
    near(result, hidden(merged, **inputs), 1e-5)
    assert not torch.allclose(result, hidden(loaded.mllm, **inputs), atol=1e-3)


def test_offloaded_weights_get_the_lora_too(loaded, apply_lora, near, save, language_change, monkeypatch):
    import comfy.model_management as mm

    file = save(written(language_change, LANGUAGE_SPELLINGS["PEFT DoRA"], weights_of(loaded.mllm.model)))
    changed = apply_lora(None, loaded.mllm, file, 1.0, STRENGTH)[1]
    expected = hidden(changed)
    mm.unload_all_models()
    changed.patcher.load(changed.patcher.load_device, lowvram_model_memory=1)
    monkeypatch.setattr(mm, "load_models_gpu", lambda *args, **kwargs: None)
    near(hidden(changed), expected, 1e-5)
    changed.patcher.detach()


PRECISIONS = ("bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2")
STORED = ("fp8_scaled", "fp8_scaled_old", "int8", "int8_convrot")


@pytest.fixture(scope="module", params=[*PRECISIONS, *STORED, *GGUF_DTYPES])
def quantised(request, comfyui, checkpoint, tmp_path_factory):
    """How a smaller MODEL and MLLM are loaded, again and again."""
    load = importlib.import_module("pack.native.load").load
    if request.param in PRECISIONS:
        return lambda: load(checkpoint, request.param)
    if request.param in GGUF_DTYPES:
        pytest.importorskip("gguf", reason="the package that writes GGUF files, see requirements-dev.txt")
    drawing, language, vae = convert(checkpoint, tmp_path_factory.mktemp("files"), request.param)
    return lambda: load(drawing, "auto", language, vae)


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("spelling", ["transformers", "PEFT DoRA", "LyCORIS LoHa", "the difference itself"])
def test_smaller_weights_get_the_same_lora(
    native, checkpoint, loaded, quantised, apply_lora, velocity, save, spelling, offloaded, monkeypatch
):
    """The error that a LoRA adds to that of the smaller weights is small beside the change that it makes."""
    import comfy.model_management as mm

    names = {"transformers": "bare"}
    languages = LANGUAGE_SPELLINGS | {"the difference itself": SPELLINGS["the difference itself"]}
    network, language = loaded.model.model.diffusion_model, loaded.mllm.model
    change = random_change(shapes_of(network), LAYERS, size=0.2)
    language_change = random_change(shapes_of(language), LANGUAGE_LAYERS, size=0.2)
    tensors = written(change, SPELLINGS[names.get(spelling, spelling)], weights_of(network))
    tensors |= written(language_change, languages[spelling], weights_of(language))
    file = save(tensors)
    expected = [end(*apply_lora(loaded.model, loaded.mllm, file, 1.0, 1.0)[:2]) for end in ENDS(velocity)]
    plain = [end(loaded.model, loaded.mllm) for end in ENDS(velocity)]
    model, mllm, _ = quantised()
    small = [end(model, mllm) for end in ENDS(velocity)]
    model, mllm, _ = apply_lora(model, mllm, file, 1.0, 1.0)
    if offloaded:
        mm.unload_all_models()
        for patcher in (model, mllm.patcher):
            patcher.load(patcher.load_device, lowvram_model_memory=1)
        monkeypatch.setattr(mm, "load_models_gpu", lambda *args, **kwargs: None)
    results = [end(model, mllm) for end in ENDS(velocity)]
    if offloaded:
        for patcher in (model, mllm.patcher):
            patcher.detach()
    for result, wanted, before, smaller in zip(results, expected, plain, small):
        size = (wanted - before).norm()
        assert size > 3 * (smaller - before).norm(), "the change is too small to be told from the weights' own error"
        assert (result - wanted).norm() < 0.3 * size + 2 * (smaller - before).norm()


def ENDS(velocity):
    return (lambda model, mllm: velocity(model).float(), lambda model, mllm: hidden(mllm))


def test_the_scale_that_diffusers_writes_into_the_metadata_counts(loaded, apply_lora, velocity, near, save, change):
    weights = weights_of(loaded.model.model.diffusion_model)
    tensors = written(change, SPELLINGS["diffusers"], weights)
    stated = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_dora": False}
    told = save(tensors, {"lora_adapter_metadata": json.dumps(stated)}, "told")
    doubled = apply_lora(loaded.model, None, save(tensors), 2 * STRENGTH, 1.0)[0]
    near(velocity(apply_lora(loaded.model, None, told, STRENGTH, 1.0)[0]), velocity(doubled), 1e-6)


def test_keys_that_fit_nothing_are_counted_and_named(loaded, apply_lora, save, change, caplog):
    tensors = written(change, SPELLINGS["bare"], weights_of(loaded.model.model.diffusion_model))
    foreign = {f"controlnet.{i}.lora_A.weight": torch.zeros(1) for i in range(7)}
    *_, report = apply_lora(loaded.model, None, save(tensors | foreign), 1.0, 1.0)
    assert "7 of 15 keys fit nothing here and are left out (connect the MLLM too if they are its): " in report
    assert "controlnet.0.lora_A.weight, " in report
    assert report.count("controlnet") == 5 and report in caplog.text


def test_nothing_connected_and_foreign_models_are_refused(loaded, apply_lora, save):
    file = save({"img_in.diff": torch.zeros(1)})
    with pytest.raises(ValueError, match="no MODEL and no MLLM found"):
        apply_lora(None, None, file, 1.0, 1.0)
    with pytest.raises(ValueError, match="a MODEL of another kind"):
        apply_lora(object(), None, file, 1.0, 1.0)
    with pytest.raises(ValueError, match="an MLLM of another kind"):
        apply_lora(None, object(), file, 1.0, 1.0)


def test_a_lora_for_the_half_that_is_not_connected_is_told(loaded, apply_lora, save, language_change):
    file = save(written(language_change, LANGUAGE_SPELLINGS["kohya"], weights_of(loaded.mllm.model)))
    with pytest.raises(RuntimeError, match="none of its 6 keys fits the MODEL .* connect that one too"):
        apply_lora(loaded.model, None, file, 1.0, 1.0)
