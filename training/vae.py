"""Trains the nano model's VAE: an AutoencoderKLQwenImage that knows only flat shapes.

    python -m training.vae --out FOLDER [--work FOLDER] [--minutes M] [--threads N]

Run again with the same work folder it goes on. What a latent says is laid down beforehand (`Meaning`): the mean colour
of its 8 x 8 pixels, placed so that ComfyUI's previews show it, and the thirteen strongest patterns around it. The
encoder learns to tell just that, and the decoder to draw sharp pictures from it, however noisy. Such latents are
smooth: a small transformer learns to draw with them sooner than with those that an encoder finds by itself.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import nn

from . import world
from .codec import LATENTS, clear_unused, decode_flat, encode_flat, fold, new_model, opened, publish
from .log import Log, load_state, save_state
from .optimiser import Averaged, KernelMuon, restore, state_of

PATCH = 8
PREVIEW = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)
PREVIEW_BIAS = (-0.1835, -0.0868, -0.3360)
"""What ComfyUI's previewer multiplies normalised latents of this kind with, and adds, for red, green and blue."""

CONTRAST = 1.5
"""Of previews. More makes the mean colours count more among the latents."""

STRONGEST = 1.0
"""Spread of the strongest pattern; weaker ones are spread less, by the square root of their ratio."""

PIXELS = 64 * 64 * 24
"""Pixels in a batch, whatever the size of its pictures."""

COMPILED = (64, 64)
"""The one size for which the loss is compiled (most of a minute, then 1.6 times as fast)."""

SIZE_WEIGHTS = {COMPILED: 24, (96, 96): 2}
"""How often batches of a size come; 1 for the sizes not named."""

NOISE = 0.3
"""Most noise on latents in training, in normalised units."""

STARS = 0.5
"""Chance that a scene without a star gives way to another."""

COLUMNS = ("step", "seconds", "loss", "psnr", "psnr_noise")


# Pictures


