"""What ComfyUI does with native objects: offloading, LoRA, batches, areas, precision, interrupts."""

import importlib

import pytest
import torch
from pack.internvl_u.generation import GenerationConfig
from safetensors.torch import load_file


class Poisoned(torch.Tensor):
    """An offloaded weight: only ComfyUI's cast may read it."""

    allowed = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if not cls.allowed and name not in {"__get__", "size", "dim", "element_size", "nelement", "numel", "storage"}:
            raise AssertionError(f"{name} reads an offloaded weight")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.fixture
def poison(monkeypatch):
    """Poisons every weight of a patcher's model that a partial load left offloaded; returns their share of bytes."""
    import comfy.ops

    cast = comfy.ops.cast_bias_weight

    def casting(*args, **kwargs):
        Poisoned.allowed = True
        try:
            result = cast(*args, **kwargs)
        finally:
            Poisoned.allowed = False
        return tuple(clean(value) for value in result) if isinstance(result, tuple) else clean(result)

    def clean(value):
        return value.as_subclass(torch.Tensor) if isinstance(value, Poisoned) else value

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", casting)

    def apply(patcher, budget):
        patcher.load(patcher.load_device, lowvram_model_memory=budget)
        total = poisoned = 0
        for module in patcher.model.modules():
            for name, value in list(module._parameters.items()):
                if value is None:
                    continue
                total += value.nbytes
                offloaded = not getattr(module, "comfy_patched_weights", False)
                if offloaded and hasattr(module, "comfy_cast_weights"):
                    poisoned += value.nbytes
                    Poisoned.allowed = True
                    module._parameters[name] = value.detach().as_subclass(Poisoned)
                    Poisoned.allowed = False
        return poisoned / total

    return apply


def test_a_poisoned_weight_cannot_be_read():
    weight = torch.ones(2, 2).as_subclass(Poisoned)
    with pytest.raises(AssertionError, match="reads an offloaded weight"):
        torch.nn.functional.linear(torch.ones(1, 2), weight)


@pytest.mark.parametrize("budget", [1, 200_000])
def test_transformer_gives_the_same_with_weights_offloaded(loaded, draw, golden, poison, monkeypatch, budget):
    import comfy.model_management as mm

    case = golden("t2i_square")
    whole = draw(loaded.model, loaded.mllm, case)
    mm.unload_all_models()
    share = poison(loaded.model, budget)
    assert share > (0.99 if budget == 1 else 0.5)
    monkeypatch.setattr(mm, "load_models_gpu", lambda *args, **kwargs: None)
    assert torch.equal(draw(loaded.model, loaded.mllm, case), whole)


def test_language_model_gives_the_same_with_weights_offloaded(loaded, golden, poison, monkeypatch):
    import comfy.model_management as mm

    prompt = golden("t2i_wide").prompt
    whole = loaded.mllm.encode(prompt)
    mm.unload_all_models()
    vision = sum(p.nbytes for p in loaded.mllm.patcher.model.vision_model.parameters(recurse=True) if p.ndim == 3)
    assert poison(loaded.mllm.patcher, 1) > 0.99 - vision / loaded.mllm.get_ram_usage()
    monkeypatch.setattr(mm, "load_models_gpu", lambda *args, **kwargs: None)
    loaded.mllm.kept.clear()
    for before, after in zip(whole[:2], loaded.mllm.encode(prompt)[:2]):
        assert torch.equal(before[0][0], after[0][0])


@pytest.mark.parametrize("what", ["edit", "thought", "beams"])
def test_pictures_and_writing_give_the_same_with_weights_offloaded(loaded, golden, poison, monkeypatch, what):
    import comfy.model_management as mm
    from PIL import Image

    case = golden("edit_one")
    pictures = [Image.open(file).convert("RGB") for file in case.images]

    def run():
        if what == "edit":
            positive, negative, _ = loaded.mllm.encode(case.prompt, images=pictures, vae=loaded.vae)
            return [positive[0][0], negative[0][0], positive[0][1]["internvl_u_partial"][0][0]]
        config = GenerationConfig(8, beams=3 if what == "beams" else 1)
        return loaded.mllm.generate(case.prompt, system="x", images=pictures, config=config)

    whole = run()
    mm.unload_all_models()
    assert poison(loaded.mllm.patcher, 1) > 0.98
    monkeypatch.setattr(mm, "load_models_gpu", lambda *args, **kwargs: None)
    loaded.mllm.kept.clear()
    for before, after in zip(whole, run(), strict=True):
        assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))


