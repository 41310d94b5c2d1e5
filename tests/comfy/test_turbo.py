"""Speed `turbo`: what a LoRA of few steps tells the sampler, its guider and its scheduler, whichever node loads it."""

import importlib

import pytest
import torch
from pack.internvl_u.convert import convert
from pack.internvl_u.distilled import mark, marked_layer
from pack.internvl_u.merge import merge
from pack.tests.lora_files import LAYERS, SPELLINGS, random_change, written
from safetensors.torch import save_file

EVALUATIONS = 6
TURBO = {"all_cfg_end": 0.0, "part_cfg_end": 0.0}


@pytest.fixture
def tensors(loaded):
    """A LoRA of some layers with the mark of few steps."""
    weights = dict(loaded.model.model.diffusion_model.named_parameters())
    change = random_change({name: tuple(one.shape) for name, one in weights.items()}, LAYERS)
    bias = f"{marked_layer(weights)}.bias"
    marked = mark(len(weights[bias]), EVALUATIONS)
    return written(change, SPELLINGS["ComfyUI, ai-toolkit"], weights) | {
        f"diffusion_model.{bias.removesuffix('.bias')}.diff_b": marked
    }


@pytest.fixture
def file(tensors, tmp_path):
    save_file(tensors, tmp_path / "few.safetensors", {"evaluations": str(EVALUATIONS)})
    return tmp_path / "few.safetensors"


@pytest.fixture
def evaluations_on(native):
    return importlib.import_module("pack.native.distilled").evaluations_on


@pytest.fixture
def by_core(loaded, file, monkeypatch):
    """The MODEL after core's own loader, at a strength."""
    import folder_paths

    import nodes

    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(file))
    return lambda strength=1.0: nodes.LoraLoaderModelOnly().load_lora_model_only(loaded.model, file.name, strength)[0]


@pytest.fixture
def by_ours(native, loaded, file):
    apply_lora = importlib.import_module("pack.native.lora").apply_lora
    return lambda strength=1.0: apply_lora(loaded.model, None, file, strength, 1.0)[0]


def test_the_mark_is_found_after_either_loader_and_not_without_it(loaded, by_core, by_ours, evaluations_on):
    assert evaluations_on(loaded.model) is None
    assert evaluations_on(by_core()) == evaluations_on(by_ours()) == evaluations_on(by_core(0.8)) == EVALUATIONS
    assert evaluations_on(by_core().clone()) == EVALUATIONS
    assert evaluations_on(loaded.model) is None


def test_other_loras_over_and_under_it_do_not_hide_it(native, loaded, by_core, tensors, tmp_path, evaluations_on):
    apply_lora = importlib.import_module("pack.native.lora").apply_lora
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("diff_b")}
    bias = next(name for name in tensors if name.endswith("diff_b"))
    for name, some in {"plain": plain, "bias": plain | {bias: 0.1 * torch.ones_like(tensors[bias])}}.items():
        save_file(some, tmp_path / f"{name}.safetensors")
        assert evaluations_on(apply_lora(by_core(), None, tmp_path / f"{name}.safetensors", 1.0, 1.0)[0]) == EVALUATIONS
        assert evaluations_on(apply_lora(loaded.model, None, tmp_path / f"{name}.safetensors", 1.0, 1.0)[0]) is None


def test_both_loaders_take_every_key_of_the_file(loaded, tensors, by_ours, caplog, monkeypatch):
    import comfy.lora
    import comfy.sd

    dropped = []
    monkeypatch.setattr(comfy.lora.logging, "warning", dropped.append)
    comfy.sd.load_lora_for_models(loaded.model, None, tensors, 1.0, 0.0)
    assert not dropped
    with caplog.at_level("INFO", "internvl_u"):
        by_ours()
    assert f"all {len(tensors)} keys fit" in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8_e4m3fn"])
def test_a_merged_checkpoint_tells_it_too(native, checkpoint, file, tmp_path, evaluations_on, precision):
    merge(checkpoint, tmp_path / "merged", [(file, 1.0)])
    assert evaluations_on(native.load(tmp_path / "merged", precision)[0]) == EVALUATIONS


