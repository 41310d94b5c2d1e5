"""Times whole runs of steps whose modulation is computed at each call, and once before the first step, in turns.

Both take the same weights, random ones or a checkpoint's, and the same inputs. Besides the seconds it counts the bytes
of weights that a step reads, and states how far the velocities of the last step are apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from internvl_u.defaults import GUIDANCE
from internvl_u.load import load_mmdit
from internvl_u.mmdit import MMDiT
from internvl_u.sampling import Denoiser, DrawingContexts, flow_sigmas, sample

from .report import add_device, make_parser, resolve_dtype, show
from .step import CPU_LAYERS, make_model
from .timing import median, take_turns
from .workload import LAYOUTS, PIXELS_A_LATENT, RELEASED

MIB = 2**20


def make_run(model: MMDiT, mode: str, pixels: int, steps: int, dtype: torch.dtype, once: bool) -> Callable:
    """Returns a function that samples a latent [1, 16, n, n], and counts the bytes of weights of its last step."""
    generator, config = torch.Generator().manual_seed(0), model.config
    device = model.img_in.weight.device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    side = pixels // PIXELS_A_LATENT
    latent = random(1, config.channels, side, side)
    reference = (random(1, config.channels, side, side).to(dtype),) if mode == "edit" else ()
    branches = [
        (random(sum(span.count for span in layout), config.context_width).to(dtype), layout) for layout in LAYOUTS[mode]
    ]
    contexts = DrawingContexts(branches[0], branches[1] if reference else None, branches[-1], reference)
    sigmas = flow_sigmas(steps).to(device)

    def run() -> torch.Tensor:
        denoise = Denoiser(model, contexts, (side, side), GUIDANCE, dtype, sigmas=sigmas if once else None)
        return sample(denoise, latent, sigmas)

    return run


@torch.inference_mode()
def bytes_read(model: MMDiT, run: Callable, steps: int) -> int:
    """Returns the bytes of weights that the last step of a run reads, all its calls together."""
    read, starts = [0], []
    layers = [module for module in model.modules() if not list(module.children())]
    handles = [model.img_in.register_forward_pre_hook(lambda *_: starts.append(read[0]))]
    for layer in layers:
        size = sum(weight.nbytes for weight in layer.parameters(recurse=False))
        handles.append(layer.register_forward_pre_hook(lambda *_, size=size: read.__setitem__(0, read[0] + size)))
    run()
    for handle in handles:
        handle.remove()
    calls = len(starts) // steps
    return read[0] - starts[-calls]


def measure(arguments: argparse.Namespace, model: MMDiT, mode: str, pixels: int) -> list[dict]:
    """Returns a row for each of the two."""
    dtype, steps = resolve_dtype(arguments), arguments.steps
    runs = {
        name: make_run(model, mode, pixels, steps, dtype, once) for name, once in (("each call", False), ("once", True))
    }
    times = take_turns(runs, arguments.repeats, torch.device(arguments.device))
    pairs = sorted(one / each for one, each in zip(times["once"], times["each call"], strict=True))
    with torch.inference_mode():
        expected = runs["each call"]()
        error = ((runs["once"]() - expected).norm() / expected.norm()).item()
    return [
        {
            "mode": mode,
            "pixels": pixels,
            "modulation": name,
            "seconds": median(times[name]),
            "fastest": min(times[name]),
            "slowest": max(times[name]),
            "times each call": 1.0 if name == "each call" else median(pairs),
            "of the pairs": ""
            if name == "each call"
            else f"{pairs[len(pairs) // 4]:.3f} to {pairs[-1 - len(pairs) // 4]:.3f}",
            "MiB read a step": bytes_read(model, run, steps) / MIB,
            "difference": 0.0 if name == "each call" else error,
        }
        for name, run in runs.items()
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint; None: random weights, released width")
    parser.add_argument("--modes", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS), help="edit: one reference")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512], help="pixels of a side")
    parser.add_argument("--layers", type=int, help=f"blocks; None: {CPU_LAYERS} on a CPU, else all {RELEASED.layers}")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    add_device(parser)
    arguments = parser.parse_args()
    layers = arguments.layers or (CPU_LAYERS if arguments.device == "cpu" else RELEASED.layers)
    dtype = resolve_dtype(arguments)
    if arguments.model is None:
        model = make_model(layers, dtype=dtype, device=arguments.device)
    else:
        model = load_mmdit(arguments.model, dtype=dtype, device=arguments.device)
    rows = [
        row for mode in arguments.modes for size in arguments.sizes for row in measure(arguments, model, mode, size)
    ]
    show(rows, arguments.json, dtype=str(dtype), device=arguments.device, steps=arguments.steps)


if __name__ == "__main__":
    main()
