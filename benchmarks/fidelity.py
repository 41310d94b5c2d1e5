"""Draws and writes the same under everything that may change a result, and shows by how much each does.

Kernels of other processors, threads, torch's ways to compute attention, frequencies of the time sinusoids that are one
ulp off, branches one by one, and bf16. Each runs in a process of its own; all are compared with the first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl_u import images, mmdit, prompt, sampling
from internvl_u.generation import GenerationConfig
from internvl_u.pipeline import ImageRequest, Pipeline

from .random_weights import TEMPLATE
from .report import make_parser, show

SEED, STEPS, LONGEST = 7, 20, 60
DRAWINGS = {"picture": "a red circle to the left of a blue square", "edit": "make it green", "thought": "blue"}
QUESTION = "describe the picture"


@dataclass(frozen=True)
class Condition:
    """What is different: the environment of the process, the number of threads, the dtype, or a name in `applied`."""

    name: str
    env: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    dtype: str = "float32"
    change: str = ""


CONDITIONS = (
    Condition("this processor, one thread"),
    Condition("kernels for AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Condition("kernels for any processor", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}),
    Condition("without oneDNN", change="no oneDNN"),
    Condition("two threads", threads=2),
    Condition("plain attention", change="plain attention"),
    Condition("frequencies one ulp down", change="down"),
    Condition("frequencies one ulp up", change="up"),
    Condition("bf16", dtype="bfloat16"),
    Condition("bf16, kernels for AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, 1, "bfloat16"),
    Condition("bf16, plain attention", dtype="bfloat16", change="plain attention"),
)
"""The first is the reference."""


@contextlib.contextmanager
def applied(change: str) -> Iterator[None]:
    """Applies a change of `Condition` while the block runs."""
    if change == "no oneDNN":
        with torch.backends.mkldnn.flags(enabled=False):
            yield
    elif change == "plain attention":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    elif change in ("up", "down"):
        frequencies = mmdit.time_frequencies()
        moved = torch.nextafter(frequencies, frequencies + (1 if change == "up" else -1))
        original, mmdit.time_frequencies = mmdit.time_frequencies, lambda device=None: moved.to(device)
        yield
        mmdit.time_frequencies = original
    else:
        yield


def compute(condition: Condition, model: Path, file: Path) -> None:
    """Draws and writes under a condition, in this process, and saves all results."""
    torch.set_num_threads(condition.threads)
    results: dict[str, torch.Tensor] = {}
    with applied(condition.change), torch.inference_mode():
        pipeline = Pipeline(model, dtype=getattr(torch, condition.dtype))
        seen = _something()
        for name, text in DRAWINGS.items():
            drawing = ImageRequest(text, 64, 64, STEPS, SEED, images=(seen,) if name == "edit" else ())
            if name == "thought":
                thought = pipeline.think(drawing, config=GenerationConfig(LONGEST))
                results["text of the thought"] = torch.tensor(thought.ids)
                drawing = dataclasses.replace(drawing, thought=thought)
            noise = images.noise(64, 64, SEED)
            conditions = pipeline.encode_prompt(drawing)
            latent = pipeline.sample(conditions, noise, sampling.flow_sigmas(STEPS), drawing.guidance)
            results[f"context of {name}"] = conditions.conditional[0].float()
            results[f"latent of {name}"] = latent
            results[f"image of {name}"] = torch.from_numpy(numpy.array(images.to_image(pipeline.decode(latent)[0])))
        for beams in (1, 3):
            writing = GenerationConfig(LONGEST, beams=beams)
            written = pipeline.generate(QUESTION, (seen,), prompt.SYSTEM_ANSWER, writing)
            results[f"text of {beams} beams"] = torch.tensor(written)
    torch.save(results, file)


def _something() -> Image.Image:
    image = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill="red")
    return image


def compared(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, object]:
    """Returns the largest differences of each kind of result."""

    def worst(kind: str, measure) -> float:
        return max(measure(found[name], one) for name, one in expected.items() if name.startswith(kind))

    def relative(one, other):
        return ((one - other).norm() / other.norm()).item()

    def levels(one, other):
        return (one.int() - other.int()).abs()

    texts = [name for name in expected if name.startswith("text")]
    equal = sum(torch.equal(found[name], expected[name]) for name in texts)
    return {
        "context": worst("context", relative),
        "latent": worst("latent", relative),
        "8-bit values that differ": f"{100 * worst('image', lambda a, b: (levels(a, b) > 0).float().mean()):.2g} %",
        "by levels": int(worst("image", lambda a, b: levels(a, b).max())),
        "texts equal": f"{equal} of {len(texts)}",
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="FOLDER", default=TEMPLATE, help="a checkpoint folder")
    parser.add_argument("--compute", nargs=2, metavar=("CONDITION", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compute:
        name, file = arguments.compute
        return compute(next(one for one in CONDITIONS if one.name == name), arguments.model, Path(file))

    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for condition in CONDITIONS:
            file = Path(folder) / "results.pt"
            line = [sys.executable, "-m", "benchmarks.fidelity", "--model", arguments.model]
            subprocess.run([*line, "--compute", condition.name, file], env=os.environ | condition.env, check=True)
            found[condition.name] = torch.load(file)
            rows.append({"condition": condition.name, **compared(found[condition.name], found[CONDITIONS[0].name])})
    show(rows, arguments.json, model=arguments.model.name, kernels=torch.backends.cpu.get_cpu_capability())


if __name__ == "__main__":
    main()
