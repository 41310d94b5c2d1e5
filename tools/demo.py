"""The nano model in a real ComfyUI: drawing and answering on the command line, or the page in the browser."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

from . import environment, fetch
from .comfyui import Server, make_base
from .environment import DEV, PYTHON
from .processes import ROOT, WINDOWS, DevError, say, tail
from .workflows import nano_graphs

NANO = nano_graphs.MODEL
MODEL = ROOT / "demo" / NANO


def server(comfyui: Path, folder: Path = DEV, port: int = 0, python: str | Path = PYTHON) -> Server:
    """Return a ComfyUI with only this pack, to be started; its base directory and log are in `folder`."""
    prepare_base(comfyui, folder / "base")
    flags = [*device_arguments(python), "--disable-api-nodes", "--disable-all-custom-nodes"]
    flags += ["--whitelist-custom-nodes", "internvl-u", NANO]
    # __pycache__ stays out of a tree that is not ours.
    env = {} if fetch.is_ours(comfyui) else {"PYTHONPYCACHEPREFIX": str(folder / "pycache")}
    return Server(python, comfyui, folder / "base", *flags, port=port, log=folder / "server.log", env=env)


def prepare_base(comfyui: Path, base: Path) -> None:
    """Make ComfyUI's base directory: this pack, the nano model with its workflows, and example pictures."""
    if not MODEL.is_dir():
        raise DevError(f"found no nano model in {MODEL}. It belongs to the repository: check it out again.")
    make_base(base, {NANO: MODEL, "InternVL-U": MODEL})  # the second is the name that the shipped workflows ask for
    for picture in (comfyui / "input" / "example.png", *(ROOT / "demo" / "input").glob("*.png")):
        if picture.is_file():
            shutil.copyfile(picture, base / "input" / picture.name)
    put_templates(base / "custom_nodes" / NANO)


def put_templates(pack: Path) -> None:
    """Make a pack without nodes that shows the nano model's workflows among ComfyUI's templates."""
    shutil.rmtree(pack, ignore_errors=True)
    templates = pack / "example_workflows"
    templates.mkdir(parents=True)
    (pack / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    for workflow in (ROOT / "demo" / "workflows").glob("*.json"):
        shutil.copyfile(workflow, templates / workflow.name)
        card = ROOT / "workflows" / f"{workflow.stem}.jpg"
        if card.is_file():
            shutil.copyfile(card, templates / card.name)


def device_arguments(python: str | Path) -> list[str]:
    """Return ["--cpu"] where torch finds neither CUDA nor MPS."""
    code = "import sys, torch; sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return ["--cpu"] if subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode else []


def text_to_image(args: argparse.Namespace) -> dict:
    """Return the nano model's graph that draws, with the demo's values put in."""
    values = {"prompt": args.prompt, "width": args.width, "height": args.height, "seed": args.seed, "steps": args.steps}
    graph = nano_graphs.api("text_to_image")
    for node in graph.values():
        if node["class_type"] in ("InternVLU_EncodePrompt", "InternVLU_CreateLatent", "InternVLU_SampleLatent"):
            node["inputs"] |= {name: value for name, value in values.items() if name in node["inputs"]}
        if node["class_type"] == "SaveImage":
            node["inputs"]["filename_prefix"] = "demo"
    return graph


def ask_about_a_picture(question: str, picture: str) -> dict:
    """Return the nano model's graph that answers a question about a picture in ComfyUI's input folder."""
    graph = nano_graphs.api("ask_about_a_picture")
    for node in graph.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = picture
        if node["class_type"] == "InternVLU_AnswerQuestion":
            node["inputs"]["question"] = question
    return graph


def prepare(comfyui: str | None) -> Path:
    """Return the folder of the wished ComfyUI when that and .venv are there."""
    folder = fetch.choose(comfyui)
    environment.set_up(folder)
    return folder


def demo(args: argparse.Namespace) -> int:
    """Let the nano model draw a picture and tell what it sees there."""
    if args.out and not args.out.resolve().parent.is_dir():
        raise DevError(f"found no folder {args.out.resolve().parent} for --out. Make it or name another.")
    one = server(prepare(args.comfyui))
    say(f"Starting ComfyUI (log: {one.log})")
    with one:
        say(f"Drawing {args.prompt!r}, {args.width}x{args.height}, {args.steps} steps")
        graph = text_to_image(args)
        entry = one.run(graph)
        one.outputs(entry)
        (picture,) = one.files(entry, one.find(graph, "SaveImage"))
        shown = Path(shutil.copyfile(picture, args.out)).resolve() if args.out else picture
        say(f"Picture: {shown}")
        say(f"Asking about it: {args.question!r}")
        shutil.copyfile(picture, one.base / "input" / "demo.png")
        outputs = one.outputs(one.run(ask_about_a_picture(args.question, "demo.png")))
        say(f"Answer: {next(output['text'][0] for output in outputs.values() if 'text' in output)}")
    return 0


def first_page(url: str) -> str:
    """Return the address of ComfyUI's page with the nano model's first workflow opened."""
    return f"{url}/?template=text_to_image&source={NANO}"


def ui(args: argparse.Namespace) -> int:
    """Run ComfyUI until Ctrl-C; the page opens with the nano model's first workflow."""
    one = server(prepare(args.comfyui), port=args.port)
    say(f"Starting ComfyUI (log: {one.log})")
    with one:
        page = first_page(one.url)
        say(f"ComfyUI is at {page} until you press Ctrl-C.")
        if WINDOWS or sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ:
            webbrowser.open(page)
        status = one.child.wait()
    raise DevError(f"ComfyUI stopped by itself with exit status {status}:\n{tail(one.log)}")
