"""GGUF files in ComfyUI: the same pictures and texts, patches on what is unpacked, offloading, a running server."""

import contextlib
import importlib
import shutil

import pytest
import torch
from pack.internvl_u.convert import convert
from pack.internvl_u.dequantize import dequantize
from safetensors.torch import save_file

pytest.importorskip("gguf", reason="the package that writes GGUF files is a development tool, see requirements-dev.txt")


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    """The tiny model in Q8_0, and the same numbers as plain fp32 safetensors files."""
    from pack.internvl_u.checkpoint import open_part

    drawing, language, vae = convert(checkpoint, tmp_path_factory.mktemp("packed"), "Q8_0")
    plain = []
    for file, part, stem in ((drawing, "generation_decoder", "internvl_u_x"), (language, "vlm", "internvl_u_mllm_x")):
        opened = open_part(file, part)
        numbers = {
            name: dequantize(tensor, opened.packed[name].format) if name in opened.packed else tensor.float()
            for name, tensor in opened.weights.items()
        }
        text = opened.checkpoint.header.description
        plain.append(file.with_name(f"{stem}.safetensors"))
        save_file(numbers, plain[-1], {"internvl_u": text})
    return (drawing, language, vae), (*plain, vae)


@pytest.fixture
def both(native, packed):
    """(MODEL, MLLM, VAE) packed, and of the same numbers in fp32."""
    (drawing, language, vae), (plain_drawing, plain_language, _) = packed
    return native.load(drawing, "fp32", language, vae), native.load(plain_drawing, "fp32", plain_language, vae)


def lora(rank=4, scale=1.0):
    made = torch.Generator().manual_seed(3)
    file = {}
    for name in ("attn.to_v", "attn.to_q", "img_mlp.net.2", "txt_mod.1", "img_mod.1"):
        wide = {"img_mlp.net.2": (256, 64), "attn.to_q": (64, 128), "txt_mod.1": (64, 384), "img_mod.1": (64, 384)}
        columns, rows = wide.get(name, (64, 64))
        key = f"diffusion_model.transformer_blocks.0.{name}"
        file[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=made) * scale
        file[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=made) * scale
    return file


def with_lora(model, strength=1.0, **values):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora(**values), strength, 0.0)[0]


def packed_layers(model):
    ops = importlib.import_module("pack.native.gguf_ops")
    network = model.model
    return [m for m in network.modules() if isinstance(m, (ops.CastPackedLinear, ops.CastPackedEmbedding))]


def budget_of(patcher, share):
    """Loads a share of a patcher's bytes, as ComfyUI does where memory is short."""
    patcher.load(patcher.load_device, lowvram_model_memory=max(1, int(patcher.model_size() * share)))


def test_the_weights_stay_packed_and_are_counted_so(both, packed):
    (model, mllm, _), (plain, plain_mllm, _) = both
    assert len(packed_layers(model)) == 28 and all(m.weight.dtype == torch.uint8 for m in packed_layers(model))
    assert len(packed_layers(mllm.patcher)) > 20
    assert model.model_size() < 0.5 * plain.model_size() and mllm.get_ram_usage() < 0.5 * plain_mllm.get_ram_usage()
    assert model.model_size() + mllm.get_ram_usage() < 1.6 * sum(file.stat().st_size for file in packed[0][:2])


def test_pictures_and_texts_are_those_of_the_unpacked_numbers(both, draw, golden, near):
    from pack.internvl_u.generation import GenerationConfig

    (model, mllm, _), (plain, plain_mllm, _) = both
    case = golden("t2i_square")
    for ours, theirs in zip(mllm.encode(case.prompt)[:2], plain_mllm.encode(case.prompt)[:2]):
        near(ours[0][0], theirs[0][0], 1e-5)
    near(draw(model, mllm, case), draw(plain, plain_mllm, case), 1e-4)
    for beams in (1, 2):
        config = GenerationConfig(8, beams=beams)
        assert mllm.generate("hello", system="x", config=config) == plain_mllm.generate(
            "hello", system="x", config=config
        )


def test_a_packed_model_goes_with_a_plain_language_model(native, packed, draw, golden):
    (drawing, _, vae), (_, plain_language, _) = packed
    model, mllm, _ = native.load(drawing, "fp32", plain_language, vae)
    assert torch.isfinite(draw(model, mllm, golden("t2i_square"))).all()


