"""A checkpoint folder with LoRAs merged into its weights: those of files, and those that a trainer has left inside.

PEFT, in the middle of training, saves a layer `X.weight` as `X.base_layer.weight` beside `X.lora_A.default.weight` and
`X.lora_B.default.weight`. What is written has the released layout, each weight under its own name in its own dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from .adapters import Adapter, changes_weight, merged, merged_bias, rank_of
from .checkpoint import PADDING, Folder, Part, check_folder, open_part, own_name
from .convert import CHUNK, OutputTensor, source_tensor, write_file
from .defaults import FOLDERS, PARTS
from .files import check_same, state_of
from .header import read_header
from .load import check_part
from .lora import (
    LANGUAGE,
    TRANSFORMER,
    AdapterConfig,
    LayerNames,
    adapter_config,
    check_adapters,
    check_kinds,
    check_numbers,
    read_lora,
    set_alphas,
    sort_tensors,
    split_key,
)
from .weights import check_dtypes, open_file, shapes_of

SUMS = "SHA256SUMS"
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*")
_TRAINED = ("use_llm_lora", "use_backbone_lora")
"""In vlm/config.json: ranks of a LoRA on the language model and on the vision tower; InternVL's alpha is twice that."""
_WRAPPED = ((re.compile(r"base_model\.model\."), ""), (re.compile(r"\.base_layer\."), "."))
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")
_ORIGINAL = ".original_module."
OnBytes = Callable[[int], object]


class Merged(NamedTuple):
    """The weight files that were written, and what was taken of each LoRA, in sentences."""

    files: list[Path]
    reports: list[str]


@dataclass(frozen=True)
class MergedTensor(OutputTensor):
    """A weight or bias to write with adapters added, each at its strength."""

    changes: tuple[tuple[Adapter, float], ...] = ()

    def data(self) -> Iterable[bytes]:
        """Yields the bytes to write; unlike other tensors, it is in memory as a whole.

        Raises:
            RuntimeError: the result is beyond what the dtype holds.
        """
        assert self.source is not None
        values = torch.cat([piece.float() for piece in self.source.chunks()]).reshape(self.shape)
        change = merged_bias if self.name.endswith(".bias") else merged
        for adapter, strength in self.changes:
            values = change(values, adapter, strength)
        values = values.to(self.dtype)
        if not torch.isfinite(values.float()).all():
            raise RuntimeError(
                f"{self.name} with the LoRA is beyond what {str(self.dtype)[6:]} holds, or not a number: use a smaller "
                "strength"
            )
        for piece in values.flatten().split(CHUNK):
            yield piece.contiguous().view(torch.uint8).numpy().tobytes()


@dataclass
class StoredPart:
    """A part's weights as they are stored: what is written of them, and the adapters that lie between them."""

    folder: Folder
    name: str
    shapes: dict[str, tuple[int, ...]]
    inside: dict[str, torch.Tensor]
    changes: dict[str, list[tuple[Adapter, float]]] = field(default_factory=dict)

    def add(self, layers: Mapping[str, Adapter], strength: float) -> None:
        """Lets adapters, by layer, be merged."""
        for layer, adapter in layers.items():
            self.changes.setdefault(layer, []).append((adapter, strength))

    def files(self) -> list[tuple[Path, list[OutputTensor], dict[str, str]]]:
        """Returns each file's name, tensors and metadata, as they are to be written."""
        result = []
        for file in self.folder.weight_files(self.name):
            header, start = read_header(file)
            metadata = header.pop("__metadata__", {})
            tensors = [self._output(file, start, name, entry) for name, entry in header.items() if _plain_name(name)]
            if tensors:
                result.append((Path(self.name) / file.name, tensors, metadata))
        return result

    def _output(self, file: Path, start: int, stored: str, entry: dict) -> OutputTensor:
        source = source_tensor(file, start, stored, entry)
        name = _plain_name(stored)
        layer, _, last = own_name(name, self.name).rpartition(".")
        wanted = {"weight": changes_weight, "bias": lambda adapter: "diff_b" in adapter}.get(
            last, lambda adapter: False
        )
        changes = tuple(one for one in self.changes.get(layer, ()) if wanted(one[0]))
        return (
            MergedTensor(name, source.dtype, source.shape, source, changes=changes)
            if changes
            else OutputTensor(name, source.dtype, source.shape, source)
        )


