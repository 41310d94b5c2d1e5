"""Compares the formats of weights, each converted, loaded and run in ComfyUI in a process of its own.

For each: bytes of transformer and language model, time and peak memory of loading, the error of a step from pure noise
and the PSNR of pictures against bf16 weights, tokens a second; and with --scenes the share that the pixel judge of the
nano model finds right (a quarter each: one thing, two things, edits, questions). Arithmetic is the machine's choice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from .host import pack_module, use_comfyui
from .report import make_parser, show

NANO = Path(__file__).resolve().parent.parent / "demo" / "internvl-u-nano"
PROMPTS = ("a red circle to the left of a blue square", "two green triangles on white", "a small yellow star", "a cat")
TASKS = ("one thing", "two things, related", "edit", "question, one picture")
MIB = 2**20


class NativePipeline:
    """The calls of `internvl_u.pipeline.Pipeline` that the judge makes, on ComfyUI's objects."""

    @torch.inference_mode()  # in which ComfyUI runs every node
    def __init__(self, files: list[Path], size: int = 0):
        native, self.sampler, self.decoder = (pack_module(f"native.{name}") for name in ("load", "sampler", "vae"))
        self.defaults, self.generation = (pack_module(f"internvl_u.{name}") for name in ("defaults", "generation"))
        self.prompt, self.size = pack_module("internvl_u.prompt"), size
        self.model, self.mllm, self.vae = native.load(files[0], "auto", files[1], files[2])

    def encode(self, prompt: str, **given: Any) -> tuple[list, list, dict]:
        """Returns positive, negative and an empty LATENT, of `size` pixels a side if that is set."""
        positive, negative, empty = self.mllm.encode(prompt, **given)
        return positive, negative, self.sampler.empty_latent(self.size, self.size) if self.size else empty

    @torch.inference_mode()
    def latent(self, prompt: str, images: tuple = (), seed: int = 0, steps: int | None = None) -> dict:
        """Returns the drawn LATENT."""
        positive, negative, empty = self.encode(prompt, images=images, vae=self.vae if images else None)
        usual = self.defaults.GUIDANCE
        settings = {"seed": seed, "steps": steps or self.defaults.STEPS}
        settings |= {"all_cfg": usual.all_cfg, "part_cfg": usual.part_cfg}
        return self.sampler.sample_latent(self.model, positive, negative, empty, **settings)

    @torch.inference_mode()
    def draw(self, request: SimpleNamespace) -> Image.Image:
        """Returns the picture of a request."""
        pixels = self.decoder.decode(self.vae, self.latent(request.prompt, request.images, request.seed))[0]
        return Image.fromarray((pixels * 255).to(torch.uint8).cpu().numpy())

    @torch.inference_mode()
    def think(self, prompt: str, tokens: int = 32) -> str:
        """Returns the thought before a drawing, after drawing from it."""
        config = self.generation.GenerationConfig(tokens)
        system = self.prompt.drawing_system(0)
        written = self.mllm.generate(prompt, system=system, config=config)
        thought = self.mllm.encoder.tokenizer.decode_thought(written)
        positive, negative, empty = self.encode(prompt, thought=thought)
        usual = self.defaults.GUIDANCE_WITH_THOUGHT
        settings = {"seed": 0, "steps": 2, "all_cfg": usual.all_cfg, "part_cfg": usual.part_cfg}
        self.sampler.sample_latent(self.model, positive, negative, empty, **settings)
        return thought

    @torch.inference_mode()
    def answer(self, question: str, images: list) -> str:
        """Returns the answer to a question."""
        config = self.generation.GenerationConfig(64)
        written = self.mllm.generate(question, system=self.prompt.SYSTEM_ANSWER, images=images, config=config)
        return self.mllm.encoder.tokenizer.decode(written)


