"""Times one denoising step, all its branches: ours, ours compiled, and the official code's, in turns.

Random weights and inputs, the same for all. The limit is how long the operations that we need take at the fastest
multiplication of matrices seen here. The official transformer gets what its own pipeline gives it: three
branches in one call, the contexts padded by its own function.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from internvl_u.config import MMDiTConfig
from internvl_u.mmdit import MMDiT

from . import limits
from .official import use_official
from .operations import count
from .random_weights import fill_randomly
from .report import add_device, make_parser, resolve_dtype, show
from .timing import median, take_turns
from .workload import LAYOUTS, RELEASED, Inputs, make_inputs, make_step

FP32_ERROR = 1e-4
"""The largest relative error that fp32 explains."""
CPU_LAYERS = 4
Step = Callable[[], list[torch.Tensor]]


def make_model(layers: int, *, dtype: torch.dtype, device: str) -> MMDiT:
    """Returns our transformer at the released width with random weights."""
    config = type(RELEASED)(**vars(RELEASED) | {"layers": layers})
    return fill_randomly(MMDiT(config, dtype=dtype, device=device))


def official_settings(size: MMDiTConfig) -> dict:
    """Returns what the official configuration says of a transformer of this size."""
    return {
        "decoder_projector_type": "identity",
        "input_hidden_size": size.context_width,
        "output_hidden_size": size.context_width,
        "pad_to_fix_length": False,
        "max_sequence_length": 768,
        "video_position_scale_factor": 1.0,
        "vlm_cond_position_scale_factor": size.image_scale,
        "decoder_config": {
            "patch_size": size.patch_size,
            "in_channels": size.channels * size.patch_size**2,
            "out_channels": size.channels,
            "num_layers": size.layers,
            "attention_head_dim": size.head_dim,
            "num_attention_heads": size.heads,
            "joint_attention_dim": size.context_width,
            "axes_dims_rope": list(size.rope_axes),
        },
    }


def make_official(folder: Path, model: MMDiT) -> torch.nn.Module:
    """Returns the official generation decoder from a checkout of its repository, sharing our model's weights.

    Raises:
        FileNotFoundError: the folder is no checkout of github.com/OpenGVLab/InternVL-U.
    """
    use_official(folder)
    from internvlu.diffusion import InternVLUGenerationDecoder, InternVLUGenerationDecoderConfig

    size = model.config
    config = InternVLUGenerationDecoderConfig(**official_settings(size))
    with torch.device("meta"):
        decoder = InternVLUGenerationDecoder(config)
    decoder.decoder.load_state_dict(model.state_dict(), strict=True, assign=True)
    padding = torch.zeros(size.context_width, dtype=model.dtype, device=model.img_in.weight.device)
    decoder.encoder_padding_token = torch.nn.Parameter(padding)
    # Its rotary frequencies are no weights: made on the meta device, they are made again where the weights are.
    decoder.decoder.pos_embed = type(decoder.decoder.pos_embed)(
        theta=int(size.rope_theta), axes_dim=list(size.rope_axes), scale_rope=True
    ).to(padding.device)
    return decoder.eval().requires_grad_(False)


def make_official_step(decoder: torch.nn.Module, inputs: Inputs) -> Step:
    """Returns a function that runs the official step on the same inputs, as its pipeline does."""
    device, (rows, columns) = inputs.latents.device, inputs.size
    chosen = (0, 1, 1) if len(inputs.contexts) == 2 else (0, 1, 2)  # it runs the branch without words twice
    contexts = [inputs.contexts[i] for i in chosen]
    layouts = [inputs.layouts[i] for i in chosen]
    masks = [torch.cat([torch.full((s.count,), s.is_image, device=device) for s in layout]) for layout in layouts]
    padded, valid, pictures = decoder.prepare_forward_input(contexts, encoder_image_token_mask=masks)
    seen = [
        torch.tensor([(1, span.rows, span.columns) for span in layout if span.is_image], dtype=torch.long)
        .reshape(-1, 3)
        .to(device)
        for layout in layouts
    ]
    grid = torch.tensor([[1, rows, columns]], device=device)
    extra = {"conditional_input": None, "image_grid_thw_gen_cond": None}
    if inputs.reference is not None:
        extra["conditional_input"] = [inputs.reference, inputs.reference, inputs.reference[:0]]
        extra["image_grid_thw_gen_cond"] = [grid, grid, grid[:0]]

    def run() -> list[torch.Tensor]:
        velocities = decoder.decoder(
            torch.cat([inputs.latents] * len(contexts)),
            encoder_hidden_states=padded,
            encoder_attention_mask=valid,
            encoder_image_token_mask=pictures,
            image_fhw_cond=seen,
            timestep=inputs.timestep.expand(len(contexts)),
            return_dict=False,
            image_grid_thw_gen=grid.expand(len(contexts), -1),
            **extra,
        )[0].split(1)
        return [velocities[chosen.index(i)] for i in range(len(inputs.contexts))]

    return run


@torch.inference_mode()
def relative_error(step: Step, expected: Step) -> float:
    """Returns the largest relative error of a branch's velocity."""
    pairs = zip(step(), expected(), strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def measure(arguments: argparse.Namespace, mode: str, pixels: int, models: dict) -> list[dict]:
    """Returns a row for each contestant."""
    device = torch.device(arguments.device)
    inputs = make_inputs(mode, pixels, dtype=resolve_dtype(arguments), device=arguments.device)
    steps = {
        name: make_official_step(model, inputs) if name == "official" else make_step(model, inputs)
        for name, model in models.items()
    }
    reference = "official" if "official" in steps else "ours"
    dtype = resolve_dtype(arguments)
    least = count(mode, pixels, arguments.layers) * 1e12 / limits.best_arithmetic(dtype, device)
    times = take_turns(steps, arguments.repeats, device)
    return [
        {
            "mode": mode,
            "pixels": pixels,
            "contestant": name,
            "seconds": median(times[name]),
            "fastest": min(times[name]),
            "limit s": least,
            f"times {reference}": median(times[reference]) / median(times[name]),
            f"error to {reference}": 0.0 if name == reference else relative_error(step, steps[reference]),
        }
        for name, step in steps.items()
    ]


def make_contestants(arguments: argparse.Namespace) -> dict:
    """Returns the models by name; they share their weights."""
    models = {"ours": make_model(arguments.layers, dtype=resolve_dtype(arguments), device=arguments.device)}
    if arguments.compile:
        models["ours, compiled"] = torch.compile(models["ours"])
    if arguments.official:
        models["official"] = make_official(arguments.official, models["ours"])
    return models


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="a checkout of OpenGVLab/InternVL-U")
    parser.add_argument("--compile", action="store_true", help="add our transformer under torch.compile")
    parser.add_argument("--modes", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS), help="edit: one reference")
    parser.add_argument("--sizes", nargs="+", type=int, help="pixels of a side; None: 512 on a CPU, else 512 and 1024")
    parser.add_argument("--layers", type=int, help=f"blocks; None: {CPU_LAYERS} on a CPU, else all {RELEASED.layers}")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each contestant")
    add_device(parser)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    arguments.layers = arguments.layers or (CPU_LAYERS if on_cpu else RELEASED.layers)
    arguments.sizes = arguments.sizes or ([512] if on_cpu else [512, 1024])

    models = make_contestants(arguments)
    rows = [
        row for mode in arguments.modes for size in arguments.sizes for row in measure(arguments, mode, size, models)
    ]
    dtype = resolve_dtype(arguments)
    show(rows, arguments.json, dtype=str(dtype), device=arguments.device, layers=arguments.layers)
    worst = max(row.get("error to official", 0.0) for row in rows)
    if dtype == torch.float32 and worst > FP32_ERROR:
        sys.exit(f"relative error {worst:.1e} to the official code found, at most {FP32_ERROR:.0e} expected in float32")


if __name__ == "__main__":
    main()
