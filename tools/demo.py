"""The nano model in a real ComfyUI: drawing and answering on the command line, or the page in the browser."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from . import environment, fetch
from .comfyui import Server, make_base
from .environment import DEV, PYTHON
from .processes import ROOT, WINDOWS, DevError, lock, say, tail
from .workflows import graphs, hearts, nano_graphs

NANO = nano_graphs.MODEL
MODEL = ROOT / "demo" / NANO


def server(comfyui: Path, base: Path, port: int = 0, python: str | Path = PYTHON) -> Server:
    """Return a ComfyUI with only this pack, to be started; `base` is its base directory and has its log.

    `base` is for this run alone: another one would write its pictures and templates into the same folders.
    """
    prepare_base(comfyui, base)
    flags = [*device_arguments(python), "--disable-api-nodes", "--disable-all-custom-nodes"]
    flags += ["--whitelist-custom-nodes", "internvl-u", NANO]
    # __pycache__ stays out of a tree that is not ours.
    env = {} if fetch.is_ours(comfyui) else {"PYTHONPYCACHEPREFIX": str(base.parent / "pycache")}
    return Server(python, comfyui, base, *flags, port=port, env=env)


def prepare_base(comfyui: Path, base: Path) -> None:
    """Make ComfyUI's base directory: this pack, the nano model with its workflows, and example pictures."""
    if not MODEL.is_dir():
        raise DevError(f"found no nano model in {MODEL}. It belongs to the repository: check it out again.")
    make_base(base, {NANO: MODEL, "InternVL-U": MODEL})  # the second is the name that the shipped workflows ask for
    for picture in (*(ROOT / "web" / "pictures").iterdir(), *(ROOT / "demo" / "input").iterdir()):
        shutil.copyfile(picture, base / "input" / picture.name)
    hearts.put(base / "input")
    put_templates(base / "custom_nodes" / NANO)


def put_templates(pack: Path) -> None:
    """Make a pack without nodes that shows the nano model's workflows among ComfyUI's templates."""
    shutil.rmtree(pack, ignore_errors=True)
    templates = pack / "example_workflows"
    templates.mkdir(parents=True)
    (pack / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    for workflow in (ROOT / "demo" / "workflows").glob("*.json"):
        shutil.copyfile(workflow, templates / workflow.name)
        card = ROOT / "workflows" / f"{graphs.file_name(workflow.stem)}.jpg"
        if card.is_file():
            shutil.copyfile(card, templates / f"{workflow.stem}.jpg")


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
    with environment.alone():
        folder = fetch.choose(comfyui)
        environment.set_up(folder)
    return folder


@contextlib.contextmanager
def base_of_one_run() -> Iterator[Path]:
    """Give a new base directory, which is removed at the end. After an error it stays, for its log.

    Raises:
        DevError: what failed, and where the log is.
    """
    base = Path(tempfile.mkdtemp(dir=DEV, prefix="demo-"))
    try:
        yield base
    except (DevError, OSError) as error:
        raise DevError(f"{error}\nThe log and all else of this run: {base}") from error
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(base, ignore_errors=True)
        raise
    shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def base_that_stays() -> Iterator[Path]:
    """Give the first of .dev/base, .dev/base-2, ... that no other run uses now; what was saved there is found again."""
    for number in itertools.count(1):
        base = DEV / ("base" if number == 1 else f"base-{number}")
        base.mkdir(parents=True, exist_ok=True)
        with (base / "in_use.lock").open("a") as file:
            if lock(file):
                yield base
                return


def put_picture(picture: Path, folder: Path) -> Path:
    """Copy a picture to the first free demo_00001.png, demo_00002.png, ... in a folder; returns where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    data = picture.read_bytes()
    for number in itertools.count(1):
        target = folder / f"demo_{number:05}.png"
        try:
            file = target.open("xb")  # fails where another run has just taken the name
        except FileExistsError:
            continue
        try:
            with file:
                file.write(data)
        except BaseException:
            target.unlink()
            raise
        return target


def demo(args: argparse.Namespace) -> int:
    """Let the nano model draw a picture and tell what it sees there."""
    if args.out and not args.out.resolve().parent.is_dir():
        raise DevError(f"found no folder {args.out.resolve().parent} for --out. Make it or name another.")
    comfyui = prepare(args.comfyui)
    with base_of_one_run() as base:
        one = server(comfyui, base)
        say(f"Starting ComfyUI (log: {one.log})")
        with one:
            draw_and_ask(one, args)
    return 0


def draw_and_ask(one: Server, args: argparse.Namespace) -> None:
    """Draw a picture in a running ComfyUI, put it where it stays, and ask about it."""
    say(f"Drawing {args.prompt!r}, {args.width}x{args.height}, {args.steps} steps")
    graph = text_to_image(args)
    entry = one.run(graph)
    one.outputs(entry)
    (picture,) = one.files(entry, one.find(graph, "SaveImage"))
    kept = put_picture(picture, DEV / "pictures")
    say(f"Picture: {Path(shutil.copyfile(kept, args.out)).resolve() if args.out else kept}")
    say(f"Asking about it: {args.question!r}")
    shutil.copyfile(picture, one.base / "input" / "demo.png")
    outputs = one.outputs(one.run(ask_about_a_picture(args.question, "demo.png")))
    say(f"Answer: {next(output['text'][0] for output in outputs.values() if 'text' in output)}")


def first_page(url: str) -> str:
    """Return the address of ComfyUI's page with the nano model's first workflow opened."""
    return f"{url}/?template=text_to_image&source={NANO}"


def ui(args: argparse.Namespace) -> int:
    """Run ComfyUI until Ctrl-C; the page opens with the nano model's first workflow."""
    comfyui = prepare(args.comfyui)
    with base_that_stays() as base:
        one = server(comfyui, base, port=args.port)
        say(f"Starting ComfyUI (pictures, workflows and log: {base})")
        with one:
            page = first_page(one.url)
            say(f"ComfyUI is at {page} until you press Ctrl-C.")
            if WINDOWS or sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ:
                webbrowser.open(page)
            status = one.child.wait()
        raise DevError(f"ComfyUI stopped by itself with exit status {status}:\n{tail(one.log)}")