def test_every_weight_can_be_cast_or_is_read_with_a_move(loaded):
    """A leaf module without ComfyUI's cast would be left behind by a partial load."""
    for patcher in (loaded.model, loaded.mllm.patcher):
        for name, module in patcher.model.named_modules():
            leaf = not list(module.children())
            if leaf and list(module.parameters(recurse=False)):
                assert hasattr(module, "comfy_cast_weights"), name


def test_models_can_be_unloaded_and_loaded_again_between_two_pictures(loaded, draw, golden):
    import comfy.model_management as mm

    case = golden("t2i_square")
    first = draw(loaded.model, loaded.mllm, case)
    assert loaded.model in [entry.model for entry in mm.current_loaded_models]
    mm.unload_all_models()
    assert not mm.current_loaded_models
    assert torch.equal(draw(loaded.model, loaded.mllm, case), first)


def lora(model, names, style):
    """A random LoRA on the named layers in one of the usual spellings, and the weights that it adds."""
    generator = torch.Generator().manual_seed(3)
    file, added = {}, {}
    for name in names:
        rows, columns = model.model.diffusion_model.get_submodule(name).weight.shape
        up, down = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
        added[f"{name}.weight"] = 0.7 * 0.02 * up @ down
        if style == "kohya":
            key = "lora_unet_" + name.replace(".", "_")
            file |= {
                f"{key}.lora_up.weight": 0.02 * up,
                f"{key}.lora_down.weight": down,
                f"{key}.alpha": torch.tensor(4.0),
            }
        else:
            file |= {f"{style}{name}.lora_B.weight": 0.02 * up, f"{style}{name}.lora_A.weight": down}
    return file, added


LORA_LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.0.txt_mlp.net.0.proj",
    "transformer_blocks.1.img_mod.1",
    "img_in",
    "txt_in",
)


