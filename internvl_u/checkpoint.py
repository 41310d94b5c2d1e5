"""An opened checkpoint: a folder in the released layout, or single files as `convert` writes them.

`open_part` reads everything that is known of a part once: its weights, large files mapped from disk and never copied,
its configuration, and the scales of quantised layers. Weights are found by listing a part's folder, because mirrors
differ in file names and shard counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol, cast

import torch

from .defaults import HOW_TO_GET, PARTS
from .dequantize import PackedMatrix
from .files import FileState
from .header import header_bytes, metadata_of, read_header
from .lora import check_merged
from .quantization import QuantizedLayer, joined, split_layers
from .schema import Description, ModelIndex, checked, parse, read_json
from .weights import OpenFile, Weights, check_dtypes, open_file, open_files, shapes_of, weight_files

METADATA = "internvl_u"
"""Key in a file's metadata: what the folder's JSON files say, as JSON."""
PADDING = "encoder_padding_token"
"""A tensor of the released files that only fills padding in training."""
GGUF_ENDING = ".gguf"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "*token*.json")
_SAVED_PREFIX = "model.diffusion_model."
_PREFIXES = {"generation_decoder": ("decoder.", _SAVED_PREFIX)}


@dataclass(frozen=True)
class Part:
    """One of the three parts, opened.

    `weights` go by the names of our modules (of the VAE: diffusers' or Wan 2.1's, as they are stored); `layers` are
    the quantised ones. `mapped` are the files, as they were, that weights are mapped from; `packed` says which weights
    are bytes of packed matrices; `source` names where the configuration stands.
    """

    checkpoint: WeightFormat
    name: str
    weights: Weights
    config: dict
    layers: dict[str, QuantizedLayer]
    mapped: tuple[FileState, ...] = ()
    packed: Mapping[str, PackedMatrix] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where the configuration stands, for errors."""
        return self.checkpoint.config_place(self.name)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights' shapes by name; of quantised and packed matrices those of the values that they stand for."""
        shapes = shapes_of(self.weights) | {name: packing.shape for name, packing in self.packed.items()}
        for layer, one in self.layers.items():
            rows, columns = shapes[f"{layer}.weight"]
            shapes[f"{layer}.weight"] = (rows, columns * one.values_per_byte)
        return shapes

    @property
    def plain(self) -> Weights:
        """The weights that are numbers as they are."""
        return {
            name: tensor
            for name, tensor in self.weights.items()
            if name not in self.packed and name.removesuffix(".weight") not in self.layers
        }

    def files(self) -> list[Path]:
        """Returns the files that the part alone is read from."""
        files = self.checkpoint.files()
        return [file for file in files if file == self.checkpoint.path or file.parent.name == self.name]

    def mapped_by(self, used: Mapping[str, torch.Tensor]) -> tuple[FileState, ...]:
        """Returns `mapped` if a tensor of `used`, a network's weights by name, is still mapped; else nothing."""
        pairs = ((tensor, used[name]) for name, tensor in self.weights.items() if name in used)
        return self.mapped if any(one.data_ptr() == other.data_ptr() for one, other in pairs) else ()


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

    def config_place(self, part: str) -> str:
        """Returns where the configuration of a part stands, for errors."""
        ...

    def weights(self, part: str, open_file: OpenFile) -> tuple[Weights, tuple[FileState, ...]]:
        """Returns the tensors of a part as they are stored, and the files that they are mapped from.

        `open_file` opens one safetensors file.

        Raises:
            FileNotFoundError, RuntimeError: a file is missing or unreadable.
        """
        ...

    @property
    def packed(self) -> Mapping[str, PackedMatrix]:
        """How tensors of `weights` are packed, by name; those that it does not name are numbers as they are."""
        ...

    def metadata(self, part: str) -> Mapping[str, str]:
        """Returns what stands beside the tensors of a part, as safetensors has it.

        Raises:
            RuntimeError: the file is unreadable.
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

    def config_place(self, part: str) -> str:
        return str(self.path / part / "config.json")

    def weight_files(self, part: str) -> list[Path]:
        """Returns the files of a part's weights; see `weights.weight_files`."""
        return weight_files(self.path / part)

    def weights(self, part: str, open_file: OpenFile) -> tuple[Weights, tuple[FileState, ...]]:
        return open_files(self.weight_files(part), open_file)

    def metadata(self, part: str) -> Mapping[str, str]:
        return joined([metadata_of(file) for file in self.weight_files(part)], self.path / part)

    @property
    def packed(self) -> Mapping[str, PackedMatrix]:
        return {}

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
    key: ClassVar[str] = METADATA

    @cached_property
    def _metadata(self) -> dict[str, str]:
        return metadata_of(self.path)

    def metadata(self, part: str) -> Mapping[str, str]:
        return self._metadata

    @property
    def packed(self) -> Mapping[str, PackedMatrix]:
        return {}

    @cached_property
    def description(self) -> Description:
        """What `convert` wrote of the part; empty in a file that is not ours."""
        return self._described(self._metadata.get(METADATA, "{}"))

    def _described(self, text: str) -> Description:
        source = self.config_place("")
        return checked(Description, parse(text, source), source)

    def config_place(self, part: str) -> str:
        return f"{self.path}, {self.key} in its metadata"

    def config(self, part: str) -> dict:
        found = self.description
        if found.part not in (None, part):
            raise RuntimeError(f"{self.path} holds the {found.part} of InternVL-U, {part} expected")
        return found.config

    def weights(self, part: str, open_file: OpenFile) -> tuple[Weights, tuple[FileState, ...]]:
        return open_files([self.path], open_file)

    def files(self) -> list[Path]:
        return [self.path]

    def transformer_config(self) -> dict:
        return self.description.drawing

    def processor_config(self) -> dict:
        return self.description.processor

    def tokenizer(self) -> str:
        if self.description.tokenizer is None:
            raise RuntimeError(f"{self.path} carries no tokenizer: convert the checkpoint folder again")
        return self.description.tokenizer


