"""Modulation once per sampling run inside ComfyUI, and its weights as the first that a device does without.

A wrapper on the MODEL puts what is remembered into the run's own options, so that nothing of it outlives the run. It is
used where the weights cannot change under it, and where nobody asks for gradients or compiles; elsewhere each call
computes its modulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import nn

from ..internvl_u.mmdit import MMDiT
from ..internvl_u.modulation import Modulations
from .gguf_ops import PackedPatcher
from .patcher import MovingPatcher

KEY = "internvl_u_modulation"
"""Of the wrapper, and in the transformer's options of a run."""
_PREFIX = "diffusion_model."


def install(patcher: ModelPatcher) -> None:
    """Lets the runs of a MODEL remember their modulation."""
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)


def sample(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Runs a sampling that remembers its modulation until its end."""
    guider = cast(Any, executor.class_obj)
    options = guider.model_options.setdefault("transformer_options", {})
    run = options[KEY] = RunModulations(guider)
    try:
        return executor(*args, **kwargs)
    finally:
        options.pop(KEY, None)
        run.clear()


class RunModulations:
    """The modulation of one sampling run, of each of the networks that take part in it (one per GPU)."""

    def __init__(self, guider: Any):
        self._guider = guider
        self._known: dict[int, tuple[object, Modulations]] = {}

    def __deepcopy__(self, memo: object) -> RunModulations:
        return self  # options are copied by many nodes, and a run has one memory

    def clear(self) -> None:
        """Lets go of all that is remembered."""
        for _, modulations in self._known.values():
            modulations.clear()
        self._known.clear()
        self._guider = None

    def of(self, network: MMDiT, time: torch.Tensor, options: Mapping[str, Any]) -> Modulations | None:
        """Returns what is remembered of a network as its weights are now; None where they are not known to stay so.

        `time` are the sinusoids of the call, `options` the transformer's.
        """
        model = self._model(network)
        weights = None if model is None else _weights(model, network)
        if model is None or weights is None:
            return None
        known = self._known.get(id(network))
        if known is None or known[0] != weights:
            if known is not None:
                known[1].clear()
            known = self._known[id(network)] = (weights, Modulations(_schedule(model, time, options)))
        return known[1]

    def _model(self, network: MMDiT) -> Any:
        """Returns the run's model, or its copy for another GPU, that has this network."""
        if self._guider is None:
            return None
        copies = self._guider.model_options.get("multigpu_clones", {}).values()
        models = [patcher.model for patcher in (self._guider.model_patcher, *copies)]
        return next((model for model in models if model.diffusion_model is network), None)


def _weights(model: Any, network: MMDiT) -> object | None:
    """Returns what tells the weights of a model's modulation apart; None where a run may change them as it goes."""
    patcher = model.current_patcher
    if patcher is None:
        return None
    changing = {key for patches in patcher.hook_patches.values() for key in patches}
    changing.update(patcher.weight_wrapper_patches)
    if changing:
        of_modulation = {id(module) for layer in network.modulation_layers() for module in layer.modules()}
        names = tuple(f"{_PREFIX}{name}." for name, module in network.named_modules() if id(module) in of_modulation)
        if any(key.startswith(names) for key in changing):
            return None
    return model.current_weight_patches_uuid


def _schedule(model: Any, time: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """Returns the sinusoids [n, 256] of a run's noise levels, as the model's calls make them."""
    sigmas = options.get("sample_sigmas")
    if sigmas is None:
        return time[:0]
    sigmas = sigmas.to(time.device).flatten()
    return model.process_timestep(model.model_sampling.timestep(sigmas[sigmas > 0]).float())


class FlowPatcher(MovingPatcher):
    """ComfyUI's patcher, where the layers of modulation come last to the device and are the first to leave it.

    ComfyUI takes the largest layers first, which they are.
    """

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        network = cast(MMDiT, self.model.diffusion_model)
        once = {id(module) for layer in network.modulation_layers() for module in layer.modules()}

        def placed(entry: tuple[Any, ...]) -> tuple[Any, ...]:
            # The first number decides, and how much is kept free to cast a layer into.
            later = any(isinstance(part, nn.Module) and id(part) in once for part in entry)
            return (0, *entry[1:]) if later else entry

        return [placed(entry) for entry in super()._load_list(*args, **kwargs)]


class PackedFlowPatcher(FlowPatcher, PackedPatcher):
    """The same over a model with packed layers."""
