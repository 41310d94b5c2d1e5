"""A conversation in ComfyUI: one message answered by the nodes' models, its pictures kept in the output folder.

A picture is named by its values: the same run writes the same file, and a conversation is known by its text.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import comfy.sd
import folder_paths
import numpy
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..internvl_u.chat import History, Picture, Role, Turn
from ..internvl_u.defaults import GUIDANCE, GUIDANCE_WITH_THOUGHT
from ..internvl_u.files import in_short
from ..internvl_u.generation import GenerationConfig
from ..internvl_u.images import ReferenceSizes, drawn_size, to_rgb
from ..internvl_u.reply import Message, new_pictures, reply
from ..internvl_u.tokenizer import Tokenizer, has_thought
from .generate import check_history, write
from .guidance import check_model
from .images import to_pil_images
from .latents import check_vae
from .mllm import NativeMLLM, check_mllm
from .progress import show_chat, show_note
from .sampler import empty_latent, sample_latent
from .vae import decode

if TYPE_CHECKING:
    from comfy_api.latest._io import HiddenHolder

FOLDER = "InternVL-U/chat"
FOLDERS = {
    "output": folder_paths.get_output_directory,
    "input": folder_paths.get_input_directory,
    "temp": folder_paths.get_temp_directory,
}


@dataclass(frozen=True)
class Settings:
    """How a message is answered. Sizes are pixels of a new picture, 0 is the model's own.

    `scales` are `all_cfg` and `part_cfg`; None: the official ones, which a thought changes.
    """

    width: int
    height: int
    steps: int
    seed: int
    max_new_tokens: int
    scales: tuple[float, float] | None = None


@dataclass
class NativeSpeaker:
    """The nodes' models as `reply` wants them. What is written is shown on the node."""

    mllm: NativeMLLM
    model: ModelPatcher | None
    vae: comfy.sd.VAE | None
    settings: Settings
    hidden: HiddenHolder
    cut: str = ""

    @property
    def tokenizer(self) -> Tokenizer:
        """What its ids mean."""
        return self.mllm.encoder.tokenizer

    def write(
        self, text: str, system: str, images: Sequence[Image.Image], history: History, *, thinks: bool
    ) -> list[int]:
        """Returns the ids that it writes."""
        if thinks:
            self._drawing_parts()  # what is missing is not found after a minute of thinking
        config = GenerationConfig(self.settings.max_new_tokens)
        written, self.cut = write(self.mllm, text, system, images, config, self.hidden, history)
        return written

    def draw(self, text: str, images: Sequence[Image.Image], history: History, thought: str) -> Picture:
        """Returns the picture that it draws, or makes of `images`: then of the first one's size.

        Raises:
            ValueError: the MODEL or the VAE is not connected.
        """
        model, vae = self._drawing_parts()
        positive, negative, latent = self.mllm.encode(
            text, images=images, vae=vae, thought=thought, history=history, on_note=self._note
        )
        if not images:
            width, height = self.mllm.encoder.default_size
            size = drawn_size(self.settings.width or width, self.settings.height or height)
            latent = empty_latent(*size)
        official = GUIDANCE_WITH_THOUGHT if has_thought(thought) else GUIDANCE
        all_cfg, part_cfg = self.settings.scales or official
        drawn = sample_latent(
            model,
            positive,
            negative,
            latent,
            seed=self.settings.seed,
            steps=self.settings.steps,
            all_cfg=all_cfg,
            part_cfg=part_cfg,
        )
        levels = (decode(vae, drawn)[0].cpu().float().numpy() * 255).astype(numpy.uint8)
        return keep_picture(Image.fromarray(levels))

    def _drawing_parts(self) -> tuple[ModelPatcher, comfy.sd.VAE]:
        if self.model is None or self.vae is None:
            raise ValueError("no MODEL or no VAE found, both expected to draw: connect those of Load InternVL-U")
        check_vae(self.vae)
        return self.model, self.vae

    def _note(self, sentence: str) -> None:
        show_note(self.hidden, sentence)


