"""Stage 1: the nano model's VAE, an AutoencoderKLQwenImage that knows only flat shapes.

What a latent says is laid down beforehand (`LatentTarget`): the mean colour of its 8 x 8 pixels, placed so that
ComfyUI's previews show it, and the thirteen strongest patterns around it. The encoder learns to say just that, and the
decoder to draw sharp images from it, however noisy. Such latents are smooth: a small transformer learns to draw with
them sooner than with those that an encoder finds by itself.

    python -m training.vae --out FOLDER [--work FOLDER] [--minutes M] [--threads N]

Run again with the same work folder it goes on.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import nn

from .data.scenes import IMAGE_SIZES, any_scene, oversample_stars, render
from .distributed import set_up_process
from .optim import EMA, make_kernel_optimizers
from .trainer import Losses, TimeSchedule, Trainer, weighted_sum
from .vae_model import (
    LATENTS,
    clear_unused,
    decode_frame,
    encode_frame,
    fold_statistics,
    load_unfolded,
    new_model,
    save_model,
)

NAME = "vae"
COLUMNS = ("loss", "psnr", "psnr_noise")
EMA_DECAY = 0.999
PATCH = 8
"""Pixels along a side of what one latent says."""
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
"""Pixels in a batch, whatever the size of its images."""

COMPILED = (64, 64)
"""The one size for which the loss is compiled (most of a minute, then 1.6 times as fast)."""

SIZE_WEIGHTS = {COMPILED: 24, (96, 96): 2}
"""How often batches of a size come; 1 for the sizes not named."""

NOISE = 0.3
"""Most noise on latents in training, in normalised units."""

STARS = 0.5
"""Chance that a scene without a star gives way to another."""


@dataclass(frozen=True)
class LossWeights:
    """What each loss counts in the total."""

    image_l1: float = 1.0
    image_l2: float = 1.0
    edge_loss: float = 0.5
    """Of the differences between neighbouring pixels."""
    latent_l2: float = 1.0
    """Of the encoder's latents, from `LatentTarget`."""
    latent_l1: float = 0.2


WEIGHTS = LossWeights()


# Images


