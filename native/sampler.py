"""SAMPLER, SIGMAS and a whole sampling run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from tqdm.auto import tqdm

from ..internvl_u import sampling
from ..internvl_u.defaults import LONGEST_SCHEDULE
from ..internvl_u.images import LATENT_STRIDE, latent_size
from ..internvl_u.numbers import check_real, check_whole
from ..internvl_u.speed import ALWAYS, GuidanceIntervals
from . import compat
from .conditioning import Conditioning
from .guidance import DualGuider, check_model
from .latents import CHANNELS, Latent, noise_mask


def dpmpp_2m_flow() -> comfy.samplers.KSAMPLER:
    """Returns the official solver as a SAMPLER."""
    return comfy.samplers.KSAMPLER(_sample)


def flow_sigmas(steps: int, denoise: float = 1.0) -> torch.Tensor:
    """Returns the official noise levels [steps + 1]; below `denoise` 1 the last ones of a longer schedule.

    Raises:
        ValueError: `steps` is below 1, or `denoise` is not in 0..1 or asks for a schedule that is too long.
    """
    check_whole("steps", steps, 1, LONGEST_SCHEDULE)
    check_real("denoise", denoise, 0.0, 1.0)
    if denoise == 0.0:
        return torch.empty(0)
    if steps / denoise > LONGEST_SCHEDULE:
        raise ValueError(
            f"denoise {denoise} found for {steps} steps: 0, or at least {steps / LONGEST_SCHEDULE:.1g} expected"
        )
    return sampling.flow_sigmas(int(steps / denoise))[-(steps + 1) :]


def empty_latent(width: int, height: int, batch: int = 1) -> Latent:
    """Returns an empty LATENT [batch, 16, 1, height / 8, width / 8] of a drawn size in pixels."""
    size = latent_size(width, height)
    device = comfy.model_management.intermediate_device()
    samples = torch.zeros(batch, CHANNELS, 1, *size, device=device)
    return {"samples": samples, compat.LATENT_RATIOS[0]: LATENT_STRIDE}


def sample_latent(
    model: ModelPatcher,
    positive: Conditioning,
    negative: Conditioning,
    latent: Latent,
    *,
    seed: int,
    steps: int,
    all_cfg: float,
    part_cfg: float,
    denoise: float = 1.0,
    intervals: GuidanceIntervals = ALWAYS,
) -> Latent:
    """Returns the drawn LATENT: official solver, schedule and guidance, which works in its `intervals` alone.

    Raises:
        ValueError: an input is of another model, of no numbers or out of range.
        RuntimeError: what was drawn is no numbers.
    """
    check_model(model)
    guider = DualGuider(model)
    guider.set_conds(positive, negative)
    guider.set_scales(all_cfg, part_cfg)
    guider.set_intervals(intervals)
    sigmas = flow_sigmas(steps, denoise)
    samples = compat.fitted_latent(model, latent)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    drawn = guider.sample(
        noise,
        samples,
        dpmpp_2m_flow(),
        sigmas,
        denoise_mask=noise_mask(latent.get("noise_mask")),
        callback=latent_preview.prepare_callback(model, sigmas.shape[-1] - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    drawn = drawn.to(comfy.model_management.intermediate_device())
    return {key: value for key, value in latent.items() if key not in compat.LATENT_RATIOS} | {"samples": drawn}


@torch.no_grad()
def _sample(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    ones = x.new_ones([x.shape[0]])

    def denoise(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model(latent, sigma * ones, **(extra_args or {}))

    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def on_step(index: int, latent: torch.Tensor, sigma: torch.Tensor, clean: torch.Tensor) -> None:
            if callback is not None:
                callback({"x": latent, "i": index, "sigma": sigma, "sigma_hat": sigma, "denoised": clean})
            bar.update()

        return sampling.sample(denoise, x, sigmas, on_step)
