"""A LoRA trained in ComfyUI: what core's Train LoRA needs of a run beyond what sampling does.

Training is a sampling whose steps want gradients; nodes run in inference mode otherwise, which has none. So all of this
steps aside for every other run, and what sampling remembers (`modulation`) steps aside for this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..internvl_u.sampling import check_finite
from . import compat
from .gguf_ops import check_plain
from .quantized import Quantized

KEY = "internvl_u_training"
Entry = dict[str, Any]
_WHERE = ("area", "mask", "hooks", "control", "gligen", "default", "timestep_start", "timestep_end", "strength")
"""What of a condition says where, when or how much it counts."""


def install(patcher: ModelPatcher) -> None:
    """Lets core's trainer train a MODEL."""
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sample)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, evaluate)


def sample(executor: WrapperExecutor, guider: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Runs a sampler; one that trains gets conditions that it can copy, and latents in the model's range.

    Raises:
        ValueError: the model's weights are kept in a way in which they cannot be trained on.
    """
    if torch.is_grad_enabled():
        check_trainable(guider.inner_model.diffusion_model)
        guider.conds = {name: [_evaluated(entry) for entry in entries] for name, entries in guider.conds.items()}
        compat.scale_training_latents(cast(Any, executor.class_obj), guider.inner_model.process_latent_in)
    return executor(guider, *args, **kwargs)


def check_trainable(network: torch.nn.Module) -> None:
    """Makes sure that gradients of a LoRA on a network's layers are those of the weights that they stand for.

    Raises:
        ValueError: matrices are packed, or changed beneath a scale that only we know.
    """
    check_plain(network, "training a LoRA")
    if any(isinstance(layer, Quantized) and layer.weight_function for layer in network.modules()):
        raise ValueError(
            "training a LoRA: a quantised model found in a format that this ComfyUI does not know. Turn bypass_mode "
            "on, or load the released folder or a bf16 file."
        )


def evaluate(
    executor: WrapperExecutor,
    model: Any,
    conds: list[list[Entry] | None],
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """Returns what the model makes of a batch [B, ...] under each list of conditions.

    Core's trainer gives a batch of B pictures a list of their B conditions; sampling would use every one of them for
    every picture, and take the mean. Here each condition is its own picture's.

    Raises:
        RuntimeError: the result is no numbers, so that what is learnt would be none.
    """
    if not torch.is_grad_enabled():
        return executor(model, conds, x, timestep, model_options)
    results = []
    for entries in conds:
        if not entries:
            results.append(torch.zeros_like(x))  # core divides 0 by 1e-37 here, which is 0 / 0 in float16
            continue
        parts = _own_parts(entries) if len(entries) == len(x) > 1 else [(entries, slice(None))]
        found = [executor(model, [part], x[rows], timestep[rows], model_options)[0] for part, rows in parts]
        results.append(torch.cat(found))
        check_finite(results[-1].detach(), "what the model sees in training", "a learning rate that is too high")
    return results


def _own_parts(entries: Sequence[Entry]) -> list[tuple[list[Entry], slice]]:
    """Returns conditions and the rows of a batch that they are for: all together, or each alone."""
    merged = _merged(entries)
    if merged is not None:
        return [([merged], slice(None))]
    return [([entry], slice(i, i + 1)) for i, entry in enumerate(entries)]


def _evaluated(entry: Entry) -> Entry:
    """Returns a condition without the lists of which `extra_conds` has made conditions: core copies its tensors."""
    return {key: value for key, value in entry.items() if key == "area" or not isinstance(value, list | tuple)}


def _merged(entries: Sequence[Entry]) -> Entry | None:
    """Returns the conditions of a batch's pictures as one of the batch; None where they do not go together."""
    first, *others = (entry["model_conds"] for entry in entries)
    if any(key in entry for entry in entries for key in _WHERE) or any(
        other.keys() != first.keys() for other in others
    ):
        return None
    merged = {}
    for name, cond in first.items():
        same = all(type(other[name]) is type(cond) for other in others)
        own, *rest = (one.process_cond(batch_size=1, area=None) for one in (cond, *(other[name] for other in others)))
        if not same or not all(own.can_concat(one) for one in rest):
            return None
        merged[name] = own._copy_with(own.concat(rest))
    return entries[0] | {"model_conds": merged}
