"""Memory and time of training at the released size beside what `train --estimate` says of them.

Weights as torch makes them; a LoRA of the transformer, its real loss, backward pass and AdamW. On a CPU memory is what
the process grows by, on a GPU what torch has taken of it at most. glibc keeps what is freed, a quarter more; so that it
gives it back, set MALLOC_ARENA_MAX=1, MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536.
"""

from __future__ import annotations

import time
from dataclasses import replace

import peft  # noqa: F401 - first: the library itself takes some memory
import torch

from internvl_u.finetune.adapter import AdapterSettings, add_adapter
from internvl_u.finetune.estimate import (
    BatchSize,
    DrawnSize,
    Estimate,
    LearningStep,
    Networks,
    estimate,
    networks_to_time,
    step_seconds,
)

from .memory import MIB, memory, reset_peak
from .report import add_device, make_parser, resolve_dtype, show
from .workload import LAYOUTS, PIXELS_A_LATENT, RELEASED


def learning_batch(mode: str, pixels: int, batch: int) -> BatchSize:
    """Returns a batch of drawings or edits of square pictures."""
    side = pixels // PIXELS_A_LATENT
    tokens = sum(span.count for span in LAYOUTS[mode][0])
    return BatchSize((DrawnSize(((side, side),) * (2 if mode == "edit" else 1), tokens),) * batch)


def train(networks: Networks, batch: BatchSize, steps: int, device: torch.device) -> tuple[float, float]:
    """Trains and returns the most memory in MiB that it took, and the seconds of the fastest step."""
    before = 0.0 if device.type == "cuda" else memory("VmRSS")
    step = LearningStep(networks, device)
    optimizer = torch.optim.AdamW([weight for weight in step.parameters() if weight.requires_grad])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()
    fastest = float("inf")
    for _ in range(steps):
        start = time.perf_counter()
        loss = step.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        fastest = min(fastest, time.perf_counter() - start)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB, fastest
    return memory("VmHWM") - before, fastest


def row(said: Estimate, taken: float, seconds: float) -> dict[str, object]:
    """Returns what was said and what was measured, as a row of the table."""
    assert said.seconds is not None
    return {
        "said (MiB)": said.total / MIB,
        "taken (MiB)": taken,
        "taken / said": taken * MIB / said.total,
        "said (s)": said.seconds[0],
        "fastest (s)": seconds,
        "TFLOP": said.operations / 1e12,
    }


def main() -> None:
    parser = make_parser(__doc__)
    add_device(parser)
    parser.add_argument("--mode", choices=tuple(LAYOUTS), default="t2i", help="drawings or edits")
    parser.add_argument("--pixels", type=int, default=256, help="of a side")
    parser.add_argument("--layers", type=int, default=RELEASED.layers, help="of the transformer")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--batch", type=int, default=1, help="samples")
    parser.add_argument("--steps", type=int, default=3, help="to train")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute blocks twice")
    options = parser.parse_args()

    def add(network: torch.nn.Module, part: str) -> None:
        add_adapter(network, part, AdapterSettings(rank=options.rank))

    config = type(RELEASED)(**vars(RELEASED) | {"layers": options.layers})
    networks = Networks(config, None, resolve_dtype(options), options.gradient_checkpointing, add)
    batch, device = learning_batch(options.mode, options.pixels, options.batch), torch.device(options.device)
    taken, seconds = train(networks, batch, options.steps, device)  # first: what was freed before would be used again
    said = estimate(networks, batch)
    times = step_seconds(networks, batch, device, networks_to_time(networks, said.total))
    said = replace(said, seconds=times)
    show([row(said, taken, seconds)], options.json, estimate=said.describe())


if __name__ == "__main__":
    main()
