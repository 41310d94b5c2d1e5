"""ComfyUI's nodes for several GPUs, and ours for the MLLM, on two devices that are as strict as GPUs: same pictures."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pack.internvl_u.convert import convert
from pack.internvl_u.generation import GenerationConfig
from pack.tests.lora_files import LANGUAGE_LAYERS, LAYERS, STRENGTH, random_change
from PIL import Image
from safetensors.torch import save_file

SAME = 1e-5
"""Two samples are multiplied in another order than four."""
FORMATS = ("Q8_0", "int8", "fp8_scaled", "int8_convrot")


@pytest.fixture(scope="module")
def fakes(comfyui):
    try:
        return importlib.import_module("pack.tests.fake_gpus")
    except (ImportError, AttributeError):
        pytest.skip(f"torch {torch.__version__} has no devices that are made in Python")


@pytest.fixture
def gpus(fakes):
    with fakes.as_gpus() as gpus:
        yield gpus


@pytest.fixture
def core(native):
    """ComfyUI's nodes for several GPUs as functions."""
    nodes = pytest.importorskip("comfy_extras.nodes_multigpu", reason="ComfyUI 0.33 and newer have them")

    def function(node):
        return lambda *inputs: node.execute(*inputs).args[0]

    return SimpleNamespace(
        split=lambda model: function(nodes.MultiGPUCFGSplitNode)(model, 2),
        model=function(nodes.SelectModelDeviceNode),
        clip=function(nodes.SelectCLIPDeviceNode),
        vae=function(nodes.SelectVAEDeviceNode),
    )


@pytest.fixture
def select(native):
    return importlib.import_module("pack.native.devices").select_device


@pytest.fixture
def apply_lora(native):
    return importlib.import_module("pack.native.lora").apply_lora


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """Makes the checkpoint's three files in a format, once."""
    made = {}

    def of(level):
        if level not in made:
            made[level] = convert(checkpoint, tmp_path_factory.mktemp(level), level)
        return made[level]

    return of


@pytest.fixture
def load(native, checkpoint, files):
    """Loads MODEL, MLLM and VAE of the folder in a precision, or of files in a format."""

    def run(kept="fp32"):
        if kept not in FORMATS:
            return native.load(checkpoint, kept)
        if kept == "Q8_0":
            pytest.importorskip("gguf", reason="the package that writes GGUF files is a development tool")
        transformer, language, vae = files(kept)
        return native.load(transformer, "auto", language, vae)

    return run


@pytest.fixture
def lora(loaded, tmp_path):
    """A LoRA on a few layers of both halves."""
    halves = (
        (loaded.model.model.diffusion_model, LAYERS, "diffusion_model."),
        (loaded.mllm.model, LANGUAGE_LAYERS, ""),
    )
    tensors = {}
    for network, layers, prefix in halves:
        shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
        for layer, (up, down) in random_change(shapes, layers).items():
            tensors |= {f"{prefix}{layer}.lora_up.weight": up, f"{prefix}{layer}.lora_down.weight": down}
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.fixture
def draw(parts):
    def run(model, positive, negative):
        settings = {"seed": 3, "steps": 3, "all_cfg": 4.5, "part_cfg": 2.0}
        latent = parts.sampler.empty_latent(64, 48, 2)
        return parts.sampler.sample_latent(model, positive, negative, latent, **settings)["samples"]

    return run


def context_of(mllm):
    return mllm.encode("a red circle")[0][0][0]


def places(network):
    return {weight.device for weight in network.parameters()}


def networks(model):
    return [one.model.diffusion_model for one in (model, *model.get_additional_models_with_key("multigpu"))]


def test_devices_that_are_not_there_are_as_strict_as_gpus(fakes):
    one, other = (torch.ones(3, device=device) for device in fakes.DEVICES)
    for pair in ((one, other), (one, torch.ones(3))):
        with pytest.raises(RuntimeError, match="on one expected"):
            torch.add(*pair)
    assert (one + other.to(one.device) * torch.tensor(2.0)).cpu().tolist() == [3.0, 3.0, 3.0]
    assert not torch.accelerator.is_available()


@pytest.mark.parametrize("kept", ["fp32", "fp8_e4m3fn", *FORMATS])
def test_two_gpus_draw_the_picture_of_one_from_weights_of_every_kind(
    kept, gpus, core, load, lora, apply_lora, draw, near
):
    model, mllm, _ = load(kept)
    positive, negative, _ = mllm.encode("a red circle")
    plain, changed = draw(model, positive, negative), apply_lora(model, None, lora, STRENGTH, 0)[0]
    expected = draw(changed, positive, negative)
    assert not torch.equal(plain, expected)
    after, before = core.split(changed), apply_lora(core.split(model), None, lora, STRENGTH, 0)[0]
    for split in (after, before):
        near(draw(split, positive, negative), expected, SAME)
        assert [places(network) for network in networks(split)] == [{device} for device in gpus.devices]
    near(draw(core.model(changed, "gpu:1"), positive, negative), expected, SAME)


