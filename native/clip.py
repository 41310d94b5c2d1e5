"""CLIP: the language model as ComfyUI's text encoder, for core's nodes that encode a text or write one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from ..internvl_u.encoder import check_length
from ..internvl_u.generation import SMALLEST_TOP_P, GenerationConfig, cut_warning, ended
from ..internvl_u.prompt import (
    IMAGE_PLACEHOLDER,
    SYSTEM_ANSWER,
    TokenizedPrompt,
    branch_prompts,
    generation_prompt,
    plain_prompt,
)
from . import compat
from .conditioning import own_options
from .images import to_pil_images
from .mllm import NativeMLLM

KEY = "internvl_u"
"""The one key of what `CLIP.tokenize` returns."""
FRAMES_A_SECOND = 24
"""What core's nodes take a video's frames for; the model is shown one of each second."""
LAST_LAYER = -1
_logger = logging.getLogger("internvl_u")
Tokens = dict[str, list[list[tuple[Any, ...]]]]
"""ComfyUI's form of a text: lists of (token, weight) by the encoder's name. Ours has one token, a `Text`."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text and its pictures (IMAGE). Drawing and writing put it into different templates, so it has no ids yet."""

    text: str
    images: tuple[torch.Tensor, ...] = ()
    template: bool = True


class CLIP(comfy.sd.CLIP):
    """ComfyUI's CLIP over an MLLM, whose weights and patcher it shares."""

    def __init__(self, mllm: NativeMLLM):
        super().__init__(no_init=True)
        self._mllm = mllm
        self.patcher = mllm.patcher
        self.tokenizer = ClipTokenizer(mllm)
        self.tokenizer_options: dict[str, Any] = {}
        self.layer_idx = None
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None

    @property
    def mllm(self) -> NativeMLLM:
        """The MLLM under this CLIP's patcher: other nodes exchange it for one with their LoRAs and hooks."""
        return self._mllm.over(self.patcher)

    @property
    def cond_stage_model(self) -> TextEncoder:
        """What ComfyUI calls as a CLIP's network, and looks for its layers in."""
        return TextEncoder(self.mllm)

    def clone(self, disable_dynamic: bool = False) -> CLIP:
        """Returns a CLIP of the same weights that takes LoRAs and hooks of its own."""
        cloned = copy.copy(self)
        cloned.patcher = compat.cloned_patcher(self.patcher) if disable_dynamic else self.patcher.clone()
        cloned.tokenizer_options = self.tokenizer_options.copy()
        return cloned

    def get_ram_usage(self) -> int:
        """Returns the bytes that ComfyUI's cache counts for this object: the weights are counted at the MLLM."""
        return 0

    def clip_layer(self, layer_idx: int) -> None:
        """Takes the last layer, which stands for those that the transformer was trained with.

        Raises:
            ValueError: it is another one.
        """
        if layer_idx != LAST_LAYER:
            raise ValueError(
                f"layer {layer_idx} found, {LAST_LAYER} expected: the transformer of InternVL-U reads the layers that "
                "it was trained with. Take CLIP Set Last Layer out"
            )

    def load_model(self, tokens: Tokens | None = None) -> ModelPatcher:
        """Loads the weights, with room for a text to draw where ComfyUI says which: since 0.33."""
        mllm = self.mllm
        mllm.load(len(_drawing_prompt(mllm, text_of(tokens)).ids) if tokens else 0)
        return self.patcher

    def generate(
        self,
        tokens: Tokens,
        do_sample: bool = True,
        max_length: int = 256,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        presence_penalty: float = 0.0,
    ) -> list[int]:
        """Returns the ids that the model writes after a text, as InternVL-U Answer does.

        Without `do_sample` it is the likeliest token each time, and what follows after `max_length` has no meaning.

        Raises:
            ValueError: a value is out of range, or the text does not fit the model.
        """
        sampling: dict[str, Any] = {}
        if do_sample:
            sampling = {"temperature": temperature, "top_k": top_k, "top_p": max(top_p, SMALLEST_TOP_P), "min_p": min_p}
            sampling |= {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty or 0.0}
            sampling["seed"] = seed or 0
        config = GenerationConfig(max_length, **sampling)
        mllm, text = self.mllm, text_of(tokens)
        images = to_pil_images(text.images, mllm.encoder.sizes)
        bar = comfy.utils.ProgressBar(max_length)

        def on_token(ids: list[int]) -> None:
            mm.throw_exception_if_processing_interrupted()
            bar.update_absolute(len(ids))

        written = mllm.write(_writing_prompt(mllm, text, images), images, config, on_token)
        if not ended(written, mllm.encoder.tokenizer.stops):
            _logger.warning("InternVL-U: %s", cut_warning(len(written), "max_length"))
        return written

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids. Special tokens are always left out."""
        return self.tokenizer.decode(token_ids)

    def get_sd(self) -> NoReturn:
        """Refuses to give the weights for a file.

        Raises:
            ValueError: always; it says what writes such a file.
        """
        raise ValueError(
            "a CLIP of InternVL-U found, one that ComfyUI can save expected: its file holds the configuration and the "
            "tokenizer as well. `python -m internvl_u convert` writes it, after `merge` with a LoRA in the weights"
        )

    def state_dict_for_saving(self) -> NoReturn:
        """Refuses as `get_sd` does, which newer versions ask instead."""
        self.get_sd()


class ClipTokenizer:
    """What ComfyUI calls as a CLIP's tokenizer."""

    def __init__(self, mllm: NativeMLLM):
        self._tokenizer = mllm.encoder.tokenizer

    def tokenize_with_weights(
        self,
        text: str,
        return_word_ids: bool = False,
        image: torch.Tensor | None = None,
        images: Sequence[torch.Tensor] = (),
        video: torch.Tensor | None = None,
        audio: object = None,
        skip_template: bool = False,
        thinking: bool = False,
        **_: object,
    ) -> Tokens:
        """Returns a text with its pictures. Weights such as `(cat:1.2)` and `embedding:` are plain text.

        `video` are frames at 24 a second. With `skip_template` a text is gone on with as it is; a text to draw always
        has its template. What other models' encoders take besides is left alone, as theirs do.

        Raises:
            ValueError: there is a sound, or the text is none.
        """
        if not isinstance(text, str):
            raise ValueError(f"a {type(text).__name__} found, a text expected")
        if audio is not None:
            raise ValueError(
                "a sound found, a text and pictures expected: InternVL-U does not hear. Take the audio off"
            )
        if thinking:
            _logger.info("InternVL-U thinks before it draws (InternVL-U Think), not before it answers")
        pictures = [*([] if image is None else [image]), *images]
        if video is not None:
            frames = video[::FRAMES_A_SECOND]
            shown = "".join(f"Frame{i + 1}: {IMAGE_PLACEHOLDER}\n" for i in range(len(frames)))
            unplaced = sum(map(len, pictures)) - text.count(IMAGE_PLACEHOLDER)
            pictures, text = [frames, *pictures], shown + f"{IMAGE_PLACEHOLDER}\n" * unplaced + text
        token = (Text(text, tuple(pictures), not skip_template), 1.0)
        return {KEY: [[(*token, 1) if return_word_ids else token]]}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids. Special tokens are always left out."""
        return self._tokenizer.decode(token_ids)


class TextEncoder:
    """What ComfyUI calls as a CLIP's network. For all else it is the network: its layers, its `state_dict`."""

    def __init__(self, mllm: NativeMLLM):
        self.mllm = mllm

    def __getattr__(self, name: str) -> Any:
        if name == "mllm" or name.startswith("__"):
            raise AttributeError(name)  # of an object that is being copied
        return getattr(self.mllm.model, name)

    def reset_clip_options(self) -> None:
        """There are none."""

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Takes options, none of which means anything here: the device is the patcher's, the layers are trained."""

    def encode_token_weights(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Returns a text's context [1, tokens, width], a pooled output without meaning, and a conditioning's options.

        The weights have to be loaded. An empty text is the model's own empty prompt, the one for the negative.

        Raises:
            ValueError: the text has pictures, or does not fit the model.
        """
        prompt = _drawing_prompt(self.mllm, text_of(tokens))
        with self.mllm.computing() as where:
            (context,) = self.mllm.encoder.encode(self.mllm.model, [(prompt, ())], **where)
        options = own_options()
        context = context.unsqueeze(0).to(mm.intermediate_device(), torch.float32)
        return context, options["pooled_output"], options


def text_of(tokens: object) -> Text:
    """Returns the text in what `CLIP.tokenize` has returned.

    Raises:
        ValueError: another CLIP has, or other nodes have put several together.
    """
    sections = tokens.get(KEY, ()) if isinstance(tokens, dict) else ()
    found = [token for section in sections for token, *_ in section if isinstance(token, Text)]
    if len(found) != 1:
        raise ValueError(
            f"tokens of {len(found)} texts of InternVL-U found, of 1 expected: make them with the CLIP of Load "
            "InternVL-U, and put texts together as texts or with Conditioning (Concat)"
        )
    return found[0]


def _drawing_prompt(mllm: NativeMLLM, text: Text) -> TokenizedPrompt:
    if text.images:
        raise ValueError(
            "a text with pictures found, a text alone expected: pictures to edit go to InternVL-U Encode, which also "
            "shows them to the transformer"
        )
    prompts = branch_prompts(mllm.encoder.tokenizer, text.text, grid=mllm.model.vision.grid)
    prompt = prompts.conditional if text.text.strip() else prompts.unconditional
    check_length(mllm.model, prompt)
    return prompt


def _writing_prompt(mllm: NativeMLLM, text: Text, images: Sequence[Image.Image]) -> TokenizedPrompt:
    tokenizer, grid = mllm.encoder.tokenizer, mllm.model.vision.grid
    if text.template:
        return generation_prompt(tokenizer, text.text, system=SYSTEM_ANSWER, images=len(images), grid=grid)
    return plain_prompt(tokenizer, text.text, images=len(images), grid=grid)