def measure(files: list[Path], arguments: argparse.Namespace) -> dict:
    """Returns what one format costs, with its pictures and a step, in this process."""
    torch.manual_seed(0)
    before, start = _memory(), time.perf_counter()
    pipeline = NativePipeline(files, arguments.size)
    loaded, peak = time.perf_counter() - start, _memory()
    prompts = enumerate(PROMPTS[: arguments.pictures])
    pictures = [pipeline.latent(prompt, seed=i, steps=arguments.steps)["samples"] for i, prompt in prompts]
    step = torch.zeros(1)
    if pictures:
        step = _step(pipeline)
        pipeline.think(PROMPTS[0], arguments.tokens)  # so that all four uses have worked
    start = time.perf_counter()
    config = pipeline.generation.GenerationConfig(arguments.tokens)
    with torch.inference_mode():
        written = pipeline.mllm.generate("describe the picture", system="x", config=config)
    rate = len(written) / (time.perf_counter() - start)
    result = {
        "MiB": sum(file.stat().st_size for file in files[:2]) / MIB,
        "loaded s": loaded,
        "loading MiB": (peak - before) / MIB,
        "tokens/s": rate,
        "right %": _judged(pipeline, arguments.scenes),
    }
    with torch.inference_mode():
        decoded = [pipeline.decoder.decode(pipeline.vae, {"samples": one}).cpu() for one in pictures]
    torch.save({"row": result, "pictures": decoded, "step": step}, arguments.child)
    return result


@torch.inference_mode()
def _step(pipeline: NativePipeline) -> torch.Tensor:
    """Returns what one step from pure noise sees as the clean latent; it differs from the velocity by the noise."""
    positive, negative, empty = pipeline.encode(PROMPTS[0])
    settings = {"seed": 1, "steps": 1, "all_cfg": 1.0, "part_cfg": 1.0}
    drawn = pipeline.sampler.sample_latent(pipeline.model, positive, negative, empty, **settings)
    return drawn["samples"].float().cpu()


def _judged(pipeline: NativePipeline, scenes: int) -> float | str:
    if not scenes:
        return ""
    from training.eval import score

    per_task = scenes // len(TASKS)
    right = 0
    for task in TASKS:
        for number in range(per_task):
            rng = random.Random(f"score {task.split(',')[0]} {number}")
            right += score.TASKS[task][0](pipeline, rng).correct
    return 100 * right / (per_task * len(TASKS))


def _memory() -> float:
    """Returns the largest resident set so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _psnr(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    error = sum((one.float() - other.float()).square().mean().item() for one, other in zip(found, expected))
    return math.inf if error == 0 else -10 * math.log10(error / len(found))


def compare(arguments: argparse.Namespace) -> list[dict]:
    """Returns a row for each format."""
    rows, reference = [], None
    with tempfile.TemporaryDirectory() as folder:
        for dtype in arguments.formats:
            out = Path(folder) / dtype
            line = [sys.executable, "-m", "internvl_u", "convert", "--model", arguments.model, "--out", out]
            done = subprocess.run([*map(str, line), "--dtype", dtype], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"convert --dtype {dtype}: {done.stderr.strip().splitlines()[-1]}")
            result = Path(folder) / "result.pt"
            child = [sys.executable, "-m", "benchmarks.weights", *sys.argv[1:], "--child", str(result)]
            done = subprocess.run([*child, "--files", *done.stdout.split("\n")[:3]], capture_output=True, text=True)
            if done.returncode:
                rows.append({"format": dtype, "error": done.stderr.strip().splitlines()[-1]})
                continue
            found = torch.load(result, weights_only=True)
            reference = reference or found
            rows.append({"format": dtype, **found["row"]})
            if found["pictures"]:
                error = (found["step"] - reference["step"]).norm() / reference["step"].norm()
                rows[-1] |= {"step error": float(error), "PSNR dB": _psnr(found["pictures"], reference["pictures"])}
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    from internvl_u.defaults import FILE_DTYPES, GGUF_DTYPES

    parser = make_parser(__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--model", type=Path, default=NANO, help="checkpoint folder")
    formats = [*FILE_DTYPES, *GGUF_DTYPES]
    parser.add_argument("--formats", nargs="+", default=formats, help="the first is what others are held to")
    parser.add_argument("--scenes", type=int, default=0, help="scenes for the judge; 0: none. The nano model alone")
    parser.add_argument("--steps", type=int, default=20, help="of the compared pictures")
    parser.add_argument("--size", type=int, default=0, help="pixels a side; 0: the model's own")
    parser.add_argument(
        "--pictures", type=int, default=len(PROMPTS), help="how many are compared; 0: only loading and writing"
    )
    parser.add_argument("--tokens", type=int, default=32, help="that are written")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is None:
        show(compare(arguments), arguments.json, comfyui=str(arguments.comfyui))
        return
    use_comfyui(arguments.comfyui)
    measure(arguments.files, arguments)


if __name__ == "__main__":
    main()
