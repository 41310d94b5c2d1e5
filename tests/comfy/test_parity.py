"""Our objects in ComfyUI's own samplers against the official pipeline, in this process."""

import pytest
import torch
from safetensors.torch import load_file


def test_our_sampler_draws_the_official_latent_and_picture(loaded, draw, parts, case, normalised, near, same_picture):
    samples = draw(loaded.model, loaded.mllm, case)
    near(normalised(samples), case["final_latents"])
    picture = parts.vae.decode(loaded.vae, {"samples": samples}, case.width, case.height)
    same_picture((picture[0] * 255).to(torch.uint8), case["image_u8"])


def test_conditioning_equals_the_official_context(loaded, case, near):
    positive, negative, _ = loaded.mllm.encode(case.prompt)
    near(positive[0][0][0], case.context(0), 1e-5)
    near(negative[0][0][0], case.context(2), 1e-5)


def test_every_step_sees_the_official_latent(loaded, parts, case, empty, near):
    import comfy.sample

    positive, negative, _ = loaded.mllm.encode(case.prompt)
    guider = parts.guidance.DualGuider(loaded.model)
    guider.set_conds(positive, negative)
    guider.set_scales(4.5, 2.0)
    seen = []
    noise = comfy.sample.prepare_noise(empty(case.width, case.height)["samples"], 1234)
    guider.sample(
        noise,
        torch.zeros_like(noise),
        parts.sampler.dpmpp_2m_flow(),
        parts.sampler.flow_sigmas(case.steps),
        callback=lambda step, denoised, x, total: seen.append(x[:, :, 0]),
        seed=1234,
    )
    near(torch.stack(seen), case["mmdit_in"])


def test_plain_ksampler_draws_the_official_latent(loaded, golden, empty, normalised, near):
    """In two steps the official solver is Euler's, and 2 divides the schedule's 1000."""
    import comfy.sample

    case = golden("t2i_odd_size")
    positive, negative, _ = loaded.mllm.encode(case.prompt)
    latent = empty(case.width, case.height)["samples"]
    noise = comfy.sample.prepare_noise(latent, 1234)
    samples = comfy.sample.sample(
        loaded.model, noise, 2, 4.5, "euler", "simple", positive, negative, latent, denoise=1.0, seed=1234
    )
    near(normalised(samples), case["final_latents"])


def test_cores_own_solver_without_noise_is_the_official_one(loaded, parts, case, empty, normalised, near):
    import comfy.sample
    import comfy.samplers

    positive, negative, _ = loaded.mllm.encode(case.prompt)
    guider = parts.guidance.DualGuider(loaded.model)
    guider.set_conds(positive, negative)
    guider.set_scales(4.5, 2.0)
    noise = comfy.sample.prepare_noise(empty(case.width, case.height)["samples"], 1234)
    solver = comfy.samplers.ksampler("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "midpoint"})
    samples = guider.sample(noise, torch.zeros_like(noise), solver, parts.sampler.flow_sigmas(case.steps), seed=1234)
    near(normalised(samples), case["final_latents"])


def edit_conditionings(case, layout_key):
    """Conditionings of the golden edit, as an encoder of references would make them."""
    return [[case.context(branch)[None], {layout_key: case.layout(branch)}] for branch in range(3)]


@pytest.mark.parametrize("how", ["guider", "ksampler"])
def test_three_branches_with_a_reference_draw_the_official_edit(loaded, parts, golden, empty, normalised, near, how):
    import comfy.latent_formats
    import comfy.sample
    import comfy.samplers

    case = golden("edit_one")
    conditional, partial, unconditional = edit_conditionings(case, parts.model.LAYOUT)
    reference = comfy.latent_formats.Wan21().process_out(case["ref_latents_0"][:, :, None])
    conditional[1]["reference_latents"] = partial[1]["reference_latents"] = [reference]
    conditional[1][parts.guidance.PARTIAL] = [partial]
    guider = (parts.guidance.DualGuider if how == "guider" else comfy.samplers.CFGGuider)(loaded.model)
    guider.set_conds([conditional], [unconditional])
    guider.set_cfg(4.5)
    noise = comfy.sample.prepare_noise(empty(case.width, case.height)["samples"], 1234)
    solver, sigmas = parts.sampler.dpmpp_2m_flow(), parts.sampler.flow_sigmas(case.steps)
    samples = guider.sample(noise, torch.zeros_like(noise), solver, sigmas, seed=1234)
    near(normalised(samples), case["final_latents"])


def test_vae_equals_the_official_one_and_keeps_a_batch_apart(loaded, checkpoint, near):
    expected = load_file(checkpoint.parent / "golden" / "vae.safetensors")
    pictures = loaded.vae.decode(expected["z"]).flatten(0, 1)
    near(pictures.movedim(-1, 1) * 2 - 1, expected["decoded"][:, :, 0].clamp(-1, 1), 1e-5)
    latents = loaded.vae.encode((expected["x"][:, :, 0].movedim(1, -1) + 1) / 2)
    near(latents, expected["encoded_mean"], 1e-5)


def test_vae_equals_diffusers_at_another_size(loaded, checkpoint, near):
    from pack.internvl_u.load import load_vae

    other = load_vae(checkpoint)
    mean, std = other._statistics(torch.zeros(1))
    latents = torch.randn(1, 16, 5, 11, generator=torch.Generator().manual_seed(2))
    pictures = other.decode(latents).clamp(-1, 1)
    found = loaded.vae.decode((latents * std + mean)[:, :, None]).flatten(0, 1).movedim(-1, 1) * 2 - 1
    near(found, pictures, 1e-5)
    encoded = loaded.vae.encode((pictures.movedim(1, -1) + 1) / 2)[:, :, 0]
    near((encoded - mean) / std, other.encode(pictures), 1e-5)


@pytest.mark.parametrize("steps, denoise, expected", [(4, 1.0, 4), (4, 0.5, 8), (3, 0.3, 10)])
def test_partial_denoise_takes_the_end_of_a_longer_schedule(parts, steps, denoise, expected):
    sigmas = parts.sampler.flow_sigmas(steps, denoise)
    assert torch.equal(sigmas, parts.sampler.flow_sigmas(expected)[-(steps + 1) :])
    assert len(sigmas) == steps + 1


def test_a_denoise_of_nothing_returns_the_latent(loaded, draw, golden):
    assert not draw(loaded.model, loaded.mllm, golden("t2i_square"), denoise=0.0).any()
