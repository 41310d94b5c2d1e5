"""Stage 3: the transformer learns to draw and to edit, by flow matching on the frozen VAE's latents.

Times are mostly logit-normal, and shifted by 3, as the model is sampled. Beside the velocity, linear heads that are
not kept tell from inside the transformer where each token lies and what will lie under it: composing begins sooner.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn
from torch.nn import functional

from internvl_u.config import MMDiTConfig
from internvl_u.mmdit import MLP, MMDiT, time_embedding
from internvl_u.sampling import SHIFT, whole_timestep
from internvl_u.tokenizer import Tokenizer

from . import tokenizer, understand, world
from .layouts import THINGS, centres, grounds, shares
from .log import Log, load_state, save_state
from .optimiser import Averaged, optimisers, restore, set_rates, state_of
from .studies import SIZES_ALL, SIZES_SMALL, Studio, Study
from .together import average_gradients, start

CONFIG = MMDiTConfig(
    channels=16, patch_size=2, context_width=384, layers=6, heads=4, head_dim=32, rope_axes=(8, 12, 12)
)
ROOMS = {False: (32, 96, 192), True: (48, 96, 192)}
"""Lengths that contexts are filled up to, without and with a picture. Loads of all but the longest are compiled: each
costs half a minute at first, and is four times as fast then."""
PLACED_AFTER, TOLD_AFTER = 1, 3
"""Blocks after which each token tells where it lies itself, and what lies under it."""
EVEN, ALONE = 0.3, 0.03
"""Shares of the samples whose times are uniform before the shift instead of logit-normal, and that are noise alone."""
COLUMNS = ("step", "seconds", "loss", "layout")


def new_model(seed: int = 0) -> MMDiT:
    """Returns the nano transformer with random weights; its blocks and its output begin as nothing."""
    model = MMDiT(CONFIG, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if "norm_" in name and "linear" not in name or name.startswith("txt_norm"):
                weight.fill_(1.0)
            elif name.endswith("bias") or "_mod." in name or name.startswith(("norm_out", "proj_out")):
                weight.zero_()
            else:
                weight.normal_(0, weight.shape[1] ** -0.5 * 0.7, generator=generator)
    return model


@dataclass(frozen=True)
class Load:
    """Samples of one size side by side, their contexts filled up to one length."""

    latents: torch.Tensor  # [B, 16, h, w]
    references: tuple[torch.Tensor, ...]
    context: torch.Tensor  # [B, L, width]
    rotary_image: torch.Tensor  # [2, 1, N, 1, E / 2]
    rotary_text: torch.Tensor  # [2, B * L, 1, E / 2]
    bias: torch.Tensor  # [B, 1, 1, N + L], nothing or nearly minus infinity

    def to(self, device: torch.device) -> Load:
        """Returns the load on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "references"}
        return dataclasses.replace(self, **moved, references=tuple(x.to(device) for x in self.references))


class Tables:
    """Rotary tables, each made once."""

    def __init__(self, model: MMDiT):
        self.model, self.made = model, {}

    def __call__(self, study: Study) -> torch.Tensor:
        grid = tuple(study.latent.shape[-2:])
        key = (grid, study.reference is not None, study.layout)
        if key not in self.made:
            references = [grid] if study.reference is not None else []
            self.made[key] = self.model.branch(study.context, study.layout, grid, references).rotary
        return self.made[key]


