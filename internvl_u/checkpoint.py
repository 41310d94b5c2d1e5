"""An opened checkpoint: a folder in the released layout, or single files as `convert` writes them.

`open_part` reads everything that is known of a part once: its weights, mapped from disk and never copied, its
configuration, and the scales of quantised layers. Weights are found by listing a part's folder, because mirrors differ
in file names and shard counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from .fp8 import split_scales
from .header import header_bytes, in_short, read_header

REPOSITORY = "InternVL-U/InternVL-U"
PARTS = ("vlm", "generation_decoder", "vae")
METADATA = "internvl_u"
"""Key in a file's metadata: what the folder's JSON files say, as JSON."""
PADDING = "encoder_padding_token"
"""A tensor of the released files that only fills padding in training."""
HOW_TO_GET = (
    f"Download {REPOSITORY} from Hugging Face (or OpenGVLab/InternVL-U from ModelScope) with its subfolders "
    "vlm, generation_decoder, vae, scheduler and processor"
)
Weights = dict[str, torch.Tensor]
OpenFile = Callable[[Path], Weights]
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "*token*.json")
_SAVED_PREFIX = "model.diffusion_model."
_PREFIXES = {"generation_decoder": ("decoder.", _SAVED_PREFIX)}


@dataclass(frozen=True)
class Part:
    """One of the three parts, opened.

    `weights` go by the names of our modules (of the VAE: diffusers' or Wan 2.1's, as they are stored); `scales` and
    `formats` are those of quantised layers, by layer.
    """

    checkpoint: WeightFormat
    name: str
    weights: Weights
    config: dict
    scales: Weights
    formats: dict[str, dict[str, str]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights' shapes by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.weights.items()}


class WeightFormat(Protocol):
    """What a checkpoint's files can be asked for, however they are stored."""

    @property
    def path(self) -> Path:
        """The folder or the file."""
        ...

    def config(self, part: str) -> dict:
        """Returns the configuration of a part.

        Raises:
            FileNotFoundError, RuntimeError: it is missing, unreadable or of another part.
        """
        ...

    def weights(self, part: str, open_file: OpenFile) -> tuple[Weights, Mapping[str, str]]:
        """Returns the tensors of a part as they are stored, and the metadata beside them; `open_file` opens one file.

        Raises:
            FileNotFoundError, RuntimeError: a file is missing or damaged.
        """
        ...

    def files(self) -> list[Path]:
        """Returns the files that are read: weights, JSON, tokenizer; nothing else that lies beside them."""
        ...

    def transformer_config(self) -> dict:
        """Returns the transformer's configuration, which tells what is handed on to it."""
        ...

    def processor_config(self) -> dict:
        """Returns how images are prepared; empty where it is not stated."""
        ...

    def tokenizer(self) -> Path | str:
        """Returns the folder of the tokenizer's files, or the text of a tokenizer.json.

        Raises:
            FileNotFoundError, RuntimeError: there is none.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder in the released layout."""

    path: Path

    def config(self, part: str) -> dict:
        return read_json(self.path / part / "config.json")

    def weights(self, part: str, open_file: OpenFile) -> tuple[Weights, Mapping[str, str]]:
        weights: Weights = {}
        origin: dict[str, str] = {}
        for file in weight_files(self.path / part):
            found = _opened(file, open_file)
            twice = [name for name in found if name in origin]
            if twice:
                raise RuntimeError(
                    f"{self.path / part}: {len(twice)} tensors stand in both {origin[twice[0]]} and {file.name} "
                    f"({', '.join(twice[:5])}). Keep one of the two."
                )
            origin.update(dict.fromkeys(found, file.name))
            weights.update(found)
        return weights, {}

    def files(self) -> list[Path]:
        patterns = [f"{part}/{name}" for part in PARTS for name in ("*.safetensors", "*.index.json", "config.json")]
        patterns += [f"{place}/{name}" for place in ("processor", "vlm") for name in _TOKENIZER_FILES]
        patterns += ["model_index.json", "processor/processor_config.json"]
        found = (file for pattern in patterns for file in self.path.glob(pattern))
        return sorted(file for file in found if file.is_file() and not file.name.startswith("."))

    def transformer_config(self) -> dict:
        return self.config("generation_decoder")

    def processor_config(self) -> dict:
        file = self.path / "processor" / "processor_config.json"
        return read_json(file) if file.is_file() else {}

    def tokenizer(self) -> Path:
        places = [self.path / part for part in ("processor", "vlm")]  # the second in some mirrors
        for place in places:
            if (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file():
                return place
        raise FileNotFoundError(f"no tokenizer.json or vocab.json in {places[0]} or {places[1]}. {HOW_TO_GET}.")


@dataclass(frozen=True)
class SingleFile:
    """A part in a safetensors file of its own, with what the folder's JSON files say in its metadata."""

    path: Path

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The file's metadata, as safetensors has it."""
        return read_header(self.path)[0].get("__metadata__", {})

    @property
    def description(self) -> dict:
        """What `convert` wrote of the part; empty in a file that is not ours."""
        try:
            described = json.loads(self.metadata.get(METADATA, "{}"))
        except (ValueError, RecursionError) as error:
            raise RuntimeError(f"{self.path}: {METADATA} in its metadata is no JSON ({in_short(error)})") from error
        if not isinstance(described, dict):
            raise RuntimeError(
                f"{self.path}: {METADATA} in its metadata is a {type(described).__name__}, not an object"
            )
        return described

    def config(self, part: str) -> dict:
        found = self.description
        if found.get("part", part) != part:
            raise RuntimeError(f"{self.path} holds the {found['part']} of InternVL-U, {part} expected")
        return found.get("config", {})

    def weights(self, part: str, open_file: OpenFile) -> tuple[Weights, Mapping[str, str]]:
        return _opened(self.path, open_file), self.metadata

    def files(self) -> list[Path]:
        return [self.path]

    def transformer_config(self) -> dict:
        return self.description.get("drawing", {})

    def processor_config(self) -> dict:
        return self.description.get("processor", {})

    def tokenizer(self) -> str:
        if "tokenizer" not in self.description:
            raise RuntimeError(f"{self.path} carries no tokenizer: convert the checkpoint folder again")
        return self.description["tokenizer"]


def open_file(file: Path) -> Weights:
    """Returns a file's tensors by name, mapped from disk (read when first touched)."""
    with safe_open(file, framework="pt", device="cpu") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}


