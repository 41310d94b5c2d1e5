"""Trains the nano model's VAE: an AutoencoderKLQwenImage that knows only flat shapes.

    python training/vae.py --out FOLDER [--work FOLDER] [--minutes M] [--threads N]

Run again with the same work folder it goes on. What a latent says is laid down beforehand (`Meaning`): the mean colour
of its 8 x 8 pixels, placed so that ComfyUI's previews show it, and the thirteen strongest patterns around it. The
encoder learns to tell just that, and the decoder to draw sharp pictures from it, however noisy. Such latents are
smooth: a small transformer learns to draw with them sooner than with those that an encoder finds by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageResidualBlock,
    QwenImageRMS_norm,
)
from pack.training import world
from pack.training.log import Log, load_state, optimiser_tensors, restore_optimiser, save_state
from safetensors.torch import save_file
from torch import nn

LATENTS, PATCH = 16, 8
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
LATENTS_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
LATENTS_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916)
"""Of the released VAE: the released pipeline, and ComfyUI, normalise latents with these numbers."""

CONFIG = {
    "attn_scales": [],
    "base_dim": 8,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(LATENTS_MEAN),
    "latents_std": list(LATENTS_STD),
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": LATENTS,
}
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

POSTERIOR_STD = 0.05
"""What the encoder calls its own uncertainty, in normalised units: a constant, for those who sample from it."""

PIXELS = 64 * 64 * 24
"""Pixels in a batch, whatever the size of its pictures."""

COMPILED = (64, 64)
"""The one size for which the loss is compiled (most of a minute, then 1.6 times as fast)."""

SIZE_WEIGHTS = {COMPILED: 24, (96, 96): 2}
"""How often batches of a size come; 1 for the sizes not named."""

NOISE = 0.3
"""Most noise on latents in training, in normalised units."""

COLUMNS = ("step", "seconds", "loss", "psnr", "psnr_noise")


# --- the network on single pictures ---


def run_flat(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns what a part of diffusers' VAE makes of one frame, [B, C, H, W] in and out.

    For one frame the causal convolutions see zeros for the past, so only the last slice of their kernels counts, and
    the convolutions over time are skipped.
    """
    if isinstance(module, QwenImageCausalConv3d):
        return F.conv2d(x, module.weight[:, :, -1], module.bias, padding=module.kernel_size[-1] // 2)
    if isinstance(module, QwenImageRMS_norm):
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-12)
        return (wide * inverse * module.gamma.view(1, -1, 1, 1)).to(x.dtype)
    if isinstance(module, QwenImageResidualBlock):
        h = run_flat(module.conv1, F.silu(run_flat(module.norm1, x)))
        h = run_flat(module.conv2, F.silu(run_flat(module.norm2, h)))
        return h + (run_flat(module.conv_shortcut, x) if module.in_dim != module.out_dim else x)
    if isinstance(module, QwenImageResample):
        down, conv = module.resample
        up = module.mode.startswith("upsample")
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest-exact") if up else down(x))
    if isinstance(module, QwenImageAttentionBlock):
        return attend_flat(module, x)
    raise TypeError(type(module).__name__)


