"""Dual guidance inside ComfyUI: a wrapper on the MODEL, so that every sampler node gets it, and a GUIDER.

The positive conditioning may carry a partial one (references without words). It becomes a third condition
`middle` of the run; without it, two branches are computed, as text to image needs no more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider
from torch.nn import functional

from ..internvl_u.defaults import GUIDANCE
from ..internvl_u.numbers import check_real
from ..internvl_u.sampling import check_finite, dual_guidance, whole_timestep
from ..internvl_u.speed import ALWAYS, Branches, GuidanceIntervals
from .conditioning import Conditioning, check_conditioning
from .latents import check_numbers, latent_samples, noise_mask

KEY = "internvl_u"
PARTIAL = "internvl_u_partial"
"""Key in a positive conditioning entry: the conditioning of the partial branch."""
THOUGHT = "internvl_u_thought"
"""Key in a positive conditioning entry: True where it was encoded with a chain of thought."""
Options = dict[str, Any]
Conds = dict[str, list[Options]]
_SHARED = ("area", "strength", "mask", "mask_strength", "set_area_to_bounds", "start_percent", "end_percent", "hooks")


class DualGuider(CFGGuider):
    """A GUIDER with both strengths; without it `cfg` of a sampler node is `all_cfg`, and `part_cfg` is 2.0."""

    part_cfg = GUIDANCE.part_cfg
    intervals = ALWAYS

    def set_scales(self, all_cfg: float, part_cfg: float) -> None:
        """Sets the guidance of the words and the guidance of the references.

        Raises:
            ValueError: one of them is no number.
        """
        check_real("all_cfg", all_cfg)
        check_real("part_cfg", part_cfg)
        self.set_cfg(all_cfg)
        self.part_cfg = part_cfg

    def set_intervals(self, intervals: GuidanceIntervals) -> None:
        """Sets the parts of the schedule in which the two scales work.

        Raises:
            ValueError: one of them is none.
        """
        intervals.check()
        self.intervals = intervals

    def set_conds(self, positive: Conditioning, negative: Conditioning) -> None:
        """Sets the conditionings.

        Raises:
            ValueError: one of them is none.
        """
        check_conditioning(positive, "positive")
        check_conditioning(negative, "negative")
        super().set_conds(positive, negative)


def check_model(model: ModelPatcher) -> None:
    """Makes sure that a MODEL is InternVL-U's.

    Raises:
        ValueError: it is another one.
    """
    wrappers = getattr(model, "wrappers", {}).get(WrappersMP.OUTER_SAMPLE, {})
    if KEY not in wrappers:
        kind = type(getattr(model, "model", model)).__name__
        raise ValueError(f"a MODEL of another kind ({kind}) found: connect the MODEL of Load InternVL-U")


def drawn_with_thought(positive: Conditioning) -> bool:
    """Returns whether a conditioning was encoded with a chain of thought, in one of its entries at least.

    Raises:
        ValueError: it is no conditioning.
    """
    check_conditioning(positive, "positive")
    return any(entry[1].get(THOUGHT) for entry in positive)


def install(patcher: ModelPatcher) -> None:
    """Puts dual guidance on a MODEL."""
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)


def sample(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Runs a sampling with dual guidance and looks at what goes in and comes out, whichever node samples.

    Raises:
        ValueError: the latent, its mask or the noise levels are no numbers, or the latent is not ours.
        RuntimeError: what was drawn is no numbers.
    """
    noise, latent, sampler, sigmas, mask, *rest = args  # as `CFGGuider.sample` hands them on
    latent_samples({"samples": latent})
    check_numbers(sigmas, "SIGMAS")
    drawn = _guided(executor, noise, latent, sampler, sigmas, noise_mask(mask), *rest, **kwargs)
    check_finite(drawn, "the drawn latent", "the transformer, a LoRA on it, or the conditioning")
    return drawn


