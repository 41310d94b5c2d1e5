"""Measures what speed costs in the picture: bf16, fp8, torch.compile and EasyCache against fp32, in ComfyUI.

Same weights, prompt and seed. PSNR in dB and SSIM are of the decoded pictures; with random weights these are noise,
and the numbers then tell of the arithmetic, not of what a person would see.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from .host import pack_module, use_comfyui
from .random_weights import TEMPLATE
from .report import make_parser, show
from .timing import median, seconds

PROMPT = "A red fox in the snow, at dawn"
WINDOW, SIGMA = 11, 1.5
EASY_CACHE = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}


@dataclass(frozen=True)
class Choice:
    """A way to draw: how the weights are kept, and what is done to the MODEL."""

    name: str
    precision: str
    change: Callable = lambda model: model


def compiled(model):
    """Returns the MODEL after ComfyUI's TorchCompileModel."""
    node = importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel
    return node.execute(model, "inductor").args[0]


def cached(model):
    """Returns the MODEL after ComfyUI's EasyCache, with its default settings."""
    return importlib.import_module("comfy_extras.nodes_easycache").EasyCacheNode.execute(model, **EASY_CACHE).args[0]


CHOICES = (
    Choice("fp32", "fp32"),
    Choice("bf16", "bf16"),
    Choice("fp8_e4m3fn", "fp8_e4m3fn"),
    Choice("fp32 + EasyCache", "fp32", cached),
    Choice("bf16 + EasyCache", "bf16", cached),
    Choice("fp32 + compile", "fp32", compiled),
    Choice("bf16 + compile", "bf16", compiled),
)
"""The first is the reference."""


@torch.inference_mode()
def draw(choice: Choice, arguments: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """Returns the picture [1, 3, H, W] in [0, 1] and the median seconds of its sampling, after one to warm up."""
    torch.compiler.reset()
    importlib.import_module("comfy.utils").PROGRESS_BAR_ENABLED = False
    native = pack_module("native.load")
    sampler = pack_module("native.sampler")
    model, language, vae = native.load(arguments.model, choice.precision)
    model = choice.change(model)
    positive, negative, latent = language.encode(PROMPT)
    if arguments.pixels:
        latent = sampler.empty_latent(arguments.pixels, arguments.pixels)
    times = []
    for _ in range(1 + arguments.repeats):
        drawn = []

        def sample(drawn=drawn):
            drawn.append(
                sampler.sample_latent(
                    model, positive, negative, latent, seed=0, steps=arguments.steps, all_cfg=4.5, part_cfg=2.0
                )
            )

        times.append(seconds(sample, model.load_device))
    picture = vae.decode(drawn[0]["samples"]).flatten(0, -4)  # [1, (1,) H, W, 3]
    return picture.movedim(-1, 1).float().cpu(), median(times[1:])


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the peak signal-to-noise ratio, in dB, of pictures in [0, 1]; infinity for equal ones."""
    return (-10 * (picture - reference).square().mean().log10()).item()


def ssim(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the structural similarity of pictures [B, 3, H, W] in [0, 1], 1 for equal ones.

    Wang et al. 2004: a Gaussian window of 11 x 11 with sigma 1.5, mean over all places and channels.
    """
    offsets = torch.arange(WINDOW) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur(x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x.flatten(0, 1)[:, None], window)

    a, b = blur(picture), blur(reference)
    variance_a, variance_b = blur(picture**2) - a**2, blur(reference**2) - b**2
    covariance = blur(picture * reference) - a * b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (variance_a + variance_b + c2))
    return similarity.mean().item()


def main() -> None:
    names = [choice.name for choice in CHOICES]
    parser = make_parser(__doc__)
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", required=True, help="the ComfyUI to draw in")
    parser.add_argument("--model", type=Path, metavar="FOLDER", default=TEMPLATE, help="a checkpoint folder")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="besides fp32; compiling takes minutes")
    parser.add_argument("--pixels", type=int, help="a side of the square picture; None: the checkpoint's own size")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=3, help="timed samplings of each choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    arguments = parser.parse_args()
    version = use_comfyui(arguments.comfyui, arguments.device)

    rows, reference, first = [], None, None
    for choice in CHOICES:
        if reference is not None and choice.name not in arguments.only:
            continue
        picture, taken = draw(choice, arguments)
        if reference is None:
            reference, first = picture, taken
        quality = {"PSNR dB": psnr(picture, reference), "SSIM": ssim(picture, reference)}
        rows.append({"choice": choice.name, "seconds": taken, "times fp32": first / taken, **quality})
    pixels = tuple(reference.shape[-2:])
    show(rows, arguments.json, comfyui=version, model=arguments.model.name, steps=arguments.steps, pixels=pixels)


if __name__ == "__main__":
    main()