@pytest.mark.parametrize("kind", ["bfloat16", "fp8_scaled", "int8", "Q8_0"])
def test_single_files_of_a_merged_checkpoint_tell_it_too(native, checkpoint, file, tmp_path, evaluations_on, kind):
    if kind == "Q8_0":
        pytest.importorskip("gguf", reason="the package that writes GGUF files, see requirements-dev.txt")
    merge(checkpoint, tmp_path / "merged", [(file, 1.0)])
    drawing, language, vae = convert(tmp_path / "merged", tmp_path / "files", kind)
    assert evaluations_on(native.load(drawing, "auto", language, vae)[0]) == EVALUATIONS


@pytest.fixture
def told(native, monkeypatch):
    """The sentences that the nodes show below themselves."""
    sentences = []
    nodes = importlib.import_module("pack.nodes.sample")
    monkeypatch.setattr(nodes, "_tell", lambda hidden, *lines: sentences.extend(filter(None, lines)))
    return sentences


@pytest.fixture
def drawn(native, loaded, golden, told):
    """The latent that the sampler node draws with a MODEL."""
    sampler = importlib.import_module("pack.nodes.sample").SampleLatent
    case = golden("t2i_square")
    positive, negative, latent = loaded.mllm.encode(case.prompt)
    latent = importlib.import_module("pack.native.sampler").empty_latent(32, 32)

    def draw(model, steps=20, **more):
        given = {"seed": 3, "steps": steps, "all_cfg": 4.5, "part_cfg": 2.0, "denoise": 1.0} | more
        given |= {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
        return sampler.execute(**given).result[0]["samples"]

    return draw


def test_turbo_draws_as_its_numbers_do_and_says_so(drawn, by_core, told):
    model = by_core()
    found = drawn(model, speed="turbo")
    assert told == ["speed turbo: 6 steps, one branch without guidance taken"]
    assert torch.equal(found, drawn(model, EVALUATIONS, **TURBO))
    assert not torch.equal(found, drawn(model, speed="fast"))
    assert torch.equal(drawn(model, 4, speed="turbo"), drawn(model, 4, **TURBO)), "typed steps count"


def test_turbo_evaluates_one_branch_in_each_step(drawn, by_core, loaded, monkeypatch):
    model, network, batches = by_core(), loaded.model.model.diffusion_model, []
    forward = network._forward
    monkeypatch.setattr(network, "_forward", lambda x, *args: batches.append(len(x)) or forward(x, *args))
    drawn(model, speed="turbo")
    assert batches == [1] * EVALUATIONS


def test_turbo_without_the_lora_says_what_is_missing(native, drawn, loaded):
    with pytest.raises(ValueError, match="with the LoRA of `python -m internvl_u distill` expected"):
        drawn(loaded.model, speed="turbo")
    nodes = importlib.import_module("pack.nodes.sample")
    with pytest.raises(ValueError, match="no MODEL connected"):
        nodes.ScheduleSteps.execute(steps=20, denoise=1.0, speed="turbo")


def test_guider_and_scheduler_take_the_same(native, loaded, told, by_core):
    nodes = importlib.import_module("pack.nodes.sample")
    model = by_core()
    sigmas = nodes.ScheduleSteps.execute(steps=20, denoise=1.0, speed="turbo", model=model).result[0]
    assert torch.equal(sigmas, nodes.ScheduleSteps.execute(steps=EVALUATIONS, denoise=1.0).result[0])
    positive, negative, _ = loaded.mllm.encode("a cat")
    guider = nodes.CreateGuider.execute(
        model=model, positive=positive, negative=negative, all_cfg=4.5, part_cfg=2.0, speed="turbo"
    ).result[0]
    assert set(guider.intervals.named().values()) == {0.0}


def test_other_presets_do_not_ask_for_it(drawn, loaded):
    assert torch.isfinite(drawn(loaded.model, speed="fast")).all()


def test_a_graph_with_cores_lora_node_draws_in_turbo(server, graph, golden, tensors):
    save_file(tensors, server.base / "models" / "loras" / "few_steps.safetensors")

    def latent(**inputs):
        nodes = server.with_latent(graph("text_to_image", golden("t2i_square")))
        load, sample = (server.find(nodes, f"InternVLU_{kind}") for kind in ("LoadModel", "SampleLatent"))
        given = {"model": [load, 0], "lora_name": "few_steps.safetensors", "strength_model": 1.0}
        nodes["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": given}
        nodes[sample]["inputs"] |= {"model": ["lora", 0], "steps": 20} | inputs
        return server.latent(server.run(nodes))

    assert torch.equal(latent(speed="turbo"), latent(steps=EVALUATIONS, **TURBO))
