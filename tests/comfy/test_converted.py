"""Converted single files: they load, draw the same within their precision, and ComfyUI's own loaders read the VAE."""

import shutil
from pathlib import Path

import pytest
import torch
from pack.internvl_u.convert import convert
from pack.internvl_u.defaults import FILE_DTYPES
from safetensors.torch import load_file, save_file

TOLERANCE = {"bfloat16": 0.02, "fp8_e4m3fn": 0.12, "fp8_scaled": 0.12, "fp8_scaled_old": 0.12}
TOLERANCE |= {"float16": 0.02, "fp8_e5m2": 0.3, "int8": 0.04, "int8_convrot": 0.04}


@pytest.fixture(scope="module", params=FILE_DTYPES)
def converted(request, checkpoint, tmp_path_factory):
    return request.param, convert(checkpoint, tmp_path_factory.mktemp(request.param), request.param)


def test_converted_files_draw_nearly_the_official_velocity(native, parts, converted, golden, near):
    from pack.internvl_u.mmdit import time_embedding

    choice, (drawing, language, vae) = converted
    case = golden("t2i_square")
    model, mllm, loaded_vae = native.load(drawing, "auto", language, vae)
    positive, *_ = mllm.encode(case.prompt)
    near(positive[0][0][0], case.context(0), TOLERANCE[choice])
    network = model.model.diffusion_model
    compute = model.model.manual_cast_dtype or network.dtype
    context = parts.model.PromptContext(network, case.context(0), positive[0][1][parts.model.LAYOUT], [])
    time = time_embedding(case["mmdit_t"][0][:1])
    near(
        network(case["mmdit_in"][0].to(compute), time, contexts=[context]), case["mmdit_out"][0][:1], TOLERANCE[choice]
    )
    pictures = loaded_vae.decode(torch.randn(1, 16, 1, 4, 4))
    assert pictures.shape[-3:] == (32, 32, 3)


def test_scaled_files_are_small_and_never_widened(native, converted):
    choice, (drawing, language, vae) = converted
    model, mllm, _ = native.load(drawing, "auto", language, vae)
    size = sum(file.stat().st_size for file in (drawing, language))
    assert model.model_size() + mllm.get_ram_usage() < 1.3 * size


@pytest.mark.parametrize("beams", [1, 2])
def test_text_is_written_from_any_stored_dtype(native, converted, beams):
    from pack.internvl_u.generation import GenerationConfig

    _, (drawing, language, vae) = converted
    _, mllm, _ = native.load(drawing, "auto", language, vae)
    assert len(mllm.generate("hello", system="x", config=GenerationConfig(6, beams=beams))) > 1


def test_a_lora_works_on_scaled_weights(native, converted, draw, golden):
    import comfy.sd

    choice, (drawing, language, vae) = converted
    model, mllm, _ = native.load(drawing, "auto", language, vae)
    case = golden("t2i_square")
    name = "transformer_blocks.0.attn.to_v"
    file = {
        f"diffusion_model.{name}.lora_A.weight": torch.randn(4, 64),
        f"diffusion_model.{name}.lora_B.weight": torch.randn(64, 4),
    }
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    plain = draw(model, mllm, case)
    changed = draw(patched, mllm, case)
    assert torch.isfinite(changed).all() and not torch.allclose(changed, plain, atol=1e-2)


def test_precision_of_a_scaled_file_is_its_own(native, checkpoint, tmp_path):
    files = convert(checkpoint, tmp_path, "fp8_scaled")
    with pytest.raises(ValueError, match=r"quantised file .float8_e4m3fn., auto expected"):
        native.load(files[0], "bf16", files[1], files[2])


def test_comfyuis_own_loader_reads_the_converted_vae(native, checkpoint, tmp_path, near):
    import comfy.sd

    *_, file = convert(checkpoint, tmp_path)
    latents = torch.randn(1, 16, 1, 4, 4)
    ours = native.load_vae(str(checkpoint))
    near(comfy.sd.VAE(sd=load_file(file)).decode(latents), ours.decode(latents), 0.05)
    near(native.load_vae(str(file)).decode(latents), ours.decode(latents), 0.05)


