"""Few steps as a regression: what the student must say so that its solver goes where the teacher's goes.

Between two of the student's noise levels the teacher takes several guided steps from where the student is, and the
student is asked for the one velocity with which the official solver arrives there in one step (trajectory regression on
the student's own path; guidance is distilled with it, arXiv 2210.03142, and the path is the student's, as in imitation
learning by DAgger, arXiv 1011.0686). All samples of a batch may be at levels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..defaults import Guidance
from ..mmdit import MMDiT, RunBlock, time_embedding
from ..packing import BranchInput
from ..rope import Grid, Layout, grid_of
from ..sampling import DrawingContexts, dual_guidance, flow_sigmas, whole_timestep
from .objective import Branches


@dataclass(frozen=True)
class Prompt:
    """What one picture is drawn from, on the CPU: contexts, (rows, columns) of its latent, and the guidance."""

    contexts: DrawingContexts
    size: Grid
    guidance: Guidance

    @property
    def shapes(self) -> tuple[Grid, ...]:
        """What prompts of one batch have in common: the grids of the latent and of the references."""
        return (self.size, *(grid_of(reference) for reference in self.contexts.references))


class Schedule:
    """Noise levels of a run and what DPM-Solver++ (2M) multiplies by at each; see `sampling.sample`.

    `levels` is [..., n + 1], fp32; several runs, one a row, may be asked for at once.
    """

    def __init__(self, levels: torch.Tensor):
        self.levels = levels
        now, after = levels[..., :-1].double(), levels[..., 1:].double()
        log_snr = torch.log1p(-levels.double()) - torch.log(levels.double())
        step = log_snr.diff(dim=-1)
        last = after == 0
        self.decay = (after / now).float()
        self.gain = torch.where(last, -1.0, (1 - after) * torch.expm1(-step)).float()
        self.extra = torch.zeros_like(self.decay)
        self.extra[..., 1:] = torch.where(last, 0.0, 0.5 * step / step.roll(1, -1)).float()[..., 1:]

    def step(
        self, at: tuple[torch.Tensor | int, ...], latent: torch.Tensor, clean: torch.Tensor, previous: torch.Tensor
    ) -> torch.Tensor:
        """Returns latents [B, C, h, w] one step on, from what they were seen as, now and at the step before.

        `at` are the places of the steps in the schedule, one for each sample. At a first step `previous` counts for
        nothing.
        """
        decay, gain, extra = (_spread(one[at], latent) for one in (self.decay, self.gain, self.extra))
        return decay * latent - gain * (clean + extra * (clean - previous))

    def clean_before(
        self, at: tuple[torch.Tensor | int, ...], latent: torch.Tensor, reached: torch.Tensor, previous: torch.Tensor
    ) -> torch.Tensor:
        """Returns the clean latents with which `step` arrives at `reached`."""
        decay, gain, extra = (_spread(one[at], latent) for one in (self.decay, self.gain, self.extra))
        return ((decay * latent - reached) / gain + extra * previous) / (1 + extra)


def student_schedule(evaluations: int) -> Schedule:
    """Returns the official schedule of so many steps."""
    return Schedule(flow_sigmas(evaluations))


def teacher_schedule(evaluations: int, substeps: int) -> Schedule:
    """Returns the schedule of each of the student's steps in so many substeps: levels [evaluations, substeps + 1].

    Together they are the official schedule of `evaluations * substeps` steps; the solver begins anew at each row.
    """
    fine = flow_sigmas(evaluations * substeps)
    return Schedule(fine.unfold(0, substeps + 1, substeps).clone())


class Velocities:
    """A transformer's velocities of batches whose samples are at noise levels of their own."""

    def __init__(self, model: MMDiT, dtype: torch.dtype, run_block: RunBlock | None = None):
        self.model, self.dtype, self.run_block = model, dtype, run_block
        self._branches = Branches(model)

    def conditional(self, latents: torch.Tensor, levels: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Returns the conditional branch's velocity [B, 16, h, w], fp32, of latents at noise levels [B]."""
        branches = [self._branch(prompt.contexts.conditional, prompt, prompt.contexts.references) for prompt in prompts]
        return self._call(latents, levels, branches, _stacked(prompts), self.run_block)

    @torch.no_grad()
    def guided(self, latents: torch.Tensor, levels: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Returns the guided velocity [B, 16, h, w], fp32, as `sampling.Denoiser` guides one picture."""
        conditional = self.conditional(latents, levels, prompts)
        blind = [self._branch(prompt.contexts.unconditional, prompt, ()) for prompt in prompts]
        unconditional = self._call(latents, levels, blind, ())
        partial, references = unconditional, _stacked(prompts)
        if references:
            seeing = [
                self._branch(prompt.contexts.partial or prompt.contexts.unconditional, prompt, references)
                for prompt in prompts
            ]
            partial = self._call(latents, levels, seeing, references)
        all_cfg = _spread(torch.tensor([prompt.guidance.all_cfg for prompt in prompts]), latents)
        part_cfg = _spread(torch.tensor([prompt.guidance.part_cfg for prompt in prompts]), latents)
        return dual_guidance(conditional, partial, unconditional, all_cfg, part_cfg, whole_timestep(levels))

    def _call(
        self,
        latents: torch.Tensor,
        levels: torch.Tensor,
        branches: Sequence[BranchInput],
        references: Sequence[torch.Tensor],
        run_block: RunBlock | None = None,
    ) -> torch.Tensor:
        time = time_embedding(whole_timestep(levels).to(self.dtype))
        given = [one.to(latents.device, self.dtype) for one in references]
        return self.model(latents.to(self.dtype), time, branches, given, run_block).float()

    def _branch(
        self, context: tuple[torch.Tensor, Layout], prompt: Prompt, references: Sequence[torch.Tensor]
    ) -> BranchInput:
        hidden, layout = context
        return self._branches(hidden, layout, prompt.size, tuple(grid_of(one) for one in references))


def _stacked(prompts: Sequence[Prompt]) -> tuple[torch.Tensor, ...]:
    """Returns the references of prompts of equal shapes as batches."""
    return tuple(torch.cat(every) for every in zip(*(prompt.contexts.references for prompt in prompts)))


def _spread(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Returns values [B] or one value as they are multiplied with latents [B, C, h, w]."""
    return values.to(latents).reshape(-1, 1, 1, 1)