@pytest.mark.parametrize("style", ["diffusion_model.", "transformer.", "", "kohya"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_a_lora_changes_the_picture_as_merged_weights_do(
    native, checkpoint, loaded, draw, golden, near, style, offloaded
):
    import comfy.model_management as mm
    import comfy.sd

    case = golden("t2i_square")
    plain = draw(loaded.model, loaded.mllm, case)
    file, added = lora(loaded.model, LORA_LAYERS, style)
    patched, _ = comfy.sd.load_lora_for_models(loaded.model, None, file, 0.7, 0.0)
    if offloaded:
        mm.unload_all_models()
        patched.load(patched.load_device, lowvram_model_memory=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mm, "load_models_gpu", lambda *args, **kwargs: None)
            changed = draw(patched, loaded.mllm, case)
        patched.detach()
    else:
        changed = draw(patched, loaded.mllm, case)
    assert (changed - plain).norm() / plain.norm() > 1e-2

    merged = native.load(checkpoint, "fp32")[0]
    weights = merged.model.diffusion_model.state_dict()
    for name, delta in added.items():
        weights[name] = weights[name] + delta
    merged.model.diffusion_model.load_state_dict(weights, assign=True)
    near(changed, draw(merged, loaded.mllm, case), 1e-5)
    assert torch.equal(draw(loaded.model, loaded.mllm, case), plain)


def test_a_batch_of_three_equals_three_single_pictures(loaded, parts, golden, empty, near):
    case = golden("t2i_square")
    positive, negative, _ = loaded.mllm.encode(case.prompt)
    noise = torch.randn(3, 16, 1, 8, 8, generator=torch.Generator().manual_seed(5))

    def sample(noise):
        guider = parts.guidance.DualGuider(loaded.model)
        guider.set_conds(positive, negative)
        guider.set_scales(4.5, 2.0)
        return guider.sample(
            noise, torch.zeros_like(noise), parts.sampler.dpmpp_2m_flow(), parts.sampler.flow_sigmas(4), seed=0
        )

    near(sample(noise), torch.cat([sample(one) for one in noise.split(1)]), 1e-5)


def test_equal_branches_are_computed_once(loaded, draw, golden, monkeypatch):
    samples = []
    model = loaded.model.model.diffusion_model
    original = model._forward
    monkeypatch.setattr(model, "_forward", lambda x, *args: samples.append(x.shape[0]) or original(x, *args))
    case = golden("t2i_square")
    draw(loaded.model, loaded.mllm, case)
    assert sum(samples) == 2 * case.steps


def test_rotary_tables_are_made_once_a_picture(loaded, draw, golden, monkeypatch):
    made = []
    model = loaded.model.model.diffusion_model
    original = model.branch
    monkeypatch.setattr(model, "branch", lambda *args: made.append(args) or original(*args))
    draw(loaded.model, loaded.mllm, golden("t2i_square"))
    assert len(made) == 2


def test_an_area_over_the_whole_picture_changes_nothing_and_a_part_does(loaded, parts, golden, empty, near):
    case = golden("t2i_square")
    positive, negative, _ = loaded.mllm.encode(case.prompt)
    other, *_ = loaded.mllm.encode("a blue square")

    def sample(conditioning):
        settings = {"seed": 1234, "steps": 4, "all_cfg": 4.5, "part_cfg": 2.0}
        latent = empty(case.width, case.height)
        return parts.sampler.sample_latent(loaded.model, conditioning, negative, latent, **settings)["samples"]

    def inside(conditioning, *area):
        return [[tensor, extra | {"area": area, "strength": 1.0}] for tensor, extra in conditioning]

    plain = sample(positive)
    near(sample(inside(positive, 8, 8, 0, 0)), plain, 1e-5)
    half = sample(positive + inside(other, 4, 8, 4, 0))
    assert torch.isfinite(half).all()
    assert (half[..., 4:, :] - plain[..., 4:, :]).norm() > (half[..., :2, :] - plain[..., :2, :]).norm()


def test_core_nodes_that_lengthen_a_conditioning_are_understood(loaded, parts, golden, empty):
    positive, negative, _ = loaded.mllm.encode(golden("t2i_square").prompt)
    longer = [[torch.cat([positive[0][0], positive[0][0]], dim=1), positive[0][1]]]
    settings = {"seed": 1, "steps": 2, "all_cfg": 4.5, "part_cfg": 2.0}
    samples = parts.sampler.sample_latent(loaded.model, longer, negative, empty(64, 64), **settings)["samples"]
    assert torch.isfinite(samples).all()


def test_nodes_that_cut_the_picture_into_tiles_draw_it(loaded, draw, golden):
    """They call the model with parts of the latent and tell nobody."""
    tiles = []

    def tiled(apply_model, args):
        tiles.append(args["input"].shape)
        halves = [apply_model(half, args["timestep"], **args["c"]) for half in args["input"].split(4, dim=-2)]
        return torch.cat(halves, dim=-2)

    model = loaded.model.clone()
    model.set_model_unet_function_wrapper(tiled)
    assert torch.isfinite(draw(model, loaded.mllm, golden("t2i_square"))).all() and tiles


def test_foreign_and_cut_conditionings_are_refused(loaded, parts, golden, empty):
    positive, negative, _ = loaded.mllm.encode("a cat")
    settings = {"seed": 1, "steps": 1, "all_cfg": 4.5, "part_cfg": 2.0}
    foreign = [[torch.zeros(1, 77, 768), {}]]
    with pytest.raises(ValueError, match="width 768 found, 128 expected: connect InternVL-U Encode"):
        parts.sampler.sample_latent(loaded.model, foreign, negative, empty(64, 64), **settings)
    cut = [[positive[0][0][:, :5], positive[0][1]]]
    with pytest.raises(ValueError, match="conditioning of 5 tokens found"):
        parts.sampler.sample_latent(loaded.model, cut, negative, empty(64, 64), **settings)


def test_a_video_latent_is_refused(loaded, parts):
    positive, negative, _ = loaded.mllm.encode("a cat")
    settings = {"seed": 1, "steps": 1, "all_cfg": 4.5, "part_cfg": 2.0}
    with pytest.raises(ValueError, match="5 frames found, 1 expected"):
        parts.sampler.sample_latent(
            loaded.model, positive, negative, {"samples": torch.zeros(1, 16, 5, 8, 8)}, **settings
        )


def test_a_latent_of_another_model_is_taken_for_its_size(loaded, parts):
    """EmptySD3LatentImage and the like give four axes."""
    positive, negative, _ = loaded.mllm.encode("a cat")
    settings = {"seed": 1, "steps": 1, "all_cfg": 4.5, "part_cfg": 2.0}
    samples = parts.sampler.sample_latent(
        loaded.model, positive, negative, {"samples": torch.zeros(2, 16, 8, 6)}, **settings
    )["samples"]
    assert samples.shape == (2, 16, 1, 8, 6)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.05), ("fp8_e4m3fn", 0.2), ("auto", 1e-5)])
