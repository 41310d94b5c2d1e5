"""Single files for ComfyUI's model folders from a checkpoint folder, in a smaller dtype if wished.

A file carries what the folder's JSON files and tokenizer say in its metadata. Scaled fp8 follows ComfyUI's convention:
one scale a matrix, absmax / 448, named `weight_scale` and listed in the metadata key `_quantization_metadata`; the
older spelling is `scale_weight` beside a tensor `scaled_fp8`. Weights are read, converted and written piece by piece.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from . import __version__
from .checkpoint import check_folder, read_header, read_json, weight_files
from .prompt import find_tokenizer, tokenizer_text
from .source import METADATA, PADDING, QUANTIZATION
from .vae import wan_name

CHOICES = ("bfloat16", "fp8_e4m3fn", "fp8_scaled", "fp8_scaled_old")
FP8 = torch.float8_e4m3fn
CHUNK = 8 << 20
"""Values that are converted at once."""
_KEPT = ("img_in.", "txt_in.", "proj_out.", "norm_out.", "lm_head.", "embed")
"""Matrices that stay in bfloat16 among fp8 ones: what stands at the ends of a network, and embeddings."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", FP8: "F8_E4M3", torch.uint8: "U8"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes are."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yields the values, flat, a piece at a time."""
        width = self.dtype.itemsize
        left = int(numpy.prod(self.shape, dtype=numpy.int64)) * width
        with self.file.open("rb") as source:
            source.seek(self.start)
            while left:
                data = source.read(min(left, CHUNK * width))
                if not data:
                    raise RuntimeError(f"{self.file} ends too early. Download it again.")
                left -= len(data)
                yield torch.frombuffer(bytearray(data), dtype=self.dtype)


@dataclass(frozen=True)
class Wanted:
    """A tensor to write: its new name and dtype, and the scale that its values are divided by."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Stored | None
    scale: float | None = None

    def data(self) -> Iterable[bytes]:
        """Yields the bytes to write, a piece at a time."""
        if self.source is None:
            pieces = [torch.tensor([] if self.scale is None else [self.scale], dtype=torch.float32)]
        else:
            pieces = self.source.chunks()
        for piece in pieces:
            if self.source is not None and self.scale is not None:
                piece = piece.float() / self.scale
            if self.dtype == FP8:
                piece = piece.float().clamp(-448.0, 448.0)
            yield piece.to(self.dtype).view(torch.uint8).numpy().tobytes()


def convert(
    model: Path, out: Path, choice: str = "bfloat16", on_bytes: Callable[[int], None] | None = None
) -> list[Path]:
    """Writes the three files of a checkpoint folder below `out` and returns them.

    They go to `diffusion_models`, `text_encoders` and `vae`. Each appears under its name only when it is whole, with
    its SHA-256 in a file beside it. `on_bytes(n)` hears of each n bytes written.

    Raises:
        ValueError: the choice is unknown.
        FileExistsError: a file is there already.
        FileNotFoundError, RuntimeError: the folder is incomplete, damaged or of another model.
    """
    if choice not in CHOICES:
        raise ValueError(f"dtype {choice!r} found, one of {', '.join(CHOICES)} expected")
    check_folder(model)
    suffix = {"bfloat16": "bf16"}.get(choice, choice)
    plans = {
        out / "diffusion_models" / f"internvl_u_{suffix}.safetensors": _drawing(model, choice),
        out / "text_encoders" / f"internvl_u_mllm_{suffix}.safetensors": _language(model, choice),
        out / "vae" / "internvl_u_vae_bf16.safetensors": _vae(model),
    }
    there = [str(file) for file in plans if file.exists()]
    if there:
        raise FileExistsError(f"{', '.join(there)} exist already: remove them or choose another folder")
    for file, (tensors, metadata) in plans.items():
        write_file(file, tensors, metadata, on_bytes)
    return list(plans)


def write_file(file: Path, tensors: list[Wanted], metadata: dict[str, str], on_bytes=None) -> None:
    """Writes a safetensors file piece by piece, and its SHA-256 to `FILE.sha256`; whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header, end = {"__metadata__": metadata}, 0
    for tensor in tensors:
        size = int(numpy.prod(tensor.shape, dtype=numpy.int64)) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    part, digest = file.with_name(file.name + ".part"), hashlib.sha256()
    try:
        with part.open("wb") as target:
            for data in _pieces(text, tensors):
                target.write(data)
                digest.update(data)
                if on_bytes is not None:
                    on_bytes(len(data))
            target.flush()
            os.fsync(target.fileno())
        file.with_name(file.name + ".sha256").write_text(f"{digest.hexdigest()}  {file.name}\n")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _pieces(header: bytes, tensors: list[Wanted]) -> Iterator[bytes]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield from tensor.data()


