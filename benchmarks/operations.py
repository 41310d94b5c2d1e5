"""Counts the floating-point operations of one denoising step at the released size, all branches together."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from internvl_u.mmdit import MMDiT, time_embedding

from .report import make_parser, show
from .workload import LAYOUTS, RELEASED, make_inputs, make_step

SIZES = (512, 1024)


BRANCHES = {"t2i": ("conditional", "unconditional"), "edit": ("conditional", "partial", "unconditional")}
"""The branches of each mode, in the order of `workload.LAYOUTS`."""


def count_branches(mode: str, pixels: int) -> dict[str, float]:
    """Returns the operations of one evaluation of each branch, in units of 1e12."""
    with torch.device("meta"):
        model = MMDiT(RELEASED, dtype=torch.bfloat16)
    inputs = make_inputs(mode, pixels, dtype=torch.bfloat16, device="meta")
    time = time_embedding(inputs.timestep.to(torch.bfloat16))
    counts = {}
    for name, context, layout in zip(BRANCHES[mode], inputs.contexts, inputs.layouts, strict=True):
        references = [inputs.reference] if inputs.reference is not None and name != "unconditional" else []
        branch = model.branch(context, layout, inputs.size, [inputs.size for _ in references])
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(inputs.latents, time, [branch], references)
        counts[name] = counter.get_total_flops() / 1e12
    return counts


def count(mode: str, pixels: int, layers: int = RELEASED.layers) -> float:
    """Returns the operations of a step, in units of 1e12; nothing is computed, the tensors have no data."""
    with torch.device("meta"):
        model = MMDiT(replace(RELEASED, layers=layers), dtype=torch.bfloat16)
    step = make_step(model, make_inputs(mode, pixels, dtype=torch.bfloat16, device="meta"))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        step()
    return counter.get_total_flops() / 1e12


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    counts = {f"{mode}_{pixels}": round(count(mode, pixels), 3) for mode in LAYOUTS for pixels in SIZES}
    show([{"step": name, "TFLOP": value} for name, value in counts.items()], arguments.json)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