def load(studies: Sequence[Study], tables: Tables) -> Load:
    """Returns samples of one shelf as one load."""
    longest = shelf_of(studies[0])[-1]
    tokens = sum(x.shape[-1] * x.shape[-2] // 4 for x in (studies[0].latent, studies[0].reference) if x is not None)
    context = torch.zeros(len(studies), longest, CONFIG.context_width, dtype=torch.bfloat16)
    rotary = torch.zeros(2, len(studies), longest, CONFIG.head_dim // 2)
    bias = torch.zeros(len(studies), 1, 1, tokens + longest)
    for i, study in enumerate(studies):
        table, length = tables(study), len(study.context)
        context[i, :length] = study.context
        rotary[:, i, :length] = table[:, tokens:]
        bias[i, ..., tokens + length :] = -1e4
    references = (torch.stack([s.reference for s in studies]),) if studies[0].reference is not None else ()
    image = tables(studies[0])[:, None, :tokens, None].contiguous()  # other strides would be compiled anew
    latents = torch.stack([study.latent for study in studies])
    return Load(latents, references, context, image, rotary.flatten(1, 2)[:, :, None], bias)


def run_block(
    block: nn.Module,
    image: torch.Tensor,
    text: torch.Tensor,
    modulation: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
    picture: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both streams after a block, for contexts of one length."""
    count, length = image.shape[0], text.shape[0] // image.shape[0]
    which = torch.arange(count, device=image.device)[:, None].expand(count, length).flatten()
    packing = _Even(length, which, *rotary)

    def attention(query, key, value):
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
        # Queries and keys have been normalised, so that no maximum need be taken off first.
        weights = (scores.float() + bias).exp()
        total = weights.sum(-1, keepdim=True).to(value.dtype)
        return (weights.to(value.dtype) @ value / total).transpose(1, 2).flatten(2)

    return block(image, text, modulation, packing, attention, picture)


def compiled(model: MMDiT):
    """Returns `run_block`, compiled once for all blocks (and once for the last) of each shape."""
    template = copy.deepcopy(model.transformer_blocks[0])
    for part in template.modules():
        if isinstance(part, MLP):
            part.__class__ = _MLP

    def run(weights: dict[str, torch.Tensor], *given):
        def block(*inner):
            return torch.func.functional_call(template, weights, inner)

        return run_block(block, *given)

    torch._dynamo.config.cache_size_limit = 64
    fast = torch.compile(run, dynamic=False)
    return lambda block, *given: fast(dict(block.named_parameters()), *given)


class _MLP(MLP):
    """The same with the tanh-GELU written with a sigmoid, which is much faster on the CPU than tanh."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.net[0].proj(tokens)
        twice = 2 * (2 / math.pi) ** 0.5 * (inner + 0.044715 * inner * inner * inner)
        return self.net[2](inner * torch.sigmoid(twice))


class _Even:
    """A `Packing` of contexts of one length."""

    def __init__(self, length: int, sample: torch.Tensor, rotary_image: torch.Tensor, rotary_text: torch.Tensor):
        self.length, self.sample, self.rotary_image, self.rotary_text = length, sample, rotary_image, rotary_text

    def groups(self) -> list[tuple[slice, slice, int]]:
        return [(slice(None), slice(None), self.length)]


def velocity(
    model: MMDiT, noisy: torch.Tensor, timestep: torch.Tensor, data: Load, run=run_block
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the velocity [B, 16, h, w], and the picture's tokens [2, B, N, D] early and midway in the transformer.

    As `MMDiT.forward`, for contexts that are filled up.
    """
    image, grid = model.embed_image(noisy, data.references)
    picture = grid[0] * grid[1]
    text = model.embed_text(data.context.flatten(0, 1).to(noisy))
    modulation = model.embed_time(time_embedding(timestep), noisy.dtype)
    rotary, told = (data.rotary_image, data.rotary_text), []

    def run_padded(index, block, image, text, modulation, packing, image_tokens):
        image, text = run(block, image, text, modulation, rotary, data.bias, image_tokens)
        if index + 1 in (PLACED_AFTER, TOLD_AFTER):
            told.append(image[:, :picture])
        return image, text

    image = model.run_blocks(image, text, modulation, None, picture, run_padded)
    return model.velocity(image, modulation, grid, noisy.shape[-2:]), torch.stack(told)


class Layout(nn.Module):
    """Where a token lies, and under it: shares of each shape and colour, and their centre; only for training."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.told = nn.Linear(width, THINGS + len(world.BACKGROUNDS))
        self.centre = nn.Linear(width, 3)
        self.place = nn.Linear(width, 2)

    def loss(self, tokens: torch.Tensor, scenes: Sequence[world.Scene], grid: tuple[int, int]) -> torch.Tensor:
        """Returns the loss of the picture's tokens [2, B, rows * columns, D], early and midway, for what is drawn."""
        (early, tokens), (rows, columns) = self.norm(tokens.float()), grid
        # Attention is relative; with places of their own at hand, tokens soon find out where things are.
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(early)
        lost = (self.place(early) - places).abs().mean()
        told = self.told(tokens)
        things, ground = told.split((THINGS, len(world.BACKGROUNDS)), dim=-1)
        wanted = shares(scenes, rows, columns).to(things)
        told_apart = functional.binary_cross_entropy_with_logits(things, wanted)
        below = functional.cross_entropy(ground.mean(1), grounds(scenes).to(ground.device))
        centre, asked = (tensor.to(things) for tensor in centres(scenes, rows, columns))
        off = (self.centre(tokens) - centre).abs().mean(-1)
        return 4 * told_apart + below + (off * asked).sum() / asked.sum().clamp(min=1) + lost


class Stock:
    """Samples in store, on shelves of equal size and about equal length; the oldest go when new ones come."""

    def __init__(self, capacity: int):
        self.capacity, self.studies = capacity, []

    def add(self, studies: Sequence[Study]) -> None:
        """Takes in new samples."""
        self.studies = (self.studies + list(studies))[-self.capacity :]
        self.shelves: dict[tuple, list[Study]] = {}
        for study in self.studies:
            self.shelves.setdefault(shelf_of(study), []).append(study)

    def take(self, rng: random.Random, tokens: int, common: random.Random) -> list[Study]:
        """Returns samples of one shelf, about `tokens` tokens in all: always as many of a full shelf.

        Workers that share `common` take from the same shelf, nearly always, and so need the same time.
        """
        keys = sorted(self.shelves)
        key = common.choices(keys, [len(self.shelves[key]) * tokens_of(key) for key in keys])[0]
        return rng.sample(self.shelves[key], min(samples_of(key, tokens), len(self.shelves[key])))


def shelf_of(study: Study) -> tuple[int, int, bool, int]:
    """Returns what samples of one load share: rows and columns of the latent, a reference, the context's room."""
    referring = study.reference is not None
    room = next(room for room in ROOMS[referring] if len(study.context) <= room)
    return *study.latent.shape[-2:], referring, room


def samples_of(shelf: tuple[int, int, bool, int], tokens: int) -> int:
    """Returns how many samples of a shelf have about `tokens` tokens."""
    return max(8, tokens // tokens_of(shelf) // 8 * 8)


def tokens_of(shelf: tuple[int, int, bool, int]) -> int:
    """Returns the tokens of one sample of a shelf."""
    rows, columns, referring, room = shelf
    return rows * columns // 4 * (1 + referring) + room


def noised(latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns latents at shifted noise levels, their whole timesteps [B], and the velocity to predict."""
    count = len(latents)
    level = torch.randn(count, generator=generator).sigmoid()
    # Where things go is decided in the first steps of sampling, where logit-normal times hardly ever come.
    even = torch.rand(count, generator=generator) < EVEN
    level = torch.where(even, torch.rand(count, generator=generator), level)
    level = SHIFT * level / (1 + (SHIFT - 1) * level)
    level = torch.where(torch.rand(count, generator=generator) < ALONE, 0.9995, level)
    noise = torch.randn(latents.shape, generator=generator)
    part = level.view(-1, 1, 1, 1)
    return (1 - part) * latents + part * noise, whole_timestep(level), noise - latents


def train(options: argparse.Namespace, rank: int = 0) -> MMDiT:
    """Trains, going on from the work folder where it was left, and returns the averaged model."""
    studio = make_studio(options.work, options.tokenizer, options.vae, torch.device(options.device))
    model = new_model(options.seed)
    layout = Layout(CONFIG.width)
    device = torch.device(options.device)
    both = nn.ModuleDict({"model": model, "layout": layout}).to(device)
    steppers, average, tables = optimisers(both, options.rate), Averaged(both, 0.999), Tables(model)
    file, first, seconds, losses = options.work / "draw.safetensors", 0, 0.0, []
    log = Log(options.work / "draw.csv", COLUMNS)
    if (state := load_state(file)) is not None:
        tensors, facts = state
        restore(both, average, steppers, tensors)
        first, seconds = facts["step"], facts["seconds"]
        if rank == 0:
            log.cut(first)
    fast = compiled(model) if options.compile else run_block
    stock, begun = Stock(options.stock), time.monotonic() - seconds
    for step in range(first, options.steps):
        rng = random.Random(f"draw {options.seed} {step} {rank}")
        sizes = SIZES_SMALL if step < options.small * options.steps else SIZES_ALL
        if step == first:
            stock.add(studio.studies(rng, options.stock // 4, sizes))
        if step % options.every == 0:
            if options.follow:
                renew(studio.model, options.work / "understand.safetensors")
            stock.add(studio.studies(rng, options.fresh, sizes))
        taken = stock.take(rng, options.tokens, random.Random(f"shelf {options.seed} {step}"))
        data = load(taken, tables)
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        noisy, timestep, target = (tensor.to(device) for tensor in noised(data.latents, generator))
        data = data.to(device)
        set_rates(steppers, options.rate, step, options.steps)
        shelf = shelf_of(taken[0])
        # A shelf that is not full yet would be compiled for its size of the day.
        whole = len(taken) == samples_of(shelf, options.tokens)
        run = fast if whole and shelf[-1] != ROOMS[shelf[-2]][-1] else run_block
        with torch.autocast(device.type, torch.bfloat16):
            found, inner = velocity(model, noisy, timestep, data, run)
        loss = functional.mse_loss(found.float(), target)
        rows, columns = (side // CONFIG.patch_size for side in data.latents.shape[-2:])
        told = layout.loss(inner, [study.scene for study in taken], (rows, columns))
        for stepper in steppers:
            stepper.zero_grad(set_to_none=True)
        (loss + 0.1 * told).backward()
        average_gradients(both)
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        average.update(step)
        losses.append((loss.item(), told.item()))
        if rank == 0 and ((step + 1) % options.log_every == 0 or step + 1 == options.steps):
            took = time.monotonic() - begun
            means = [sum(pair[i] for pair in losses) / len(losses) for i in (0, 1)]
            print(f"{step + 1} steps, {took:.0f} s, loss {means[0]:.4f}, layout {means[1]:.4f}", flush=True)
            log.append(step=step + 1, seconds=took, loss=means[0], layout=means[1])
            losses = []
            save_state(file, state_of(both, average, steppers), {"step": step + 1, "seconds": took})
    both.load_state_dict(average.weights)
    return model.cpu().eval()


def renew(model: nn.Module, file: Path) -> None:
    """Gives the language model the averaged weights of its stage's state, if these are not what it has."""
    changed = file.stat().st_mtime
    if getattr(model, "renewed", None) != changed:
        tensors, _ = load_state(file)
        prefix = "average/model."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        model.renewed = changed


def make_studio(work: Path, folder: Path, coder: Path, device: torch.device) -> Studio:
    """Returns the studio of what the stages before have made."""
    words = Tokenizer(folder)
    model = understand.new_model(words, tokenizer.size(folder))
    renew(model, work / "understand.safetensors")
    pictures = AutoencoderKLQwenImage.from_pretrained(coder, torch_dtype=torch.float32)
    return Studio(model.eval().to(device), words, pictures.eval().to(device))


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--work", type=Path, required=True, help="folder for the log and the state to go on from")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--tokens", type=int, default=4608, help="tokens a step, about")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--small", type=float, default=0.7, help="share of the steps with squares alone")
    parser.add_argument("--stock", type=int, default=16384, help="samples in store")
    parser.add_argument("--every", type=int, default=10, help="steps between new samples")
    parser.add_argument("--fresh", type=int, default=60, help="new samples each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of all workers together")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together")
    parser.add_argument("--follow", action="store_true", help="the language model is still learning: keep up with it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    start(train, parse())