def _drawing(model: Path, choice: str) -> tuple[list[Wanted], dict[str, str]]:
    folder = model / "generation_decoder"
    stored = {name.removeprefix("decoder."): tensor for name, tensor in _stored(folder).items() if name != PADDING}
    told = {"part": "generation_decoder", "config": read_json(folder / "config.json")}
    return _planned(stored, choice, told)


def _language(model: Path, choice: str) -> tuple[list[Wanted], dict[str, str]]:
    processor = model / "processor" / "processor_config.json"
    told = {
        "part": "vlm",
        "config": read_json(model / "vlm" / "config.json"),
        "drawing": read_json(model / "generation_decoder" / "config.json"),
        "processor": read_json(processor) if processor.is_file() else {},
        "tokenizer": tokenizer_text(find_tokenizer(model)),
    }
    return _planned(_stored(model / "vlm"), choice, told)


def _vae(model: Path) -> tuple[list[Wanted], dict[str, str]]:
    stored = {wan_name(name): tensor for name, tensor in _stored(model / "vae").items()}
    told = {"part": "vae", "config": read_json(model / "vae" / "config.json")}
    return _planned(stored, "bfloat16", told)


def _planned(stored: dict[str, Stored], choice: str, told: dict) -> tuple[list[Wanted], dict[str, str]]:
    wanted, layers = [], {}
    for name in sorted(stored):
        source = stored[name]
        shrinks = choice != "bfloat16" and name.endswith(".weight") and len(source.shape) == 2
        if not shrinks or any(kept in name for kept in _KEPT):
            wanted.append(Wanted(name, torch.bfloat16, source.shape, source))
        elif choice == "fp8_e4m3fn":
            wanted.append(Wanted(name, FP8, source.shape, source))
        else:
            layer, scale = name.removesuffix(".weight"), _scale(source)
            scale_name = f"{layer}.scale_weight" if choice == "fp8_scaled_old" else f"{layer}.weight_scale"
            layers[layer] = {"format": "float8_e4m3fn"}
            wanted.append(Wanted(name, FP8, source.shape, source, scale))
            wanted.append(Wanted(scale_name, torch.float32, (), None, scale))
    metadata = {METADATA: json.dumps(told | {"version": __version__}, ensure_ascii=False), "format": "pt"}
    if layers and choice == "fp8_scaled":
        metadata[QUANTIZATION] = json.dumps({"format_version": "1.0", "layers": layers})
    if layers and choice == "fp8_scaled_old":
        wanted.append(Wanted("scaled_fp8", FP8, (0,), None))
    return wanted, metadata


def _scale(source: Stored) -> float:
    largest = max(chunk.float().abs().max().item() for chunk in source.chunks())
    return float(torch.tensor(largest / 448.0, dtype=torch.float32)) or 1.0


def _stored(folder: Path) -> dict[str, Stored]:
    result: dict[str, Stored] = {}
    for file in weight_files(folder):
        header, start = read_header(file)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise RuntimeError(f"{file}: {name} is {entry['dtype']}, one of {', '.join(_DTYPES)} expected")
            if name in result:
                raise RuntimeError(f"{name} stands in both {result[name].file} and {file}. Keep one of the two.")
            result[name] = Stored(
                file, start + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            )
    return result
