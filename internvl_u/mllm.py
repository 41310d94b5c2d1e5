"""The multimodal language model: vision tower, projector, special-token rows and Qwen3 (through transformers).

Attribute names are the checkpoint's keys below `vlm/`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from .checkpoint import fill, map_weights, read_json
from .config import VisionConfig, read_vision
from .picture import ReferenceSizes, vision_pixels
from .prompt import ROW_TOKENS, TokenIds, Tokenizer, find_tokenizer
from .source import read_part, told
from .vision import Projector, VisionTower


@dataclass(frozen=True)
class MLLMConfig:
    """The parts' sizes; `language` is the checkpoint's Qwen3 configuration as it stands."""

    vision: VisionConfig
    language: Mapping


class MLLM(nn.Module):
    """Token ids and pictures in, hidden states out."""

    def __init__(self, config: MLLMConfig, *, dtype=None, device=None, operations=nn):
        super().__init__()
        self.vision = config.vision
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.vision_model = VisionTower(config.vision, **factory)
        self.mlp1 = Projector(config.vision, **factory)
        self.language_model = build_language(config.language, dtype=dtype, device=device)
        width = self.language_model.config.hidden_size
        self.special_token_embedding = operations.Embedding(len(ROW_TOKENS), width, dtype=dtype, device=device)

    def embed(self, ids: Sequence[int], rows: Mapping[int, int], device: torch.device) -> torch.Tensor:
        """Returns embeddings [1, tokens, width] on `device`; ids in `rows` (id -> row) take that special row."""
        table = self.language_model.get_input_embeddings()
        embedded = table(torch.tensor([ids], device=device))
        special = [(i, rows[token]) for i, token in enumerate(ids) if token in rows]
        if special:
            where, which = zip(*special, strict=True)
            replaced = self.special_token_embedding(torch.tensor(which, device=device))
            embedded = embedded.index_copy(1, torch.tensor(where, device=device), replaced[None].to(embedded))
        return embedded

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the features [B, tokens, width] of normalised pixels [B, 3, size, size]."""
        return self.mlp1(self.vision_model(pixels))

    def read(self, embedded: torch.Tensor):
        """Returns keys and values of a text's beginning [1, tokens, width], for `hidden_states` to go on from."""
        output = self.language_model.model(inputs_embeds=embedded, use_cache=True)
        return output[cache_name(self.language_model)]

    def hidden_states(self, embedded: torch.Tensor, layers: Sequence[int], past=None) -> torch.Tensor:
        """Returns the chosen layers' hidden states side by side [1, tokens, len(layers) * width].

        Layer -1 is the output after the final norm, -2 the input of the last layer. `past` is what `read` gave for the
        tokens before; it is left as it is.
        """
        states = self.language_model.model(
            inputs_embeds=embedded,
            use_cache=past is not None,
            output_hidden_states=True,
            **{cache_name(self.language_model): copy.deepcopy(past)},
        ).hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1)


def cache_name(language: nn.Module) -> str:
    """Returns transformers' name of the keys and values of the tokens before, as an argument and in an output.

    It is `cache` since 5.24, which announces the end of `past_key_values` for 5.40.
    """
    arguments = inspect.signature(type(language.model).forward).parameters
    return "cache" if "cache" in arguments else "past_key_values"


def build_language(config: Mapping, *, dtype=None, device=None) -> nn.Module:
    """Returns transformers' Qwen3 with uninitialised weights.

    Raises:
        RuntimeError: the configuration is of another architecture.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if config.get("model_type") != "qwen3":
        raise RuntimeError(f"vlm: language model {config.get('model_type')!r} found, 'qwen3' expected")
    settings = Qwen3Config.from_dict({k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")})
    settings._attn_implementation = "sdpa"
    if not settings.use_sliding_window:
        settings.sliding_window = None  # transformers 4.51 warns of a window even where it is not used
    with torch.device("meta"):
        model = Qwen3ForCausalLM(settings)
    if torch.device(device or "cpu").type != "meta":
        model = model.to_empty(device=device or "cpu")
    # Its table is a buffer that no checkpoint stores, so it cannot stay on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    return model.to(dtype=dtype) if dtype is not None else model


def read_config(source: Path, shapes: Mapping[str, tuple[int, ...]]) -> MLLMConfig:
    """Returns the sizes that `vlm/config.json` and the weights' shapes tell."""
    config = read_part(source, "vlm")
    return MLLMConfig(read_vision(shapes, config), config.get("llm_config", {}))


