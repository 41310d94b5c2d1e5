"""LoRA files, whoever has written them: their tensors by the names of our modules.

A key is a layer's name in one of many spellings and, after it, which tensor of the adapter it is. The spellings are
those of ComfyUI and ai-toolkit (`diffusion_model.`), diffusers (`transformer.`), PEFT (`base_model.model.`), kohya and
musubi (`lora_unet_` with underscores), LyCORIS (`lycoris_`, LoHa, LoKr), OneTrainer (`lora_transformer_`) and of the
checkpoint itself (`decoder.`, `vlm.language_model.`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from .adapters import Adapter, can_be_merged, problem_of, rank_of
from .header import metadata_of
from .schema import Section, checked, parse, read_json
from .weights import check_dtypes, open_file, open_files

TRANSFORMER, LANGUAGE = "generation_decoder", "vlm"
PART_NAMES = {TRANSFORMER: "MODEL", LANGUAGE: "MLLM"}
"""What the parts are called in messages: ComfyUI's inputs."""
Shapes = Mapping[str, tuple[int, ...]]
LONGEST_NAME = 500
"""Characters; the longest of a layer's spellings has about 100."""
_ADAPTER_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"  # PEFT's, such as `default`
_SUFFIXES = tuple(
    (re.compile(pattern + "$"), name)
    for pattern, name in (
        (rf"\.lora_A{_ADAPTER_NAME}(?:\.weight)?", "lora_down.weight"),
        (rf"\.lora_B{_ADAPTER_NAME}(?:\.weight)?", "lora_up.weight"),
        (rf"\.lora_magnitude_vector{_ADAPTER_NAME}(?:\.weight)?", "dora_scale"),
        (r"[._]lora(?:_linear_layer)?[._](down|up|mid)\.weight", r"lora_\1.weight"),
        (rf"\.(hada_[wt][12](?:_[ab])?|lokr_(?:w[12](?:_[ab])?|t2)){_ADAPTER_NAME}", r"\1"),
        (r"\.(alpha|dora_scale|diff|diff_b|oft_blocks|rescale)", r"\1"),
        (r"\.w_norm", "diff"),
        (r"\.b_norm", "diff_b"),
    )
)
_UNDERSCORED = re.compile(r"(?:lora_[a-z]+\d*|lycoris)_")
_WRAPPERS = re.compile(r"(?:base_model\.model|_orig_mod)\.")  # PEFT's and torch.compile's, anywhere in a name
_UNMERGED = re.compile(r"\.(lora_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.|^base_model\.model\.")
_PREFIXES = (
    "diffusion_model.",
    "transformer.",
    "generation_decoder.",
    "decoder.",
    "unet.",
    "base_model.model.",
    "vlm.",
    "mllm.",
    "text_encoders.",
    "text_encoder.",
    "language_model.",
    "llm.",
    "model.",
    "module.",
)
_TAILS = ("language_model.model.", "language_model.", "vision_model.encoder.", "vision_model.")
"""What trainers leave away before a layer of the language model, who wrap only a part of it."""
_OTHERS = (
    (r"(down|up|mid|input|output|middle)_blocks?[._]|lora_te[12]?_text_model", "Stable Diffusion"),
    (r"single_(transformer_)?blocks|double_blocks", "Flux or HunyuanVideo"),
    (r"joint_blocks|joint_transformer_blocks", "Stable Diffusion 3 or AuraFlow"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)", "Wan"),
    (r"layers[._]\d+[._](attention|feed_forward)", "Z-Image or Lumina"),
    (r"transformer_blocks", "Qwen-Image or another transformer with blocks of the same names"),
    (r"layers[._]\d+[._](self_attn|mlp)", "a language model"),
)


class AdapterConfig(Section):
    """PEFT's adapter_config.json: what scales the product of the two matrices."""

    lora_alpha: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    alpha: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None  # of LoHa and LoKr
    alpha_pattern: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], float] = {}
    use_rslora: bool = False

    def alpha_of(self, layer: str, rank: int) -> float | None:
        """Returns what is divided by the rank; None if it is not stated."""
        patterns = self.alpha_pattern.items()
        found = next((value for key, value in patterns if _same_end(key, layer)), None)
        whole = self.alpha if self.lora_alpha is None else self.lora_alpha
        alpha = whole if found is None else found
        return alpha * math.sqrt(rank) if alpha is not None and self.use_rslora else alpha


