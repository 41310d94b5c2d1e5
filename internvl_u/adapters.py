"""What an adapter adds to a weight: LoRA (arXiv 2106.09685), DoRA (2402.09353), LyCORIS' LoHa and LoKr (2309.14859).

An adapter is a layer's tensors by the names that kohya and LyCORIS gave them, which ComfyUI knows. All arithmetic is in
fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Adapter = dict[str, torch.Tensor]
ADDITIVE = ("lora_up.weight", "lora_down.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a", "diff")
"""Tensors by which an adapter is seen to add something to the weight."""
_OF_CONVOLUTIONS = ("lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2")


def merged(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    """Returns a layer's weight with an adapter, in fp32 and its own shape.

    Raises:
        ValueError: the adapter is of a kind that cannot be added.
    """
    wide = weight.float()
    if not changes_weight(adapter):
        return wide
    added = wide + delta(adapter).reshape(wide.shape)
    if "dora_scale" in adapter:
        added = decomposed(added, adapter["dora_scale"])
    return wide + strength * (added - wide)


def merged_bias(bias: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    """Returns a layer's bias with an adapter, in fp32."""
    difference = adapter.get("diff_b")
    return bias.float() if difference is None else bias.float() + strength * difference.float()


def decomposed(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Returns `weight` with the norms that DoRA has learned: of rows for [rows, 1], of columns for [1, columns].

    ComfyUI's own divides by the norms of the rows before anything was added; PEFT and LyCORIS by those after.
    """
    flat = weight.flatten(1)
    rows = magnitude.shape[0] == flat.shape[0]
    norms = flat.norm(dim=1 if rows else 0, keepdim=True)
    return (flat * (magnitude.to(flat).flatten(1) / norms)).reshape(weight.shape)


def delta(adapter: Adapter) -> torch.Tensor:
    """Returns what an adapter adds at strength 1 [rows, columns].

    Raises:
        ValueError: the adapter is of another kind.
    """
    product, rank = _product(adapter)
    alpha = adapter.get("alpha")
    return product if alpha is None or rank is None else product * (float(alpha) / rank)


def changes_weight(adapter: Mapping[str, object]) -> bool:
    """Returns whether an adapter changes the weight, and not only the bias."""
    return bool(set(adapter) - {"diff_b", "alpha"})


def can_be_merged(adapter: Adapter) -> bool:
    """Returns whether `merged` knows an adapter's kind."""
    return not changes_weight(adapter) or any(name in adapter for name in ADDITIVE)


def rank_of(adapter: Adapter) -> int | None:
    """Returns what alpha is divided by; None where it does not count."""
    if not any(name in adapter for name in ADDITIVE):
        return None
    return _product(_sizes(adapter))[1]


def problem_of(adapter: Adapter, weight: tuple[int, ...] | None, bias: tuple[int, ...] | None) -> str:
    """Returns why an adapter does not fit a layer of these shapes, "" if it does."""
    difference, alpha = adapter.get("diff_b"), adapter.get("alpha")
    if difference is not None and tuple(difference.shape) != bias:
        return f"a bias of {list(difference.shape)} found, {'none' if bias is None else list(bias)} expected"
    if alpha is not None and alpha.numel() != 1:
        return f"alpha of {alpha.numel()} values found, one expected"
    if not changes_weight(adapter):
        return "" if difference is not None else "alpha found and nothing else"
    if weight is None or len(weight) < 1:
        return "it has no weight to change"
    if inner := [name for name in _OF_CONVOLUTIONS if name in adapter]:
        return f"{inner[0]} found, which only convolutions have"
    kinds = {name.partition("_")[0] for name in adapter if name.startswith(("lora_", "hada_", "lokr_", "oft_"))}
    if len(kinds | ({"diff"} & set(adapter))) > 1:
        return f"{', '.join(sorted(adapter))} found, one kind of change expected"
    if "diff" in adapter and tuple(adapter["diff"].shape) != weight:
        return f"{list(adapter['diff'].shape)} found, {list(weight)} expected"
    if empty := [name for name, tensor in adapter.items() if 0 in tensor.shape]:
        return f"{empty[0]} {list(adapter[empty[0]].shape)} found, which is empty"
    rows, columns = weight[0], math.prod(weight[1:])
    magnitude = adapter.get("dora_scale")
    if magnitude is not None and tuple(magnitude.flatten(1).shape) not in ((rows, 1), (1, columns)):
        return f"dora_scale {list(magnitude.shape)} found, {[rows, 1]} or {[1, columns]} expected"
    blocks = adapter.get("oft_blocks")
    if blocks is not None:
        fits = blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2] and blocks.shape[0] * blocks.shape[1] == rows
        return "" if fits else f"oft_blocks {list(blocks.shape)} found, square blocks of {rows} rows together expected"
    if not any(name in adapter for name in ADDITIVE):
        return f"{', '.join(sorted(adapter))} found and nothing that they belong to"
    try:
        found = _product(_sizes(adapter))[0].shape
    except KeyError as error:
        return f"{error.args[0]} is missing beside {', '.join(sorted(adapter))}"
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(adapter.items()))
        return f"{shapes} found, which do not go together"
    return "" if tuple(found) == (rows, columns) else f"{list(found)} found, {[rows, columns]} expected"


def _sizes(adapter: Adapter) -> Adapter:
    return {name: tensor.to("meta") for name, tensor in adapter.items()}


def _product(adapter: Adapter) -> tuple[torch.Tensor, int | None]:
    """Returns the unscaled change [rows, columns], and the rank that alpha is divided by, if there is one."""
    if "diff" in adapter:
        change = adapter["diff"].float()
        return change.reshape(change.shape[0], -1), None
    if "lora_up.weight" in adapter or "lora_down.weight" in adapter:
        up, down = (adapter[f"lora_{name}.weight"].float().flatten(1) for name in ("up", "down"))
        return up @ down, max(down.shape[0], 1)
    if "hada_w1_a" in adapter:
        first, second = (adapter[f"hada_{w}_a"].float() @ adapter[f"hada_{w}_b"].float() for w in ("w1", "w2"))
        return first * second, max(adapter["hada_w1_b"].shape[0], 1)
    if any(name.startswith("lokr_") for name in adapter):
        (first, rank), (second, other) = _kronecker_factor(adapter, "w1"), _kronecker_factor(adapter, "w2")
        return torch.kron(first, second.flatten(1)), other or rank
    raise ValueError(f"an adapter of {', '.join(sorted(adapter))} found, LoRA, DoRA, LoHa or LoKr expected")


def _kronecker_factor(adapter: Adapter, name: str) -> tuple[torch.Tensor, int | None]:
    whole = adapter.get(f"lokr_{name}")
    if whole is not None:
        return whole.float(), None
    left, right = adapter[f"lokr_{name}_a"].float(), adapter[f"lokr_{name}_b"].float()
    return left @ right.flatten(1), max(right.shape[0], 1)