@dataclass(frozen=True)
class Said:
    """A conversation after a run, of it the turns of the run itself, and what a limit has cut."""

    history: History
    own: History
    new: History
    cut: str = ""

    @property
    def text(self) -> str:
        """The newest words of the model: its answer, or what it thought before it drew."""
        last = next((turn for turn in reversed(self.history.turns) if turn.role == "assistant"), None)
        return "" if last is None else last.text or str(last.thought)

    def image(self) -> torch.Tensor | None:
        """Returns the newest picture [1, height, width, 3] in [0, 1]."""
        last = self.history.last_picture
        return None if last is None else as_image(last.image)

    def ui(self) -> dict[str, Any]:
        """Returns what the node shows: its own conversation before the run, and the turns that came to it."""
        shown = {"before": len(self.own), "turns": self.new.to_json()}
        return {"chat": [shown | {"cut": self.cut}], "text": [self.text]}


def talk(
    mllm: NativeMLLM,
    model: ModelPatcher | None,
    vae: comfy.sd.VAE | None,
    message: str,
    images: Sequence[torch.Tensor | None],
    *,
    conversation: str,
    history: History | None,
    action: str,
    reads: str,
    settings: Settings,
    hidden: HiddenHolder,
) -> Said:
    """Returns the conversation after a message; an empty message adds nothing to it.

    `conversation` is the node's own, as JSON; `history` is one that it goes on from.

    Raises:
        ValueError: an input is of another kind, or the message cannot be answered: then nothing is kept.
    """
    check_mllm(mllm)
    if model is not None:
        check_model(model)
    if vae is not None:
        check_vae(vae)
    before = check_history(history)
    own = History.from_json(conversation, open_picture)
    before = before.add(*own.turns)
    if not message.strip():
        return Said(before, own, History())
    given = [keep_picture(image) for image in to_pil_images(images, mllm.encoder.sizes)]
    asked = Message(message, new_pictures(before, message, given), action, reads)
    speaker = NativeSpeaker(mllm, model, vae, settings, hidden)
    after = reply(speaker, before, asked)
    said = Said(after, own, History(after.turns[len(before) :]), speaker.cut)
    show_chat(hidden, said.ui()["chat"][0])
    return said


def add_turn(history: object, role: str, text: str, images: Sequence[torch.Tensor | None]) -> History:
    """Returns a history, or with None an empty one, with a turn of a text and IMAGE inputs.

    Raises:
        ValueError: an input is of another kind, or there is neither a text nor a picture.
    """
    before = check_history(history)
    pictures = tuple(map(Picture, to_pil_images(images, ReferenceSizes())))
    if not text.strip() and not pictures:
        raise ValueError("neither a text nor a picture found, one of them expected: type a text or connect a picture")
    return before.add(Turn(cast(Role, role), text, pictures))


def blocked(image: torch.Tensor | None) -> torch.Tensor | ExecutionBlocker:
    """Returns an IMAGE, or without one what keeps the nodes behind it from running."""
    return ExecutionBlocker(None) if image is None else image


def as_image(image: Image.Image) -> torch.Tensor:
    """Returns an RGB image as an IMAGE [1, height, width, 3] in [0, 1]."""
    return torch.from_numpy(numpy.asarray(image).astype(numpy.float32) / 255)[None]


def keep_picture(image: Image.Image) -> Picture:
    """Returns a picture whose file in the output folder is named by its values; one that is there stays as it is."""
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
    name = f"{FOLDER}/{digest}.png"
    file = Path(folder_paths.get_output_directory(), name)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.part")
        content = io.BytesIO()
        image.save(content, format="PNG")
        partial.write_bytes(content.getvalue())
        os.replace(partial, file)
    return Picture(image, f"{name} [output]")


def open_picture(name: str) -> Image.Image:
    """Returns the RGB image of a name such as "InternVL-U/chat/1f.png [output]".

    Raises:
        ValueError: there is no such picture in ComfyUI's output, input or temp folder.
    """
    path, _, kind = name.rpartition(" [")
    folder = FOLDERS.get(kind.removesuffix("]")) if path else FOLDERS["input"]
    if folder is None:
        raise ValueError(
            f"picture {name[:200]!r} found in the conversation, a name with [output], [input] or [temp] expected"
        )
    root = os.path.realpath(folder())
    file = os.path.realpath(os.path.join(root, path or name))
    if not Path(file).is_relative_to(root):
        raise ValueError(f"picture {name[:200]!r} found in the conversation, one inside ComfyUI's folders expected")
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"the conversation's picture {name[:200]!r} cannot be opened ({in_short(error)}): put the file back, or go "
            "on from a turn before it"
        ) from error
