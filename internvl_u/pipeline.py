"""Drawing, editing, thinking and answering from a checkpoint folder, without ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from . import mllm, picture, prompt, sampling
from .checkpoint import check_folder, fill, read_json
from .config import read_mmdit
from .mmdit import MMDiT, time_embedding
from .source import map_mmdit
from .vae import StandaloneVAE
from .writing import Writing, write


@dataclass(frozen=True)
class Drawing:
    """What to draw. Sizes are pixels, scales the two guidance strengths; None takes the official default.

    With `images` (RGB) the prompt edits them; `thought` is a chain of thought that the drawing follows.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int = 20
    seed: int = 0
    all_cfg: float | None = None
    part_cfg: float | None = None
    system: str | None = None
    images: tuple[Image.Image, ...] = ()
    thought: str = ""

    @property
    def scales(self) -> tuple[float, float]:
        """The two guidance strengths: 4.5 and 2.0, or 3.5 and 1.5 after a thought, where none is given."""
        all_cfg, part_cfg = (3.5, 1.5) if prompt.has_thought(self.thought) else (4.5, 2.0)
        return (
            all_cfg if self.all_cfg is None else self.all_cfg,
            part_cfg if self.part_cfg is None else self.part_cfg,
        )


@dataclass(frozen=True)
class Conditions:
    """What the transformer draws from: (context, layout) of each branch, and the references' latents [1, 16, h, w].

    Without references the partial branch is the unconditional one and is left out.
    """

    conditional: tuple[torch.Tensor, prompt.Layout]
    partial: tuple[torch.Tensor, prompt.Layout] | None
    unconditional: tuple[torch.Tensor, prompt.Layout]
    references: tuple[torch.Tensor, ...] = ()


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
            ValueError: a size, the number of steps or the number of placeholders is out of range.
        """
        width, height = self.size(drawing)
        drawn = picture.drawn_size(width, height)
        sigmas = sampling.flow_sigmas(drawing.steps)
        noise = picture.noise(*drawn, drawing.seed)
        latent = self.sample(self.conditions(drawing), noise, sigmas, drawing.scales, on_step)
        return picture.resize(picture.to_image(self.decode(latent)[0]), width, height)

    def size(self, drawing: Drawing) -> tuple[int, int]:
        """Returns the wished (width, height): by default the first picture's, or the checkpoint's own."""
        default = self.encoder.default_size
        if drawing.images:
            default = self.encoder.sizes.fit(*drawing.images[0].size)
        wished = (drawing.width, drawing.height)
        return tuple(usual if side is None else side for side, usual in zip(wished, default, strict=True))

    @torch.inference_mode()
    def write(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        system: str = prompt.SYSTEM_ANSWER,
        writing: Writing | None = None,
        on_token: Callable[[list[int]], None] | None = None,
    ) -> list[int]:
        """Returns the ids that the model writes after the prompt; see `writing.write`."""
        model = self._mllm()
        opening = prompt.opening(
            self.encoder.tokenizer, text, system=system, pictures=len(images), grid=model.vision.grid
        )
        where = {"device": self.device, "dtype": self.dtype}
        features = self.encoder.features(model, images, **where)
        return write(self.encoder, model, opening, features, writing, on_token=on_token, **where)

    def answer(self, question: str, images: Sequence[Image.Image] = (), system: str | None = None, **how) -> str:
        """Returns the model's answer to a question about any number of pictures."""
        chosen = {} if system is None else {"system": system}
        return self.encoder.tokenizer.decode(self.write(question, images, **chosen, **how))

    def think(self, drawing: Drawing, **how) -> prompt.Thought:
        """Returns the thought that the model has before it draws, as far as the official code hands it on."""
        system = prompt.drawing_system(len(drawing.images)) if drawing.system is None else drawing.system
        return self.encoder.tokenizer.thought_of(self.write(drawing.prompt, drawing.images, system, **how))

    @torch.inference_mode()
    def conditions(self, drawing: Drawing) -> Conditions:
        """Returns what the transformer draws from.

        Raises:
            ValueError: the prompt has more placeholders than there are pictures.
        """
        references = self._references(drawing.images)
        model, images = self._mllm(), drawing.images
        tokenizer, where = self.encoder.tokenizer, {"device": self.device, "dtype": self.dtype}
        prompts = prompt.branches(
            tokenizer,
            drawing.prompt,
            pictures=len(images),
            grid=model.vision.grid,
            system=drawing.system,
            thought=tokenizer.thought(drawing.thought),
        )
        features = self.encoder.features(model, images, **where)
        wanted = [(prompts.conditional, features), (prompts.unconditional, ())]
        if images:
            wanted.append((prompts.partial, features))
        contexts = self.encoder.contexts(model, wanted, **where)
        conditional, nothing, *partial = zip(contexts, (tokens.layout for tokens, _ in wanted), strict=True)
        return Conditions(conditional, partial[0] if partial else None, nothing, references)

    @torch.inference_mode()
    def sample(self, conditions: Conditions, noise, sigmas, scales, on_step=None) -> torch.Tensor:
        """Returns the final latent [1, 16, h, w], fp32, from `noise` [1, 16, h, w]."""
        model = self._on_device("mmdit", lambda: load_mmdit(self.root, dtype=self.dtype))
        size, references = noise.shape[-2:], conditions.references
        grids = [reference.shape[-2:] for reference in references]
        seeing = [c for c in (conditions.conditional, conditions.partial) if c is not None]
        groups = [([model.branch(*seen, size, grids) for seen in seeing], references)]
        groups.append(([model.branch(*conditions.unconditional, size, ())], ()))
        if not references:
            groups = [([*groups[0][0], *groups[1][0]], ())]

        def denoise(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            timestep = sampling.whole_timestep(sigma).reshape(1)
            time = time_embedding(timestep.to(self.dtype))
            velocities = []
            for branches, seen in groups:
                count = len(branches)
                repeated = [one.to(self.dtype).expand(count, -1, -1, -1) for one in (latent, *seen)]
                velocity = model(repeated[0], time.expand(count, -1), branches, repeated[1:])
                velocities += velocity.float().split(1)
            conditional, partial, unconditional = velocities if len(velocities) == 3 else (*velocities, velocities[1])
            return latent - sigma * sampling.dual_guidance(conditional, partial, unconditional, *scales, timestep)

        hear = None if on_step is None else lambda index, *_: on_step(index + 1)
        return sampling.sample(denoise, noise.to(self.device), sigmas.to(self.device), hear)

    @torch.inference_mode()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Returns pictures [1, 3, 8 h, 8 w] in [-1, 1] from a final latent [1, 16, h, w]."""
        vae = self._on_device("vae", lambda: StandaloneVAE(self.root, dtype=self.dtype))
        return vae.decode(latent.to(self.dtype)).float()

    def _references(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, ...]:
        if not images:
            return ()
        vae = self._on_device("vae", lambda: StandaloneVAE(self.root, dtype=self.dtype))
        return tuple(vae.encode(picture.reference_pixels(image, self.encoder.sizes)) for image in images)

    def _mllm(self) -> mllm.MLLM:
        return self._on_device("mllm", lambda: mllm.load(self.root, dtype=self.dtype))

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
