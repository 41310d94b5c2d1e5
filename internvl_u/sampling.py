"""Flow matching: noise schedule, dual guidance and DPM-Solver++ (2M) of the official pipeline.

A latent at noise level s is (1 - s) * x0 + s * noise, and the model predicts the velocity noise - x0.
The solver is arXiv 2211.01095, algorithm 2 (data prediction, order 2, midpoint), with log-SNR
log(1 - s) - log(s) of the flow schedule, first order at the first and at the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy
import torch

from .defaults import LONGEST_SCHEDULE, Guidance
from .mmdit import MMDiT, time_embedding
from .modulation import Modulations
from .numbers import check_whole
from .packing import BranchInput
from .rope import Grid, Layout, grid_of
from .speed import ALWAYS, EVERY_BRANCH, Branches, GuidanceIntervals

TRAIN_STEPS = 1000
SHIFT = 3.0
DAMPED_ABOVE, DAMPING = 930, 0.4
"""Timestep above which guidance is damped, and the power of the norm that it is divided by."""


def flow_sigmas(steps: int) -> torch.Tensor:
    """Returns the noise levels [steps + 1], fp32, from 0.99967 down to 0.

    Raises:
        ValueError: `steps` is below 1 or above 100,000.
    """
    return torch.from_numpy(numpy.append(_sigmas(steps), 0.0)).float()


def flow_timesteps(steps: int) -> list[int]:
    """Returns the whole timesteps in 0..999 that the model is given at each step."""
    return [int(step) for step in _sigmas(steps) * TRAIN_STEPS]


def _sigmas(steps: int) -> numpy.ndarray:
    check_whole("steps", steps, 1, LONGEST_SCHEDULE)
    linear = 1.0 - numpy.linspace(1, 1 / TRAIN_STEPS, steps + 1)
    return _shifted(linear)[::-1][:-1].copy()


def sigma_table() -> torch.Tensor:
    """Returns the noise level [1000], fp32, of each whole timestep 1..1000, for samplers that take a table."""
    linear = (1 - 1 / TRAIN_STEPS) * torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    return _shifted(linear).float()


def _shifted(level):
    return SHIFT * level / (1 + (SHIFT - 1) * level)


def percent_to_sigma(percent: float) -> float:
    """Returns the noise level at a share of the schedule, 0..1: 1 before its first step, 0 at its end."""
    return _shifted(1.0 - percent)


def whole_timestep(sigma: torch.Tensor) -> torch.Tensor:
    """Returns the timestep of a noise level, cut to a whole number as the official scheduler does."""
    return torch.floor(sigma * TRAIN_STEPS)


def dual_guidance(
    conditional: torch.Tensor,
    partial: torch.Tensor,
    unconditional: torch.Tensor,
    all_cfg: float | torch.Tensor,
    part_cfg: float | torch.Tensor,
    timestep: torch.Tensor,
    scale_words: bool = True,
) -> torch.Tensor:
    """Returns the guided velocity, of the shape of the three velocities [B, C, ...].

    `part_cfg` scales what the references bring, `all_cfg` what the words bring on top; tensors are [B, 1, ...].
    `timestep` [B] are whole timesteps; above 930 each difference is damped where its norm over the channels exceeds 1.
    Without `scale_words` what the words bring is taken as it is, neither scaled nor damped.
    """
    damped = (timestep > DAMPED_ABOVE).reshape(-1, *[1] * (conditional.ndim - 1))
    words = conditional - partial
    if scale_words:
        words = all_cfg * _damp(words, damped)
    if partial is unconditional:
        return unconditional + words
    return unconditional + part_cfg * _damp(partial - unconditional, damped) + words


def _damp(difference: torch.Tensor, damped: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
    return difference / torch.where(damped, norm.clamp(min=1.0) ** DAMPING, 1.0)


class DrawingContexts(NamedTuple):
    """What the transformer draws from: (context, layout) of each branch, and the references' latents [1, 16, h, w].

    `partial` is None without references: it is the unconditional branch then.
    """

    conditional: tuple[torch.Tensor, Layout]
    partial: tuple[torch.Tensor, Layout] | None
    unconditional: tuple[torch.Tensor, Layout]
    references: tuple[torch.Tensor, ...] = ()


class Denoiser:
    """The transformer with dual guidance: (latents [N, 16, h, w], sigma) -> the clean latents that it sees.

    It is for one picture's `contexts`, or for those of N pictures whose references have the same sizes. All branches of
    equal references share a call: one for images from text; when editing two, for those that see the references and
    those that do not. Pictures whose contexts are equally long also share the calls of the attention if they stand side
    by side. Outside the `intervals` only the branches that then count are evaluated. With `sigmas`, the noise levels of
    a run to come, their modulation is computed at the first call and kept.
    """

    def __init__(
        self,
        model: MMDiT,
        contexts: DrawingContexts | Sequence[DrawingContexts],
        size: Grid,
        guidance: Guidance,
        dtype: torch.dtype,
        intervals: GuidanceIntervals = ALWAYS,
        sigmas: torch.Tensor | None = None,
    ):
        self.model, self.guidance, self.dtype, self.intervals = model, guidance, dtype, intervals
        self.modulations = None
        if sigmas is not None:
            self.modulations = Modulations(time_embedding(whole_timestep(sigmas[sigmas > 0]).to(dtype)))
        pictures = [contexts] if isinstance(contexts, DrawingContexts) else contexts
        references = tuple(torch.cat(same) for same in zip(*(one.references for one in pictures), strict=True))
        grids = [grid_of(reference) for reference in references]

        def made(some: Iterable[tuple[torch.Tensor, Layout] | None], seen: Sequence[Grid]) -> list[BranchInput]:
            return [model.branch(*one, size, seen) for one in some if one is not None]

        conditional, partial, unconditional = zip(*(one[:3] for one in pictures), strict=True)
        seeing = [made(some, grids) for some in (conditional, partial)]
        blind = [made(unconditional, ())]
        seeing = [branches for branches in seeing if branches]
        self.groups = [(seeing, references), (blind, ())] if references else [([*seeing, *blind], ())]

    def __call__(self, latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        timestep = whole_timestep(sigma).reshape(1)
        branches = EVERY_BRANCH
        if self.intervals != ALWAYS:  # reading the level waits for a GPU
            branches = self.intervals.branches_at(float(sigma), percent_to_sigma, len(self.groups) > 1)
        velocities = self.velocities(latent, timestep, branches)
        return latent - sigma * dual_guidance(*velocities, *self.guidance, timestep, branches.words)

    def velocities(
        self, latent: torch.Tensor, timestep: torch.Tensor, wanted: Branches = EVERY_BRANCH
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the velocities [N, 16, h, w], fp32, of the conditional, partial and unconditional branch.

        In the place of one that is not wanted stands the one that it cancels out with.
        """
        time = time_embedding(timestep.to(self.dtype))
        modulation_at = None if self.modulations is None else self.modulations.at
        edits = len(self.groups) > 1
        counts = (1 + wanted.partial, int(wanted.unconditional)) if edits else (1 + wanted.unconditional,)
        found: list[torch.Tensor] = []
        for (kinds, references), count in zip(self.groups, counts):
            if count:
                branches = [branch for kind in kinds[:count] for branch in kind]
                latents, *seen = (one.to(self.dtype).repeat(count, 1, 1, 1) for one in (latent, *references))
                inputs = (latents, time.expand(len(branches), -1), branches, seen)
                found += self.model(*inputs, modulation_at=modulation_at).float().split(len(latent))
        return found[0], found[1] if edits and wanted.partial else found[-1], found[-1]


def check_finite(values: torch.Tensor, what: str, cause: str) -> None:
    """Makes sure that values are numbers: an image of others would be black without a word.

    Raises:
        RuntimeError: some are infinite or not a number.
    """
    if not torch.isfinite(values).all():
        share = (~torch.isfinite(values)).float().mean().item()
        raise RuntimeError(
            f"{100 * share:.3g} % of {what} are infinite or not a number (NaN): the fault lies in {cause}"
        )


def sample(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
    on_step: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], object] | None = None,
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
