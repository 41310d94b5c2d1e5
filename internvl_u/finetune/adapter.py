"""LoRA, DoRA and LoKr by PEFT: put beside the layers of a network, read out again, and written for everybody.

Two things are written: one safetensors file with ComfyUI's names, which its LoRA loaders and ours take, and a folder
for `peft.PeftModel.from_pretrained` on the official code's modules, whose names are the checkpoint's as ours are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..weights import save_weights

KINDS = ("lora", "dora", "lokr")
PARTS = ("transformer", "language")
LAYERS = {
    "transformer": r"transformer_blocks\.\d+\.(attn\.\w+(\.0)?|(img|txt)_mlp\.net\.(0\.proj|2))",
    "language": r"(.+\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}
"""The layers that learn, by part: attention and MLPs."""
FILE_PREFIX = {"transformer": "diffusion_model.", "language": "text_encoders.language_model."}
PEFT_FOLDER = {"transformer": "transformer", "language": "language_model"}
_NAME = "default"
_SPELLED = (
    (r"\.lora_magnitude_vector(\.weight)?$", ".dora_scale"),
    (r"\.lora_(A|B)\.weight$", r".lora_\1.weight"),
    (r"\.lokr_(w\w+|t2)$", r".lokr_\1"),
)


@dataclass(frozen=True)
class AdapterSettings:
    """How layers learn. `alpha` None: as large as the rank; `layers` None: attention and MLPs."""

    kind: str = "lora"
    rank: int = 16
    alpha: float | None = None
    layers: str | None = None

    @property
    def scale(self) -> float:
        """Alpha."""
        return float(self.rank if self.alpha is None else self.alpha)


def add_adapter(network: nn.Module, part: str, settings: AdapterSettings, seed: int = 0) -> list[str]:
    """Puts adapters beside the layers of a part, in fp32; all else of it stops learning. Returns the layers' names.

    Raises:
        ValueError: no layer has such a name.
    """
    from peft import inject_adapter_in_model

    pattern = re.compile(settings.layers or LAYERS[part])
    names = [
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and pattern.fullmatch(name)
    ]
    if not names:
        some = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        raise ValueError(f"--layers {settings.layers} found, which no layer of the {part} fits: {', '.join(some[:12])}")
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(names, settings), network, _NAME)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return names


def adapter_weights(network: nn.Module, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Returns the adapters' tensors by PEFT's names, without its prefix.

    Raises:
        RuntimeError: one is infinite or not a number, as it is learnt or in this dtype.
    """
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(network, adapter_name=_NAME)
    weights = {name: tensor.detach().cpu().to(getattr(torch, dtype)).clone() for name, tensor in found.items()}
    if bad := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise RuntimeError(f"{bad[0]}: what was learnt is beyond what {dtype} holds, or not a number: write bfloat16")
    return weights


def count_parameters(network: nn.Module) -> int:
    """Returns how many numbers of a network learn."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def file_tensors(part: str, weights: Mapping[str, torch.Tensor], settings: AdapterSettings) -> dict[str, torch.Tensor]:
    """Returns the tensors of a part as the file for ComfyUI has them, with the alpha of each layer."""
    tensors = {}
    for name, tensor in weights.items():
        spelled = next((re.sub(p, to, name) for p, to in _SPELLED if re.search(p, name)), name)
        if spelled.endswith(".dora_scale"):
            tensor = tensor.reshape(-1, 1)
        tensors[FILE_PREFIX[part] + spelled] = tensor
        layer = re.sub(r"\.(lora_[AB]\.weight|dora_scale|lokr_\w+)$", "", spelled)
        tensors[f"{FILE_PREFIX[part]}{layer}.alpha"] = torch.tensor(settings.scale)
    return tensors


def write_adapter(
    target: Path,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    settings: AdapterSettings,
    metadata: Mapping[str, str],
    more: Mapping[str, torch.Tensor] | None = None,
) -> list[Path]:
    """Writes the file for ComfyUI and, beside it, the folder for PEFT; each whole or not at all. Returns both.

    The file gets `more` tensors, under the names that they have.
    """
    tensors = dict(more or {})
    for part, weights in parts.items():
        tensors |= file_tensors(part, weights, settings)
    draft = target.with_name(f".{target.name}.part")
    folder = peft_folder(target)
    try:
        save_weights(draft, tensors, {"format": "pt", **metadata})
        os.replace(draft, target)
        _write_peft(folder, parts, settings, metadata)
    finally:
        draft.unlink(missing_ok=True)
    return [target, folder]


def peft_folder(target: Path) -> Path:
    """Returns the folder for PEFT that belongs to a file for ComfyUI."""
    return target.with_name(f"{target.stem}-peft")


def _write_peft(
    folder: Path,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    settings: AdapterSettings,
    metadata: Mapping[str, str],
) -> None:
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    for part, weights in parts.items():
        place = draft / PEFT_FOLDER[part]
        place.mkdir(parents=True)
        inner = {_without_whole(name): tensor for name, tensor in weights.items()}
        named = {f"base_model.model.{name}": tensor for name, tensor in inner.items()}
        save_weights(place / "adapter_model.safetensors", named, {"format": "pt", **metadata})
        names = sorted({re.sub(r"\.(lora|lokr)_.*$", "", name) for name in inner})
        config = _config(names, settings).to_dict()
        config |= {"inference_mode": True, "base_model_name_or_path": metadata.get("base", "")}
        (place / "adapter_config.json").write_text(json.dumps(_plain(config), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def _without_whole(name: str) -> str:
    """Returns a layer's name within the official code's own module: its language model is one of its own."""
    return name.removeprefix("language_model.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else getattr(value, "value", str(value))


def _config(names: list[str], settings: AdapterSettings) -> Any:
    from peft import LoKrConfig, LoraConfig

    alpha: Any = settings.scale  # PEFT's hint says int, and it divides
    if settings.kind == "lokr":
        return LoKrConfig(r=settings.rank, alpha=alpha, target_modules=names)
    return LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=names, use_dora=settings.kind == "dora")
