"""Single files for ComfyUI's model folders from a checkpoint folder, in a smaller dtype if wished.

A file carries what the folder's JSON files and tokenizer say in its metadata. Weights are read, converted and written
piece by piece, which the safetensors library cannot do: a conversion takes as much memory as `CHUNK` values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path

import torch

from . import __version__, fp8, int8, quantization
from .checkpoint import METADATA, Folder, check_folder, open_part, own_name
from .defaults import FILE_DTYPES, GGUF_DTYPES, PARTS
from .files import check_same, digest_of, state_of
from .gguf_convert import check_writer, write_gguf
from .header import read_header
from .load import check_part
from .tokenizer import tokenizer_json
from .vae import wan_name

CHUNK = 8 << 20
"""Values that are converted at once."""
SOURCE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in SOURCE_DTYPES.items()} | {torch.int8: "I8"}
_DTYPE_NAMES |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint8: "U8"}
_PLAIN = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_MATRICES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor to convert: where its bytes are in a file."""

    name: str
    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yields the values a piece at a time: whole rows [n, ...] of what has any, else all.

        Raises:
            RuntimeError: some are infinite or not a number, or the file has become shorter.
        """
        rows, width = (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)
        step = max(1, CHUNK // max(width, 1))
        with self.file.open("rb") as source:
            source.seek(self.start)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                data = source.read(count * width * self.dtype.itemsize)
                if len(data) < count * width * self.dtype.itemsize:
                    raise RuntimeError(f"{self.file} has become shorter while it was read: run again when it is whole")
                values = torch.frombuffer(bytearray(data), dtype=self.dtype) if data else torch.empty(0)
                if not torch.isfinite(values).all():
                    raise RuntimeError(
                        f"{self.file}: {self.name} holds values that are infinite or not a number (NaN), numbers "
                        "expected: nothing is converted from it"
                    )
                yield values.reshape(count, *self.shape[1:]) if self.shape else values


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: its new name and dtype.

    The values are those of `source`, in groups of `group` columns rotated (0: not), divided by `scale`: one, or one per
    row. Without a source they are the scale itself.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: SourceTensor | None
    scale: torch.Tensor | None = None
    group: int = 0

    def data(self) -> Iterator[bytes]:
        """Yields the bytes to write, a piece at a time.

        Raises:
            RuntimeError: see `SourceTensor.chunks`; or a value is too large for the dtype.
        """
        if self.source is None:
            yield _bytes_of(torch.empty(0) if self.scale is None else self.scale, self.dtype, self.name)
            return
        first = 0
        for piece in self.source.chunks():
            if self.scale is not None:
                piece = int8.rotate(piece.float(), self.group) if self.group else piece.float()
                piece = piece / (self.scale if self.scale.numel() == 1 else self.scale[first : first + len(piece)])
            first += len(piece)
            yield _bytes_of(piece, self.dtype, self.name)


def _bytes_of(values: torch.Tensor, dtype: torch.dtype, name: str) -> bytes:
    if dtype == torch.int8:
        values = values.round().clamp(-int8.LARGEST, int8.LARGEST)
    elif dtype.itemsize == 1 and dtype.is_floating_point:
        values = fp8.cast(values, dtype)
    elif dtype == torch.float16 and values.numel() and values.abs().max() > torch.finfo(dtype).max:
        raise RuntimeError(
            f"{name} holds values up to {float(values.abs().max()):.3g}, 65504 at most expected for float16: convert "
            "to bfloat16"
        )
    return values.to(dtype).reshape(-1).view(torch.uint8).numpy().tobytes()


Plan = tuple[list[OutputTensor], dict[str, str]]
"""The tensors of a file in their order, and its metadata."""


def convert(
    model: Path, out: Path, dtype: str = "bfloat16", on_bytes: Callable[[int], object] | None = None
) -> list[Path]:
    """Writes the three files of a checkpoint folder below `out` and returns them.

    They go to `diffusion_models`, `text_encoders` and `vae`. Each appears under its name only when it is whole, with
    its SHA-256 in a file beside it. The VAE is the same in every dtype: the file of an earlier conversion is kept.
    `on_bytes(n)` is called after each n bytes written.

    Raises:
        ValueError: the dtype is unknown.
        ModuleNotFoundError: GGUF is wanted, and the package that writes it is not installed.
        FileExistsError: a file is there already, other than this VAE.
        FileNotFoundError, RuntimeError: the folder is incomplete or of another model, its weights do not fit its
            configuration or are no numbers, or a file of it was written to meanwhile.
    """
    packs = dtype in GGUF_DTYPES
    if not packs and dtype not in FILE_DTYPES:
        raise ValueError(f"dtype {dtype!r} found, one of {', '.join((*FILE_DTYPES, *GGUF_DTYPES))} expected")
    if packs:
        check_writer()
    check_folder(model)
    suffix = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype) + (".gguf" if packs else ".safetensors")
    files = [
        out / "diffusion_models" / f"internvl_u_{suffix}",
        out / "text_encoders" / f"internvl_u_mllm_{suffix}",
        out / "vae" / "internvl_u_vae_bf16.safetensors",
    ]
    if any(model.resolve() in file.resolve().parents for file in files):
        raise ValueError(f"--out {out} lies in the checkpoint folder {model}: choose another folder")
    *named_by_dtype, vae = files
    there = [str(file) for file in named_by_dtype if file.exists()]
    if there:
        raise FileExistsError(f"{', '.join(there)} exist already: remove them or choose another folder")
    folder = Folder(model)
    before = [state_of(file) for file in folder.files()]
    sources = {part: list_tensors(folder, part) for part in PARTS}
    # Planning reads all weights, for their scales.
    planned = "bfloat16" if packs else dtype  # the blocks of a GGUF file are planned by their writer
    plans = [
        _plan_transformer(folder, sources["generation_decoder"], planned),
        _plan_language_model(folder, sources["vlm"], planned),
        _plan_vae(folder, sources["vae"]),
    ]
    # Names of this process's own: two conversions at once do not mix.
    partial = [file.with_name(f"{file.name}.{os.getpid()}.part") for file in files]
    writers = [partial_of(write_gguf, dtype=dtype) if file.suffix == ".gguf" else write_file for file in files]
    sums: dict[Path, str] = {}
    try:
        # The VAE first: if another one is there, that is said before hours of work.
        for file, part, plan, write in reversed([*zip(files, partial, plans, writers, strict=True)]):
            sums[file] = write(part, *plan, on_bytes)
            if file == vae:
                _is_kept(vae, part)
        check_same(before)
        made = len(files) - _is_kept(vae, partial[-1])
        put_all(partial[:made], files[:made])
    finally:
        for file in partial:
            file.unlink(missing_ok=True)
    for file in files[:made]:
        file.with_name(file.name + ".sha256").write_text(f"{sums[file]}  {file.name}\n")
    return files


def _is_kept(vae: Path, made: Path) -> bool:
    """Returns whether the VAE's weights are there already, of an earlier conversion.

    Only weights are compared: what stands beside them names the version of this package.

    Raises:
        FileExistsError: what is there is another one.
        RuntimeError: it is no safetensors file.
    """
    if not vae.exists():
        return False
    (there, start), (ours, begin) = read_header(vae), read_header(made)
    for header in (there, ours):
        header.pop("__metadata__", None)
    if there != ours or digest_of(vae, start=start) != digest_of(made, start=begin):
        raise FileExistsError(f"{vae} is there already and holds another VAE: rename it or choose another folder")
    return True


def write_file(
    file: Path,
    tensors: list[OutputTensor],
    metadata: dict[str, str],
    on_bytes: Callable[[int], object] | None = None,
) -> str:
    """Writes a safetensors file piece by piece and returns its SHA-256.

    Raises:
        RuntimeError: a source is no longer as it was, or holds what is no number.
        OSError: it could not be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with file.open("wb") as target:
        for data in _pieces(_header(tensors, metadata), tensors):
            target.write(data)
            digest.update(data)
            if on_bytes is not None:
                on_bytes(len(data))
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def put_all(partial: Sequence[Path], files: Sequence[Path]) -> None:
    """Gives whole files their names: all of them, or none where another conversion has taken one meanwhile.

    Raises:
        FileExistsError: one has.
    """
    given: list[Path] = []
    try:
        for part, file in zip(partial, files, strict=True):
            _put(part, file)
            given.append(file)
    except BaseException:
        for file in given:
            file.unlink(missing_ok=True)
        raise