def attend_flat(module: QwenImageAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """Returns x with self-attention over all its places added, [B, C, H, W]."""
    batch, channels, height, width = x.shape
    qkv = module.to_qkv(run_flat(module.norm, x)).flatten(2).transpose(1, 2)[:, None]
    mixed = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
    return x + module.proj(mixed[:, 0].transpose(1, 2).reshape(batch, channels, height, width))


def run_middle(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns what the middle of the encoder or decoder makes of x, [B, C, H, W]."""
    for part in (block.resnets[0], block.attentions[0], block.resnets[1]):
        x = run_flat(part, x)
    return x


def encode_flat(model: AutoencoderKLQwenImage, pictures: torch.Tensor) -> torch.Tensor:
    """Returns the mean latents [B, 16, h, w], not normalised, of pictures [B, 3, 8 h, 8 w] in [-1, 1]."""
    encoder = model.encoder
    x = run_flat(encoder.conv_in, pictures)
    for block in encoder.down_blocks:
        x = run_flat(block, x)
    x = run_middle(encoder.mid_block, x)
    x = run_flat(encoder.conv_out, F.silu(run_flat(encoder.norm_out, x)))
    return run_flat(model.quant_conv, x)[:, :LATENTS].float()


def decode_flat(model: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Returns pictures [B, 3, 8 h, 8 w], not clamped, from what `model.post_quant_conv` takes, [B, 16, h, w]."""
    decoder = model.decoder
    x = run_flat(decoder.conv_in, run_flat(model.post_quant_conv, latents))
    x = run_middle(decoder.mid_block, x)
    for block in decoder.up_blocks:
        for part in (*block.resnets, *(block.upsamplers or ())):
            x = run_flat(part, x)
    return run_flat(decoder.conv_out, F.silu(run_flat(decoder.norm_out, x))).float()


def new_model(seed: int) -> AutoencoderKLQwenImage:
    """Returns a VAE with random weights, zero where a single frame never looks."""
    torch.manual_seed(seed)
    model = AutoencoderKLQwenImage.from_config(CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 4 and name.endswith("weight"):
            inputs = parameter.shape[1] * parameter.shape[-1] * parameter.shape[-2]
            # Residual branches begin small, so that the twenty of them do not add up to a flood.
            gain = 0.3 if name.endswith("conv2.weight") or "proj" in name else 1.0
            nn.init.normal_(parameter, std=gain * inputs**-0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    clear_unused(model)
    return model


@torch.no_grad()
def clear_unused(model: AutoencoderKLQwenImage) -> None:
    """Sets to zero the weights that only films need."""
    for name, module in model.named_modules():
        if isinstance(module, QwenImageCausalConv3d):
            if "time_conv" in name:
                module.weight.zero_()
                module.bias.zero_()
            else:
                module.weight[:, :, :-1] = 0


# --- data ---


def draw_batch(rng: random.Random, size: tuple[int, int], count: int) -> torch.Tensor:
    """Returns random pictures of one (width, height), [count, 3, height, width] in [-1, 1]."""
    pictures = [np.asarray(world.draw(world.any_scene(rng, size))) for _ in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_of(seed: int, step: int) -> torch.Tensor:
    """Returns the pictures of a training step."""
    rng = random.Random(f"vae {seed} {step}")
    size = rng.choices(world.PICTURES, [SIZE_WEIGHTS.get(size, 1) for size in world.PICTURES])[0]
    return draw_batch(rng, size, PIXELS // (size[0] * size[1]))


def picture_set(name: str, count: int) -> list[torch.Tensor]:
    """Returns a fixed set of pictures, about `count` in all, one batch for each size."""
    each = -(-count // len(world.PICTURES))
    return [draw_batch(random.Random(f"vae {name} {size}"), size, each) for size in world.PICTURES]


# --- training ---


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


class Average:
    """A running average of a model's weights; it follows faster in the beginning."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.tensors = decay, {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after a step."""
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach() for p in model.parameters()], 1 - keep)


class KernelMuon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for the last slices of convolution kernels [out, in, time, height, width] or without time.

    torch's own takes matrices only. Kernels of one shape are made orthogonal together, which is faster.
    """

    def __init__(self, kernels: list[torch.Tensor], lr: float, momentum: float = 0.95, decay: float = 0.05):
        super().__init__(kernels, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """Moves all kernels by one step."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for kernel in group["params"]:
                shapes.setdefault(tuple(kernel.shape), []).append(kernel)
            for kernels in shapes.values():
                self._step_together(kernels, group)

    def _step_together(self, kernels: list[torch.Tensor], group: dict) -> None:
        slices = [last_slice(kernel) for kernel in kernels]
        gradients = torch.stack([last_slice(kernel.grad) for kernel in kernels]).flatten(2)
        for kernel, gradient in zip(kernels, gradients):
            memory = self.state[kernel].setdefault("momentum", torch.zeros_like(gradient))
            memory.lerp_(gradient, 1 - group["momentum"])
            gradient.lerp_(memory, group["momentum"])
        updates = orthogonal(gradients)
        rate = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5  # as large as AdamW's steps
        for kernel, update in zip(slices, updates):
            kernel.mul_(1 - group["lr"] * group["decay"]).sub_(update.view_as(kernel), alpha=rate)


def last_slice(kernel: torch.Tensor) -> torch.Tensor:
    """Returns the part of a kernel that a single frame uses, [out, in, height, width]."""
    return kernel[:, :, -1] if kernel.ndim == 5 else kernel


def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Returns the matrices [N, rows, columns] with singular values near 1, by Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Run:
    """A training run that can be stopped at any time and goes on from its last state."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.step, self.seconds = options, 0, 0.0
        self.model = new_model(options.seed).requires_grad_().to(options.device)
        self.average = Average(self.model)
        kernels, rest = [], []
        for name, weight in self.model.named_parameters():
            if "time_conv" not in name:
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
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                self.average.tensors[name].copy_(tensors[f"average.{name}"])
        for i, optimiser in enumerate(self.optimisers):
            its = {name[2:]: value for name, value in tensors.items() if name.startswith(f"{i}.")}
            restore_optimiser(optimiser, its)
        self.log.cut(self.step)

    def save(self) -> None:
        """Writes the state from which another run goes on."""
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        tensors |= {f"average.{name}": p for name, p in self.average.tensors.items()}
        for i, optimiser in enumerate(self.optimisers):
            tensors |= {f"{i}.{name}": value for name, value in optimiser_tensors(optimiser).items()}
        facts = {"step": self.step, "seconds": self.seconds, "seed": self.options.seed}
        save_state(self.options.work / "vae.safetensors", tensors, facts)

    def averaged(self) -> AutoencoderKLQwenImage:
        """Returns a copy of the model with the averaged weights."""
        model = new_model(self.options.seed)
        model.load_state_dict(self.average.tensors)
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
        self.average.follow(self.model, self.step)
        return float(loss.detach())

    def note(self, loss: float) -> None:
        """Writes a row to the log, and the state."""
        clean, noisy = measure(self.averaged(), self.held)
        self.log.append(step=self.step, seconds=self.seconds, loss=loss, psnr=clean, psnr_noise=noisy)
        print(
            f"{self.step} steps, {self.seconds:.0f} s, loss {loss:.4f}, {clean:.2f} dB, noisy {noisy:.2f}", flush=True
        )
        self.save()


# --- what is published ---


@torch.no_grad()
def fold(model: AutoencoderKLQwenImage) -> None:
    """Makes the encoder give latents that the released mean and spread normalise, and the decoder take them.

    Before, the model works with normalised latents; what it makes of a picture does not change.
    """
    into, back = model.quant_conv, model.post_quant_conv
    mean, std = torch.tensor(LATENTS_MEAN), torch.tensor(LATENTS_STD)
    into.weight[:LATENTS] *= std.view(-1, 1, 1, 1, 1)
    into.bias[:LATENTS] = into.bias[:LATENTS] * std + mean
    into.weight[LATENTS:] = 0
    into.bias[LATENTS:] = 2 * (POSTERIOR_STD * std).log()
    back.weight /= std.view(1, -1, 1, 1, 1)
    back.bias -= back.weight[:, :, -1, 0, 0] @ mean


def publish(model: AutoencoderKLQwenImage, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json and the weights of a folded model in the released layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKLQwenImage", "_diffusers_version": "0.35.1", **CONFIG}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


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
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
