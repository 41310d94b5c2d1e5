"""The ComfyUI that the pack's nodes run in, and the pack as ComfyUI imports it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACK = "comfyui_internvl_u"


def use_comfyui(folder: Path, device: str = "cpu") -> str:
    """Makes the ComfyUI in `folder` importable in this process and returns its version.

    Raises:
        FileNotFoundError: the folder holds no ComfyUI.
    """
    if not (folder / "comfy" / "model_management.py").is_file():
        raise FileNotFoundError(f"no ComfyUI in {folder}: give the folder that holds its main.py with --comfyui")
    # Before the working directory, where our folder `nodes` would hide ComfyUI's module of that name.
    sys.path.insert(0, str(folder.resolve()))
    import comfy.cli_args
    import comfyui_version
    import utils.extra_config  # noqa: F401 - first, as in main.py: nodes.py puts ComfyUI's other module `utils` before it

    comfy.cli_args.args.cpu = device == "cpu"
    # What it takes on a GPU by itself. Its own choice on a CPU asks for free memory at every attention, which breaks
    # a compiled model into pieces.
    comfy.cli_args.args.use_pytorch_cross_attention = True
    return comfyui_version.__version__


def pack_module(name: str) -> ModuleType:
    """Returns a module of the pack, such as "native.load", imported as ComfyUI does: the root as a package.

    Its `internvl_u` is another copy than the one that benchmarks import: take from here what is handed to the module.
    """
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    return importlib.import_module(f"{PACK}.{name}")