def test_two_gpus_share_the_branches_of_an_edit_under_every_sampler(gpus, core, load, draw, near, parts, monkeypatch):
    import comfy.sample

    model, mllm, vae = load()
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    positive, negative, _ = mllm.encode("make it like the other", images=pictures, vae=core.vae(vae, "gpu:1"))
    noise = torch.randn(2, 16, 1, 6, 8, generator=torch.Generator().manual_seed(1))

    def ksampler(model, *conditionings):
        arguments = (model, noise, 3, 4.5, "euler", "simple", *conditionings, torch.zeros_like(noise))
        return comfy.sample.sample(*arguments, seed=1, disable_pbar=True)

    for way in (draw, ksampler):
        expected = way(model, positive, negative)
        calls, forward = [], parts.model.NativeMMDiT._forward

        def counted(network, x, *args, calls=calls, forward=forward):
            calls.append((x.device, len(x)))
            return forward(network, x, *args)

        with monkeypatch.context() as patch:
            patch.setattr(parts.model.NativeMMDiT, "_forward", counted)
            near(way(core.split(model), positive, negative), expected, SAME)
        # Two pictures in three branches each: the larger share is the first GPU's.
        samples = {device: sum(count for where, count in calls if where == device) for device in gpus.devices}
        assert list(samples.values()) == [3 * 4, 3 * 2]


def test_a_run_on_two_gpus_makes_modulation_and_positions_once_for_each(gpus, core, load, draw, parts, monkeypatch):
    model, mllm, _ = load()
    positive, negative, _ = mllm.encode("a red circle")
    made = {"modulation": [], "branch": []}
    for name, seen in made.items():
        function = getattr(parts.model.NativeMMDiT, name)

        def counted(network, given, *args, seen=seen, function=function):
            seen.append(given.device)
            return function(network, given, *args)

        monkeypatch.setattr(parts.model.NativeMMDiT, name, counted)
    draw(core.split(model), positive, negative)
    assert sorted(map(str, made["modulation"])) == sorted(map(str, gpus.devices))
    assert {made["branch"].count(device) for device in gpus.devices} == {1}  # one branch on each


def test_a_gpu_that_is_short_of_memory_draws_the_same(gpus, core, load, draw, near):
    model, mllm, _ = load()
    positive, negative, _ = mllm.encode("a red circle")
    expected, split = draw(model, positive, negative), core.split(model)
    gpus.free[gpus.devices[1]] = 1
    near(draw(split, positive, negative), expected, SAME)
    assert torch.device("cpu") in places(networks(split)[1])


def test_weights_follow_from_device_to_device(gpus, core, load, draw, near):
    model, mllm, _ = load()
    positive, negative, _ = mllm.encode("a red circle")
    expected, first = draw(model, positive, negative), gpus.devices[0]
    for choice, device in {
        "cpu": torch.device("cpu"),
        "gpu:0": first,
        "gpu:1": gpus.devices[1],
        "default": first,
    }.items():
        chosen = core.model(model, choice)
        near(draw(chosen, positive, negative), expected, SAME)
        assert places(chosen.model.diffusion_model) == {device}


def test_a_vae_on_another_gpu_takes_the_short_way_there(gpus, core, load):
    vae = load()[2]
    other, pixels = core.vae(vae, "gpu:1"), torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(1))
    latent = vae.encode(pixels)
    assert torch.equal(other.encode(pixels), latent) and torch.equal(other.decode(latent), vae.decode(latent))
    assert type(other.first_stage_model) is type(vae.first_stage_model)
    assert places(other.first_stage_model) == {gpus.devices[1]}


@pytest.mark.parametrize("kept", ["fp32", *FORMATS])
def test_the_language_model_reads_and_writes_the_same_on_every_device(kept, gpus, load, select, lora, apply_lora, near):
    if not hasattr(load()[0], "deepclone_multigpu"):
        pytest.skip("ComfyUI 0.33 and newer have several GPUs")
    mllm = load(kept)[1]
    changed = apply_lora(None, mllm, lora, 0, STRENGTH)[1]
    expected = context_of(changed)
    assert not torch.equal(context_of(mllm), expected)
    for choice, device in {"gpu:1": gpus.devices[1], "cpu": torch.device("cpu"), "gpu:0": gpus.devices[0]}.items():
        after, before = select(changed, choice)[0], apply_lora(None, select(mllm, choice)[0], lora, 0, STRENGTH)[1]
        for chosen in (after, before):
            near(context_of(chosen), expected, SAME)
            assert places(chosen.model) == {device}


