"""Times the VAE on one picture: ours, diffusers', and with --comfyui ComfyUI's own network and ours in it.

Random weights at the released width and the same inputs for all, in turns. `peak MiB` is what a call needs above what
was there before it: of a GPU's memory, or of this process's on Linux. Errors are relative to diffusers' in float32.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from internvl_u.vae import StandaloneVAE, to_wan, vae_shapes

from .host import pack_module, use_comfyui
from .random_weights import VAE_WIDTH
from .report import add_device, make_parser, resolve_dtype, show
from .timing import median, take_turns

FP32_ERROR = 1e-5
"""The largest relative error that fp32 explains."""
MIB = 2**20
Run = Callable[[torch.Tensor], torch.Tensor]
Contestant = dict[str, Run]


def make_weights(width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns weights by diffusers' names under which values keep their size through the layers."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in vae_shapes(width).items():
        spread = (shape[1] * shape[-1] * shape[-2]) ** -0.5 if name.endswith("weight") else 0.1
        weights[name] = torch.randn(shape, generator=generator) * spread + name.endswith("gamma")
    return weights


def make_diffusers(weights: dict[str, torch.Tensor], width: int, dtype: torch.dtype, device: str) -> Contestant:
    """Returns diffusers' decoder and encoder, latents normalised."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        model = AutoencoderKLQwenImage.from_config({"base_dim": width})
    model.load_state_dict(weights, strict=True, assign=True)
    nn.Module.to(model, device=device, dtype=dtype).eval()
    mean, std = statistics(dtype, device)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return model.decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0]

    def encode(images: torch.Tensor) -> torch.Tensor:
        return (model.encode(images[:, :, None], return_dict=False)[0].mode()[:, :, 0] - mean) / std

    return {"decode": decode, "encode": encode}


def make_ours(weights: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> Contestant:
    """Returns the library's decoder and encoder."""
    model = StandaloneVAE(weights).to(device=device, dtype=dtype)
    return {"decode": model.decode, "encode": model.encode}


def make_comfyui(weights: dict[str, torch.Tensor], dtype: torch.dtype, device: str, ours: bool) -> Contestant:
    """Returns the decoder and encoder of ComfyUI's network, as it is or shortened by the pack."""
    import comfy.model_management
    import comfy.sd

    vae = comfy.sd.VAE(sd=to_wan(weights), dtype=dtype)
    comfy.model_management.load_models_gpu([vae.patcher])
    if ours and not pack_module("native.one_frame").shorten(vae):
        raise RuntimeError("this ComfyUI's VAE network is not one that the pack knows: it stays as it is")
    mean, std = statistics(dtype, device)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.first_stage_model.decode((latents * std + mean)[:, :, None])[:, :, 0].clamp(-1, 1)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return (vae.first_stage_model.encode(images[:, :, None])[:, :, 0] - mean) / std

    return {"decode": decode, "encode": encode}


def statistics(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation of the released latents, [1, 16, 1, 1]."""
    mean, std = StandaloneVAE({})._statistics(torch.zeros(1, dtype=dtype, device=device))
    return mean, std


@torch.inference_mode()
def peak(run: Callable[[], object], device: torch.device) -> float | None:
    """Returns the MiB that a call needs above what is there before it; None where that cannot be read."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    reset = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not reset.exists():
        return None
    _give_back()
    reset.write_text("5")  # the peak is now what is resident now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _give_back() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: what earlier calls left with it would be counted
    if trim is not None:
        trim(0)


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


@torch.inference_mode()
def measure(arguments: argparse.Namespace, way: str, pixels: int, contestants: dict[str, Contestant], exact) -> list:
    """Returns a row for each contestant."""
    device, dtype = torch.device(arguments.device), resolve_dtype(arguments)
    shape = (16, pixels // 8, pixels // 8) if way == "decode" else (3, pixels, pixels)
    given = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    expected = exact[way](given.to(device)).float()
    given = given.to(device, dtype)
    runs = {name: lambda run=one[way]: run(given) for name, one in contestants.items()}
    errors = {name: relative_error(run(), expected) for name, run in runs.items()}
    times = take_turns(runs, arguments.repeats, device)
    reference = median(times["diffusers"])
    return [
        {
            "way": way,
            "pixels": pixels,
            "contestant": name,
            "seconds": median(times[name]),
            "fastest": min(times[name]),
            "slowest": max(times[name]),
            "times diffusers": reference / median(times[name]),
            "peak MiB": peak(run, device),
            "error": errors[name],
        }
        for name, run in runs.items()
    ]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the relative error; infinite for NaN."""
    error = ((found.float() - expected).norm() / expected.norm()).item()
    return math.inf if math.isnan(error) else error


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--comfyui", type=Path, metavar="PATH", help="ComfyUI's folder: add its network, and ours in it"
    )
    parser.add_argument("--ways", nargs="+", choices=("decode", "encode"), default=["decode", "encode"], help="what")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512], help="pixels of a side, multiples of 8")
    parser.add_argument("--width", type=int, default=VAE_WIDTH, help="channels at full resolution")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each contestant")
    add_device(parser)
    arguments = parser.parse_args()
    dtype, device = resolve_dtype(arguments), arguments.device
    weights = make_weights(arguments.width)
    exact = make_diffusers(weights, arguments.width, torch.float32, device)
    same = dtype == torch.float32
    contestants = {
        "diffusers": exact if same else make_diffusers(weights, arguments.width, dtype, device),
        "ours": make_ours(weights, dtype, device),
    }
    if arguments.comfyui:
        version = use_comfyui(arguments.comfyui, device)
        for name, ours in ((f"ComfyUI {version}", False), (f"ours in ComfyUI {version}", True)):
            contestants[name] = make_comfyui(weights, dtype, device, ours)
    rows = [
        row
        for way in arguments.ways
        for size in arguments.sizes
        for row in measure(arguments, way, size, contestants, exact)
    ]
    show(rows, arguments.json, dtype=str(dtype), device=device, width=arguments.width, threads=torch.get_num_threads())
    worst = max(row["error"] for row in rows)
    if same and worst > FP32_ERROR:
        sys.exit(f"relative error {worst:.1e} to diffusers found, at most {FP32_ERROR:.0e} expected in float32")


if __name__ == "__main__":
    main()