def open_checkpoint(source: Path) -> WeightFormat:
    """Returns the format that a checkpoint folder or a single file is in. Nothing is read yet."""
    return Folder(source) if source.is_dir() else SingleFile(source)


def open_part(source: Path, part: str, open_file: OpenFile = open_file) -> Part:
    """Returns a part ("vlm", "generation_decoder" or "vae") of a checkpoint folder, or of a single file.

    Raises:
        FileNotFoundError: the folder lacks a file.
        RuntimeError: a file is damaged, unreadable, of another part or quantised in an unknown way.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.config(part)
    stored, metadata = checkpoint.weights(part, open_file)
    for prefix in _PREFIXES.get(part, ()):
        stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    if part == "generation_decoder":
        stored.pop(PADDING, None)
    quantized = split_scales(stored, metadata, source)
    return Part(checkpoint, part, quantized.weights, config, quantized.scales, quantized.formats)


def is_checkpoint(root: Path) -> bool:
    """Returns whether `root` looks like a released InternVL-U folder (its parts are there; nothing is opened)."""
    try:
        return all((root / part / "config.json").is_file() for part in PARTS)
    except OSError:  # a folder without the right to be read
        return False


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


def holds_transformer(file: Path) -> bool:
    """Returns whether a file's header is that of InternVL-U's transformer: its queries come with gates."""
    try:
        if b"txt_norm.weight" not in header_bytes(file)[0]:  # so that foreign files cost no parsing
            return False
        header = read_header(file)[0]
    except (RuntimeError, OSError, ValueError):
        return False
    names = {name.removeprefix(_SAVED_PREFIX): entry for name, entry in header.items()}
    query, key = (names.get(f"transformer_blocks.0.attn.{name}.weight") for name in ("to_q", "to_k"))
    if query is None or key is None or "txt_norm.weight" not in names:
        return False
    return len(query["shape"]) == len(key["shape"]) == 2 and query["shape"][0] == 2 * key["shape"][0]


def holds_language_model(file: Path) -> bool:
    """Returns whether a file says in its metadata that `convert` made it of the language model."""
    try:
        if METADATA.encode() not in header_bytes(file)[0]:
            return False
        return SingleFile(file).description.get("part") == "vlm"
    except (RuntimeError, OSError, ValueError):
        return False


def read_json(path: Path) -> dict:
    """Returns the JSON object in `path`.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"{path} is not readable as JSON ({in_short(error)})") from error
    if not isinstance(value, dict):
        raise RuntimeError(f"{path} holds a {type(value).__name__}, a JSON object expected. Download it again.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Returns the folder's weight files in order of their names.

    Raises:
        FileNotFoundError: there is none, or a shard that a file name or the index announces is missing.
    """
    # Hidden files are none: macOS puts `._model.safetensors` beside a file that it copies.
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file() and not file.name.startswith("."))
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


def check_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], part: str) -> None:
    """Makes sure that `found` has exactly the names and shapes of `expected`.

    Raises:
        RuntimeError: with the number of missing, extra and misshapen tensors and the first five of each.
    """
    missing = sorted(name for name in expected if name not in found)
    unexpected = sorted(name for name in found if name not in expected)
    misshapen = sorted(
        f"{name}: {list(found[name].shape)} found, {list(tensor.shape)} expected"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    )
    kinds = (("missing", missing, ", "), ("unexpected", unexpected, ", "), ("of another shape", misshapen, "; "))
    problems = [f"{len(names)} {kind} ({between.join(names[:5])})" for kind, names, between in kinds if names]
    if problems:
        raise RuntimeError(
            f"{part}: {len(found)} tensors found, {len(expected)} expected: {'; '.join(problems)}. "
            "The files do not fit the configuration beside them; download the folder again."
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
    check_weights(model.state_dict(), weights, part)
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False)


def _opened(file: Path, open_file: OpenFile) -> Weights:
    try:
        return open_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise RuntimeError(f"{file} is damaged ({error}). Download it again.") from error


def _siblings(name: str) -> list[str]:
    match = re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", name)
    if match is None:
        return []
    stem, number, count = match.groups()
    return [f"{stem}-{i:0{len(number)}d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
