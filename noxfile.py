"""The sessions in which everything is checked; `python dev.py nox` runs nox for those who have none.

    nox -s lint                   ruff, the rules and the format

These use .venv, which they make if need be, and the ComfyUI of `python dev.py test`:

    nox -s types                  basedpyright over what ships
    nox -s tests                  all tests
    nox -s tests_older            what meets transformers, tokenizers, diffusers or the hub, on the older lines
    nox -s fuzz [-- EXAMPLES]     the inputs that hypothesis makes, 20,000 of each kind: for a night
    nox -s workflows [-- NAME]    makes the shipped workflows, their cards and the pictures of the help pages anew
    nox -s locales                makes the nodes' texts in other languages anew, out of tools/translations

The others test other versions, each in an environment of its own:

    nox -s "library(oldest)"      the library on the oldest packages that it runs on
    nox -s "library(newest)"      the library on the newest ones
    nox -s "comfyui(0.3.75)"      the whole pack in the oldest ComfyUI
    nox -s "comfyui(0.33.0)"      the whole pack in a newer one

COMFYUI_PATH names a ComfyUI that is there already; comfyui() takes only one of the wished version. Arguments after `--`
go to pytest. With `-- --record`, what passed in library() and comfyui() goes into docs/tested.json, and the README's
table is made anew.
"""

import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # nox puts this folder there only when it is run as `python -m nox`

from tools import environment, fetch, tested  # noqa: E402

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
    "0.3.75": (*environment.TORCH, *environment.OLDER),
    "0.33.0": ("torch==2.14.1", "torchvision==0.29.1"),
}
"""What ComfyUI runs on in each session; 0.33.0 with the newest of all else. `dev.py test` has 0.3.75 with that."""

nox.options.default_venv_backend = "uv|venv"
nox.options.reuse_existing_virtualenvs = True
_OLDER = {
    "unit": ("mllm", "qwen3", "generation", "pipeline", "prompt", "vae", "convert", "training"),
    "comfy": ("parity", "modes", "graph", "integration", "converted", "gguf", "lora"),
    "hostile": ("values", "configurations", "download", "security"),
}
MEETING_LIBRARIES = [f"tests/{kind}/test_{name}.py" for kind, names in _OLDER.items() for name in names]
"""What tests_older runs: the rest would only pass again."""
SIDE_BY_SIDE = ["--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile"]
"""Arguments of pytest-xdist for many tests; each process starts its own servers, which a few tests are not worth."""
nox.options.sessions = ["lint", "types", "tests", "tests_older"]