def _put(part: Path, file: Path) -> None:
    try:
        os.link(part, file)  # unlike a rename, it fails where there is a file
    except OSError:
        if file.exists():
            raise FileExistsError(
                f"{file} was written by another conversion meanwhile: remove one of the two"
            ) from None
        os.replace(part, file)  # a file system without links


def _header(tensors: list[OutputTensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _pieces(header: bytes, tensors: list[OutputTensor]) -> Iterator[bytes]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield from tensor.data()


def _plan_transformer(folder: Folder, sources: dict[str, SourceTensor], dtype: str) -> Plan:
    return _plan_tensors(sources, dtype, {"part": "generation_decoder", "config": folder.config("generation_decoder")})


def _plan_language_model(folder: Folder, sources: dict[str, SourceTensor], dtype: str) -> Plan:
    description = {
        "part": "vlm",
        "config": folder.config("vlm"),
        "drawing": folder.transformer_config(),
        "processor": folder.processor_config(),
        "tokenizer": tokenizer_json(folder.tokenizer()),
    }
    return _plan_tensors(sources, dtype, description)


def _plan_vae(folder: Folder, sources: dict[str, SourceTensor]) -> Plan:
    renamed = {wan_name(name): tensor for name, tensor in sources.items()}
    return _plan_tensors(renamed, "bfloat16", {"part": "vae", "config": folder.config("vae")})


def _plan_tensors(sources: dict[str, SourceTensor], dtype: str, description: dict) -> Plan:
    outputs: list[OutputTensor] = []
    layers: dict[str, dict] = {}
    for name in sorted(sources):
        source = sources[name]
        if dtype in _PLAIN or not fp8.shrinks(name, source.shape):
            outputs.append(OutputTensor(name, _PLAIN.get(dtype, torch.bfloat16), source.shape, source))
        elif dtype in _MATRICES:
            outputs.append(OutputTensor(name, _MATRICES[dtype], source.shape, source))
        else:
            layer = name.removesuffix(".weight")
            matrix, scale = _scaled(layer, source, dtype)
            outputs += [matrix, scale]
            layers[layer] = _form_of(matrix)
    metadata = {METADATA: json.dumps(description | {"version": __version__}, ensure_ascii=False), "format": "pt"}
    if layers and dtype == "fp8_scaled_old":
        outputs.append(OutputTensor(quantization.OLD_MARKER, fp8.DTYPE, (0,), None))
    elif layers:
        metadata |= quantization.layers_entry(layers)
    return outputs, metadata


def _scaled(layer: str, source: SourceTensor, dtype: str) -> tuple[OutputTensor, OutputTensor]:
    """Returns a matrix divided by its scale, and the scale."""
    scale_name = f"{layer}.{quantization.OLD_SCALE if dtype == 'fp8_scaled_old' else quantization.SCALE}"
    if dtype in ("int8", "int8_convrot"):
        group = int8.group_for(source.shape[1]) if dtype == "int8_convrot" else 0
        scale = torch.cat([int8.scale_of(chunk, group) for chunk in source.chunks()])
        matrix = OutputTensor(f"{layer}.weight", torch.int8, source.shape, source, scale, group)
    else:
        scale = torch.tensor(fp8.scale_for(max(chunk.float().abs().max().item() for chunk in source.chunks())))
        matrix = OutputTensor(f"{layer}.weight", fp8.DTYPE, source.shape, source, scale)
    return matrix, OutputTensor(scale_name, torch.float32, tuple(scale.shape), None, scale)


def _form_of(matrix: OutputTensor) -> dict:
    """Returns a layer's format as ComfyUI spells it."""
    if matrix.dtype != torch.int8:
        return {"format": fp8.FORMAT}
    rotated = {"convrot": True, "convrot_groupsize": matrix.group} if matrix.group else {}
    return {"format": int8.FORMAT, **rotated}


def list_tensors(folder: Folder, part: str) -> dict[str, SourceTensor]:
    """Returns the tensors of a part by the names of our modules, checked as strictly as loading checks them.

    Raises:
        FileNotFoundError, RuntimeError: a file is missing or unreadable, or the weights do not fit the configuration.
    """
    opened = open_part(folder.path, part)
    check_part(opened)
    result: dict[str, SourceTensor] = {}
    for file in folder.weight_files(part):
        header, start = read_header(file)
        for stored, entry in header.items():
            name = own_name(stored, part)
            if name in opened.weights:
                result[name] = source_tensor(file, start, stored, entry)
    return result


def source_tensor(file: Path, start: int, name: str, entry: dict) -> SourceTensor:
    """Returns a tensor to convert, of its entry in the header of a file whose data begin at `start`.

    Raises:
        RuntimeError: it is of a dtype that is not converted.
    """
    if entry["dtype"] not in SOURCE_DTYPES:
        raise RuntimeError(f"{file}: {name} is {entry['dtype']}, one of {', '.join(SOURCE_DTYPES)} expected")
    dtype = SOURCE_DTYPES[entry["dtype"]]
    return SourceTensor(name, file, start + entry["data_offsets"][0], tuple(entry["shape"]), dtype)