@dataclass(frozen=True)
class LoRA:
    """An opened file: adapters by part and layer, and the keys that fit nothing."""

    file: Path
    layers: dict[str, dict[str, Adapter]]
    unknown: tuple[str, ...]
    keys: int

    def summary(self, strengths: Mapping[str, float]) -> str:
        """Returns what was taken and what was not, in a sentence; `strengths` by part."""
        taken = [
            f"{len(self.layers[part])} layers of the {PART_NAMES[part]} at {strength:g}"
            for part, strength in strengths.items()
            if self.layers.get(part)
        ]
        text = f"{self.file.name}: {', '.join(taken) or 'nothing is changed'}"
        if not self.unknown:
            return f"{text}; all {self.keys} keys fit"
        other = [name for part, name in PART_NAMES.items() if part not in strengths]
        where = f" (connect the {other[0]} too if they are its)" if other else ""
        return (
            f"{text}; {len(self.unknown)} of {self.keys} keys fit nothing here and are left out{where}: "
            f"{_first(self.unknown)}"
        )


class LayerNames:
    """The layers of one or both parts, found by any spelling of their names."""

    def __init__(self, shapes: Mapping[str, Shapes]):
        self._found: dict[str, tuple[str, str]] = {}
        for part, tensors in shapes.items():
            for layer in dict.fromkeys(
                name.rpartition(".")[0] for name in tensors if name.endswith((".weight", ".bias"))
            ):
                for spelled in (layer, *(layer.removeprefix(tail) for tail in _TAILS if part == LANGUAGE)):
                    self._found.setdefault(spelled, (part, layer))
                    self._found.setdefault(spelled.replace(".", "_"), (part, layer))

    def find(self, spelled: str) -> tuple[str, str] | None:
        """Returns (part, layer) of a name in whatever spelling; None for one that is no layer of ours."""
        if len(spelled) > LONGEST_NAME:
            return None
        name = _WRAPPERS.sub("", spelled)
        prefixes: Iterable[str] = _PREFIXES
        if "." not in name:
            name = _UNDERSCORED.sub("", name, count=1) if _UNDERSCORED.match(name) else name
            prefixes = [prefix.replace(".", "_") for prefix in _PREFIXES]
        while name not in self._found:
            prefix = next((one for one in prefixes if name.startswith(one)), None)
            if prefix is None:
                return None
            name = name.removeprefix(prefix)
        return self._found[name]


def read_lora(file: Path, shapes: Mapping[str, Shapes]) -> LoRA:
    """Returns a LoRA file's adapters for the parts whose weights have these `shapes`, by part and name.

    Raises:
        RuntimeError: the file is unreadable, of another model, holds what is no number, or adapters of another shape.
    """
    opened, mapped = open_files([file], open_file)
    tensors = {name: tensor.clone() for name, tensor in opened.items()} if mapped else opened
    layers, unknown = sort_tensors(tensors, LayerNames(shapes), str(file))
    if not layers:
        raise RuntimeError(_foreign(file, tuple(tensors), shapes))
    left = frozenset(unknown)
    taken = {name: tensor for name, tensor in tensors.items() if name not in left}
    check_dtypes({name: one for name, one in taken.items() if not name.endswith(".alpha")}, "LoRA", file)
    check_adapters(layers, shapes, str(file))
    check_numbers(taken, str(file))
    set_alphas(layers, _stated_alphas(file))
    return LoRA(file, layers, unknown, len(tensors))


def sort_tensors(
    tensors: Mapping[str, torch.Tensor], names: LayerNames, source: str
) -> tuple[dict[str, dict[str, Adapter]], tuple[str, ...]]:
    """Returns adapters by part and layer, and the keys that fit nothing; `source` is named in errors.

    Raises:
        RuntimeError: two keys stand for the same tensor.
    """
    layers: dict[str, dict[str, Adapter]] = {}
    unknown = []
    for key, tensor in tensors.items():
        spelled, suffix = split_key(key)
        found = names.find(spelled) if suffix else None
        if found is None:
            unknown.append(key)
            continue
        part, layer = found
        adapter = layers.setdefault(part, {}).setdefault(layer, {})
        if suffix in adapter:
            raise RuntimeError(
                f"{source}: {key[:200]} and another key both stand for {layer}.{suffix}, one expected: it holds "
                "several adapters. Save one alone."
            )
        adapter[suffix] = tensor[:, None] if suffix == "dora_scale" and tensor.ndim == 1 else tensor
    return layers, tuple(unknown)


def split_key(key: str) -> tuple[str, str]:
    """Returns a key's layer, as it is spelled, and which tensor of the adapter it is; "" for what is none."""
    for pattern, name in _SUFFIXES:
        if match := pattern.search(key):
            return key[: match.start()], match.expand(name)
    return key, ""


def check_adapters(layers: Mapping[str, Mapping[str, Adapter]], shapes: Mapping[str, Shapes], source: str) -> None:
    """Makes sure that adapters are whole and fit the weights.

    Raises:
        RuntimeError: with the count and the first five that do not.
    """
    every = [(part, layer, adapter) for part, found in layers.items() for layer, adapter in found.items()]
    wrong = [
        f"{layer}: {problem}"
        for part, layer, adapter in every
        if (problem := problem_of(adapter, shapes[part].get(f"{layer}.weight"), shapes[part].get(f"{layer}.bias")))
    ]
    if wrong:
        raise RuntimeError(
            f"{source}: {len(wrong)} of {len(every)} layers do not fit: {'; '.join(wrong[:5])}. It was made for a "
            "model of another size, or is damaged: take one that was made for InternVL-U."
        )


