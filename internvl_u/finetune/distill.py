"""`python -m internvl_u distill`: guidance and steps into a LoRA, so that one branch and few steps draw alike.

No picture is learned from. Many prompts are on their way from noise to a picture at once, each at a step of its own;
every training step brings all of them one step on by the student and asks it for what `trajectory` says. All that the
next step depends on is in the saved state, so that a run that was killed and goes on ends with the same weights.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .. import __version__
from ..distilled import mark, marked_layer
from ..load import load_mmdit
from ..mmdit import RunBlock
from ..pipeline import Pipeline
from ..speed import TURBO
from .adapter import FILE_PREFIX, adapter_weights, add_adapter, count_parameters, write_adapter
from .distill_estimate import estimate_distillation
from .distill_settings import DistillSettings, adapter_settings
from .log import CSVLog, plot
from .objective import checkpointed
from .pool import Pool
from .processes import Processes
from .prompts import PromptSource, read_prompts
from .sheet import draw_sheet
from .state import load_state, save_state
from .timing import Pace
from .trainer import check_loss, seed_of
from .trajectory import Prompt, Velocities, student_schedule, teacher_schedule

BETAS = (0.9, 0.99)
LARGEST_GRADIENT = 1.0


class Distillation:
    """A run; see `DistillSettings`."""

    def __init__(self, settings: DistillSettings, report: Callable[[str], object]):
        """Reads the prompts and opens the model.

        Raises:
            FileNotFoundError, ValueError: something of the settings or of the prompts is not as it should be.
        """
        self.settings, self.processes = settings, Processes(settings.device)
        self.main, self.device = self.processes.main, self.processes.device
        self.report, self.dtype = self.processes.saying(report), getattr(torch, settings.dtype)
        wishes = [wish for source in settings.data for wish in read_prompts(source)]
        self.pipeline = Pipeline(settings.model, dtype=self.dtype, device=self.device)
        self.source = PromptSource(self.pipeline, wishes, settings.resolution)
        self.student = student_schedule(settings.evaluations)
        self.teacher = teacher_schedule(settings.evaluations, settings.substeps)
        self.log = CSVLog(settings.folder / "log.csv", ("seconds", "lr", "loss", *self._columns(), "gradient"))

    def estimate(self) -> None:
        """Says what a step takes, before anything is computed or loaded."""
        if self.main:
            found = estimate_distillation(self.settings, self.source, self.device)
            self.report(found.describe(self.settings.steps))

    def run(self) -> list[Path]:
        """Distils, and returns what was written."""
        settings = self.settings
        self.estimate()
        self._load()
        settings.folder.mkdir(parents=True, exist_ok=True)
        fingerprint = settings.fingerprint(self.source.fingerprint, self.processes.count)
        step = load_state(settings.folder, fingerprint, self.weights, self)
        if self.main:
            self.log.start(step)
        self._tell(step)
        if step == 0 and settings.sample_every:
            self.sheet(step, "sheet_teacher.png")
            self.sheet(step)
        self._fit(step, fingerprint)
        return self.write() if self.main else []

    def _fit(self, step: int, fingerprint: str) -> None:
        settings, started, rows, pace = self.settings, time.monotonic(), [], Pace()
        while step < settings.steps:
            with pace.step():
                rows.append(self.learn(step))
            step += 1
            last = step == settings.steps
            if self.main and (step % settings.log_every == 0 or last):
                loss = self._write_row(step, rows, time.monotonic() - started)
                self.report(f"step {step} of {settings.steps}, loss {loss:.4f}, {pace.told(settings.steps - step)}")
                rows = []
            if settings.sample_every and (step % settings.sample_every == 0 or last):
                self.sheet(step)
            if step % settings.save_every == 0 or last:
                state = self.state_dict()
                if self.main:
                    save_state(settings.folder, fingerprint, step, self.weights, state)
                    plot(self.log, settings.folder / "loss.png", ("loss",))

    def sheet(self, step: int, name: str = "") -> None:
        """Draws the sample prompts, each with its own seed: in few evaluations, or by a name as the teacher does."""
        if not self.main:
            return
        file = self.settings.folder / (name or f"sheet_{step:06}.png")
        wishes = self.source.samples(self.settings.sample_prompts)
        if not name:
            few: dict[str, Any] = {"speed": TURBO, "evaluations": self.settings.evaluations}
            wishes = [replace(wish, **few) for wish in wishes]
        with adapters_off(self.model) if name else contextlib.nullcontext():
            draw_sheet(self.pipeline, {"mmdit": self.model}, wishes, file)
        self.report(f"drawn: {file}")

    def _load(self) -> None:
        settings = self.settings
        self.model = load_mmdit(self.pipeline.files.transformer, dtype=self.dtype).to(self.device)
        self.adapter = adapter_settings(settings, len(self.model.transformer_blocks))
        add_adapter(self.model, "transformer", self.adapter, settings.seed)
        self.model.to(self.device)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=settings.lr, betas=BETAS, weight_decay=0.0)
        run_block = cast(RunBlock, checkpointed) if settings.checkpointing else None
        self.velocities = Velocities(self.model, self.dtype, run_block)
        rank = self.processes.rank
        self.generator = torch.Generator().manual_seed(seed_of(settings.seed, rank) if rank else settings.seed)
        self.pools: dict[int, Pool] = {}
        self.shapes = list(self.source.buckets)

    def learn(self, step: int) -> dict[str, float]:
        """Makes one step down the loss, and the pool's one step on; returns what is logged."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(step)
        pool = self._chosen_pool()
        prompts = self._prompts(pool)
        index, latents, previous = pool.index, pool.latents.to(self.device), pool.previous.to(self.device)
        levels = self.student.levels[index].to(self.device)
        target = self.target(index, latents, previous, prompts)
        velocity = self.velocities.conditional(latents, levels, prompts)
        errors = (velocity - target).square().flatten(1).mean(1)
        loss = errors.mean()
        check_loss(loss, step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average_gradients(self.weights)
        norm = nn.utils.clip_grad_norm_(self.weights, LARGEST_GRADIENT)
        self.optimizer.step()
        clean = latents - levels.reshape(-1, 1, 1, 1) * velocity.detach()
        pool.move(self.student.step((index,), latents, clean, previous).cpu(), clean.cpu())
        row = {"loss": loss.item(), "gradient": float(norm)}
        for number, column in enumerate(self._columns()):
            if (there := index == number).any():
                row[column] = errors.detach().cpu()[there].mean().item()
        return row

    @torch.no_grad()
    def target(
        self, index: torch.Tensor, latents: torch.Tensor, previous: torch.Tensor, prompts: Sequence[Prompt]
    ) -> torch.Tensor:
        """Returns the velocity [B, 16, h, w] with which the student's solver goes where the teacher goes.

        `index` [B] are the student's steps, `latents` where it is, `previous` what it saw there a step before.
        """
        with adapters_off(self.model):
            reached = self.teach(index, latents, prompts)
        wanted = self.student.clean_before((index,), latents, reached, previous)
        return (latents - wanted) / self.student.levels[index].to(latents).reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def teach(self, index: torch.Tensor, latents: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Returns where guided steps lead from latents, at the end of the student's steps `index` [B]."""
        before = latents
        for substep in range(self.settings.substeps):
            at = (index, substep)
            levels = self.teacher.levels[at].to(latents)
            velocity = self.velocities.guided(latents, levels, prompts)
            clean = latents - levels.reshape(-1, 1, 1, 1) * velocity
            latents, before = self.teacher.step(at, latents, clean, before), clean
        return latents

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next steps depend on, beside the weights; asked for in all processes at once."""
        own = {
            "generator": self.generator.get_state(),
            "pools": {number: pool.state() for number, pool in self.pools.items()},
        }
        first, *others = self.processes.gather(own)
        return {"optimizer": self.optimizer.state_dict(), **first} | ({"others": others} if others else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        own = state["others"][self.processes.rank - 1] if self.processes.rank else state
        for number, stored in own["pools"].items():
            self._pool(number).restore(stored)
        self.generator.set_state(own["generator"])

    def write(self) -> list[Path]:
        """Writes the LoRA, with the mark that tells how many evaluations it is for."""
        layer = marked_layer(name for name, _ in self.model.named_parameters())
        added = mark(self.model.config.width, self.settings.evaluations)
        more = {f"{FILE_PREFIX['transformer']}{layer}.diff_b": added}
        parts = {"transformer": adapter_weights(self.model, self.settings.save_dtype)}
        return write_adapter(self.settings.out, parts, self.adapter, self.metadata(), more)

    def metadata(self) -> dict[str, str]:
        """Returns what the file says of itself."""
        settings, files = self.settings, self.pipeline.files
        return {
            "made_by": f"internvl_u {__version__} distill",
            "base": files.transformer.name,
            "dataset": self.source.fingerprint,
            "prompts": str(len(self.source.wishes)),
            "evaluations": str(settings.evaluations),
            "teacher_steps": str(settings.substeps * settings.evaluations),
            "steps": str(settings.steps),
            "batch": str(settings.batch * self.processes.count),
            "rank": str(settings.rank),
            "alpha": f"{self.adapter.scale:g}",
            "learning_rate": f"{settings.lr:g}",
            "seed": str(settings.seed),
        }

    def _chosen_pool(self) -> Pool:
        """Returns the pool whose turn it is: by chance, as often as it has prompts, or edits as often as is wished."""
        counts = torch.tensor([float(len(self.source.buckets[shapes])) for shapes in self.shapes])
        edits, share = torch.tensor([len(shapes) > 1 for shapes in self.shapes]), self.settings.edits
        if share is not None and edits.any() and not edits.all():
            counts[edits] *= share / counts[edits].sum()
            counts[~edits] *= (1 - share) / counts[~edits].sum()
        return self._pool(int(torch.multinomial(counts, 1, generator=self.generator)))

    def _pool(self, number: int) -> Pool:
        if number not in self.pools:
            shapes = self.shapes[number]
            of_run = self.settings.batch, self.settings.evaluations, self.generator
            self.pools[number] = Pool(self.source.buckets[shapes], shapes[0], *of_run)
        return self.pools[number]

    def _prompts(self, pool: Pool) -> list[Prompt]:
        """Returns a pool's prompts, and puts it in their order: by length, for those of one share a call."""
        found = [self.source[number] for number in pool.wishes.tolist()]
        order = sorted(range(len(found)), key=lambda place: len(found[place].contexts.conditional[0]))
        pool.arrange(order)
        return [found[place] for place in order]

    def _columns(self) -> tuple[str, ...]:
        return tuple(f"loss_{number}" for number in range(self.settings.evaluations))

    def _tell(self, step: int) -> None:
        settings, edits = self.settings, sum(bool(wish.references) for wish in self.source.wishes)
        self.report(
            f"{len(self.source.wishes):,} prompts, {edits:,} of them edits; {count_parameters(self.model):,} numbers "
            f"learn what {settings.substeps * settings.evaluations} guided steps draw, in {settings.evaluations}"
        )
        if step:
            self.report(f"going on after step {step}")

    def _write_row(self, step: int, rows: Sequence[dict[str, float]], seconds: float) -> float:
        """Logs the means of some steps, and returns the loss."""
        names = dict.fromkeys(name for row in rows for name in row)
        means = {name: statistics.fmean(row[name] for row in rows if name in row) for name in names}
        self.log.append(step, means | {"seconds": seconds, "lr": self.settings.rate(step - 1)})
        return means["loss"]


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Lets a network compute without its adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
