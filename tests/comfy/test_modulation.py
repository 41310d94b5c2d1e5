"""Modulation once per run: the pictures of every way to sample stay, nothing stale is used, and little is loaded."""

import contextlib
import copy
import gc
import importlib
from collections import Counter

import pytest
import torch
from pack.internvl_u.modulation import Modulations, StepModulation

BLOCK = "diffusion_model.transformer_blocks"
SCALES = {"all_cfg": 4.5, "part_cfg": 2.0}


@pytest.fixture
def modulation(comfyui):
    return importlib.import_module("pack.native.modulation")


@pytest.fixture
def forgetful(modulation, monkeypatch):
    """A context in which every call computes its modulation."""

    @contextlib.contextmanager
    def switch():
        with monkeypatch.context() as patch:
            patch.setattr(modulation.RunModulations, "of", lambda *_: None)
            yield

    return switch


@pytest.fixture
def rows(loaded, monkeypatch):
    """The numbers of levels that the loaded network was asked to compute at a time."""
    asked = []
    network = loaded.model.model.diffusion_model
    original = network.modulation
    monkeypatch.setattr(network, "modulation", lambda time, dtype: asked.append(len(time)) or original(time, dtype))
    return asked


@pytest.fixture
def edit(loaded, golden):
    """Conditionings and latent of an edit, which takes two calls a step."""
    from PIL import Image

    case = golden("edit_one")
    pictures = [Image.open(file).convert("RGB") for file in case.images]
    return loaded.mllm.encode(case.prompt, images=pictures, vae=loaded.vae)


@pytest.fixture
def sample(loaded, edit, parts):
    """Draws the edit with a sampler of ComfyUI by name; changes of the guider are made by a function."""
    import comfy.samplers

    def run(model=None, sampler=None, steps=5, sigmas=None, positive=None, changed=None, seed=3):
        model = model or loaded.model
        guider = parts.guidance.DualGuider(model)
        guider.set_conds(positive or edit[0], edit[1])
        guider.set_scales(*SCALES.values())
        if changed is not None:
            changed(guider)
        latent = edit[2]["samples"]
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        solver = comfy.samplers.sampler_object(sampler) if sampler else parts.sampler.dpmpp_2m_flow()
        sigmas = parts.sampler.flow_sigmas(steps) if sigmas is None else sigmas
        return guider.sample(noise, latent, solver, sigmas, seed=seed)

    return run


def lora(network, layers, seed=0, scale=0.3):
    """A LoRA in ComfyUI's own names on some layers of a transformer."""
    made = torch.Generator().manual_seed(seed)
    file = {}
    for layer in layers:
        rows, columns = network.get_submodule(layer).weight.shape
        file[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(2, columns, generator=made) * scale
        file[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=made) * scale
    return file


MODULATION = (
    "transformer_blocks.0.img_mod.1",
    "transformer_blocks.1.txt_mod.1",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
)


def with_lora(model, layers=MODULATION, **how):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora(model.model.diffusion_model, layers, **how), 1.0, 0.0)[0]


