"""InternVL-U as ComfyUI's own objects. The only place that speaks with ComfyUI's model management."""

from __future__ import annotations

from pathlib import Path

import torch

from ...internvl_u.checkpoint import check_folder
from .mllm import load_mllm
from .model import load_model
from .vae import load_vae

_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}


def load(root: Path, precision: str = "auto"):
    """Returns MODEL, MLLM and VAE of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        RuntimeError: the folder holds another model, or files that are damaged or do not fit each other.
    """
    check_folder(root)
    dtype = _DTYPES[precision]
    return load_model(str(root), dtype), load_mllm(str(root), dtype), load_vae(str(root))