def test_each_precision_draws_nearly_the_same_velocity(native, checkpoint, parts, golden, near, precision, tolerance):
    from pack.internvl_u.mmdit import time_embedding

    case = golden("t2i_square")
    model, mllm, _ = native.load(checkpoint, precision)
    positive, *_ = mllm.encode(case.prompt)
    near(positive[0][0][0], case.context(0), tolerance)
    network = model.model.diffusion_model
    compute = model.model.manual_cast_dtype or network.dtype
    stored = {p.dtype for p in network.parameters()}
    expected = {"auto": {torch.float32}, "bf16": {torch.bfloat16}}
    assert stored == expected.get(precision, {torch.float8_e4m3fn, torch.float32})
    context = parts.model.PromptContext(network, case.context(0), positive[0][1][parts.model.LAYOUT], [])
    time = time_embedding(case["mmdit_t"][0][:1])
    velocity = network(case["mmdit_in"][0].to(compute), time, contexts=[context])
    near(velocity, case["mmdit_out"][0][:1], tolerance)


def test_an_interrupt_stops_within_a_step_and_the_next_picture_is_drawn(loaded, draw, golden, monkeypatch):
    import comfy.model_management as mm

    case = golden("t2i_square")
    expected = draw(loaded.model, loaded.mllm, case)
    calls = []
    model = loaded.model.model.diffusion_model
    original = model._forward

    def forward(*args):
        calls.append(len(calls))
        if len(calls) == 3:
            mm.interrupt_current_processing()
        return original(*args)

    monkeypatch.setattr(model, "_forward", forward)
    with pytest.raises(mm.InterruptProcessingException):
        draw(loaded.model, loaded.mllm, case, steps=50)
    assert len(calls) == 3
    monkeypatch.setattr(model, "_forward", original)
    assert torch.equal(draw(loaded.model, loaded.mllm, case), expected)


def test_weights_of_large_files_are_not_copied_on_loading(native, checkpoint, monkeypatch):
    monkeypatch.setattr(importlib.import_module("pack.internvl_u.weights"), "SMALL", 0)
    model, mllm, _ = native.load(checkpoint, "fp32")
    with open("/proc/self/maps") as maps:
        mapped = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in maps
            if line.rstrip().endswith(".safetensors")
        ]
    for patcher in (model, mllm.patcher):
        for parameter in patcher.model.parameters():
            assert any(first <= parameter.data_ptr() < last for first, last in mapped)


def test_a_saved_model_holds_the_checkpoints_tensors(loaded, checkpoint, tmp_path):
    import comfy.sd

    file = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(file), loaded.model)
    saved = load_file(file)
    original = load_file(checkpoint / "generation_decoder" / "model.safetensors")
    for name, tensor in original.items():
        if name != "encoder_padding_token":
            assert torch.equal(saved[name.replace("decoder.", "model.diffusion_model.", 1)], tensor)


def test_cfg_of_one_evaluates_the_prompt_only(loaded, draw, golden, monkeypatch):
    samples = []
    model = loaded.model.model.diffusion_model
    original = model._forward
    monkeypatch.setattr(model, "_forward", lambda x, *args: samples.append(x.shape[0]) or original(x, *args))
    draw(loaded.model, loaded.mllm, golden("t2i_square"), all_cfg=1.0)
    assert sum(samples) == 4


def test_other_nodes_guidance_functions_are_honoured(loaded, draw, golden):
    case = golden("t2i_square")
    called = []
    model = loaded.model.clone()
    model.set_model_sampler_pre_cfg_function(lambda args: called.append("pre") or args["conds_out"])
    model.set_model_sampler_post_cfg_function(lambda args: called.append("post") or args["denoised"])
    assert torch.equal(draw(model, loaded.mllm, case), draw(loaded.model, loaded.mllm, case))
    assert called == ["pre", "post"] * case.steps
    replaced = loaded.model.clone()
    replaced.set_model_sampler_cfg_function(lambda args: args["cond"])
    expected = draw(loaded.model, loaded.mllm, case, all_cfg=1.0)
    assert torch.allclose(draw(replaced, loaded.mllm, case), expected, atol=1e-5)