def open_checkpoint(source: Path) -> WeightFormat:
    """Returns the format that a checkpoint folder or a single file is in. Nothing is read yet."""
    if source.is_dir():
        return Folder(source)
    if source.suffix == GGUF_ENDING:
        from .gguf_file import GGUF  # it is a single file as well, and derived from it

        return GGUF(source)
    return SingleFile(source)


def open_part(source: Path, part: str, open_file: OpenFile = open_file) -> Part:
    """Returns a part ("vlm", "generation_decoder" or "vae") of a checkpoint folder, or of a single file.

    Raises:
        FileNotFoundError: the folder lacks a file.
        RuntimeError: a file is damaged, unreadable, of another part or quantised in an unknown way.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.config(part)
    stored, mapped = checkpoint.weights(part, open_file)
    check_merged(stored, source)
    # By their stored names, which a list of quantised layers has as well.
    weights, layers = split_layers(stored, checkpoint.metadata(part), source)
    weights = {own_name(name, part): tensor for name, tensor in weights.items()}
    layers = {own_name(name, part): layer for name, layer in layers.items()}
    if part == "generation_decoder":
        weights.pop(PADDING, None)
    packed = {name: packing for name, packing in checkpoint.packed.items() if name in weights}
    opened = Part(checkpoint, part, weights, config, layers, mapped, packed)
    check_dtypes(opened.plain, part, source)
    return opened


def own_name(stored: str, part: str) -> str:
    """Returns the name in our modules of a tensor or layer of a part, by its name in a file."""
    for prefix in _PREFIXES.get(part, ()):
        stored = stored.removeprefix(prefix)
    return stored


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
        RuntimeError: the folder holds another model, or is a file.
    """
    if root.is_file():
        raise RuntimeError(f"{root} is a file, a checkpoint folder expected")
    if not root.is_dir():
        raise FileNotFoundError(f"no model folder {root}. {HOW_TO_GET} into it.")
    index = root / "model_index.json"
    if index.is_file():
        name = checked(ModelIndex, read_json(index), str(index)).class_name
        if name != "InternVLUPipeline":
            raise RuntimeError(f"{root} holds a {name}, InternVLUPipeline expected. {HOW_TO_GET}.")
    missing = [part for part in PARTS if not (root / part / "config.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{root} has no {', '.join(f'{part}/config.json' for part in missing)}. {HOW_TO_GET}.")


def holds_transformer(file: Path) -> bool:
    """Returns whether a file's header is that of InternVL-U's transformer: its queries come with gates."""
    try:
        if file.suffix == GGUF_ENDING:
            return cast(SingleFile, open_checkpoint(file)).description.part == "generation_decoder"
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
        if file.suffix != GGUF_ENDING and METADATA.encode() not in header_bytes(file)[0]:
            return False
        return cast(SingleFile, open_checkpoint(file)).description.part == "vlm"
    except (RuntimeError, OSError, ValueError):
        return False