SAMPLERS = ["euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "uni_pc", None]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_it_drew(sample, forgetful, rows, near, sampler):
    once = sample(sampler=sampler)
    asked = list(rows)
    with forgetful():
        each = sample(sampler=sampler)
    near(once, each, 2e-5)
    assert rows == asked  # none in the second run
    assert 4 <= asked[0] <= 6 and all(count == 1 for count in asked[1:])
    if sampler in ("euler", "heun", None):
        assert len(asked) == 1


def test_a_step_needs_none_of_the_modulations_weights(loaded, draw, golden):
    calls, steps = Counter(), []
    network = loaded.model.model.diffusion_model
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    network.img_in.register_forward_pre_hook(lambda *_: steps.append(dict(calls)))
    draw(loaded.model, loaded.mllm, golden("t2i_square"), steps=6)
    layers = {name for name in calls if "_mod" in name or name.startswith(("norm_out.linear", "time_text_embed"))}
    assert len(layers) == 2 * 2 * 3 + 1 + 3
    assert {calls[name] for name in layers} == {1}
    assert calls["transformer_blocks.0.attn.to_q"] == 6
    assert not set(steps[0]) & layers and all(layers <= set(step) for step in steps[1:])


def test_a_lora_on_the_modulation_is_in_it_and_no_clones_is_in_anothers(loaded, sample, forgetful, near):
    models = [loaded.model, with_lora(loaded.model), with_lora(loaded.model, seed=1)]
    assert all(model.model is loaded.model.model for model in models)
    with forgetful():
        expected = [sample(model) for model in models]
    for i in (0, 1, 2, 1, 0):
        near(sample(models[i]), expected[i], 2e-5)
    for one, other in ((0, 1), (1, 2)):
        assert (expected[one] - expected[other]).norm() / expected[one].norm() > 0.01


@pytest.mark.parametrize("layers", [MODULATION[:1], MODULATION[3:], ("transformer_blocks.0.attn.to_q",)])
@pytest.mark.parametrize("mode", ["MinVram", "MaxSpeed"])
def test_a_scheduled_lora_is_obeyed(loaded, edit, sample, forgetful, rows, near, layers, mode):
    """One that comes and goes within a run, on one conditioning of three."""
    import comfy.hooks

    network = loaded.model.model.diffusion_model
    hooks = comfy.hooks.create_hook_lora(lora(network, layers, scale=1.0), 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.3), (0.4, 0.7)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    positive = [[tensor, extra | {"hooks": hooks}] for tensor, extra in edit[0]]

    def changed(guider):
        guider.model_patcher.hook_mode = getattr(comfy.hooks.EnumHookMode, mode)

    plain = sample()
    rows.clear()
    once = sample(positive=positive, changed=changed)
    assert bool(rows) == (layers == ("transformer_blocks.0.attn.to_q",))
    with forgetful():
        near(once, sample(positive=positive, changed=changed), 2e-5)
    assert (once - plain).norm() / plain.norm() > 1e-3
    near(sample(), plain, 1e-6)


def test_functions_that_other_nodes_put_on_a_weight_are_run_at_each_call(loaded, sample, forgetful, rows, near):
    model = loaded.model.clone()
    run = []
    model.add_weight_wrapper(
        f"{BLOCK}.0.img_mod.1.weight", lambda weight: run.append(1) or weight * (1 + 0.1 * len(run))
    )
    once = sample(model)
    count = len(run)
    assert not rows and count >= 10
    run.clear()
    with forgetful():
        near(once, sample(model), 1e-6)
    assert len(run) == count


def change_vec(args, original):
    return original(args | {"vec": args["vec"] * 1.5})


def write_vec(args, original):
    args["vec"].mul_(1.5)
    return original(args)


def other_vec(args, original):
    assert args["vec"].shape == (args["img"].shape[0], 64)
    return original(args | {"vec": torch.ones_like(args["vec"])})


def leave_vec(args, original):
    return original(args)


@pytest.mark.parametrize("how", [change_vec, write_vec, other_vec, leave_vec])
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_is_modulated_by_what_its_replacement_hands_on(loaded, sample, forgetful, rows, near, how, index):
    model = loaded.model.clone()
    model.set_model_patch_replace(lambda args, extra: how(args, extra["original_block"]), "dit", "double_block", index)
    once = sample(model)
    assert rows == [5]
    with forgetful():
        each = sample(model)
    near(once, each, 2e-5)
    assert torch.equal(once, sample()) == (how is leave_vec)


def test_samples_of_a_batch_may_be_at_levels_of_their_own(loaded, sample, forgetful, rows, near):
    """As nodes have them that hold parts of a picture back."""

    def apart(apply_model, args):
        levels = args["timestep"] * torch.linspace(1.0, 0.5, len(args["timestep"]))
        return apply_model(args["input"], levels, **args["c"])

    model = loaded.model.clone()
    model.set_model_unet_function_wrapper(apart)
    once = sample(model)
    assert 2 in rows
    with forgetful():
        near(once, sample(model), 2e-5)


def test_a_wrapper_that_changes_the_time_is_obeyed(loaded, sample, forgetful, near):
    from comfy.patcher_extension import WrappersMP

    model = loaded.model.clone()
    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, lambda executor, x, time, *args: executor(x, time.flip(1), *args))
    once = sample(model)
    with forgetful():
        near(once, sample(model), 2e-5)
    assert not torch.allclose(once, sample(), atol=1e-2)


def test_other_noise_levels_of_the_model_are_obeyed(loaded, sample, forgetful, rows, near):
    """A node that puts another ModelSampling on a clone; the schedule's levels are its."""

    class Twice(type(loaded.model.model.model_sampling)):
        def timestep(self, sigma):
            return super().timestep(sigma) / 2

    model = loaded.model.clone()
    model.add_object_patch("model_sampling", Twice(loaded.model.model.model_config))
    once = sample(model)
    assert rows == [5]
    with forgetful():
        near(once, sample(model), 2e-5)


