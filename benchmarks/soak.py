"""Runs many mixed jobs in one ComfyUI and shows its resident memory, which must not grow with their number.

Pictures of several sizes, edits, thoughts, answers, refused and interrupted jobs, with two small models in several
precisions, each with a seed and words of its own so that nothing comes out of ComfyUI's cache. "own" is what is not
mapped from files, "tensors" are those of torch that are alive in the process. The last rows are after ComfyUI's /free,
which unloads the models and empties its cache; after the history of the jobs is cleared too; and after glibc is told to
give back what it keeps for later. Linux only.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .host import ROOT, pack_module
from .report import make_parser, show

MIB = 2**20
LOOK = """
import ctypes, gc
import torch
from aiohttp import web
from server import PromptServer

@PromptServer.instance.routes.get("/soak")
async def look(request):
    gc.collect()
    if "trim" in request.query:
        ctypes.CDLL(None).malloc_trim(0)
    return web.json_response({"tensors": sum(isinstance(one, torch.Tensor) for one in gc.get_objects())})

NODE_CLASS_MAPPINGS = {}
"""
"""A pack for the measured ComfyUI: it counts tensors, and trims memory when asked."""
MODELS = {"tiny": ROOT / "tests" / "data" / "checkpoint", "nano": ROOT / "demo" / "internvl-u-nano"}
PRECISIONS = {"tiny": ("fp32", "bf16", "fp8_e4m3fn"), "nano": ("auto", "fp32")}
SIZES = ((64, 64), (256, 256), (96, 64), (128, 384), (32, 32), (512, 512))
PICTURES = ((64, 64), (200, 120), (512, 512), (33, 77))
KINDS = (
    "text_to_image",
    "edit",
    "think_then_draw",
    "ask_about_a_picture",
    "compare_two_pictures",
    "refused at the door",
)
KINDS += ("text_to_image", "edit_two_references", "refused at work", "interrupted")


def jobs(count: int) -> Iterator[tuple[str, dict]]:
    """Yields (kind, graph in the API's format) for each job."""
    loaders = itertools.cycle((name, precision) for name in MODELS for precision in PRECISIONS[name])
    sizes = itertools.cycle(SIZES)
    name, precision = next(loaders)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        if number % 4 == 0:  # between, ComfyUI reuses what is loaded
            name, precision = next(loaders)
        width, height = next(sizes)
        values = {"model_name": name, "precision": precision, "preset": "custom", "width": width, "height": height}
        values |= {"seed": number, "steps": 2, "max_new_tokens": 8 + number % 9, "largest_size": 128}
        file = kind if (ROOT / "tests" / "workflows" / f"{kind}.api.json").is_file() else "text_to_image"
        values |= {
            "refused at the door": {"model_name": f"no such model {number}"},
            "refused at work": {"denoise": 1e-9},
            "interrupted": {"steps": 1000},
        }.get(kind, {})
        yield kind, graph(file, number, values)


def graph(name: str, number: int, values: dict) -> dict:
    """Returns a shipped workflow with values put in, and a text and pictures of its own."""
    text = (ROOT / "tests" / "workflows" / f"{name}.api.json").read_text(encoding="utf-8")
    nodes = json.loads(text)
    pictures = itertools.count(number)
    for node in nodes.values():
        inputs = node["inputs"]
        inputs |= {key: value for key, value in values.items() if key in inputs and not isinstance(inputs[key], list)}
        for key in ("prompt", "question", "value"):
            if isinstance(inputs.get(key), str):
                inputs[key] = f"{inputs[key]}, the {number}th"
        if node["class_type"] == "LoadImage":
            inputs["image"] = f"picture{next(pictures) % len(PICTURES)}.png"
        if node["class_type"] == "InternVLU_DecodeLatent":
            inputs |= {"width": 0, "height": 0}
    return nodes


def run(server, kind: str, nodes: dict) -> str:
    """Runs a job and returns how it ended: success, error, refused or interrupted.

    Raises:
        RuntimeError: a job of this kind should not end so.
    """
    answer = server.queue(nodes)
    if "prompt_id" not in answer:
        ended = "refused"
    else:
        if kind == "interrupted":
            while not server.get("/queue")["queue_running"]:
                time.sleep(0.02)
            time.sleep(0.5)
            server.post("/interrupt", {})
        messages = server.wait(answer["prompt_id"])["status"]["messages"]
        ended = messages[-1][0].removeprefix("execution_")
    wanted = {"refused at the door": "refused", "refused at work": "error", "interrupted": "interrupted"}
    if ended != wanted.get(kind, "success"):
        raise RuntimeError(f"a job of the kind {kind!r} ended with {ended}. See {server.log}")
    return ended


def free(server) -> None:
    """Lets ComfyUI unload the models and empty its cache, and waits until it has."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(3)


def memory(process: int) -> dict[str, float]:
    """Returns the resident memory of a process in MiB: all of it, and its own without mapped files."""
    found = {}
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon"):
            found[{"VmRSS": "resident MiB", "RssAnon": "own MiB"}[name]] = round(int(value.split()[0]) * 1024 / MIB, 1)
    return found


def soak(server, count: int, every: int) -> list[dict]:
    """Returns a row after the start, after each `every` jobs, and after each way to give memory back."""
    process, ended, begun, rows = server.child.process.pid, Counter(), time.monotonic(), []

    def row(what: object, trim: bool = False) -> None:
        alive = server.get("/soak?trim=1" if trim else "/soak")
        rows.append({"jobs": what, **memory(process), **alive, "s": round(time.monotonic() - begun), **ended})
        print(rows[-1], file=sys.stderr)

    row(0)
    for number, (kind, nodes) in enumerate(jobs(count), 1):
        ended[run(server, kind, nodes)] += 1
        if number % every == 0:
            row(number)
    free(server)
    row("/free")
    server.post("/history", {"clear": True})
    row("no history")
    row("trimmed", trim=True)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", required=True, help="ComfyUI's folder")
    parser.add_argument("--jobs", type=int, default=200, help="how many jobs")
    parser.add_argument("--every", type=int, default=20, help="measure after each of so many")
    parser.add_argument("flags", nargs="*", help="after --: flags of ComfyUI")
    arguments = parser.parse_args()
    tools = pack_module("tools.comfyui")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        base = Path(folder)
        tools.make_base(base, MODELS)
        for number, size in enumerate(PICTURES):
            Image.effect_noise(size, 64).convert("RGB").save(base / "input" / f"picture{number}.png")
        (base / "custom_nodes" / "soak.py").write_text(LOOK, encoding="utf-8")
        flags = ("--cpu", "--disable-api-nodes", *arguments.flags)
        with tools.Server(sys.executable, arguments.comfyui, base, *flags) as server:
            version = server.get("/system_stats")["system"]["comfyui_version"]
            rows = soak(server, arguments.jobs, arguments.every)
    show(rows, arguments.json, comfyui=version)


if __name__ == "__main__":
    main()
