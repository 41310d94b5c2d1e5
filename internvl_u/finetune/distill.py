"""`python -m internvl_u distill`: guidance and steps into a LoRA, so that one branch and few steps draw alike.

No picture is learned from. Many prompts are on their way from noise to a picture at once, each at a step of its own;
every training step brings all of them one step on by the student and asks it for what `trajectory` says. All that the
next step depends on is in the saved state, so that a run that was killed and goes on ends with the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .. import __version__
from ..defaults import STEPS
from ..distilled import mark, marked_layer
from ..load import load_mmdit
from ..mmdit import MMDiT, RunBlock
from ..numbers import check_real, check_whole
from ..pipeline import Pipeline
from .adapter import FILE_PREFIX, AdapterSettings, adapter_weights, add_adapter, count_parameters, write_adapter
from .log import CSVLog, plot
from .objective import checkpointed
from .pool import Pool
from .prompts import PromptSource, read_prompts
from .state import load_state, save_state
from .trainer import check_loss
from .trajectory import Prompt, Velocities, student_schedule, teacher_schedule

BETAS = (0.9, 0.99)
LARGEST_GRADIENT = 1.0
WARMUP = 30
"""Steps until the whole learning rate, which then falls along a cosine to a fiftieth."""
_OF_THE_RESULT = ("out", "work", "save_every", "log_every", "device", "checkpointing")


@dataclass(frozen=True)
class DistillSettings:
    """A run. Every field is an option of `python -m internvl_u distill`; see there."""

    model: Path
    data: tuple[Path, ...]
    out: Path
    evaluations: int = 8
    teacher_steps: int = STEPS
    rank: int = 64
    steps: int = 1000
    batch: int = 16
    lr: float = 1e-4
    edits: float | None = None
    resolution: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    checkpointing: bool = False
    save_every: int = 100
    log_every: int = 10
    work: Path | None = None

    def __post_init__(self):
        if self.out.suffix.lower() != ".safetensors":
            raise ValueError(f"--out {self.out} found, a name ending in .safetensors expected")
        if not self.data:
            raise ValueError("no --data found, a file of prompts expected")
        for name, value, lowest, highest in (
            ("evaluations", self.evaluations, 1, 50),
            ("teacher-steps", self.teacher_steps, 1, 1000),
            ("rank", self.rank, 1, 4096),
            ("steps", self.steps, 1, 1_000_000),
            ("batch", self.batch, 1, 4096),
            ("seed", self.seed, -(2**63), 2**63 - 1),
            ("save-every", self.save_every, 1, 1_000_000),
            ("log-every", self.log_every, 1, 1_000_000),
        ):
            check_whole(f"--{name}", value, lowest, highest)
        check_real("--lr", self.lr)
        if not 0 < self.lr <= 10:
            raise ValueError(f"--lr {self.lr} found, more than 0 and at most 10 expected")
        if self.edits is not None:
            check_real("--edits", self.edits, 0.0, 1.0)

    @property
    def substeps(self) -> int:
        """The teacher's guided steps for one of the student's."""
        return math.ceil(self.teacher_steps / self.evaluations)

    @property
    def folder(self) -> Path:
        """Where the log and the state are."""
        return self.out.with_name(f"{self.out.stem}-training") if self.work is None else self.work

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        share = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / WARMUP) * (0.98 * share + 0.02)

    def fingerprint(self, prompts: str) -> str:
        """Returns what a state must agree in to be gone on from."""
        told = {key: value for key, value in dataclasses.asdict(self).items() if key not in (*_OF_THE_RESULT, "data")}
        return hashlib.sha256(json.dumps(told | {"prompts": prompts}, sort_keys=True, default=str).encode()).hexdigest()


class Distillation:
    """A run; see `DistillSettings`."""

    def __init__(self, settings: DistillSettings, report: Callable[[str], object]):
        """Reads the prompts and opens the model.

        Raises:
            FileNotFoundError, ValueError: something of the settings or of the prompts is not as it should be.
        """
        self.settings, self.report = settings, report
        self.dtype, self.device = getattr(torch, settings.dtype), torch.device(settings.device)
        wishes = [wish for source in settings.data for wish in read_prompts(source)]
        self.pipeline = Pipeline(settings.model, dtype=self.dtype, device=self.device)
        self.source = PromptSource(self.pipeline, wishes, settings.resolution)
        self.student = student_schedule(settings.evaluations)
        self.teacher = teacher_schedule(settings.evaluations, settings.substeps)
        self.log = CSVLog(settings.folder / "log.csv", ("seconds", "lr", "loss", *self._columns(), "gradient"))

    def run(self) -> list[Path]:
        """Distils, and returns what was written."""
        settings = self.settings
        self._load()
        fingerprint = settings.fingerprint(self.source.fingerprint)
        settings.folder.mkdir(parents=True, exist_ok=True)
        step = load_state(settings.folder, fingerprint, self.weights, self)
        self.log.start(step)
        self._tell(step)
        started, rows = time.monotonic(), []
        while step < settings.steps:
            rows.append(self.learn(step))
            step += 1
            last = step == settings.steps
            if step % settings.log_every == 0 or last:
                self._write_row(step, rows, time.monotonic() - started)
                rows = []
            if step % settings.save_every == 0 or last:
                save_state(settings.folder, fingerprint, step, self.weights, self)
                plot(self.log, settings.folder / "loss.png", ("loss",))
        return self.write()

    def _load(self) -> None:
        settings = self.settings
        self.model = load_mmdit(self.pipeline.files.transformer, dtype=self.dtype).to(self.device)
        layers = AdapterSettings(rank=settings.rank, layers=_learning(self.model))
        self.adapter = layers
        add_adapter(self.model, "transformer", layers, settings.seed)
        self.model.to(self.device)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=settings.lr, betas=BETAS, weight_decay=0.0)
        run_block = cast(RunBlock, checkpointed) if settings.checkpointing else None
        self.velocities = Velocities(self.model, self.dtype, run_block)
        self.generator = torch.Generator().manual_seed(settings.seed)
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
        """Returns what the next steps depend on, beside the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "pools": {number: pool.state() for number, pool in self.pools.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        for number, stored in state["pools"].items():
            self._pool(number).restore(stored)
        self.generator.set_state(state["generator"])

    def write(self) -> list[Path]:
        """Writes the LoRA, with the mark that tells how many evaluations it is for."""
        layer = marked_layer(name for name, _ in self.model.named_parameters())
        added = mark(self.model.config.width, self.settings.evaluations)
        more = {f"{FILE_PREFIX['transformer']}{layer}.diff_b": added}
        parts = {"transformer": adapter_weights(self.model)}
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
            "batch": str(settings.batch),
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

    def _write_row(self, step: int, rows: Sequence[dict[str, float]], seconds: float) -> None:
        """Logs the means of some steps."""
        names = dict.fromkeys(name for row in rows for name in row)
        means = {name: statistics.fmean(row[name] for row in rows if name in row) for name in names}
        self.log.append(step, means | {"seconds": seconds, "lr": self.settings.rate(step - 1)})
        self.report(f"step {step} of {self.settings.steps}, loss {means['loss']:.4f}, {seconds:.0f} s")


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


def _learning(model: MMDiT) -> str:
    """Returns the names of the layers that learn, as a pattern: all but those whose output nothing reads."""
    last = len(model.transformer_blocks) - 1
    unread = rf"transformer_blocks\.{last}\.(txt_mlp\..*|attn\.(add_q_proj|to_add_out))"
    return rf"(?!{unread}$).*"
