"""A checkpoint as MODEL, MLLM and VAE."""

from __future__ import annotations

from pathlib import Path

from ...internvl_u.checkpoint import check_folder
from .mllm import load_mllm
from .model import load_model
from .precision import PRECISIONS
from .vae import load_vae


def load(drawing: Path, precision: str = "auto", language: Path | None = None, vae: Path | None = None):
    """Returns MODEL, MLLM and VAE.

    `drawing` is a checkpoint folder, or a single file of the transformer; then `language` and `vae` are files too.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        RuntimeError: the folder holds another model, or files that are damaged or do not fit each other.
        ValueError: the precision does not fit a file.
    """
    if drawing.is_dir():
        check_folder(drawing)
    language, vae = language or drawing, vae or drawing
    dtype = PRECISIONS[precision]
    model, mllm = load_model(str(drawing), dtype), load_mllm(str(language), dtype)
    wanted, handed_on = model.model.diffusion_model.config.context_width, mllm.context_width
    if wanted != handed_on:
        raise RuntimeError(
            f"{language} hands on {handed_on} values a token, {drawing} expects {wanted}: they do not belong together"
        )
    return model, mllm, load_vae(str(vae))
