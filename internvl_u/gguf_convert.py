"""A part of a checkpoint folder as a GGUF file, written by the package `gguf`; a matrix at a time is in memory.

What is packed: all matrices but the two ends of the transformer, its time embedding, and tables of embeddings. The
language model's table of tokens and its `lm_head`, 311 million values each of the released 2.3 billion, are packed a
little finer than the rest: their errors are those of whole tokens. llama.cpp does so as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from .checkpoint import METADATA
from .dequantize import FORMATS, PackedMatrix
from .files import digest_of
from .gguf_header import ARCHITECTURE, DESCRIPTION
from .quantize import quantize

if TYPE_CHECKING:
    from .convert import OutputTensor

FILE_TYPES = {"Q8_0": 7, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18}
"""llama.cpp's numbers of a file's usual dtype."""
TOKEN_MATRICES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_KEPT = ("img_in.", "txt_in.", "time_text_embed.", "proj_out.", "norm_out.", "embedding")


def check_writer() -> None:
    """Makes sure that the package that writes GGUF files is there.

    Raises:
        ModuleNotFoundError: it is not.
    """
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("GGUF files are written by the package gguf: pip install gguf") from error


def form_of(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Returns the format that a tensor is written in, "BF16" for what is not packed.

    Rows that are no whole number of a K-quant's 256 values are packed as Q8_0, whose blocks are of 32.
    """
    if not name.endswith(".weight") or len(shape) != 2 or any(kept in name for kept in _KEPT):
        return "BF16"
    wanted = "Q6_K" if name in TOKEN_MATRICES and dtype != "Q8_0" else dtype
    return next((form for form in (wanted, "Q8_0") if shape[1] % FORMATS[form].values == 0), "BF16")


def write_gguf(
    file: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], object] | None = None,
    *,
    dtype: str,
) -> str:
    """Writes a part's GGUF file and returns its SHA-256; see `convert.write_file`, whose arguments these are.

    Raises:
        RuntimeError: a source is no longer as it was, or holds what is no number.
        OSError: it could not be written.
    """
    import gguf

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_string("general.name", "InternVL-U")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_string(DESCRIPTION, metadata[METADATA])
    planned: list[tuple[OutputTensor, str, int]] = []
    for tensor in tensors:
        form = form_of(tensor.name, tensor.shape, dtype)
        size = math.prod((*tensor.shape, 2) if form == "BF16" else PackedMatrix(form, tensor.shape).stored_shape)
        planned.append((tensor, form, size))
        kind = gguf.GGMLQuantizationType[form]
        writer.add_tensor_info(tensor.name, tensor.shape, numpy.dtype("float32"), size, raw_dtype=kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, form, size in planned:
            writer.write_tensor_data(_packed(tensor, form, size))
            if on_bytes is not None:
                on_bytes(size)
        writer.flush()
    finally:
        writer.close()
    with file.open("rb+") as written:
        os.fsync(written.fileno())
    return digest_of(file)


def _packed(tensor: OutputTensor, form: str, size: int) -> numpy.ndarray:
    """Returns a tensor's bytes. Pieces of a source are whole blocks of every format, and a row is one run of blocks."""
    data, end = numpy.empty(size, numpy.uint8), 0
    for values in tensor.source.chunks() if tensor.source else ():
        piece = _blocks(values.reshape(-1), form).reshape(-1)
        data[end : end + piece.size] = piece
        end += piece.size
    return data


def _blocks(values: torch.Tensor, form: str) -> numpy.ndarray:
    import gguf

    if form == "BF16":
        return values.to(torch.bfloat16).view(torch.uint8).numpy()
    if form == "Q8_0":
        return gguf.quants.quantize(values.float().numpy().reshape(1, -1), gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    return quantize(values, form).numpy()