@pytest.mark.parametrize(
    "precision, dtype", [("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_what_is_not_packed_is_kept_in_the_chosen_precision(native, packed, precision, dtype, draw, golden):
    drawing, language, vae = packed[0]
    model, mllm, _ = native.load(drawing, precision, language, vae)
    kept = {t.dtype for t in model.model.diffusion_model.state_dict().values()}
    assert kept == {torch.uint8, dtype}
    assert torch.isfinite(draw(model, mllm, golden("t2i_square"))).all()


def test_fp8_of_a_packed_file_is_refused(native, packed):
    drawing, language, vae = packed[0]
    with pytest.raises(ValueError, match="for a GGUF file, auto, fp32, bf16 or fp16 expected"):
        native.load(drawing, "fp8_e4m3fn", language, vae)


@pytest.mark.parametrize("share", [None, 1.0, 0.5, 0.0])
def test_a_lora_is_that_of_the_unpacked_model_however_much_is_loaded(both, draw, golden, near, share):
    (model, mllm, _), (plain, plain_mllm, _) = both
    case = golden("t2i_square")
    before = draw(model, mllm, case, steps=2)
    ours, theirs = with_lora(model, scale=0.3), with_lora(plain, scale=0.3)
    if share is not None:
        ours.patch_model(load_weights=False)
        budget_of(ours, share)
        assert ours.model.model_lowvram == (share < 1)
    positive = mllm.encode(case.prompt)[0]
    velocities = [
        velocity(patcher, positive, case, patched=share is not None and patcher is ours) for patcher in (ours, theirs)
    ]
    near(*velocities, 1e-5)
    ours.unpatch_model(ours.offload_device)
    assert not any(layer.weight_function for layer in packed_layers(ours))
    assert torch.equal(draw(model, mllm, case, steps=2), before), "the LoRA stays on a model that it was not loaded on"


def velocity(patcher, positive, case, patched=False):
    """What the network makes of a golden input under a patcher's patches."""
    from pack.internvl_u.mmdit import time_embedding
    from pack.native.model import LAYOUT, PromptContext

    if not patched:
        patcher.patch_model(patcher.load_device)
    network = patcher.model.diffusion_model
    context = PromptContext(network, case.context(0), positive[0][1][LAYOUT], [])
    return network(case["mmdit_in"][0], time_embedding(case["mmdit_t"][0][:1]), contexts=[context])


def test_a_lora_is_applied_once_when_layers_are_unloaded_and_loaded_again(both, golden, near):
    (model, mllm, _), (plain, _, _) = both
    case = golden("t2i_square")
    positive = mllm.encode(case.prompt)[0]
    ours, theirs = with_lora(model, scale=0.3), with_lora(plain, scale=0.3)
    expected = velocity(theirs, positive, case)
    ours.patch_model(ours.load_device)
    near(velocity(ours, positive, case, patched=True), expected, 1e-5)
    ours.partially_unload(ours.offload_device, 2 * ours.model_size())
    near(velocity(ours, positive, case, patched=True), expected, 1e-5)
    ours.partially_load(ours.load_device, ours.model_size())
    near(velocity(ours, positive, case, patched=True), expected, 1e-5)
    budget_of(ours, 0.3)
    near(velocity(ours, positive, case, patched=True), expected, 1e-5)


def test_an_interrupt_ends_a_step_in_the_middle(both, golden):
    import comfy.model_management as mm

    (model, mllm, _), _ = both
    case = golden("t2i_square")
    positive = mllm.encode(case.prompt)[0]
    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        velocity(model, positive, case)
    assert velocity(model, positive, case).isfinite().all()


def test_a_patched_table_of_tokens_gives_what_is_unpacked(both):
    """Without patches only the rows that are looked up are unpacked; with some the whole table is."""
    from pack.native.gguf_ops import CastPackedEmbedding, Dequantize

    (_, mllm, _), (_, plain, _) = both
    table, plain_table = (one.model.language_model.model.embed_tokens for one in (mllm, plain))
    ids = torch.tensor([[1, 5, 5], [7, 0, 2]])
    assert isinstance(table, CastPackedEmbedding) and torch.equal(table(ids), plain_table(ids))
    table.weight_function = [Dequantize(table.packing.format), lambda weight: weight + 1]
    assert torch.equal(table(ids), plain_table(ids) + 1)
    table.weight_function = []


def test_two_loras_follow_each_other_without_a_trace(both, draw, golden):
    (model, mllm, _), _ = both
    case = golden("t2i_square")
    first = draw(with_lora(model), mllm, case, steps=2)
    other = draw(with_lora(model, strength=-0.5), mllm, case, steps=2)
    plain = draw(model, mllm, case, steps=2)
    assert torch.equal(draw(with_lora(model), mllm, case, steps=2), first)
    assert not torch.allclose(first, other) and not torch.allclose(first, plain)


def test_models_are_merged_by_their_numbers(both, golden, near):
    """Halves of the same numbers, whichever of the two are packed, are those numbers."""
    (model, mllm, _), (plain, _, _) = both
    case = golden("t2i_square")
    positive = mllm.encode(case.prompt)[0]
    expected = velocity(plain, positive, case)
    for base, other in ((model, plain), (plain, model), (model, model)):
        clone = base.clone()
        clone.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
        near(velocity(clone, positive, case), expected, 1e-5)
        clone.unpatch_model(clone.offload_device)


def test_saving_and_hooks_are_refused_with_a_sentence(both):
    import comfy.hooks
    import comfy.sd

    (model, *_), _ = both
    with pytest.raises(ValueError, match="saving the model: a GGUF model found"):
        comfy.sd.save_checkpoint("never", model)
    hooks = comfy.hooks.create_hook_lora(lora(), 1.0, 0.0)
    clone = model.clone()
    clone.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    with pytest.raises(ValueError, match="of hooks .* found on a GGUF model"):
        clone.patch_hooks(hooks)


@contextlib.contextmanager
def placed(server, folder, dtype):
    """The nano model in a format where ComfyUI keeps models, while it lasts; gives its files."""
    source = server.base / "models" / "InternVL-U" / "internvl-u-nano"
    made = convert(source.resolve(), folder, dtype)
    for file in made:
        place = server.base / "models" / file.parent.name
        place.mkdir(exist_ok=True)
        shutil.copy(file, place / file.name)
    yield made
    for file in made:
        (server.base / "models" / file.parent.name / file.name).unlink()


def for_nano(shipped_graph, model):
    """Reads shipped workflows for a file of the nano model."""

    def make(name, **values):
        graph = shipped_graph(name, **{"model_name": model, "preset": "custom", "width": 64, "height": 64} | values)
        for node in graph.values():
            if node["class_type"] == "InternVLU_DecodeLatent":
                node["inputs"] |= {"width": 0, "height": 0}
        return graph

    return make


@pytest.fixture(scope="module")
def nano(server, tmp_path_factory):
    with placed(server, tmp_path_factory.mktemp("nano"), "Q8_0") as made:
        yield made


@pytest.fixture
def nano_graph(shipped_graph, nano):
    return for_nano(shipped_graph, nano[0].name)


def run(server, graph):
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    return entry


def seen(server, graph):
    """What is in the picture that a graph draws: its ground and its things."""
    pytest.importorskip("scipy")
    from PIL import Image

    from training.eval import detector

    entry = run(server, graph)
    saver = [name for name, node in graph.items() if node["class_type"] == "SaveImage"][-1]
    reading = detector.detect(Image.fromarray(server.picture(entry, saver)))
    return reading.background, sorted(thing.name for thing in reading.things)


def scene(server):
    pytest.importorskip("scipy")
    from training.data import scenes
    from training.data.scenes import Scene, Thing

    things = (Thing("circle", "red", "medium", 0.25, 0.5), Thing("square", "blue", "medium", 0.75, 0.5))
    scenes.render(Scene(64, 64, "white", things)).save(server.base / "input" / "packed.png")
    return "packed.png"


def test_the_loader_offers_the_files_and_comfyuis_own_do_not(server, nano):
    info = server.get("/object_info")
    inputs = info["InternVLU_LoadModel"]["input"]
    assert nano[0].name in inputs["required"]["model_name"][1]["options"]
    assert nano[1].name in inputs["optional"]["mllm_name"][1]["options"]
    assert nano[1].name not in inputs["required"]["model_name"][1]["options"]
    assert ".gguf" not in str(info["UNETLoader"]["input"]) and ".gguf" not in str(info["CLIPLoader"]["input"])


def test_memory_is_freed_and_it_draws_again(server, nano_graph):
    graph = nano_graph("text_to_image", prompt="a red circle", seed=3)
    first = seen(server, graph)
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert seen(server, nano_graph("text_to_image", prompt="a red circle", seed=3)) == first
