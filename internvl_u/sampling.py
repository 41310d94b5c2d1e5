"""Flow matching: the noise schedule, dual guidance and the DPM-Solver++ (2M) that the official pipeline uses.

A latent at noise level s is (1 - s) * x0 + s * noise, and the model predicts the velocity noise - x0.
The solver is arXiv 2211.01095, algorithm 2 (data prediction, order 2, midpoint), with log-SNR
log(1 - s) - log(s) of the flow schedule, first order at the first and at the last step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
import torch

TRAIN_STEPS = 1000
SHIFT = 3.0
DAMPED_ABOVE = 930
"""Timestep above which guidance is damped."""


def flow_sigmas(steps: int) -> torch.Tensor:
    """Returns the noise levels [steps + 1], fp32, from 0.99967 down to 0.

    Raises:
        ValueError: `steps` is below 1.
    """
    return torch.from_numpy(numpy.append(_sigmas(steps), 0.0)).float()


def flow_timesteps(steps: int) -> list[int]:
    """Returns the whole timesteps in 0..999 that the model is told at each step."""
    return [int(step) for step in _sigmas(steps) * TRAIN_STEPS]


def _sigmas(steps: int) -> numpy.ndarray:
    if steps < 1:
        raise ValueError(f"{steps} steps asked for, at least 1 expected")
    linear = 1.0 - numpy.linspace(1, 1 / TRAIN_STEPS, steps + 1)
    shifted = SHIFT * linear / (1 + (SHIFT - 1) * linear)
    return shifted[::-1][:-1].copy()


def sigma_table() -> torch.Tensor:
    """Returns the noise level [1000], fp32, of each whole timestep 1..1000, for samplers that take a table."""
    linear = (1 - 1 / TRAIN_STEPS) * torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    return (SHIFT * linear / (1 + (SHIFT - 1) * linear)).float()


def whole_timestep(sigma: torch.Tensor) -> torch.Tensor:
    """Returns the timestep of a noise level, cut to a whole number as the official scheduler does."""
    return torch.floor(sigma * TRAIN_STEPS)


def dual_guidance(
    conditional: torch.Tensor,
    partial: torch.Tensor,
    unconditional: torch.Tensor,
    all_cfg: float,
    part_cfg: float,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """Returns the guided velocity, of the shape of the three velocities [B, C, ...].

    `part_cfg` scales what the references bring, `all_cfg` what the words bring on top. `timestep` [B] are whole
    timesteps; above 930 each difference is damped where its norm over the channels exceeds 1.
    """
    damped = (timestep > DAMPED_ABOVE).reshape(-1, *[1] * (conditional.ndim - 1))
    words = _damp(conditional - partial, damped)
    if partial is unconditional:
        return unconditional + all_cfg * words
    return unconditional + part_cfg * _damp(partial - unconditional, damped) + all_cfg * words


def _damp(difference: torch.Tensor, damped: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
    return difference / torch.where(damped, norm.clamp(min=1.0) ** 0.4, 1.0)


def sample(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
    on_step: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Returns the latent at the last noise level, of the shape of `noisy`.

    `denoise(latent, sigma)` returns the clean latent that the model sees in `latent` at the level `sigma`
    (a scalar tensor); `on_step(index, latent, sigma, clean)` is called before each update.
    """
    levels = sigmas.float().cpu()
    log_snr = torch.log(1 - levels) - torch.log(levels)
    latent, previous = noisy, None
    for i in range(len(levels) - 1):
        clean = denoise(latent, sigmas[i])
        if on_step is not None:
            on_step(i, latent, sigmas[i], clean)
        if levels[i + 1] == 0:
            latent = clean
        else:
            step = log_snr[i + 1] - log_snr[i]
            direction = clean
            if previous is not None:
                ratio = float((log_snr[i] - log_snr[i - 1]) / step)
                direction = clean + (0.5 / ratio) * (clean - previous) if ratio > 0 else clean
            gain = float((1 - levels[i + 1]) * torch.expm1(-step))
            latent = float(levels[i + 1] / levels[i]) * latent - gain * direction
        previous = clean
    return latent