def render_batch(rng: random.Random, size: tuple[int, int], count: int, stars: float = 0.0) -> torch.Tensor:
    """Returns random images of one (width, height), [count, 3, height, width] in [-1, 1]."""
    scenes = (oversample_stars(rng, lambda: any_scene(rng, size), stars) for _ in range(count))
    images = [np.asarray(render(scene)) for scene in scenes]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def training_batch(seed: int, step: int) -> torch.Tensor:
    """Returns the images of a training step."""
    rng = random.Random(f"vae {seed} {step}")
    size = rng.choices(IMAGE_SIZES, [SIZE_WEIGHTS.get(size, 1) for size in IMAGE_SIZES])[0]
    return render_batch(rng, size, PIXELS // (size[0] * size[1]), STARS)


def image_set(name: str, count: int) -> list[torch.Tensor]:
    """Returns a fixed set of images, about `count` in all, one batch for each size."""
    each = -(-count // len(IMAGE_SIZES))
    return [render_batch(random.Random(f"vae {name} {size}"), size, each) for size in IMAGE_SIZES]


# Training


class LatentTarget(nn.Module):
    """What latents are to say of their 8 x 8 pixels: a fixed linear map, found from images."""

    def __init__(self, images: list[torch.Tensor]):
        super().__init__()
        patches = torch.cat([F.unfold(x, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1) for x in images])
        means = patches.unflatten(1, (3, -1)).mean(-1)
        around = patches - means.repeat_interleave(PATCH**2, 1)
        variances, patterns = torch.linalg.eigh(torch.cov(around.T))
        count = LATENTS - 3
        spread, patterns = variances[-count:].flip(0).sqrt(), patterns[:, -count:].flip(1)

        shown, bias = torch.tensor(PREVIEW), torch.tensor(PREVIEW_BIAS)
        colours = shown @ torch.linalg.inv(shown.T @ shown)  # [16, 3]: previews of these are red, green and blue
        unseen = torch.linalg.qr(torch.cat([shown, random_directions(count)], 1))[0][:, 3:]  # previews do not see these
        means_of = torch.block_diag(*[torch.full((1, PATCH**2), PATCH**-2.0)] * 3)  # [3, 192]
        shapes = unseen @ torch.diag(STRONGEST * (spread / spread[0]).sqrt() / spread) @ patterns.T
        weight = CONTRAST * colours @ means_of + shapes
        self.register_buffer("weight", weight.view(LATENTS, 3, PATCH, PATCH))
        self.register_buffer("bias", -colours @ bias - shapes @ around.mean(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the latents [B, 16, h, w] of images [B, 3, 8 h, 8 w]."""
        return F.conv2d(images, self.weight, self.bias, stride=PATCH)


def random_directions(count: int) -> torch.Tensor:
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


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the differences between neighbours, across and down."""
    return images.diff(dim=3), images.diff(dim=2)


def compute_losses(
    model: AutoencoderKLQwenImage, latent_target: LatentTarget, images: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the losses of images [B, 3, H, W], by their names in `LossWeights`."""
    latents, wanted = encode_frame(model, images), latent_target(images).float()
    # The decoder must not bend what the encoder says.
    decoded = decode_frame(model, disturb(latents.detach()))
    error = decoded - images
    edge_loss = sum(edge.abs().mean() for edge in edges(error))
    latent_error = latents - wanted
    return {
        "image_l1": error.abs().mean(),
        "image_l2": error.square().mean(),
        "edge_loss": edge_loss,
        "latent_l2": latent_error.square().mean(),
        "latent_l1": latent_error.abs().mean(),
    }


def total_loss(model: AutoencoderKLQwenImage, latent_target: LatentTarget, images: torch.Tensor) -> torch.Tensor:
    """Returns the training loss on images [B, 3, H, W]."""
    return weighted_sum(compute_losses(model, latent_target, images), WEIGHTS)


def psnr(decoded: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Returns the mean over images of the PSNR in dB."""
    errors = [((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)) for a, b in zip(decoded, wanted)]
    return float((-10 * torch.cat(errors).clamp_min(1e-10).log10()).mean())


@torch.no_grad()
def measure(model: AutoencoderKLQwenImage, held_out: list[torch.Tensor], noise: float = 0.2) -> tuple[float, float]:
    """Returns the PSNR on held-out images from clean latents and from latents with noise."""
    latents = [encode_frame(model, images) for images in held_out]
    generator = torch.Generator().manual_seed(0)
    noisy = [clean + noise * torch.randn(clean.shape, generator=generator) for clean in latents]
    return tuple(psnr([decode_frame(model, x) for x in kind], held_out) for kind in (latents, noisy))


class VAEStage:
    """The VAE, and the loss of each step."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.model = load_unfolded(options.decoder_of) if options.decoder_of else new_model(options.seed)
        self.model.requires_grad_().to(options.device)
        if options.decoder_of:
            self.model.encoder.requires_grad_(False)
            self.model.quant_conv.requires_grad_(False)
        self.network = self.model
        self.held_out = image_set("held out", 128)
        self.latent_target = LatentTarget(image_set("meaning", 900)).to(options.device)
        self.compiled_loss = torch.compile(total_loss, dynamic=False) if options.compile else total_loss

    def losses(self, step: int) -> Losses:
        """Returns the loss of a step."""
        options = self.options
        torch.manual_seed(options.seed * 1_000_003 + step)
        images = training_batch(options.seed, step).to(options.device, memory_format=torch.channels_last)
        compute = self.compiled_loss if images.shape[2:] == COMPILED else total_loss
        with torch.autocast(images.device.type, torch.bfloat16, enabled=options.bf16):
            loss = compute(self.model, self.latent_target, images)
        return {"total": loss, "loss": loss}

    def report(self, ema: EMA) -> dict[str, float]:
        """Returns the PSNR of the averaged model on held-out images, from clean latents and from noisy ones."""
        clean, noisy = measure(self.averaged(ema), self.held_out)
        return {"psnr": clean, "psnr_noise": noisy}

    def averaged(self, ema: EMA) -> AutoencoderKLQwenImage:
        """Returns a copy of the model with the averaged weights."""
        model = new_model(self.options.seed)
        model.load_state_dict(ema.weights)
        return model.eval().requires_grad_(False)


def make_trainer(options: argparse.Namespace, stage: VAEStage) -> Trainer:
    """Returns the trainer, which has gone back to the last state in the work folder."""
    learning = ((name, weight) for name, weight in stage.model.named_parameters() if "time_conv" not in name)
    trainer = Trainer(
        stage,
        make_kernel_optimizers(learning, options.lr),
        TimeSchedule(options.lr, 60 * options.minutes, options.log_seconds),
        ema_decay=EMA_DECAY,
        work=options.work,
        name=NAME,
        columns=COLUMNS,
    )
    trainer.resume()
    return trainer


def main(options: argparse.Namespace) -> None:
    """Trains, or goes on training, and writes the VAE to `options.out`."""
    set_up_process(options.threads)
    stage = VAEStage(options)
    trainer = make_trainer(options, stage)
    trainer.fit()
    model = stage.averaged(trainer.ema)
    clear_unused(model)
    fold_statistics(model)
    save_model(model, options.out, getattr(torch, options.dtype))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--work", type=Path, default=Path("vae-work"), help="folder of the log and the running state")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time, over all runs")
    parser.add_argument("--log-seconds", type=float, default=60.0, help="seconds between rows of the log, and states")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--decoder-of", type=Path, help="a trained VAE: train on its decoder alone, for its latents")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