def load(root: Path, *, dtype: torch.dtype | None = None, device="cpu", operations=nn) -> MLLM:
    """Returns the model of a checkpoint folder, ready for inference. With `dtype` None the files' own is kept.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: the files are damaged, of another model, or do not fit each other.
    """
    weights = map_weights(root / "vlm")
    config = read_config(root, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    model = MLLM(config, device="meta", operations=operations)
    fill(model, weights, "vlm")
    return model.to(device=device, dtype=dtype).eval()


@dataclass(frozen=True)
class Encoder:
    """What a checkpoint's prompts are made with: tokenizer, layers handed on, and how pictures are prepared."""

    tokenizer: Tokenizer
    layers: tuple[int, ...]
    sizes: ReferenceSizes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    default_size: tuple[int, int]

    @classmethod
    def read(cls, source: Path) -> Encoder:
        """Returns the encoder of a checkpoint folder or of a converted language model.

        Raises:
            FileNotFoundError: the tokenizer is missing.
            RuntimeError: a file is unreadable or of another model.
        """
        if source.is_dir():
            file = source / "processor" / "processor_config.json"
            processor = read_json(file) if file.is_file() else {}
            return cls.made(
                Tokenizer(find_tokenizer(source)), read_json(source / "generation_decoder" / "config.json"), processor
            )
        found = told(source)
        if "tokenizer" not in found:
            raise RuntimeError(f"{source} carries no tokenizer: convert the checkpoint folder again")
        return cls.made(Tokenizer(found["tokenizer"]), found.get("drawing", {}), found.get("processor", {}))

    @classmethod
    def made(cls, tokenizer: Tokenizer, drawing: Mapping, processor: Mapping) -> Encoder:
        """Returns the encoder that the checkpoint's configurations describe."""
        vision = processor.get("image_processor_kwargs", {})
        return cls(
            tokenizer,
            tuple(drawing.get("vlm_select_layer", (-1, -2))),
            ReferenceSizes.read(processor),
            tuple(vision.get("image_mean", (0.485, 0.456, 0.406))),
            tuple(vision.get("image_std", (0.229, 0.224, 0.225))),
            (int(drawing.get("gen_image_width", 512)), int(drawing.get("gen_image_height", 512))),
        )

    @property
    def rows(self) -> dict[int, int]:
        """Special-token row by token id."""
        return {self.tokenizer.special[name]: row for row, name in enumerate(ROW_TOKENS)}

    def features(
        self, model: MLLM, images: Sequence[Image.Image], *, device: torch.device, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Returns what the model sees in each RGB picture [1, tokens, width]."""
        size = model.vision.image_size
        pixels = (vision_pixels(image, size, self.mean, self.std) for image in images)
        return [model.image_features(one.to(device, dtype)).to(dtype) for one in pixels]

    def embedded(
        self, model: MLLM, prompt: TokenIds, features: Sequence[torch.Tensor], *, device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns a prompt's embeddings [1, tokens, width], its pictures' features in place."""
        embedded = model.embed(prompt.ids, self.rows, device).to(dtype)
        for place, seen in zip(prompt.pictures, features, strict=True):
            embedded[:, place.start : place.stop] = seen
        return embedded

    def contexts(
        self,
        model: MLLM,
        prompts: Sequence[tuple[TokenIds, Sequence[torch.Tensor]]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        """Returns the context [tokens, len(layers) * width] of each prompt: its user's turn to its end.

        A prompt comes with the features of its pictures. The prompts share their system turn, which is seen by the
        attention but not handed on: each is read once. The same prompt gives the same bits whatever it comes with.
        `device` and `dtype` are the arithmetic's.
        """
        read: dict[tuple[int, ...], object] = {}
        result = []
        for prompt, features in prompts:
            embedded = self.embedded(model, prompt, features, device=device, dtype=dtype)
            turn = prompt.ids[: prompt.user]
            if turn not in read:
                read[turn] = model.read(embedded[:, : prompt.user])
            result.append(model.hidden_states(embedded[:, prompt.user :], self.layers, read[turn])[0])
        return result
