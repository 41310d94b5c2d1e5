"""A checkpoint as MODEL, MLLM and VAE."""

from __future__ import annotations

from pathlib import Path

import comfy.model_patcher
import comfy.sd

from ..internvl_u.checkpoint import check_folder
from .dtypes import PRECISIONS
from .mllm import NativeMLLM, load_mllm
from .model import load_model
from .vae import load_vae


def load(
    transformer: Path, precision: str = "auto", language: Path | None = None, vae: Path | None = None
) -> tuple[comfy.model_patcher.ModelPatcher, NativeMLLM, comfy.sd.VAE]:
    """Returns MODEL, MLLM and VAE.

    `transformer` is a checkpoint folder, or a single file of the transformer; then `language` and `vae` are files too.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        RuntimeError: the folder holds another model, or files that are damaged or do not fit each other.
        ValueError: the precision does not fit a file.
    """
    if transformer.is_dir():
        check_folder(transformer)
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} found, one of {', '.join(PRECISIONS)} expected")
    language, vae = language or transformer, vae or transformer
    dtype = PRECISIONS[precision]
    model, mllm = load_model(str(transformer), dtype), load_mllm(str(language), dtype)
    expected, found = model.model.diffusion_model.config.context_width, mllm.context_width
    if expected != found:
        raise RuntimeError(
            f"{language} hands on {found} values per token, {transformer} expects {expected}: they do not belong "
            "together"
        )
    return model, mllm, load_vae(str(vae))