@pytest.mark.skipif("'DualModelGuider' not in __import__('comfy_extras.nodes_custom_sampler', fromlist=['']).__dict__")
@pytest.mark.parametrize("same_network", [False, True])
def test_a_guider_with_a_second_model_draws_what_it_drew(
    native, checkpoint, loaded, edit, parts, forgetful, near, same_network
):
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    second = with_lora(loaded.model if same_network else native.load(checkpoint, "fp32")[0])

    def draw():
        guider = DualModelGuider.execute(loaded.model, edit[0], 4.0, second, edit[1]).result[0]
        latent = edit[2]["samples"]
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
        solver, sigmas = parts.sampler.dpmpp_2m_flow(), parts.sampler.flow_sigmas(4)
        return guider.sample(noise, latent, solver, sigmas, seed=1)

    once = draw()
    with forgetful():
        near(once, draw(), 2e-5)


def alive():
    gc.collect()
    return sum(type(thing) in (Modulations, StepModulation) for thing in gc.get_objects())


def test_nothing_outlives_a_run_even_one_that_is_interrupted(loaded, sample):
    import comfy.model_management as mm

    seen = []

    def look(apply_model, args):
        seen.append(alive())
        if len(seen) == 9:
            raise mm.InterruptProcessingException
        return apply_model(args["input"], args["timestep"], **args["c"])

    model = loaded.model.clone()
    model.set_model_unet_function_wrapper(look)
    sample(model, steps=3)
    assert max(seen) > 0 and alive() == 0
    with pytest.raises(mm.InterruptProcessingException):
        sample(model, steps=3)
    assert alive() == 0 and len(seen) == 9


def test_a_node_that_keeps_a_copy_of_the_options_keeps_nothing_of_the_run(loaded, sample):
    kept = []

    def keep(apply_model, args):
        kept.append(copy.deepcopy(args["c"]["transformer_options"].get("internvl_u_modulation")))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model = loaded.model.clone()
    model.set_model_unet_function_wrapper(keep)
    sample(model, steps=2)
    assert kept[0] is not None and alive() == 0


def test_gradients_go_through_the_layers(native, checkpoint, sample):
    """As in core's Train LoRA, whose steps are calls within a run."""
    with torch.inference_mode(False):
        model = native.load(checkpoint, "fp32")[0].clone()
        layer = model.model.diffusion_model.transformer_blocks[0].img_mod[1]
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=True)
    found = []

    def train(apply_model, args):
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [args[name].clone() for name in ("input", "timestep")]
            conditions = args["c"] | {"ref_latents": [latent.clone() for latent in args["c"].get("ref_latents", ())]}
            contexts = [copy.copy(context) for context in conditions["contexts"]]
            for context in contexts:
                context.context, context._branches = context.context.clone(), {}
            out = apply_model(*inputs, **conditions | {"contexts": contexts})
            found.append(torch.autograd.grad(out.sum(), layer.weight)[0])
        return out.detach()

    model.set_model_unet_function_wrapper(train)
    sample(model, steps=2)
    assert len(found) == 4 and all(gradient.abs().sum() > 0 for gradient in found)


def test_each_gpus_copy_of_the_network_has_its_own(loaded, native, checkpoint, modulation):
    from types import SimpleNamespace

    patchers = [loaded.model, native.load(checkpoint, "fp32")[0], native.load(checkpoint, "fp32")[0]]
    guider = SimpleNamespace(model_patcher=patchers[0], model_options={"multigpu_clones": {"second": patchers[1]}})
    run = modulation.RunModulations(guider)
    time, found = torch.zeros(1, 256), []
    for patcher in patchers:
        patcher.model.current_patcher, patcher.model.current_weight_patches_uuid = patcher, patcher.patches_uuid
        found.append(run.of(patcher.model.diffusion_model, time, {}))
    assert found[0] is not None and found[1] is not None and found[0] is not found[1] and found[2] is None
    assert run.of(patchers[0].model.diffusion_model, time, {}) is found[0]
    patchers[0].model.current_weight_patches_uuid = "others"
    assert run.of(patchers[0].model.diffusion_model, time, {}) is not found[0]


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """The tiny model's transformer in every format that has packed or quantised layers."""
    from pack.internvl_u.convert import convert

    pytest.importorskip("gguf", reason="the package that writes GGUF files is a development tool")
    return {
        level: convert(checkpoint, tmp_path_factory.mktemp(level), level)[0] for level in ("Q8_0", "int8", "fp8_scaled")
    }


@pytest.fixture(params=["fp32", "fp8_e4m3fn", "Q8_0", "int8", "fp8_scaled"])
def stored(request, checkpoint, files, parts):
    """Returns a function that loads the MODEL whose weights are stored in one of the ways."""
    dtypes = {"fp32": torch.float32, "fp8_e4m3fn": torch.float8_e4m3fn}
    source = str(files.get(request.param, checkpoint))
    return lambda: parts.model.load_model(source, dtypes.get(request.param))


