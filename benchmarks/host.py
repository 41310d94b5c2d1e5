"""The ComfyUI that the pack's nodes run in."""

from __future__ import annotations

import sys
from pathlib import Path


def use_comfyui(folder: Path, device: str = "cpu") -> str:
    """Makes the ComfyUI in `folder` importable in this process and returns its version.

    Raises:
        FileNotFoundError: the folder holds no ComfyUI.
    """
    if not (folder / "comfy" / "model_management.py").is_file():
        raise FileNotFoundError(f"no ComfyUI in {folder}: give the folder that holds its main.py with --comfyui")
    sys.path.insert(0, str(folder.resolve()))
    import comfy.cli_args
    import comfyui_version

    comfy.cli_args.args.cpu = device == "cpu"
    # What it takes on a GPU by itself. Its own choice on a CPU asks for free memory at every attention, which breaks
    # a compiled model into pieces.
    comfy.cli_args.args.use_pytorch_cross_attention = True
    return comfyui_version.__version__