def check_kinds(layers: Mapping[str, Adapter], source: str) -> None:
    """Makes sure that adapters are of kinds that `adapters.merged` knows.

    Raises:
        RuntimeError: with the count and the first five that are not.
    """
    wrong = [
        f"{layer} ({', '.join(sorted(adapter))})" for layer, adapter in layers.items() if not can_be_merged(adapter)
    ]
    if wrong:
        raise RuntimeError(
            f"{source}: {len(wrong)} of {len(layers)} layers are no LoRA, DoRA, LoHa or LoKr: {'; '.join(wrong[:5])}. "
            "They cannot be merged: use the file in ComfyUI."
        )


def check_numbers(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Makes sure that all values are numbers.

    Raises:
        RuntimeError: some are infinite or not a number.
    """
    wrong = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all())
    if wrong:
        raise RuntimeError(
            f"{source}: {len(wrong)} of {len(tensors)} tensors hold values that are infinite or not a number (NaN), "
            f"numbers expected: {_first(wrong)}. The training has failed: take an earlier save."
        )


def check_merged(names: Iterable[str], source: Path) -> None:
    """Makes sure that no LoRA lies unmerged between a checkpoint's weights, as trainers save it with PEFT.

    Raises:
        RuntimeError: with the count and the first five names; says how to merge it.
    """
    found = sorted(name for name in names if _UNMERGED.search(name))
    if found:
        raise RuntimeError(
            f"{source}: {len(found)} tensors of a LoRA that is not merged found ({_first(found)}), plain "
            "weights expected: `python -m internvl_u merge --model FOLDER --out NEW_FOLDER` merges it"
        )


def set_alphas(layers: Mapping[str, Mapping[str, Adapter]], configs: Mapping[str, AdapterConfig]) -> None:
    """Puts what `configs` (by part) say of the scale into the adapters that carry none of their own."""
    for part, layer, adapter in _every(layers):
        rank = rank_of(adapter)
        if part in configs and rank is not None and "alpha" not in adapter:
            alpha = configs[part].alpha_of(layer, rank)
            if alpha is not None:
                adapter["alpha"] = torch.tensor(float(alpha))


def adapter_config(file: Path) -> AdapterConfig:
    """Returns what an adapter_config.json says.

    Raises:
        RuntimeError: it is unreadable, or says what cannot be.
    """
    return checked(AdapterConfig, read_json(file), str(file))


def _same_end(one: str, other: str) -> bool:
    """Returns whether one of two dotted names is the end of the other: PEFT's begin where the wrapped model does."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def files_of(file: Path) -> list[Path]:
    """Returns the files that `read_lora` reads: the LoRA's, and PEFT's configuration beside it."""
    beside = file.with_name("adapter_config.json")
    return [file, beside] if file.name.startswith("adapter_model") and beside.is_file() else [file]


def _first(names: Sequence[str]) -> str:
    return ", ".join(name[:100] for name in names[:5])


def _every(layers: Mapping[str, Mapping[str, Adapter]]) -> Iterator[tuple[str, str, Adapter]]:
    for part, found in layers.items():
        for layer, adapter in found.items():
            yield part, layer, adapter


def _stated_alphas(file: Path) -> dict[str, AdapterConfig]:
    """Returns the configuration that PEFT writes beside a file, or diffusers into its metadata, by part."""
    _, *beside = files_of(file)
    if beside:
        return dict.fromkeys((TRANSFORMER, LANGUAGE), adapter_config(beside[0]))
    source = f"{file}, lora_adapter_metadata in its metadata"
    stated = parse(metadata_of(file).get("lora_adapter_metadata", "{}"), source)
    found = {}
    for part, prefix in ((TRANSFORMER, "transformer."), (LANGUAGE, "text_encoder.")):
        own = {key.removeprefix(prefix): value for key, value in stated.items() if key.startswith(prefix)}
        if own:
            found[part] = checked(AdapterConfig, own, source)
    return found


def _foreign(file: Path, keys: tuple[str, ...], shapes: Mapping[str, Shapes]) -> str:
    likely = next((name for pattern, name in _OTHERS if any(re.search(pattern, key) for key in keys)), "")
    looks = f" It looks like one of {likely}." if likely else ""
    connected = " or ".join(PART_NAMES[part] for part in shapes)
    other = "" if len(shapes) == len(PART_NAMES) else " If it is for the other half, connect that one too."
    return (
        f"{file}: none of its {len(keys)} keys fits the {connected} of InternVL-U ({_first(keys)}), a LoRA for "
        f"InternVL-U expected.{looks}{other}"
    )
