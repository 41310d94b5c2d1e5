"""Prompts and images to the contexts that the transformer draws from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image

from .chat import History
from .checkpoint import WeightFormat
from .images import ReferenceSizes, vision_pixels
from .linear import fitting_threads
from .mllm import MLLM
from .prefix import Piece, PrefixCache
from .prompt import BranchPrompts, TokenizedPrompt
from .qwen3 import KeyValueCache
from .rope import Layout
from .sampling import check_finite
from .schema import ProcessorConfig, TransformerConfig, checked
from .tokenizer import Tokenizer


def check_length(model: MLLM, *prompts: TokenizedPrompt) -> int:
    """Returns how many tokens fit after the longest prompt into the model's context. To be asked before any work.

    Raises:
        ValueError: a prompt itself does not fit.
        RuntimeError: the tokenizer knows more tokens than the model.
    """
    config = model.language_model.config
    highest = max(max(prompt.ids) for prompt in prompts)
    if highest >= config.vocab_size:
        raise RuntimeError(
            f"token {highest} found, {config.vocab_size} tokens (0 to {config.vocab_size - 1}) known to the language "
            "model: the tokenizer belongs to another model"
        )
    found, allowed = max(len(prompt.ids) for prompt in prompts), config.max_position_embeddings
    if found > allowed:
        raise ValueError(
            f"{found} tokens found (system message, prompt, pictures and thought together), {allowed} expected at "
            "most: shorten the text or give fewer pictures"
        )
    return allowed - found


def check_layers(layers: Sequence[int], model: MLLM) -> None:
    """Makes sure that the language model has the layers that are handed on.

    Raises:
        RuntimeError: it has not.
    """
    count = model.language_model.config.num_hidden_layers
    wrong = [layer for layer in layers if not -count - 1 <= layer <= count]
    if wrong:
        raise RuntimeError(f"vlm_select_layer {wrong[0]} found, {-count - 1} to {count} expected for {count} layers")


def fit_history(
    model: MLLM, history: History, build: Callable[[History], TokenizedPrompt], new_tokens: int = 0
) -> tuple[History, str]:
    """Returns the turns of a conversation that fit before a prompt, and what to tell of those that do not: "" of none.

    `build(history)` returns the prompt. The oldest messages go first, each with its answer. Room is kept for
    `new_tokens`, up to a quarter of the model's context.
    """
    allowed = model.language_model.config.max_position_embeddings
    allowed -= min(new_tokens, allowed // 4)
    fitting = history.fit(lambda some: len(build(some).ids), allowed)
    missing = len(history) - len(fitting)
    if not missing:
        return history, ""
    return fitting, (
        f"the first {missing} of {len(history)} turns of the conversation were left out: with them the prompt has "
        f"{len(build(history).ids)} tokens, and {allowed} fit"
    )


class ReadPrompt(NamedTuple):
    """A prompt in the language model.

    `cache` are its keys and values; `states` [tokens, len(layers) * width] the chosen layers' hidden states from the
    user's last turn on; `last` [1, 1, width] is the output after its last token.
    """

    cache: KeyValueCache
    states: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class BranchContexts:
    """The context [tokens, width] and the layout of each branch; `partial` is None without input images."""

    conditional: tuple[torch.Tensor, Layout]
    partial: tuple[torch.Tensor, Layout] | None
    unconditional: tuple[torch.Tensor, Layout]


@dataclass(frozen=True)
class Encoder:
    """How a checkpoint's prompts are read: tokenizer, layers that are handed on, and how images are prepared."""

    tokenizer: Tokenizer
    layers: tuple[int, ...]
    sizes: ReferenceSizes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    default_size: tuple[int, int]

    @classmethod
    def from_checkpoint(cls, checkpoint: WeightFormat) -> Encoder:
        """Returns the encoder of a checkpoint folder or of a converted language model.

        Raises:
            FileNotFoundError: the tokenizer is missing.
            RuntimeError: a file is unreadable or of another model.
        """
        tokenizer = Tokenizer(checkpoint.tokenizer())
        return cls.from_config(
            tokenizer, checkpoint.transformer_config(), checkpoint.processor_config(), str(checkpoint.path)
        )

    @classmethod
    def from_config(
        cls, tokenizer: Tokenizer, transformer: Mapping, processor: Mapping, source: str = "the checkpoint"
    ) -> Encoder:
        """Returns the encoder that the configurations of the transformer and the processor describe.

        Raises:
            RuntimeError: they say what cannot be; `source` is named.
        """
        drawing = checked(TransformerConfig, transformer, f"{source}, the transformer's configuration")
        place = f"{source}, the processor's configuration"
        reading = checked(ProcessorConfig, processor, place).image_processor_kwargs
        return cls(
            tokenizer,
            tuple(drawing.vlm_select_layer),
            ReferenceSizes.from_config(processor, place),
            tuple(reading.image_mean),
            tuple(reading.image_std),
            (drawing.gen_image_width, drawing.gen_image_height),
        )

    def image_features(
        self,
        model: MLLM,
        images: Sequence[Image.Image],
        *,
        device: torch.device,
        dtype: torch.dtype,
        kept: PrefixCache | None = None,
    ) -> list[torch.Tensor]:
        """Returns what the model sees in each RGB image [1, tokens, width]; those in `kept` are not computed again."""
        kept = kept or PrefixCache(0)

        def features(image: Image.Image) -> torch.Tensor:
            pixels = vision_pixels(image, model.vision.image_size, self.mean, self.std)
            return kept.features(pixels, lambda: model.image_features(pixels.to(device, dtype)).to(dtype)).to(device)

        return [features(image) for image in images]

    def embed(
        self,
        model: MLLM,
        prompt: TokenizedPrompt,
        features: Sequence[torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Returns a prompt's embeddings [1, tokens, width], the features of its images in place."""
        embedded = model.embed(prompt.ids, self.tokenizer.special_token_rows, device).to(dtype)
        for image, seen in zip(prompt.images, features, strict=True):
            embedded[:, image.start : image.stop] = seen
        return embedded

    def read(
        self,
        model: MLLM,
        prompt: TokenizedPrompt,
        features: Sequence[torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        more: int = 0,
        kept: PrefixCache | None = None,
    ) -> ReadPrompt:
        """Returns what the language model makes of a prompt, with room for `more` tokens after it.

        A prompt comes with the features of its images. Pieces that are in `kept` are not read again. `device` and
        `dtype` are the arithmetic's.
        """
        kept = kept or PrefixCache(0)
        language, embedded = model.language_model, None
        cache = language.new_cache(len(prompt.ids) + more, device=device, dtype=dtype)
        digests, states, last = [kept.start()], [], None
        for start, stop in prompt.pieces:
            inside = [seen for place, seen in zip(prompt.images, features, strict=True) if start <= place.start < stop]
            digests.append(kept.after(digests[-1], prompt.ids[start:stop], inside))
            piece = kept.get(digests[-1])
            if piece is None:
                if embedded is None:
                    embedded = self.embed(model, prompt, features, device=device, dtype=dtype)
                # By the piece alone, as all of its bits.
                with fitting_threads(language.typical_matrix, stop - start):
                    hidden, made = language(embedded[:, start:stop], cache, self.layers)
                assert made is not None
                piece = Piece(*cache.part(start, stop), made[0], hidden[:, -1:].clone())
                kept.put(digests[-1], piece)
            else:
                cache.extend(piece.keys, piece.values)
            last = piece.last.to(device)
            if stop > prompt.user_start:
                states.append(piece.states.to(device)[max(prompt.user_start - start, 0) :])
        kept.touch(digests)
        assert last is not None
        return ReadPrompt(cache, torch.cat(states), last)

    def encode(
        self,
        model: MLLM,
        prompts: Sequence[tuple[TokenizedPrompt, Sequence[torch.Tensor]]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        kept: PrefixCache | None = None,
    ) -> list[torch.Tensor]:
        """Returns the context [tokens, len(layers) * width] of each prompt: its user's last turn to its end.

        A prompt comes with the features of its images. What is before that turn (the system message, and the turns of
        a conversation) is seen by the attention but not handed on; prompts that share it read it once. The same prompt
        gives the same bits whatever it comes with. `device` and `dtype` are the arithmetic's.
        """
        check_length(model, *(prompt for prompt, _ in prompts))
        check_layers(self.layers, model)
        kept = kept or PrefixCache()
        contexts = []
        for prompt, features in prompts:
            contexts.append(self.read(model, prompt, features, device=device, dtype=dtype, kept=kept).states)
            check_finite(contexts[-1], "the hidden states", "the language model, or a LoRA on it")
        return contexts

    def encode_branches(
        self,
        model: MLLM,
        prompts: BranchPrompts,
        features: Sequence[torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        earlier: Sequence[torch.Tensor] = (),
        kept: PrefixCache | None = None,
    ) -> BranchContexts:
        """Returns the contexts of an image's branches; `features` are those of its input images.

        `earlier` are those of the images of the conversation before. What is in `kept` is not read again.
        """
        wanted: list[tuple[TokenizedPrompt, Sequence[torch.Tensor]]]
        wanted = [(prompts.conditional, (*earlier, *features))]
        if features:
            wanted.append((prompts.partial, features))
        wanted.append((prompts.unconditional, ()))
        contexts = self.encode(model, wanted, device=device, dtype=dtype, kept=kept)
        conditional, *rest = ((context, prompt.layout) for context, (prompt, _) in zip(contexts, wanted, strict=True))
        return BranchContexts(conditional, rest[0] if features else None, rest[-1])