def test_block_patches_and_attention_overrides_are_called(loaded, draw, golden):
    case = golden("t2i_square")
    plain = draw(loaded.model, loaded.mllm, case)
    seen = []

    def block(args, extra):
        seen.append(args["transformer_options"]["block_index"])
        return extra["original_block"](args)

    model = loaded.model.clone()
    model.set_model_patch_replace(block, "dit", "double_block", 1)
    model.set_model_patch(lambda args: seen.append("after") or {"img": args["img"], "txt": args["txt"]}, "double_block")
    attention = model.model_options["transformer_options"]
    attention["optimized_attention_override"] = lambda func, *args, **kwargs: func(*args, **kwargs)
    assert torch.equal(draw(model, loaded.mllm, case), plain)
    assert seen == ["after", 1, "after"] * (len(seen) // 3) and seen


def test_cancelling_stops_the_writing_within_a_token(loaded):
    import comfy.model_management as mm

    heard = []

    def on_token(ids):
        heard.append(len(ids))
        if len(ids) == 3:
            mm.interrupt_current_processing()

    config = GenerationConfig(500, temperature=2.0, seed=1)
    with pytest.raises(mm.InterruptProcessingException):
        loaded.mllm.generate("tell me everything", system="x", config=config, on_token=on_token)
    assert heard == [1, 2, 3]
    assert loaded.mllm.generate("hi", system="x", config=GenerationConfig(2))


def test_a_batch_of_edits_equals_single_edits(loaded, parts, golden, near):
    from PIL import Image

    case = golden("edit_one")
    pictures = [Image.open(file).convert("RGB") for file in case.images]
    positive, negative, latent = loaded.mllm.encode(case.prompt, images=pictures, vae=loaded.vae)
    assert latent["samples"].shape[-2:] == case["noise"].shape[-2:]
    noise = torch.randn(3, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(5))

    def sample(noise):
        guider = parts.guidance.DualGuider(loaded.model)
        guider.set_conds(positive, negative)
        guider.set_scales(4.5, 2.0)
        solver, sigmas = parts.sampler.dpmpp_2m_flow(), parts.sampler.flow_sigmas(3)
        return guider.sample(noise, torch.zeros_like(noise), solver, sigmas, seed=0)

    near(sample(noise), torch.cat([sample(one) for one in noise.split(1)]), 1e-5)


def test_one_branch_at_a_time_gives_the_same_as_all_together(loaded, parts, golden, near, monkeypatch):
    """What ComfyUI does when memory is short."""
    from PIL import Image

    case = golden("edit_one")
    pictures = [Image.open(file).convert("RGB") for file in case.images]
    positive, negative, latent = loaded.mllm.encode(case.prompt, images=pictures, vae=loaded.vae)
    counts = []
    model = loaded.model.model.diffusion_model
    original = model._forward
    monkeypatch.setattr(model, "_forward", lambda x, *args: counts.append(x.shape[0]) or original(x, *args))
    settings = {"seed": 1234, "steps": 3, "all_cfg": 4.5, "part_cfg": 2.0}
    together = parts.sampler.sample_latent(loaded.model, positive, negative, latent, **settings)["samples"]
    assert 2 in counts and sum(counts) == 9
    counts.clear()
    monkeypatch.setattr(loaded.model.model, "memory_required", lambda *args, **kwargs: 1e18)
    alone = parts.sampler.sample_latent(loaded.model, positive, negative, latent, **settings)["samples"]
    assert set(counts) == {1} and sum(counts) == 9
    near(alone, together, 1e-5)


def test_guidance_without_words_and_without_references(loaded, parts, golden, near):
    """Scales of 1 leave the conditional prediction alone, with references too."""
    from PIL import Image

    case = golden("edit_one")
    pictures = [Image.open(file).convert("RGB") for file in case.images]
    positive, negative, latent = loaded.mllm.encode(case.prompt, images=pictures, vae=loaded.vae)
    settings = {"seed": 1, "steps": 3}
    plain = [[positive[0][0], {k: v for k, v in positive[0][1].items() if k != parts.guidance.PARTIAL}]]

    def draw(condition, all_cfg, part_cfg):
        scales = {"all_cfg": all_cfg, "part_cfg": part_cfg}
        return parts.sampler.sample_latent(loaded.model, condition, negative, latent, **settings, **scales)["samples"]

    low = draw(plain, 1.0, 1.0)
    assert not torch.allclose(draw(positive, 1.0, 2.0), low, atol=1e-3)
