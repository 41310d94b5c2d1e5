"""ComfyUI's patcher where several of them share a network, and what it makes a network for another device of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_patcher
import torch

from ..internvl_u.files import state_of


class MovingPatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher, which takes weights off the device that another patcher over the same network has put them on.

    ComfyUI's Select Device nodes give such a patcher for the CPU, and one for the GPU again; it only asks whether the
    weights are loaded, not where.
    """

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> Any:
        # Before 0.33 `device_to` may be that of another patcher, which is gone: the one whose weights are on it still.
        model, device_to = self.model, self.load_device
        if model.model_loaded_weight_memory > 0 and model.device != device_to:
            extra_memory += model.model_loaded_weight_memory
            self.unpatch_model(self.offload_device)
        return super().partially_load(device_to, extra_memory, force_patch_weights)


class Reload:
    """What ComfyUI calls for the same network anew, from the same files: for another GPU, or to stream it no more."""

    def __init__(self, make: Callable[..., comfy.model_patcher.ModelPatcher], files: Sequence[Path]):
        self._make, self._files = make, tuple(state_of(file) for file in files)

    def __call__(self, *arguments: object, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
        """Returns a patcher over new weights; with `disable_dynamic` one that does not stream them.

        Raises:
            FileNotFoundError: a file is not the one any more that the first was made of.
            RuntimeError, ValueError: as the loading of files has it.
        """
        for file in self._files:
            try:
                now = state_of(file.path)
            except OSError:
                now = None
            if now is None or (now.size, now.time) != (file.size, file.time):
                found = "nothing" if now is None else "another file"
                raise FileNotFoundError(
                    f"{file.path}: {found} found, the file expected that the model was loaded from, as its copy for "
                    "another device is read from there: put it back, or choose the model anew in Load InternVL-U"
                )
        return self._make(*arguments, disable_dynamic=disable_dynamic)