def merge(
    model: Path,
    out: Path,
    loras: Sequence[tuple[Path, float]] = (),
    alpha: float | None = None,
    on_bytes: OnBytes | None = None,
) -> Merged:
    """Writes the checkpoint folder `out`: `model` with `loras`, each at its strength, and with those inside at 1.

    `alpha` is that of a LoRA inside which does not state it. The folder appears under its name only when it is whole,
    with the SHA-256 of its weight files in `SHA256SUMS`. `on_bytes(n)` is called after each n bytes written.

    Raises:
        ValueError: there is nothing to merge, `out` lies in `model`, or a scale stands nowhere.
        FileExistsError: `out` is there already.
        FileNotFoundError, RuntimeError: the folder is incomplete or of another model, a LoRA is unreadable, does not
            fit or is of a kind that cannot be merged, or a file was written to meanwhile.
        OSError: it could not be written.
    """
    check_folder(model)
    _check_out(model, out)
    absent = [str(file) for file, _ in loras if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"no file {', '.join(absent)} for --lora")
    folder = Folder(model)
    partial = out.with_name(f"{out.name}.{os.getpid()}.part")  # of this process's own: two merges do not mix
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"--out {out}: nothing can be written there ({error.strerror or error})") from error
    try:
        before = [state_of(file) for file in (*folder.files(), *(file for file, _ in loras))]
        parts = [_open(folder, name) for name in (TRANSFORMER, LANGUAGE)]
        reports = [_take_inside(part, alpha) for part in parts if part.inside]
        reports += [_take_file(parts, file, strength) for file, strength in loras]
        if not reports:
            raise ValueError(f"no --lora given and none found in {model}, one expected: there is nothing to merge")
        written = _write(folder, parts, partial, on_bytes)
        check_same(before)
        for name in PARTS:
            check_part(open_part(partial, name))
        _put(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged([out / file for file in written], reports)


def _check_out(model: Path, out: Path) -> None:
    if os.path.lexists(out):
        raise FileExistsError(f"--out {out} exists already: remove it or choose another folder")
    inner, outer = out.resolve(), model.resolve()
    if outer in inner.parents:
        raise ValueError(f"--out {out} lies in the checkpoint folder {model}: choose another folder")


def _open(folder: Folder, name: str) -> StoredPart:
    """Returns a part whose plain weights are checked as strictly as loading checks them."""
    stored, _ = folder.weights(name, open_file)
    inside = {key: tensor for key, tensor in stored.items() if split_key(key)[1]}
    plain = {own_name(clean, name): tensor for key, tensor in stored.items() if (clean := _plain_name(key))}
    twice = len(stored) - len(inside) - sum(_ORIGINAL in key for key in stored) - len(plain)
    if twice:
        raise RuntimeError(f"{folder.path / name}: {twice} weights stand in it twice, by themselves and as PEFT's")
    if name == TRANSFORMER:
        plain.pop(PADDING, None)
    check_dtypes(stored, name, folder.path)
    check_part(Part(folder, name, plain, folder.config(name), {}))
    return StoredPart(folder, name, shapes_of(plain), inside)


def _take_inside(part: StoredPart, alpha: float | None) -> str:
    place = part.folder.path / part.name
    found, unknown = sort_tensors(part.inside, LayerNames({part.name: part.shapes}), str(place))
    if unknown:
        raise RuntimeError(
            f"{place}: {len(unknown)} of {len(part.inside)} tensors of a LoRA belong to no weight there: "
            f"{', '.join(unknown[:5])}"
        )
    check_adapters(found, {part.name: part.shapes}, str(place))
    check_numbers(part.inside, str(place))
    layers = found[part.name]
    for layer, adapter in layers.items():
        set_alphas({part.name: {layer: adapter}}, {part.name: _config_inside(part, layer, alpha)})
        if "alpha" not in adapter and rank_of(adapter) is not None:
            raise ValueError(
                f"{place}: how the LoRA on {layer} is scaled stands nowhere, adapter_config.json or {_TRAINED[0]} in "
                "config.json expected: give --alpha (lora_alpha of the training)"
            )
    check_kinds(layers, str(place))
    part.add(layers, 1.0)
    return f"{place}: {len(layers)} layers with a LoRA inside, merged at 1"


def _config_inside(part: StoredPart, layer: str, alpha: float | None) -> AdapterConfig:
    if alpha is not None:
        return AdapterConfig(lora_alpha=alpha)
    for place in (part.folder.path / part.name, part.folder.path):
        if (place / "adapter_config.json").is_file():
            return adapter_config(place / "adapter_config.json")
    rank = part.folder.config(part.name).get(_TRAINED[layer.startswith("vision_model.")])
    if part.name == LANGUAGE and isinstance(rank, int) and 0 < rank < 1 << 20:
        return AdapterConfig(lora_alpha=2.0 * rank)
    return AdapterConfig()


def _take_file(parts: Sequence[StoredPart], file: Path, strength: float) -> str:
    lora = read_lora(file, {part.name: part.shapes for part in parts})
    for part in parts:
        layers = lora.layers.get(part.name, {})
        check_kinds(layers, str(file))
        if strength:
            part.add(layers, strength)
    return lora.summary({part.name: strength for part in parts})


def _write(folder: Folder, parts: Sequence[StoredPart], target: Path, on_bytes: OnBytes | None) -> list[Path]:
    """Writes everything below `target`; returns the weight files' names in it."""
    sums: dict[Path, str] = {}
    for part in parts:
        (target / part.name).mkdir()
        for file, tensors, metadata in part.files():
            sums[file] = write_file(target / file, tensors, metadata, on_bytes)
    _copy_texts(folder.path, target)
    for source in folder.weight_files("vae"):
        file = Path("vae") / source.name
        sums[file] = _copy(source, target / file, on_bytes)
    for part in parts:
        _rewrite_indexes(target, part)
    config = target / LANGUAGE / "config.json"
    stated = json.loads(config.read_text(encoding="utf-8"))
    if any(stated.get(key) for key in _TRAINED):
        config.write_text(_text(stated | {key: 0 for key in _TRAINED if key in stated}), encoding="utf-8")
    lines = [f"{digest}  {file.as_posix()}\n" for file, digest in sums.items()]
    (target / SUMS).write_text("".join(lines), encoding="utf-8")
    return list(sums)


def _copy_texts(source: Path, target: Path) -> None:
    for place in ("", *FOLDERS):
        for pattern in COPIED:
            for file in sorted((source / place).glob(pattern)):
                wanted = file.is_file() and not file.name.startswith(".") and file.name != "adapter_config.json"
                if wanted:
                    (target / place).mkdir(exist_ok=True)
                    shutil.copyfile(file, target / place / file.name)


def _rewrite_indexes(target: Path, part: StoredPart) -> None:
    """Lists in a part's index what its files hold now."""
    for index in (target / part.name).glob("*.safetensors.index.json"):
        places, size = {}, 0
        for file, tensors, _ in part.files():
            places |= {tensor.name: file.name for tensor in tensors}
            size += sum(tensor.dtype.itemsize * torch.Size(tensor.shape).numel() for tensor in tensors)
        index.write_text(_text({"metadata": {"total_size": size}, "weight_map": places}), encoding="utf-8")


def _copy(source: Path, target: Path, on_bytes: OnBytes | None) -> str:
    digest = hashlib.sha256()
    target.parent.mkdir(exist_ok=True)
    with source.open("rb") as reading, target.open("wb") as writing:
        while data := reading.read(CHUNK):
            writing.write(data)
            digest.update(data)
            if on_bytes is not None:
                on_bytes(len(data))
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()


def _put(partial: Path, out: Path) -> None:
    try:
        if os.path.lexists(out):
            raise OSError  # an empty folder would be replaced
        os.rename(partial, out)
    except OSError as error:
        if os.path.lexists(out):
            raise FileExistsError(f"--out {out} was written by another program meanwhile: remove it") from None
        raise OSError(f"--out {out}: it cannot be named so ({error.strerror or error})") from error


def _plain_name(stored: str) -> str:
    """Returns a stored weight's name without what PEFT has put into it; "" for what is not written."""
    if split_key(stored)[1] or _ORIGINAL in stored:
        return ""
    for pattern, instead in _WRAPPED:
        stored = pattern.sub(instead, stored)
    return _SAVED.sub(".", stored)


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
