"""Core's step caches around the nodes' MODEL, for `curve`: one scene at a time, since they decide by the picture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from internvl_u.pipeline import ImageRequest

from .host import pack_module, use_comfyui

USUAL = {"start_percent": 0.15, "end_percent": 0.95, "verbose": False}
"""Defaults of both nodes, but for the threshold."""


class CachedDrawer:
    """Draws requests with EasyCache or LazyCache on the MODEL."""

    def __init__(self, comfyui: Path, model: Path):
        use_comfyui(comfyui)
        importlib.import_module("comfy.utils").PROGRESS_BAR_ENABLED = False
        names = ("load", "sampler", "vae")
        load, self.sampler, self.decoder = (pack_module(f"native.{name}") for name in names)
        self.model, self.mllm, self.vae = load.load(model, "fp32")
        self.calls = 0
        network = self.model.model.diffusion_model
        forward = network._forward

        def counted(*args: Any) -> torch.Tensor:
            self.calls += 1
            return forward(*args)

        network._forward = counted

    @torch.inference_mode()
    def draw(
        self, requests: Sequence[ImageRequest], name: str, threshold: float
    ) -> tuple[list[Image.Image], dict[str, float]]:
        """Returns the pictures, and how often each branch was evaluated for one, on average."""
        node = getattr(importlib.import_module("comfy_extras.nodes_easycache"), f"{name}Node")
        model = node.execute(self.model, reuse_threshold=threshold, **USUAL).args[0]
        self.calls = 0
        pictures = [self._draw(model, request) for request in requests]
        edits = bool(requests[0].images)
        branches = ("conditional", "partial", "unconditional") if edits else ("conditional", "unconditional")
        steps = self.calls / len(requests) / (2 if edits else 1)  # references go in a call of their own
        return pictures, dict.fromkeys(branches, steps)

    def _draw(self, model: Any, request: ImageRequest) -> Image.Image:
        images = {"images": request.images, "vae": self.vae} if request.images else {}
        positive, negative, latent = self.mllm.encode(request.prompt, thought=request.thought, **images)
        settings = {"seed": request.seed, "steps": request.steps, **request.guidance._asdict()}
        drawn = self.sampler.sample_latent(model, positive, negative, latent, **settings)
        pixels = self.decoder.decode(self.vae, drawn)[0]
        return Image.fromarray((pixels * 255).to(torch.uint8).cpu().numpy())