def test_a_model_saved_by_comfyui_loads_again(native, loaded, tmp_path):
    """ModelSave writes no configuration; the sizes come from the shapes, the rest from the release."""
    import comfy.sd
    from pack.internvl_u.checkpoint import holds_transformer, open_part

    file = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(file), loaded.model)
    assert holds_transformer(file)
    assert (
        open_part(file, "generation_decoder").weights.keys() == loaded.model.model.diffusion_model.state_dict().keys()
    )


def test_parts_that_do_not_belong_together_are_refused(native, checkpoint, tmp_path):
    drawing, language, vae = convert(checkpoint, tmp_path)
    with pytest.raises(RuntimeError, match="holds the vlm of InternVL-U, generation_decoder expected"):
        native.load(language, "auto", language, vae)
    with pytest.raises(RuntimeError, match="not an InternVL-U checkpoint|carries no tokenizer|vlm expected"):
        native.load(drawing, "auto", drawing, vae)


@pytest.fixture
def in_models(server, checkpoint, tmp_path):
    """Converted files where ComfyUI keeps models."""
    made = convert(checkpoint, tmp_path, "fp8_scaled")
    placed = []
    for file in made:
        place = server.base / "models" / file.parent.name / file.name
        place.parent.mkdir(exist_ok=True)
        placed.append(Path(shutil.copy(file, place)))
    yield placed
    for file in placed:
        file.unlink(missing_ok=True)


def test_the_load_node_takes_converted_files(server, graph, golden, in_models):
    case = golden("t2i_square")
    drawing, language, vae = (file.name for file in in_models)
    info = server.get("/object_info/InternVLU_LoadModel")["InternVLU_LoadModel"]["input"]
    assert drawing in info["required"]["model_name"][1]["options"]
    assert language in info["optional"]["mllm_name"][1]["options"]
    assert vae in info["optional"]["vae_name"][1]["options"]
    nodes = graph("text_to_image", case, model_name=drawing, precision="auto")
    assert server.run(nodes)["status"]["status_str"] == "success"
    named = graph("text_to_image", case, model_name=drawing, precision="auto", seed=5)
    named[server.find(named, "InternVLU_LoadModel")]["inputs"] |= {"mllm_name": language, "vae_name": vae}
    assert server.run(named)["status"]["status_str"] == "success"


def test_an_existing_qwen_image_vae_serves(server, graph, golden, in_models):
    case = golden("t2i_square")
    in_models[2].rename(in_models[2].with_name("qwen_image_vae.safetensors"))
    in_models[2] = in_models[2].with_name("qwen_image_vae.safetensors")
    nodes = graph("text_to_image", case, model_name=in_models[0].name, precision="auto", seed=6)
    assert server.run(nodes)["status"]["status_str"] == "success"


def test_a_missing_language_file_is_told(server, graph, golden, in_models):
    in_models[1].unlink()
    answer = server.error(server.run(graph("text_to_image", golden("t2i_square"), model_name=in_models[0].name)))
    assert "no language model" in str(answer) and "internvl_u convert" in str(answer)


def test_other_models_in_the_same_folders_are_not_offered(server):
    for folder in ("diffusion_models", "text_encoders"):
        (server.base / "models" / folder).mkdir(exist_ok=True)
        save_file({"some.weight": torch.zeros(2)}, server.base / "models" / folder / "other.safetensors")
        (server.base / "models" / folder / "broken.safetensors").write_bytes(b"nothing")
    info = server.get("/object_info/InternVLU_LoadModel")["InternVLU_LoadModel"]["input"]
    assert not {"other.safetensors", "broken.safetensors"} & set(info["required"]["model_name"][1]["options"])
    assert info["optional"]["mllm_name"][1]["options"] == ["auto"]