@nox.session
def lint(session: nox.Session) -> None:
    """Runs ruff, of the version that requirements-dev.txt names."""
    lines = Path("requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    (ruff,) = (line.partition(" ")[0] for line in lines if line.startswith("ruff"))
    session.install(ruff)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


# In .venv


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Runs all tests, in as many processes as there are cores."""
    comfyui = development_environment()
    run_pytest(session, environment.PYTHON, session.posargs or SIDE_BY_SIDE, INTERNVLU_COMFYUI=str(comfyui))


@nox.session(venv_backend="none")
def tests_older(session: nox.Session) -> None:
    """Runs the tests of what meets transformers, tokenizers, diffusers or huggingface_hub, on their older lines."""
    comfyui = development_environment()
    arguments = session.posargs or [*SIDE_BY_SIDE, *MEETING_LIBRARIES]
    older = str(environment.older_packages())
    run_pytest(session, environment.PYTHON, arguments, INTERNVLU_COMFYUI=str(comfyui), PYTHONPATH=older)


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """Runs tests/hostile/test_fuzz.py with other inputs each time, and many of them."""
    comfyui = development_environment()
    (examples,) = session.posargs or ["20000"]
    env = {"INTERNVLU_COMFYUI": str(comfyui), "INTERNVLU_FUZZ": examples}
    run_pytest(session, environment.PYTHON, ["tests/hostile/test_fuzz.py"], **env)


@nox.session
def types(session: nox.Session) -> None:
    """Runs basedpyright over what ships."""
    comfyui = development_environment()
    session.install("basedpyright==1.40.2")  # another one may find something else
    command = ("basedpyright", "--level", "error", "--pythonpath", str(environment.PYTHON))
    session.run(*command, env={"PYTHONPATH": str(comfyui)})


@nox.session(venv_backend="none")
def workflows(session: nox.Session) -> None:
    """Makes the shipped workflows and pictures anew in the oldest ComfyUI, whose files all later ones can open."""
    comfyui = fetch.fetched(fetch.DEFAULT)
    environment.set_up(comfyui)
    command = (environment.PYTHON, "-m", "tools.workflows.build", "--comfyui", str(comfyui), *session.posargs)
    session.run(*command, external=True)


@nox.session(venv_backend="none")
def locales(session: nox.Session) -> None:
    """Makes `locales/` anew and names what is not translated; in the oldest ComfyUI, as the workflows."""
    comfyui = fetch.fetched(fetch.DEFAULT)
    environment.set_up(comfyui)
    command = (environment.PYTHON, "-m", "tools.locales", "--comfyui", str(comfyui), *session.posargs)
    session.run(*command, external=True)


def development_environment() -> Path:
    """Returns ComfyUI's folder when that and .venv are there; `dev.py test` has seen to both already."""
    given = os.environ.get("INTERNVLU_COMFYUI")
    comfyui = Path(given) if given else fetch.choose(None)
    environment.set_up(comfyui)
    return comfyui


# In environments of their own


@nox.session
@nox.parametrize("python, packages", [nox.param("3.10", OLDEST, id="oldest"), nox.param("3.13", NEWEST, id="newest")])
def library(session: nox.Session, packages: tuple[str, ...]) -> None:
    """Runs the tests that need no ComfyUI."""
    session.install(*packages, "pydantic", "pytest", "scipy", "tqdm")
    run_recorded(session, ["tests/unit"])


@nox.session
@nox.parametrize(
    "python, version", [nox.param("3.11", "0.3.75", id="0.3.75"), nox.param("3.12", "0.33.0", id="0.33.0")]
)
def comfyui(session: nox.Session, version: str) -> None:
    """Runs all tests in a ComfyUI."""
    given = Path(os.environ.get("COMFYUI_PATH") or "/nowhere")
    folder = given.resolve() if fetch.version_of(given) == version else fetch.fetched(version)
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    rest = Path(session.create_tmp()) / "requirements.txt"
    rest.write_text("\n".join(line for line in lines if not line.startswith("torchaudio")), encoding="utf-8")
    session.install(*PINS[version], "-r", str(rest), "-r", "requirements-dev.txt")
    session.install("--no-deps", "torchaudio")  # it asks for the torch that it was built with, and runs on newer ones
    run_recorded(session, ["tests"], INTERNVLU_COMFYUI=str(folder))


def run_recorded(session: nox.Session, default: list[str], **env: str) -> None:
    """Runs pytest with the session's arguments; with --record among them, writes down what passed."""
    arguments = [argument for argument in session.posargs if argument != "--record"]
    record = Path(session.create_tmp()) / "tested.json"
    run_pytest(session, "python", arguments or default, INTERNVLU_TESTED=str(record), HF_HUB_OFFLINE="1", **env)
    if len(arguments) < len(session.posargs):
        tested.add(record)


def run_pytest(session: nox.Session, python: str | Path, arguments: list[str], **env: str) -> None:
    """Runs pytest; when it is stopped, it has time to stop what it started."""
    # This folder must not be on sys.path, as with `python -m pytest`: our nodes/ hides ComfyUI's module of that name.
    code = "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())"
    # The test models are so small that a second thread only waits, and waits long where the machine is busy.
    env = {"OMP_NUM_THREADS": "1"} | env
    patience = {"interrupt_timeout": 30, "terminate_timeout": 5}
    session.run(python, "-c", code, *arguments, env=env, external=True, **patience)