def test_the_language_model_goes_to_the_cpu_and_back(gpus, load, select, near):
    mllm = load()[1]
    expected = context_of(mllm)
    for choice, device in {"cpu": torch.device("cpu"), "default": gpus.devices[0]}.items():
        chosen, note = select(mllm, choice)
        near(context_of(chosen), expected, SAME)
        assert places(chosen.model) == {device} and note == ""


def test_the_language_model_answers_on_another_gpu_as_on_the_first(gpus, core, load, select):
    mllm = load()[1]
    other = select(mllm, "gpu:1")[0]
    for config in (GenerationConfig(5), GenerationConfig(5, beams=2)):
        asked = {"system": "", "images": [Image.new("RGB", (64, 64), "red")], "config": config}
        assert other.generate("<image> what?", **asked) == mllm.generate("<image> what?", **asked)
    assert places(other.model) == {gpus.devices[1]}


def test_a_clip_on_another_gpu_encodes_there(gpus, core, load):
    clip = importlib.import_module("pack.native.clip").CLIP(load()[1])
    expected, other = (
        one.encode_from_tokens_scheduled(one.tokenize("a cat")) for one in (clip, core.clip(clip, "gpu:1"))
    )
    assert torch.equal(other[0][0], expected[0][0])
    assert places(core.clip(clip, "gpu:1").patcher.model) == {torch.device("cpu")}  # not loaded, so not on the first


def test_each_device_reads_a_prompt_itself(gpus, load, select, count_reads):
    mllm = load()[1]
    context_of(mllm)
    other = select(mllm, "cpu")[0]
    reads = count_reads(other.model)
    context_of(other)
    assert reads
    reads.clear()
    context_of(other)
    assert not reads


def test_int8_weights_that_a_lora_has_outgrown_on_one_gpu_are_as_in_the_file_on_another(
    gpus, core, load, select, lora, apply_lora
):
    import comfy.model_management as mm

    changed = apply_lora(None, load("int8")[1], lora, 0, 6.0)[1]
    gpus.free[gpus.devices[0]] = 1
    expected = context_of(changed)  # offloaded
    mm.unload_all_models()
    gpus.free.update({gpus.devices[0]: 8 << 30, gpus.devices[1]: 1})
    other = select(changed, "gpu:1")[0]
    changed.kept.clear()
    context_of(changed)
    assert any(hasattr(weight, "grown") for weight in changed.model.parameters())
    assert torch.equal(context_of(other), expected)


def test_the_cpu_computes_in_fp32_what_a_gpu_computes_in_bf16(gpus, load, select, near, monkeypatch):
    import comfy.model_management as mm

    monkeypatch.setattr(
        mm, "should_use_bf16", lambda device=None, *_, **__: device is not None and device.type != "cpu"
    )
    mllm = load("bf16")[1]
    chosen = select(mllm, "cpu")[0]
    assert (mllm.dtype, chosen.dtype) == (torch.bfloat16, torch.float32)
    near(context_of(chosen), context_of(mllm), 0.05)
    monkeypatch.undo()
    near(context_of(chosen), context_of(load("bf16")[1]), SAME)


@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_a_model_whose_files_have_moved_is_not_made_of_others(
    kept, gpus, core, native, checkpoint, files, select, tmp_path
):
    place, moved = tmp_path / "models", tmp_path / "moved"
    place.mkdir()
    sources = [checkpoint] if kept == "fp32" else files(kept)
    copy = shutil.copytree if kept == "fp32" else shutil.copy2
    names = [Path(copy(source, place / source.name)).name for source in sources]

    def load(folder):
        transformer, *others = (folder / name for name in names)
        return native.load(transformer, "auto", *others)

    model, mllm, vae = load(place)
    ways = [lambda: core.split(model), lambda: core.vae(vae, "gpu:1"), lambda: select(mllm, "gpu:1")]
    place.rename(moved)
    for again in ways:
        with pytest.raises(FileNotFoundError, match="nothing found, the file expected that the model was loaded from"):
            again()
    shutil.copytree(moved, place, copy_function=shutil.copy)  # files of another time
    for again in ways:
        with pytest.raises(FileNotFoundError, match="another file found"):
            again()
    for again in (lambda: core.split(load(moved)[0]), lambda: select(load(moved)[1], "gpu:1")):
        again()


def test_a_gpu_that_is_not_there_leaves_the_language_model_where_it_is(load, select):
    mllm = load()[1]
    chosen, note = select(mllm, "gpu:7")
    assert chosen is mllm and "gpu:7 is not on this machine" in note


@pytest.mark.parametrize("choice", ["cuda:1", "gpu:", "", "gpu:1 "])
def test_what_is_no_choice_is_refused(load, select, choice):
    with pytest.raises(ValueError, match="one of default, cpu"):
        select(load()[1], choice)


def test_only_the_language_model_is_taken(load, select):
    with pytest.raises(ValueError, match="connect the MLLM of Load InternVL-U"):
        select(load()[0], "cpu")
