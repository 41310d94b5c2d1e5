"""The ways onto a machine other than a clone: pip, the registry's archive, and a Python that finds no package by -m."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from .test_package import ROOT, imports, published

WHEEL = "from setuptools import build_meta; build_meta.build_wheel({out!r})"
INSTALLED = "import sys; sys.path.insert(0, sys.argv.pop(1)); from internvl_u.__main__ import main; sys.exit(main())"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def run(*line, cwd, **options):
    done = subprocess.run([str(part) for part in line], cwd=cwd, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What pip installs, unpacked; made in a copy, because setuptools writes beside its source."""
    pytest.importorskip("setuptools", minversion="70.1", reason="a development tool, see requirements-dev.txt")
    source, out, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheel", "site"))
    for name in ("internvl_u", "demo/internvl-u-nano"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-c", WHEEL.format(out=str(out)), cwd=source)
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(site)
    return site


def test_pip_installs_the_library_its_command_and_the_nano_model_and_no_nodes(wheel):
    assert sorted(place.name.partition("-")[0] for place in wheel.iterdir()) == ["internvl_u", "internvl_u"]
    (info,) = wheel.glob("*.dist-info")
    assert "internvl-u = internvl_u.__main__:main" in (info / "entry_points.txt").read_text()
    modules = {file.name for file in (ROOT / "internvl_u").glob("*.py")}
    assert {file.name for file in (wheel / "internvl_u").glob("*.py")} == modules
    nano = ROOT / "demo" / "internvl-u-nano"
    expected = {file.relative_to(nano) for file in nano.rglob("*") if file.is_file()}
    assert {file.relative_to(wheel / "internvl_u" / "nano") for file in wheel.rglob("nano/**/*.*")} == expected


def test_what_is_installed_draws_with_the_nano_model(wheel, tmp_path):
    line = (sys.executable, "-I", "-c", INSTALLED, wheel, "draw", "--model", "nano", "--prompt", "a red circle")
    run(*line, "--steps", 1, "--device", "cpu", "--out", "a.png", cwd=tmp_path)
    assert Image.open(tmp_path / "a.png").size == (64, 64)


def test_an_isolated_python_runs_the_command_line_by_its_folder(tmp_path):
    done = subprocess.run([sys.executable, "-I", "-m", "internvl_u"], cwd=ROOT, capture_output=True, text=True)
    if "No module named" not in done.stderr:
        pytest.skip("the library is installed in this Python")
    line = (sys.executable, "-I", ROOT)
    assert run(*line, "--version", cwd=tmp_path).strip() in PYPROJECT
    run(*line, "draw", "--model", "nano", "--prompt", "x", "--steps", 1, "--out", "a.png", cwd=tmp_path)
    assert (tmp_path / "a.png").is_file()


def test_the_extras_are_what_the_library_imports():
    listed = set()
    for block in re.findall(r"^(?:dependencies|standalone|gguf) = \[(.*?)\]", PYPROJECT, re.M | re.S):
        listed |= {re.split(r"[<>=]", name)[0].lower() for name in ast.literal_eval(f"[{block}]")}
    distributions = {"PIL": "pillow"}
    used = {
        module.split(".")[0]
        for file in (ROOT / "internvl_u").glob("*.py")
        for module, level in imports(file)
        if not level
    }
    used = {distributions.get(name, name) for name in used - set(sys.stdlib_module_names)}
    assert used - {"filelock"} == listed, "huggingface_hub brings filelock"


def test_pip_and_the_manager_install_the_same():
    (line,) = re.findall(r"^dependencies = (\[.*\])", PYPROJECT, re.M)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert ast.literal_eval(line) == [line for line in lines if line and not line.startswith("#")]


def test_the_archive_holds_what_runs_and_stays_small(archive):
    held = {file.relative_to(archive).as_posix() for file in archive.rglob("*") if file.is_file()}
    assert held == {name.relative_to(ROOT).as_posix() for name in published()}
    nano = {
        file.relative_to(ROOT).as_posix() for file in (ROOT / "demo" / "internvl-u-nano").rglob("*") if file.is_file()
    }
    assert "__main__.py" in held and "tools/demo.py" not in held
    size = {True: 0, False: 0}
    for name in held:
        size[name in nano] += (archive / name).stat().st_size
    assert size[True] < 17e6 and size[False] < 6e6, size


def test_the_registrys_pictures_are_there_and_of_its_sizes():
    for key, name, shape in (("Icon", "icon.png", 1), ("Banner", "banner.png", 21 / 9)):
        (url,) = re.findall(rf'^{key} = "(.*)"', PYPROJECT, re.M)
        assert url.startswith("https://raw.githubusercontent.com/InternVL-U/ComfyUI-InternVL-U/main/docs/"), url
        file = ROOT / "docs" / name
        assert url.endswith(f"/docs/{name}") and file.stat().st_size < 150_000
        with Image.open(file) as image:
            assert abs(image.width / image.height - shape) < 0.02 and image.width >= 400


@pytest.mark.skipif(os.name == "nt", reason="rights are others on Windows")
def test_a_read_only_pack_stays_as_it_is(archive, tmp_path):
    pack = Path(shutil.copytree(archive, tmp_path / "pack"))
    before = sorted(pack.rglob("*"))
    for place in (pack, *before):
        place.chmod(place.stat().st_mode & ~0o222)
    try:
        run(sys.executable, "-I", pack, "ask", "--model", "nano", "--prompt", "hi", "--max-new-tokens", 1, cwd=tmp_path)
        assert [place for place in sorted(pack.rglob("*")) if "__pycache__" not in place.parts] == before
    finally:
        for place in (pack, *before):
            place.chmod(place.stat().st_mode | 0o200)
