"""The environments of developers: .dev/tools with uv and nox, and .venv with all that the pack and ComfyUI need."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .processes import ROOT, WINDOWS, Child, DevError, lock, run_logged, say

DEV = ROOT / ".dev"
TOOLS = DEV / "tools"
VENV = ROOT / ".venv"
STAMP = DEV / "setup.stamp"
LOG = DEV / "setup.log"
REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "requirements-dev.txt")

# For development only: three wheels that fit each other. The pack itself asks for no version of torch.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# The newest transformers is installed; users may still have the line before, so the tests run on that too.
OLDER = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "diffusers==0.35.2")

PIP_TO_UV = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}


def program(environment: Path, name: str) -> Path:
    """Return the path of a program in an environment, for example "python"."""
    return environment / "Scripts" / f"{name}.exe" if WINDOWS else environment / "bin" / name


PYTHON = program(VENV, "python")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other dev.py sets up this folder, and let none begin within the block."""
    DEV.mkdir(exist_ok=True)
    with (DEV / "setup.lock").open("a") as file:
        if not lock(file):
            say("Waiting for another dev.py that sets up this folder")
            while not lock(file):
                time.sleep(0.2)
        yield


# uv and nox


def make_tools() -> Path:
    """Make .dev/tools with nox and, where there is one for this machine, uv. Returns its Python."""
    python = program(TOOLS, "python")
    if python.exists() and program(TOOLS, "nox").exists():
        return python
    say("Installing uv and nox")
    DEV.mkdir(exist_ok=True)
    advice = "On Debian and Ubuntu, install the package python3-venv. Then run this again."
    run_logged([sys.executable, "-m", "venv", "--clear", TOOLS], LOG, "making .dev/tools", advice)
    pip = [python, "-m", "pip", "install", "--quiet"]
    with contextlib.suppress(DevError):  # there is none for some machines; pip does its work then
        run_logged([*pip, "--only-binary", "uv", "uv"], LOG, "pip install uv", "")
    run_logged([*pip, "nox"], LOG, "pip install nox", f"See {LOG}. Check the network, then run this again.")
    return python


def find_uv() -> Path | None:
    """Return uv's program in .dev/tools, or None where it could not be installed."""
    uv = program(TOOLS, "uv")
    return uv if uv.exists() else None


def uv_settings() -> dict[str, str]:
    """Return what pip was told of where packages come from, in uv's variables: uv does not read pip's settings."""
    listing = [make_tools(), "-m", "pip", "config", "list"]
    lines = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.splitlines()
    found: dict[str, str] = {}
    for line in lines:  # the environment's settings come first, and go before those of files
        key, _, value = line.partition("=")
        name = PIP_TO_UV.get(key.rpartition(".")[2])
        if name and name not in os.environ:
            parts = str(ast.literal_eval(value)).split()
            found.setdefault(name, ("," if name == "UV_FIND_LINKS" else " ").join(parts))
    if "UV_INDEX" in found:  # as pip does: the best version of all indexes, not of the first that has any
        found.setdefault("UV_INDEX_STRATEGY", os.environ.get("UV_INDEX_STRATEGY", "unsafe-best-match"))
    return found


def install(python: Path, *arguments: object) -> None:
    """Install packages for `python`, with uv or else with pip. Raises DevError with the end of pip's output."""
    if uv := find_uv():
        with Child([uv, "pip", "install", "--python", python, *arguments], log=LOG, env=uv_settings()) as child:
            if child.wait() == 0:
                return
        failed = shutil.copyfile(LOG, LOG.with_name("uv.log"))
        say(f"uv could not do it (see {failed}). Trying pip.")
    advice = f"See {LOG}. Check the network and the free disk space (10 GB), then run this again."
    run_logged([python, "-m", "pip", "install", *arguments], LOG, "pip install", advice)


# .venv


def set_up(comfyui: Path) -> None:
    """Make .venv as the ComfyUI in a folder needs it, unless that was done already."""
    key = requirement_key(comfyui)
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == key and PYTHON.exists():
        return
    STAMP.unlink(missing_ok=True)
    make_venv()
    check = subprocess.run([PYTHON, "-c", "import torch, torchvision, torchaudio"], capture_output=True, check=False)
    if check.returncode:
        say(f"Installing {' '.join(TORCH)} (the big download: 1 to 6 GB on disk)")
        install(PYTHON, *TORCH)
    say(f"Installing the requirements of ComfyUI in {comfyui}, and the development tools")
    install(PYTHON, "-r", comfyui / "requirements.txt", "-r", REQUIREMENTS[1])
    STAMP.write_text(key, encoding="utf-8")


def requirement_key(comfyui: Path) -> str:
    """Return a hash of everything that .venv depends on."""
    texts = [file.read_text(encoding="utf-8") for file in (*REQUIREMENTS, comfyui / "requirements.txt")]
    return hashlib.sha256(json.dumps([TORCH, str(comfyui), texts]).encode()).hexdigest()


def make_venv() -> None:
    """Make .venv with this Python, unless there is one."""
    if PYTHON.exists():
        return
    make_tools()
    say(f"Making .venv with Python {sys.version.split()[0]}")
    uv = find_uv()
    # With a pip of its own, for those who add packages by hand.
    command = [uv, "venv", "--clear", "--seed", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    run_logged([*command, VENV], LOG, "making .venv", f"See {LOG}.", uv_settings())


def older_packages() -> Path:
    """Return a folder with the packages OLDER, to be put before those of .venv."""
    folder = DEV / f"older-{hashlib.sha256(json.dumps(OLDER).encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        say(f"Fetching {' '.join(OLDER)}")
        with tempfile.TemporaryDirectory(dir=DEV, prefix="fetch-", ignore_cleanup_errors=True) as fetched:
            install(PYTHON, "--no-deps", "--target", Path(fetched) / "packages", *OLDER)
            os.replace(Path(fetched) / "packages", folder)
    return folder
