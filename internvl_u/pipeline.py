"""Text to image from a checkpoint folder, without ComfyUI: what `python -m internvl_u draw` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from . import mllm, picture, prompt, sampling
from .checkpoint import check_folder, fill, map_weights, open_file, read_json, strip_prefix
from .config import read_mmdit
from .mmdit import MMDiT, time_embedding
from .vae import StandaloneVAE

PADDING = "encoder_padding_token"
"""A tensor of the released files that only fills padding in training."""


@dataclass(frozen=True)
class Drawing:
    """What to draw. Sizes are pixels, scales are the two guidance strengths."""

    prompt: str
    width: int = 1024
    height: int = 1024
    steps: int = 20
    seed: int = 0
    all_cfg: float = 4.5
    part_cfg: float = 2.0
    system: str | None = None


class Pipeline:
    """A checkpoint on one device. Its parts are loaded when first needed and are never on the device together."""

    def __init__(self, root: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        """Opens a checkpoint folder.

        Raises:
            FileNotFoundError: the folder or a part of it is missing.
            RuntimeError: it holds another model or is damaged.
        """
        check_folder(root)
        self.root, self.dtype, self.device = root, dtype, torch.device(device)
        self.encoder = mllm.Encoder.read(root)
        self._parts: dict[str, torch.nn.Module] = {}

    @torch.inference_mode()
    def draw(self, drawing: Drawing, on_step: Callable[[int], None] | None = None) -> Image.Image:
        """Returns the picture, at the wished size; `on_step(n)` hears after each of the steps.

        Raises:
            ValueError: a size or number of steps is out of range.
        """
        width, height = picture.drawn_size(drawing.width, drawing.height)
        sigmas = sampling.flow_sigmas(drawing.steps)
        noise = picture.noise(width, height, drawing.seed)
        latent = self.sample(self.contexts(drawing), noise, sigmas, drawing, on_step)
        return picture.resize(picture.to_image(self.decode(latent)[0]), drawing.width, drawing.height)

    @torch.inference_mode()
    def contexts(self, drawing: Drawing) -> list[tuple[torch.Tensor, prompt.Layout]]:
        """Returns context and layout of the conditional and the unconditional prompt.

        The partial prompt of text to image is the unconditional one, so it is not computed again.
        """
        prompts = prompt.branches(self.encoder.tokenizer, drawing.prompt, system=drawing.system)
        model = self._on_device("mllm", lambda: mllm.load(self.root, dtype=self.dtype))
        return [
            (self.encoder.context(model, tokens, self.device, self.dtype), tokens.layout)
            for tokens in (prompts.conditional, prompts.unconditional)
        ]

    @torch.inference_mode()
    def sample(self, contexts, noise, sigmas, drawing: Drawing, on_step=None) -> torch.Tensor:
        """Returns the final latent [1, 16, h, w], fp32, from `noise` [1, 16, h, w]."""
        model = self._on_device("mmdit", lambda: load_mmdit(self.root, dtype=self.dtype))
        size = noise.shape[-2:]
        branches = [model.branch(context, layout, size, ()) for context, layout in contexts]

        def denoise(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            timestep = sampling.whole_timestep(sigma).reshape(1)
            time = time_embedding(timestep.to(self.dtype)).expand(len(branches), -1)
            both = latent.to(self.dtype).expand(len(branches), -1, -1, -1)
            conditional, nothing = model(both, time, branches).float().chunk(2)
            velocity = sampling.dual_guidance(
                conditional, nothing, nothing, drawing.all_cfg, drawing.part_cfg, timestep
            )
            return latent - sigma * velocity

        hear = None if on_step is None else lambda index, *_: on_step(index + 1)
        return sampling.sample(denoise, noise.to(self.device), sigmas.to(self.device), hear)

    @torch.inference_mode()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Returns pictures [1, 3, 8 h, 8 w] in [-1, 1] from a final latent [1, 16, h, w]."""
        vae = self._on_device("vae", lambda: StandaloneVAE(self.root, dtype=self.dtype))
        return vae.decode(latent.to(self.dtype)).float()

    def _on_device(self, name: str, load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        self._leave_device(keep=name)
        if name not in self._parts:
            self._parts[name] = load()
        return self._parts[name].to(self.device)

    def _leave_device(self, keep: str) -> None:
        for name, part in self._parts.items():
            if name != keep:
                part.to("cpu")


def load_mmdit(root: Path, *, dtype: torch.dtype | None = None, device="cpu", operations=torch.nn) -> MMDiT:
    """Returns the transformer of a checkpoint folder, ready for inference. With `dtype` None the files' own is kept.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
    """
    weights = map_mmdit(root)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    config = read_mmdit(shapes, read_json(root / "generation_decoder" / "config.json"))
    model = MMDiT(config, device="meta", operations=operations)
    fill(model, weights, "generation_decoder")
    return model.to(device=device, dtype=dtype).eval()


def map_mmdit(root: Path, open_file=open_file) -> dict[str, torch.Tensor]:
    """Returns the transformer's tensors of a checkpoint folder by the module's names, mapped from disk."""
    weights = strip_prefix(map_weights(root / "generation_decoder", open_file), "decoder.")
    weights.pop(PADDING, None)
    return weights
