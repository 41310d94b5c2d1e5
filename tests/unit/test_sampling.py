import pytest
import torch
from pack.internvl_u import sampling


def test_schedules_equal_the_official_ones(manifest):
    for steps, expected in manifest["schedules"].items():
        assert sampling.flow_timesteps(int(steps)) == expected["timesteps"]
        assert sampling.flow_sigmas(int(steps)).tolist() == expected["sigmas"]


def test_whole_timesteps_survive_single_precision(manifest):
    for steps, expected in manifest["schedules"].items():
        sigmas = sampling.flow_sigmas(int(steps))[:-1]
        assert sampling.whole_timestep(sigmas).int().tolist() == expected["timesteps"]


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 10, 20, 25, 50])
def test_the_table_holds_the_schedule(steps):
    table = sampling.sigma_table()
    picked = [table[-(1 + i * 1000 // steps)].item() for i in range(steps)]
    assert picked == sampling.flow_sigmas(steps)[:-1].tolist()


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps 0 found, 1 to 100000 expected"):
        sampling.flow_sigmas(0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 20, 50])
def test_solver_equals_diffusers_step_by_step(steps, near):
    from diffusers import DPMSolverMultistepScheduler

    official = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    official.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    noisy = torch.randn(1, 16, 4, 4, generator=generator)
    velocities = torch.randn(steps, 1, 16, 4, 4, generator=generator)
    expected = [noisy]
    for time, velocity in zip(official.timesteps, velocities):
        expected.append(official.step(velocity, time, expected[-1]).prev_sample)

    found, index = [], iter(range(steps))

    def denoise(latent, sigma):
        return latent - sigma * velocities[next(index)]

    last = sampling.sample(denoise, noisy, sampling.flow_sigmas(steps), lambda i, latent, *_: found.append(latent))
    for ours, theirs in zip([*found, last], expected, strict=True):
        near(ours, theirs, 1e-6)


def test_solver_steps_over_repeated_levels_and_starts_at_pure_noise():
    sigmas = torch.tensor([1.0, 0.6, 0.6, 0.3, 0.0])
    result = sampling.sample(lambda latent, sigma: 0.5 * latent, torch.ones(1, 1, 2, 2), sigmas)
    assert torch.isfinite(result).all()


def golden_velocities(case, step):
    return case["mmdit_out"][step].chunk(3)


def test_guided_loop_equals_the_official_latents(golden, near):
    for name, scales in (("t2i_square", (4.5, 2.0)), ("t2i_wide", (4.5, 2.0)), ("edit_one", (4.5, 2.0))):
        case = golden(name)
        index = iter(range(case.steps))
        times = sampling.flow_timesteps(case.steps)

        def denoise(latent, sigma, case=case, index=index, times=times, scales=scales):
            step = next(index)
            near(latent, case["mmdit_in"][step])
            time = torch.tensor([times[step]])
            return latent - sigma * sampling.dual_guidance(*golden_velocities(case, step), *scales, time)

        near(sampling.sample(denoise, case["noise"], sampling.flow_sigmas(case.steps)), case["final_latents"])


def test_guidance_is_damped_only_above_930_and_only_above_norm_one():
    cond, part, uncond = torch.full((2, 4, 1, 1), 8.0), torch.full((2, 4, 1, 1), 0.1), torch.zeros(2, 4, 1, 1)
    guided = sampling.dual_guidance(cond, part, uncond, 2.0, 3.0, torch.tensor([931, 930]))
    norm = (4 * 7.9**2) ** 0.5
    assert torch.allclose(guided[0], torch.tensor(3.0 * 0.1 + 2.0 * 7.9 / norm**0.4))
    assert torch.allclose(guided[1], torch.tensor(3.0 * 0.1 + 2.0 * 7.9))


def test_equal_branches_make_the_partial_scale_idle():
    cond, uncond = torch.randn(1, 16, 2, 2), torch.randn(1, 16, 2, 2)
    time = torch.tensor([940])
    alone = sampling.dual_guidance(cond, uncond, uncond, 4.5, 2.0, time)
    assert torch.equal(alone, sampling.dual_guidance(cond, uncond.clone(), uncond, 4.5, 9.0, time))
