"""Weight files: found, opened, checked against what is expected of them, and put into a network."""

from __future__ import annotations

import itertools
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .defaults import HOW_TO_GET
from .files import FileState, check_unchanged, listed, state_of
from .header import check_header, describe_weights
from .schema import ShardIndex, checked, read_json

SMALL = 256 << 20
"""Bytes up to which a file is read and not mapped: nothing that happens to it then reaches the weights in memory."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""What weights may be stored in."""
Weights = dict[str, torch.Tensor]
OpenFile = Callable[[Path], Weights]
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


def open_file(file: Path) -> Weights:
    """Returns a file's tensors by name, mapped from disk (read when first touched)."""
    with safe_open(file, framework="pt", device="cpu") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}


def save_weights(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the rights that a new file gets, whatever the library gives its own.

    Raises:
        SafetensorError, OSError: it could not be written.
    """
    file.touch()
    rights = stat.S_IMODE(file.stat().st_mode)
    save_file(dict(tensors), file, dict(metadata or {}))
    file.chmod(rights)


def weight_files(folder: Path) -> list[Path]:
    """Returns the folder's weight files in order of their names.

    Raises:
        FileNotFoundError: there is none, or a shard that a file name or the index announces is missing.
        RuntimeError: the folder may not be read, or its index is unreadable.
    """
    files = listed(folder, (".safetensors",))
    names = {file.name for file in files}
    announced: set[str] = set()
    for index in listed(folder, (".safetensors.index.json",)):
        announced |= set(checked(ShardIndex, read_json(index), str(index)).weight_map.values())
    missing, count = _missing(names, announced)
    if missing:
        raise FileNotFoundError(
            f"{folder}: {count} of {len(names) + count} weight files are missing: {', '.join(missing)}. "
            "Download them, or wait until they are."
        )
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors file. {HOW_TO_GET}.")
    return files


def open_files(files: Sequence[Path], open_file: OpenFile) -> tuple[Weights, tuple[FileState, ...]]:
    """Returns the tensors of files, and the state of those that are mapped; small files are read."""
    weights: Weights = {}
    origin: dict[str, Path] = {}
    mapped = []
    for file in files:
        before, found = _opened(file, open_file)
        twice = [name for name in found if name in origin]
        if twice:
            raise RuntimeError(
                f"{file.parent}: {len(twice)} tensors stand in both {origin[twice[0]].name} and {file.name} "
                f"({', '.join(twice[:5])}). Keep one of the two."
            )
        if before.size <= SMALL:
            found = {name: tensor.clone() for name, tensor in found.items()}
            check_unchanged([before])
        else:
            mapped.append(before)
        origin.update(dict.fromkeys(found, file))
        weights.update(found)
    return weights, tuple(mapped)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], part: str) -> None:
    """Makes sure that `found` has exactly the names and shapes of `expected`.

    Raises:
        RuntimeError: with the number of missing, extra and misshapen tensors and the first five of each.
    """
    missing = sorted(name for name in expected if name not in found)
    unexpected = sorted(name for name in found if name not in expected)
    misshapen = sorted(
        f"{name}: {list(found[name])} found, {list(shape)} expected"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    )
    kinds = (("missing", missing, ", "), ("unexpected", unexpected, ", "), ("of another shape", misshapen, "; "))
    problems = [f"{len(names)} {kind} ({between.join(names[:5])})" for kind, names, between in kinds if names]
    if problems:
        raise RuntimeError(
            f"{part}: {len(found)} tensors found, {len(expected)} expected: {'; '.join(problems)}. "
            "Weights and configuration do not belong together: take both from the same model."
        )


def check_finite_weights(weights: Mapping[str, torch.Tensor], part: str) -> None:
    """Makes sure that all weights are numbers. It reads them all: for small parts.

    Raises:
        RuntimeError: some are infinite or not a number.
    """
    wrong = sorted(name for name, tensor in weights.items() if not torch.isfinite(tensor).all())
    if wrong:
        raise RuntimeError(
            f"{part}: {len(wrong)} of {len(weights)} tensors hold values that are infinite or not a number (NaN): "
            f"{', '.join(wrong[:5])}"
        )


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], part: str) -> None:
    """Puts `weights` in place of a meta model's parameters, without a copy.

    Raises:
        RuntimeError: names or shapes differ.
    """
    check_shapes(shapes_of(model.state_dict()), shapes_of(weights), part)
    model.requires_grad_(False)  # before: whole numbers cannot require gradients
    model.load_state_dict(weights, strict=True, assign=True)


def check_dtypes(weights: Mapping[str, torch.Tensor], part: str, source: Path) -> None:
    """Makes sure that weights are of a floating-point dtype that we know; `source` is named.

    Raises:
        RuntimeError: some are not.
    """
    wrong = sorted(f"{name}: {str(tensor.dtype)[6:]}" for name, tensor in weights.items() if tensor.dtype not in DTYPES)
    if wrong:
        known = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise RuntimeError(
            f"{source}, {part}: {len(wrong)} of {len(weights)} tensors are of an unknown dtype "
            f"({', '.join(wrong[:5])}), one of {known} expected"
        )


def _opened(file: Path, open_file: OpenFile) -> tuple[FileState, Weights]:
    try:
        state = state_of(file)
        check_header(file)  # ComfyUI's own reading, in its newer versions, takes a header's word
        return state, open_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeError(describe_weights(file, error)) from error


def _missing(names: set[str], announced: set[str]) -> tuple[list[str], int]:
    """Returns the first five names that are missing, and how many are, of those that an index or a shard announces.

    A shard's count is a file name's word: nothing of that length is made or gone through.
    """
    missing = announced - names
    first, count = sorted(missing)[:5], len(missing)
    known = names | missing
    sets: dict[tuple[str, int, str], int] = {}
    for match in filter(None, map(_SHARD.fullmatch, known)):
        key = (match[1], len(match[2]), match[3])
        sets[key] = sets.get(key, 0) + (1 <= int(match[2]) <= int(match[3]))
    for (stem, width, total), found in sets.items():
        count += int(total) - found
        shards = (f"{stem}-{number:0{width}d}-of-{total}.safetensors" for number in range(1, int(total) + 1))
        first += itertools.islice((shard for shard in shards if shard not in known), 5)
    return first[:5], count
