"""Rules that hold for the tree itself: layers, versions, what is published."""

import ast
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pack.internvl_u
import pytest
from pack.tools import tested

ROOT = Path(__file__).parent.parent.parent
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server"}
LIBRARY = {
    "torch",
    "numpy",
    "PIL",
    "einops",
    "safetensors",
    "tokenizers",
    "transformers",
    "tqdm",
    "pydantic",
    "gguf",
    "huggingface_hub",
    "filelock",
}


def imports(file):
    """Yields (module, how many dots stand before it) for each import of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, 0) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def files(folder):
    return sorted((ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("file", files("internvl_u"), ids=lambda f: f.name)
def test_the_library_knows_nothing_of_comfyui_or_the_nodes(file):
    for module, level in imports(file):
        assert level <= 1
        if level == 0:
            name = module.split(".")[0]
            assert name in LIBRARY or name in sys.stdlib_module_names, module


TRAINING = {"accelerate", "peft", "datasets"}
"""What the extra `train` brings, and what a dataset on disk may need."""


BATCH = {"ray", "pyarrow", "fsspec"}
"""What the extra `batch` brings."""


COMMANDS = [
    (file, brought)
    for folder, brought in (("finetune", TRAINING), ("batch", BATCH))
    for file in files(f"internvl_u/{folder}")
]


@pytest.mark.parametrize("file, brought", COMMANDS, ids=lambda one: one.name if isinstance(one, Path) else "")
def test_what_has_an_extra_of_its_own_stands_on_the_library(file, brought):
    for module, level in imports(file):
        name = module.split(".")[0]
        assert level <= 2 and (level or name in LIBRARY | brought or name in sys.stdlib_module_names), module


def test_nothing_else_imports_what_makes_lists():
    for folder in ("internvl_u", "internvl_u/finetune", "native", "nodes"):
        for file in files(folder):
            if file.name not in ("__main__.py", "arguments.py"):
                assert not (BATCH | {"batch"}) & {module.split(".")[0] for module, _ in imports(file)}, file


def test_nothing_that_runs_in_comfyui_imports_what_trains():
    for folder in ("internvl_u", "native", "nodes"):
        for file in files(folder):
            if file.name not in ("__main__.py", "arguments.py"):
                assert not [module for module, _ in imports(file) if "finetune" in module], file


@pytest.mark.parametrize("file", files("native"), ids=lambda f: f.name)
def test_the_native_layer_does_not_know_the_nodes(file):
    for module, level in imports(file):
        assert level in (0, 1) or (level == 2 and module.startswith("internvl_u")), module


@pytest.mark.parametrize("file", files("nodes"), ids=lambda f: f.name)
def test_the_nodes_are_schemas_over_the_other_layers(file):
    for module, level in imports(file):
        assert level in (0, 1) or module.startswith(("internvl_u", "native")), module
        assert module.split(".")[0] not in {"comfy", *LIBRARY}, module


@pytest.mark.parametrize("file", sorted((ROOT / "training").rglob("*.py")), ids=lambda f: f.name)
def test_training_stands_on_the_library_alone(file):
    for module, level in imports(file):
        inside = len(file.relative_to(ROOT / "training").parts)
        assert level <= inside if level else module.split(".")[0] not in HOST | {"pack", "native", "benchmarks"}, module


def test_functions_and_files_are_short():
    for folder in ("internvl_u", "internvl_u/batch", "internvl_u/finetune", "native", "nodes"):
        for file in files(folder):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 80, (file, node.name)


def test_the_root_stays_small_and_has_no_old_style_mappings():
    text = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30 and "NODE_CLASS_MAPPINGS" not in text


def test_the_version_stands_once():
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    assert pack.internvl_u.__version__ == stated
    assert f"[{stated}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_requirements_change_nobodys_torch():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    assert not [line for line in wanted if re.match(r"(torch|transformers|numpy|diffusers)|.*[=<>]", line)]


def published():
    def listed(*arguments):
        done = subprocess.run(["git", "ls-files", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.split("\n")

    tracked, ignored = listed(), listed("-ci", "-X", ".comfyignore")
    return [ROOT / name for name in sorted(set(tracked) - set(ignored)) if name]


SCANNED = {
    ".py": r"os\.environ|getenv|subprocess|urllib|requests|socket|(?<![\w.])(eval|exec)\(|\.(connect|bind|send|cuda)\(",
    ".js": r"\.connect\(|\.bind\(|\.send\(|\.exec\(|\beval\(",
}


def test_comfy_cli_finds_the_pack_in_order():
    pytest.importorskip("comfy_cli", reason="comfy-cli is a development tool, see requirements-dev.txt")
    line = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "node", "validate"]
    quiet = {"DO_NOT_TRACK": "1", "COMFY_NO_TELEMETRY": "1", "COMFY_NO_UPDATE_CHECK": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | quiet)
    assert done.returncode == 0 and "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr


def test_the_published_files_hold_nothing_that_the_registry_flags():
    names = published()
    assert ROOT / "nodes" / "load.py" in names and ROOT / "dev.py" not in names
    assert {ROOT / "locales" / "zh" / "nodeDefs.json", ROOT / "web" / "docs" / "InternVLU_WriteThought" / "zh.md"} <= {
        *names
    }
    for_developers = {"tests", "tools", "training", "benchmarks", "demo", ".ci", ".github"}
    nano = ROOT / "demo" / "internvl-u-nano"
    assert not [
        name for name in names if for_developers & set(name.relative_to(ROOT).parts) and nano not in name.parents
    ]
    assert not [name for name in names if name.name.startswith(".")]
    for name in names:
        pattern = SCANNED.get(name.suffix)
        if pattern:
            assert not re.search(pattern, name.read_text(encoding="utf-8")), name


def test_links_and_pictures_of_published_pages_are_published_too():
    names = set(published())
    pages = [name for name in names if name.suffix == ".md" and ROOT / "web" not in name.parents]
    assert ROOT / "README.md" in pages and len(pages) > 5
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            place = urllib.parse.unquote("".join(target).partition("#")[0])
            if place and ":" not in place:
                assert (page.parent / place).resolve() in names, (page.name, place)


def test_the_readme_lists_the_versions_that_were_tested():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == tested.filled(readme)
