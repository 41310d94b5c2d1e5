"""Reading a checkpoint folder in the released layout: finding its parts, mapping its weights, strict checks.

Weights are found by listing a part's folder, because mirrors differ in file names and shard counts. They stay
mapped from disk: nothing here copies a tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

REPOSITORY = "InternVL-U/InternVL-U"
LARGEST_HEADER = 100 << 20  # what the safetensors library accepts
OpenFile = Callable[[Path], dict[str, torch.Tensor]]
PARTS = ("vlm", "generation_decoder", "vae")
HOW_TO_GET = (
    f"Download {REPOSITORY} from Hugging Face (or OpenGVLab/InternVL-U from ModelScope) with its subfolders "
    "vlm, generation_decoder, vae, scheduler and processor"
)


def is_checkpoint(root: Path) -> bool:
    """Tells whether `root` looks like a released InternVL-U folder (its parts are there; nothing is opened)."""
    return all((root / part / "config.json").is_file() for part in PARTS)


def check_folder(root: Path) -> None:
    """Makes sure that `root` is an InternVL-U checkpoint folder.

    Raises:
        FileNotFoundError: the folder or one of its parts is missing.
        RuntimeError: the folder holds another model.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no model folder {root}. {HOW_TO_GET} into it.")
    index = root / "model_index.json"
    if index.is_file():
        name = read_json(index).get("_class_name")
        if name != "InternVLUPipeline":
            raise RuntimeError(f"{root} holds a {name}, InternVLUPipeline expected. {HOW_TO_GET}.")
    missing = [part for part in PARTS if not (root / part / "config.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{root} has no {', '.join(f'{part}/config.json' for part in missing)}. {HOW_TO_GET}.")


def read_json(path: Path) -> dict:
    """Returns the JSON object in `path`.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RuntimeError(f"{path} is not readable as JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise RuntimeError(f"{path} holds a {type(value).__name__}, a JSON object expected. Download it again.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Returns the folder's weight files in order of their names.

    Raises:
        FileNotFoundError: there is none, or a shard that a file name or the index announces is missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    expected = {shard for file in files for shard in _siblings(file.name)}
    for index in folder.glob("*.safetensors.index.json"):
        expected |= set(read_json(index).get("weight_map", {}).values())
    missing = sorted(expected - {file.name for file in files})
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(expected)} weight files are missing: {', '.join(missing[:5])}. "
            "Download them again."
        )
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors file. {HOW_TO_GET}.")
    return files


def open_file(file: Path) -> dict[str, torch.Tensor]:
    """Returns a file's tensors by name, mapped from disk (read when first touched)."""
    with safe_open(file, framework="pt", device="cpu") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}


def read_header(file: Path) -> tuple[dict, int]:
    """Returns a safetensors file's header and where its data begins, in bytes.

    Raises:
        RuntimeError: the file is damaged or no safetensors file.
    """
    try:
        with file.open("rb") as source:
            size = int.from_bytes(source.read(8), "little")
            if not 2 <= size <= min(LARGEST_HEADER, file.stat().st_size - 8):
                raise ValueError(f"a header of {size} bytes")
            return json.loads(source.read(size)), 8 + size
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{file} is damaged ({error}). Download it again.") from error


def map_file(file: Path, open_file: OpenFile = open_file) -> dict[str, torch.Tensor]:
    """Returns one file's tensors by name.

    Raises:
        RuntimeError: the file is damaged.
    """
    try:
        return open_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeError(f"{file} is damaged ({error}). Download it again.") from error


def map_weights(folder: Path, open_file: OpenFile = open_file) -> dict[str, torch.Tensor]:
    """Returns all tensors of a part's folder by name; `open_file` maps one file.

    Raises:
        FileNotFoundError: see `weight_files`.
        RuntimeError: a file is damaged, or two files hold the same tensor.
    """
    weights: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    for file in weight_files(folder):
        found = map_file(file, open_file)
        twice = [name for name in found if name in origin]
        if twice:
            raise RuntimeError(
                f"{folder}: {len(twice)} tensors stand in both {origin[twice[0]]} and {file.name} "
                f"({', '.join(twice[:5])}). Keep one of the two."
            )
        origin.update(dict.fromkeys(found, file.name))
        weights.update(found)
    return weights


def strip_prefix(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the weights with `prefix` taken off the names that have it; other names are kept."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def check_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], part: str) -> None:
    """Makes sure that `found` has exactly the names and shapes of `expected`.

    Raises:
        RuntimeError: with the number of missing, extra and misshapen tensors and the first five of each.
    """
    problems = []
    for kind, names in (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
    ):
        if names:
            problems.append(f"{len(names)} {kind} ({', '.join(sorted(names)[:5])})")
    wrong = [
        f"{name}: {list(found[name].shape)} found, {list(tensor.shape)} expected"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({'; '.join(sorted(wrong)[:5])})")
    if problems:
        raise RuntimeError(
            f"{part}: {len(found)} tensors found, {len(expected)} expected: {'; '.join(problems)}. "
            "The files do not fit the configuration beside them; download the folder again."
        )


def fill(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], part: str) -> None:
    """Puts `weights` in place of a meta model's parameters, without a copy.

    Raises:
        RuntimeError: names or shapes differ.
    """
    check_weights(model.state_dict(), weights, part)
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False)


def _siblings(name: str) -> list[str]:
    match = re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", name)
    if match is None:
        return []
    stem, number, count = match.groups()
    return [f"{stem}-{i:0{len(number)}d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