def layers_of(patcher):
    """The layers with weights: (those of the modulation, all others)."""
    network = patcher.model.diffusion_model
    once = {module for layer in network.modulation_layers() for module in layer.modules()}
    layers = [module for module in network.modules() if module._parameters and not list(module.children())]
    return [layer for layer in layers if layer in once], [layer for layer in layers if layer not in once]


def size_of(layers):
    return sum(weight.nbytes for layer in layers for weight in layer._parameters.values() if weight is not None)


def is_loaded(layer):
    return getattr(layer, "comfy_patched_weights", False)


@pytest.fixture
def moved(loaded, golden, draw, monkeypatch):
    """Draws with a share of a MODEL's bytes on its device; returns the bytes that each call brings there."""
    import comfy.model_management as mm

    def run(patcher, budget):
        mm.unload_all_models()
        patcher.load(patcher.load_device, lowvram_model_memory=budget)
        calls = []
        network = patcher.model.diffusion_model
        handles = [network.img_in.register_forward_pre_hook(lambda *_: calls.append(0))]
        for layer in sum(layers_of(patcher), []):
            if not is_loaded(layer):
                handles.append(
                    layer.register_forward_pre_hook(
                        lambda layer, _: calls.__setitem__(-1, calls[-1] + size_of([layer]))
                    )
                )
        with monkeypatch.context() as patch:
            patch.setattr(mm, "load_models_gpu", lambda *args, **kwargs: None)
            drawn = draw(patcher, loaded.mllm, golden("t2i_square"), steps=4)
        for handle in handles:
            handle.remove()
        patcher.detach()
        return drawn, calls

    return run


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_a_step_moves_less_by_all_of_the_modulation(stored, moved, modulation, forgetful, monkeypatch, share, near):
    """With a share of what else there is on the device, in ComfyUI's own order, and in ours."""
    patcher = stored()
    once, others = layers_of(patcher)
    largest = max(size_of([layer]) for layer in others)
    budget = int(share * size_of(others)) + 4 * largest
    with monkeypatch.context() as patch, forgetful():
        patch.delattr(modulation.FlowPatcher, "_load_list")
        expected, before = moved(patcher, budget)
    drawn, after = moved(patcher, budget)
    in_int8 = any(getattr(layer, "layout_type", "") == "TensorWiseINT8Layout" for layer in once)
    near(
        drawn, expected, 2e-2 if in_int8 else 2e-5
    )  # multiplied in int8, the last bit of a number may be 1 / 127 of it
    assert len(before) == len(after) == 4 and len(set(before)) == len(set(after[1:])) == 1
    assert sum(after) <= sum(before) and before[1] - after[1] > 0.4 * size_of(once)
    assert after[1] == 0 if share == 1.0 else after[1] < 0.5 * before[1]


def test_levels_do_not_see_each_other_where_a_layer_rounds_by_one_scale_for_all(loaded):
    """fp8 products in ComfyUI, which only some GPUs have: stood in for by a layer."""

    class Rounding(torch.nn.Linear):
        layout_type = "TensorCoreFP8Layout"

        def forward(self, hidden):
            scale = hidden.abs().max() / 7
            return super().forward((hidden / scale).round() * scale)

    network = loaded.model.model.diffusion_model
    layer, hidden = Rounding(64, 32), torch.randn(3, 64) * torch.tensor([[1.0], [0.01], [1.0]])
    expected = torch.cat([layer(row) for row in hidden.split(1)])
    assert not torch.allclose(layer(hidden), expected, atol=1e-3)
    assert torch.equal(network.run_once(torch.nn.Sequential(layer), hidden), expected)


def test_the_modulation_is_the_first_to_leave_the_device(stored):
    patcher = stored()
    once, others = layers_of(patcher)
    patcher.load(patcher.load_device, lowvram_model_memory=10 * patcher.model_size())
    assert all(is_loaded(layer) for layer in once + others)
    freed = patcher.partially_unload(patcher.offload_device, size_of(once) // 2)
    assert size_of(once) // 2 <= freed <= size_of(once)
    assert all(is_loaded(layer) for layer in others) and not all(is_loaded(layer) for layer in once)
    patcher.detach()


def test_all_of_the_modulation_is_streamed_last(loaded):
    """ComfyUI 0.33 with dynamic VRAM asks the model."""
    first, last = loaded.model.model.get_dynamic_vram__units()
    assert first == [] and {module for unit in last for root in unit for module in root.modules()} >= set(
        layers_of(loaded.model)[0]
    )
    assert not {module for unit in last for root in unit for module in root.modules()} & set(layers_of(loaded.model)[1])