def _guided(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Runs a sampling with dual guidance; a guider with a guidance of its own is left alone.

    The guidance takes the place of the guider's own method for this run and is no wrapper: it ends the chain, and what
    other nodes wrap around it (step caches, say) has to stay around it.
    """
    guider = cast(Any, executor.class_obj)
    for name, entries in guider.conds.items():
        guider.conds[name] = [_with_plain_area(entry, args[0].shape[-2:]) for entry in entries]
    if type(guider).predict_noise is not CFGGuider.predict_noise:
        return executor(*args, **kwargs)
    middle = _partial_conds(guider.conds)
    if middle:
        guider.conds["middle"] = middle
    guider.predict_noise = functools.partial(predict, guider, usual_cfg=guider.cfg)
    try:
        return executor(*args, **kwargs)
    finally:
        del guider.predict_noise


def _with_plain_area(entry: Options, size: Sequence[int]) -> Options:
    """Returns a condition whose area, if it has one, is in latent pixels.

    ComfyUI works shares and bounds of masks out for all axes of a latent, and ours has a third, of one frame.
    """
    area, mask = entry.get("area"), entry.get("mask")
    if mask is not None and entry.get("set_area_to_bounds"):
        entry = entry | {"set_area_to_bounds": False, "area": _bounds(mask, size)}
    elif area and area[0] == "percentage" and len(area) == 5:
        height, width, y, x = area[1:]
        entry = entry | {"area": ("percentage", 1.0, height, width, 0.0, y, x)}
    return entry


def _bounds(mask: torch.Tensor, size: Sequence[int]) -> tuple[int, int, int, int]:
    """Returns (height, width, y, x), in latent pixels of (rows, columns), of what a mask [..., H, W] covers."""
    flat = mask.abs().reshape(-1, 1, *mask.shape[-2:]).amax(0, keepdim=True)
    covered = functional.interpolate(flat.float(), size=tuple(size), mode="bilinear")[0, 0] > 0
    if not covered.any():
        return min(8, size[0]), min(8, size[1]), 0, 0
    box = []
    for axis, length in enumerate(size):
        places = covered.any(dim=1 - axis).nonzero()
        extent = min(max(int(places[-1] - places[0]) + 1, 8), length)
        box.append((extent, min(int(places[0]), length - extent)))
    (height, y), (width, x) = box
    return height, width, y, x


def _partial_conds(conds: Conds) -> list[Options]:
    middle = []
    for entry in conds.get("positive", ()) if "negative" in conds else ():
        for partial in comfy.sampler_helpers.convert_cond(entry.get(PARTIAL, ())):
            middle.append(partial | {key: entry[key] for key in _SHARED if key in entry})
    return middle


def predict(
    guider: CFGGuider,
    x: torch.Tensor,
    sigma: torch.Tensor,
    model_options: Options | None = None,
    seed: int | None = None,
    *,
    usual_cfg: float | None = None,
) -> torch.Tensor:
    """Returns the guided clean latent of a guider's conditions.

    Follows `comfy.samplers.sampling_function`, with three conditions instead of two, of which those are evaluated that
    count at this level. `usual_cfg` is the guider's at the start of the run: where a node has changed it to 1 for this
    step, there is no guidance at all.
    """
    conds, model_options = guider.conds, model_options or {}
    positive, negative = conds.get("positive"), conds.get("negative")
    if positive is None or negative is None:
        return type(guider).predict_noise(guider, x, sigma, model_options, seed)
    level = float(sigma.flatten()[0])
    middle = conds.get("middle") if _covered(conds.get("middle"), level) else None
    usual_cfg = guider.cfg if usual_cfg is None else usual_cfg
    if math.isclose(guider.cfg, 1.0) and (middle is None or not math.isclose(usual_cfg, 1.0)):
        used = Branches(False, bool(model_options.get("disable_cfg1_optimization", False)))
    else:
        used = _branches_at(guider, level, middle is not None, _covered(negative, level))
    if not used.partial:
        middle = None
    elif not used.unconditional:
        negative, middle = middle, None
    unguided = not used.partial and not used.unconditional
    branches = [positive] if unguided else [positive, negative] if middle is None else [positive, negative, middle]
    _wake_cache(model_options, [entry for branch in branches for entry in branch if _covers(entry, level)])
    model = guider.inner_model
    if unguided:
        return comfy.samplers.sampling_function(model, x, sigma, negative, positive, 1.0, model_options, seed)
    out = _evaluate_branches(model, branches, x, sigma, guider.cfg, model_options)
    if "sampler_cfg_function" not in model_options:
        partial = None if middle is None else out[2]
        combine = _guidance_function(partial, guider.cfg, _part_cfg(guider), used.words)
        model_options = model_options | {"sampler_cfg_function": combine}
    return comfy.samplers.cfg_function(
        model, out[0], out[1], guider.cfg, x, sigma, model_options=model_options, cond=branches[0], uncond=branches[1]
    )


def _branches_at(guider: CFGGuider, level: float, references: bool, negative: bool) -> Branches:
    """Returns the branches that count at a noise level, by the guider's intervals and where there is a `negative`."""
    intervals, to_sigma = getattr(guider, "intervals", ALWAYS), guider.inner_model.model_sampling.percent_to_sigma
    used = intervals.branches_at(level, to_sigma, references)
    return used if negative or not used.unconditional else Branches(references, False)


def _covered(entries: list[Options] | None, level: float) -> bool:
    return any(_covers(entry, level) for entry in entries or ())


def _covers(entry: Options, level: float) -> bool:
    """Returns whether a condition is used at a noise level: core's nodes may limit it to others."""
    return entry.get("timestep_end", -math.inf) <= level <= entry.get("timestep_start", math.inf)


def _wake_cache(model_options: Options, entries: list[Options]) -> None:
    """Keeps core's EasyCache from skipping a step with a condition that it has not seen: it has nothing to repeat."""
    cache = model_options.get("transformer_options", {}).get("easycache")
    seen = getattr(cache, "uuid_cache_diffs", None)
    if seen and any(entry["uuid"] not in seen for entry in entries):
        cast(Any, cache).cumulative_change_rate = math.inf


def _part_cfg(guider: CFGGuider) -> float:
    return getattr(guider, "part_cfg", GUIDANCE.part_cfg)


def _evaluate_branches(
    model: Any, branches: list[list[Options]], x: torch.Tensor, sigma: torch.Tensor, cfg: float, model_options: Options
) -> list[torch.Tensor]:
    """Returns the clean latent of each branch, as `comfy.samplers.sampling_function` evaluates its two."""
    batch = model_options.get("sampler_calc_cond_batch_function")
    if batch is None:
        out = comfy.samplers.calc_cond_batch(model, branches, x, sigma, model_options)
    else:
        out = batch({"conds": branches, "input": x, "sigma": sigma, "model": model, "model_options": model_options})
    for function in model_options.get("sampler_pre_cfg_function", ()):
        out = function(
            {
                "conds": branches,
                "conds_out": out,
                "cond_scale": cfg,
                "timestep": sigma,
                "input": x,
                "sigma": sigma,
                "model": model,
                "model_options": model_options,
            }
        )
    return out


def _guidance_function(
    partial: torch.Tensor | None, all_cfg: float, part_cfg: float, words: bool = True
) -> Callable[[Options], torch.Tensor]:
    """Returns the `sampler_cfg_function` of dual guidance; see `comfy.samplers.cfg_function`."""

    def combine(args: Options) -> torch.Tensor:
        x, sigma = args["input"], args["sigma"]
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        # ComfyUI hands over clean latents; guidance is on velocities.
        conditional, unconditional = ((x - args[key]) / level for key in ("cond_denoised", "uncond_denoised"))
        middle = unconditional if partial is None else (x - partial) / level
        velocities = conditional, middle, unconditional
        return level * dual_guidance(*velocities, all_cfg, part_cfg, whole_timestep(sigma), words)

    return combine