def draw_batch(rng: random.Random, size: tuple[int, int], count: int, stars: float = 0.0) -> torch.Tensor:
    """Returns random pictures of one (width, height), [count, 3, height, width] in [-1, 1]."""
    scenes = (world.starry(rng, lambda: world.any_scene(rng, size), stars) for _ in range(count))
    pictures = [np.asarray(world.draw(scene)) for scene in scenes]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_of(seed: int, step: int) -> torch.Tensor:
    """Returns the pictures of a training step."""
    rng = random.Random(f"vae {seed} {step}")
    size = rng.choices(world.PICTURES, [SIZE_WEIGHTS.get(size, 1) for size in world.PICTURES])[0]
    return draw_batch(rng, size, PIXELS // (size[0] * size[1]), STARS)


def picture_set(name: str, count: int) -> list[torch.Tensor]:
    """Returns a fixed set of pictures, about `count` in all, one batch for each size."""
    each = -(-count // len(world.PICTURES))
    return [draw_batch(random.Random(f"vae {name} {size}"), size, each) for size in world.PICTURES]


# Training


class Meaning(nn.Module):
    """What latents are to say of their 8 x 8 pixels: a fixed linear map, found from pictures."""

    def __init__(self, pictures: list[torch.Tensor]):
        super().__init__()
        patches = torch.cat([F.unfold(some, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1) for some in pictures])
        means = patches.unflatten(1, (3, -1)).mean(-1)
        around = patches - means.repeat_interleave(PATCH**2, 1)
        variances, patterns = torch.linalg.eigh(torch.cov(around.T))
        count = LATENTS - 3
        spread, patterns = variances[-count:].flip(0).sqrt(), patterns[:, -count:].flip(1)

        shown, bias = torch.tensor(PREVIEW), torch.tensor(PREVIEW_BIAS)
        colours = shown @ torch.linalg.inv(shown.T @ shown)  # [16, 3]: previews of these are red, green and blue
        unseen = torch.linalg.qr(torch.cat([shown, turn(count)], 1))[0][:, 3:]  # previews do not see these
        means_of = torch.block_diag(*[torch.full((1, PATCH**2), PATCH**-2.0)] * 3)  # [3, 192]
        shapes = unseen @ torch.diag(STRONGEST * (spread / spread[0]).sqrt() / spread) @ patterns.T
        weight = CONTRAST * colours @ means_of + shapes
        self.register_buffer("weight", weight.view(LATENTS, 3, PATCH, PATCH))
        self.register_buffer("bias", -colours @ bias - shapes @ around.mean(0))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns the latents [B, 16, h, w] of pictures [B, 3, 8 h, 8 w]."""
        return F.conv2d(pictures, self.weight, self.bias, stride=PATCH)


def turn(count: int) -> torch.Tensor:
    """Returns fixed random directions [16, count], so that no latent channel is strong and none is weak."""
    return torch.randn(LATENTS, count, generator=torch.Generator().manual_seed(0))


def disturb(latents: torch.Tensor) -> torch.Tensor:
    """Returns normalised latents as a transformer under guidance might get them: noisy, shifted, too strong or weak."""
    batch, channels = latents.shape[:2]
    device = latents.device
    sigma = torch.rand(batch, 1, 1, 1, device=device) * NOISE
    gain = 1 + (torch.rand(batch, 1, 1, 1, device=device) - 0.3) * sigma
    shift = torch.randn(batch, channels, 1, 1, device=device) * 0.3
    return latents * gain + sigma * (torch.randn_like(latents) + shift)


def edges(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the differences between neighbours, across and down."""
    return pictures.diff(dim=3), pictures.diff(dim=2)


def loss_of(model: AutoencoderKLQwenImage, meant: Meaning, pictures: torch.Tensor) -> torch.Tensor:
    """Returns the training loss on pictures [B, 3, H, W]."""
    latents, wanted = encode_flat(model, pictures), meant(pictures).float()
    # The decoder must not bend what the encoder says.
    made = decode_flat(model, disturb(latents.detach()))
    off = made - pictures
    sharp = sum(edge.abs().mean() for edge in edges(off))
    told = latents - wanted
    return off.abs().mean() + off.square().mean() + 0.5 * sharp + told.square().mean() + 0.2 * told.abs().mean()


def psnr(made: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Returns the mean over pictures of the PSNR in dB."""
    errors = [((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)) for a, b in zip(made, wanted)]
    return float((-10 * torch.cat(errors).clamp_min(1e-10).log10()).mean())


@torch.no_grad()
def measure(model: AutoencoderKLQwenImage, held: list[torch.Tensor], noise: float = 0.2) -> tuple[float, float]:
    """Returns the PSNR on held-out pictures from clean latents and from latents with noise."""
    latents = [encode_flat(model, some) for some in held]
    generator = torch.Generator().manual_seed(0)
    noisy = [some + noise * torch.randn(some.shape, generator=generator) for some in latents]
    return tuple(psnr([decode_flat(model, some) for some in kind], held) for kind in (latents, noisy))


class Run:
    """A training run that can be stopped at any time and goes on from its last state."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.step, self.seconds = options, 0, 0.0
        self.model = (opened(options.decoder_of) if options.decoder_of else new_model(options.seed)).requires_grad_()
        self.model.to(options.device)
        if options.decoder_of:
            self.model.encoder.requires_grad_(False)
            self.model.quant_conv.requires_grad_(False)
        self.average = Averaged(self.model, 0.999)
        kernels, rest = [], []
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and "time_conv" not in name:
                (kernels if weight.ndim >= 4 and name.endswith("weight") else rest).append(weight)
        self.optimisers = (
            KernelMuon(kernels, options.rate),
            torch.optim.AdamW(rest, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.log = Log(options.work / "vae.csv", COLUMNS)
        self.held = picture_set("held out", 128)
        self.meaning = Meaning(picture_set("meaning", 900)).to(options.device)
        self.compiled_loss = torch.compile(loss_of, dynamic=False) if options.compile else loss_of
        self._resume()

    def _resume(self) -> None:
        found = load_state(self.options.work / "vae.safetensors")
        if found is None:
            return
        tensors, facts = found
        self.step, self.seconds = facts["step"], facts["seconds"]
        restore(self.model, self.average, self.optimisers, tensors)
        self.log.cut(self.step)

    def save(self) -> None:
        """Writes the state from which another run goes on."""
        facts = {"step": self.step, "seconds": self.seconds, "seed": self.options.seed}
        tensors = state_of(self.model, self.average, self.optimisers)
        save_state(self.options.work / "vae.safetensors", tensors, facts)

    def averaged(self) -> AutoencoderKLQwenImage:
        """Returns a copy of the model with the averaged weights."""
        model = new_model(self.options.seed)
        model.load_state_dict(self.average.weights)
        return model.eval().requires_grad_(False)

    def train(self) -> AutoencoderKLQwenImage:
        """Trains until the time is over and returns the averaged model."""
        limit, begun, noted, losses = 60 * self.options.minutes, time.time() - self.seconds, self.seconds, []
        while self.seconds < limit:
            losses.append(self.advance(self.seconds / limit))
            self.seconds = time.time() - begun
            if self.seconds - noted > self.options.every:
                noted = self.seconds
                self.note(sum(losses) / len(losses))
                losses = []
        if losses:
            self.note(sum(losses) / len(losses))
        return self.averaged()

    def advance(self, progress: float) -> float:
        """Makes one step, at the learning rate of this `progress` (0 to 1) through the run, and returns the loss."""
        rate = self.options.rate * min(1.0, (self.step + 1) / 200) * 0.5 * (1 + np.cos(np.pi * min(1.0, progress)))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = float(rate)
        torch.manual_seed(self.options.seed * 1_000_003 + self.step)
        pictures = batch_of(self.options.seed, self.step).to(self.options.device, memory_format=torch.channels_last)
        compute = self.compiled_loss if pictures.shape[2:] == COMPILED else loss_of
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self.options.bf16):
            loss = compute(self.model, self.meaning, pictures)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        return float(loss.detach())

    def note(self, loss: float) -> None:
        """Writes a row to the log, and the state."""
        clean, noisy = measure(self.averaged(), self.held)
        self.log.append(step=self.step, seconds=self.seconds, loss=loss, psnr=clean, psnr_noise=noisy)
        print(
            f"{self.step} steps, {self.seconds:.0f} s, loss {loss:.4f}, {clean:.2f} dB, noisy {noisy:.2f}", flush=True
        )
        self.save()


def main(options: argparse.Namespace) -> None:
    """Trains, or goes on training, and writes the VAE to `options.out`."""
    torch.set_num_threads(options.threads)
    model = Run(options).train()
    clear_unused(model)
    fold(model)
    publish(model, options.out, getattr(torch, options.dtype))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description="Trains the nano model's VAE.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--work", type=Path, default=Path("vae-work"), help="folder of the log and the running state")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time, over all runs")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between measurements")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate at its highest")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--decoder-of", type=Path, help="a trained VAE: train on its decoder alone, for its latents")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
