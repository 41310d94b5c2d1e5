"""The official code's whole pipeline, from a checkout of github.com/OpenGVLab/InternVL-U, with a clock in it.

It needs an environment of its own; see README.md beside this file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internvl_u.pipeline import ImageRequest

STAGES = {"encode s": 0.0, "steps s": 0.0, "decode s": 0.0}


def use_official(folder: Path) -> None:
    """Makes the official code importable.

    Raises:
        FileNotFoundError: the folder is no checkout of github.com/OpenGVLab/InternVL-U.
    """
    if not (folder / "internvlu" / "diffusion").is_dir():
        raise FileNotFoundError(f"no internvlu/diffusion in {folder}: give a checkout of OpenGVLab/InternVL-U")
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


class OfficialPipeline:
    """The official pipeline with a clock at its stages."""

    def __init__(self, folder: Path, model: Path, dtype: torch.dtype, device: str | torch.device):
        use_official(folder)
        from internvlu import InternVLUPipeline

        self.device = torch.device(device)
        self.pipeline = InternVLUPipeline.from_pretrained(str(model), torch_dtype=dtype).to(self.device)
        self.pipeline.image_pipeline.set_progress_bar_config(disable=True)
        self.taken = dict(STAGES)
        self._clock("encode s", self.pipeline.vlm, "generate_hidden_states")
        self._clock("encode s", self.pipeline.vae, "encode")
        self._clock("decode s", self.pipeline.vae, "decode")
        self._clock("steps s", self.pipeline.generation_decoder.decoder, "forward")

    def draw(self, request: ImageRequest) -> dict[str, float]:
        """Draws a picture, and returns the seconds of its stages; what else it does counts as encoding."""
        self.taken = dict(STAGES)
        start = time.perf_counter()
        self.pipeline(
            prompt=request.prompt,
            image=request.images[0] if request.images else None,
            generation_mode="image",
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seed),
        )
        self._wait()
        self.taken["encode s"] += time.perf_counter() - start - sum(self.taken.values())
        return self.taken

    def _clock(self, stage: str, owner: Any, name: str) -> None:
        run: Callable = getattr(owner, name)

        def timed(*arguments, **settings):
            self._wait()
            start = time.perf_counter()
            result = run(*arguments, **settings)
            self._wait()
            self.taken[stage] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
