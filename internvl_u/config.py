"""What a checkpoint says about itself, read from its JSON files and from the shapes of its weights.

Widths and depths come from the weights. The JSON files supply only what no shape can tell: the number of
heads, the split of the rotary axes, position scales, epsilons. Where both speak they must agree. Nothing is built, nor
looped over, that the weights' own shapes do not bear out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .files import shown
from .schema import LanguageSection, TransformerConfig, VLMConfig, checked

Shapes = Mapping[str, tuple[int, ...]]
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class MMDiTConfig:
    """The flow transformer. `width` = `heads` * `head_dim`; channels are counted per latent pixel."""

    channels: int
    patch_size: int
    context_width: int
    layers: int
    heads: int
    head_dim: int
    rope_axes: tuple[int, int, int]
    rope_theta: float = 10000.0
    image_scale: float = 0.25
    select_layers: tuple[int, ...] = (-1, -2)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its projector. `image_size` and `patch_size` are in pixels."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    eps: float
    downsample: float
    output_width: int

    @property
    def grid(self) -> int:
        """Rows (= columns) of the tokens that one image becomes in the prompt."""
        return int(self.image_size // self.patch_size * self.downsample)


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen3, by transformers' names. `rope_scaling` says how positions are stretched: None for not at all."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    attention_bias: bool = False

    @property
    def cache_width(self) -> int:
        """Keys and values of one token, in numbers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class MLLMConfig:
    """The sizes of the vision tower and of the language model."""

    vision: VisionConfig
    language: LanguageConfig


def mllm_config(shapes: Shapes, config: Mapping, source: str = "vlm/config.json") -> MLLMConfig:
    """Returns the multimodal model's configuration from its weights' shapes and `vlm/config.json`.

    Raises:
        RuntimeError: the weights are not an InternVL-U MLLM, or contradict the JSON file, which `source` names.
    """
    stated = checked(VLMConfig, config, source)
    vision, language = vision_config(shapes, stated, source), language_config(shapes, stated.llm_config, source)
    if vision.output_width != language.hidden_size:
        raise RuntimeError(
            f"{source}: mlp1.1.weight gives {vision.output_width} values per token, the language model takes "
            f"{language.hidden_size}: they do not belong together"
        )
    return MLLMConfig(vision, language)


def mmdit_config(shapes: Shapes, config: Mapping, source: str = "generation_decoder/config.json") -> MMDiTConfig:
    """Returns the transformer's sizes from its weights' shapes and `generation_decoder/config.json`.

    Raises:
        RuntimeError: the weights are not an InternVL-U transformer, or contradict the JSON file, which `source` names.
    """
    outer = checked(TransformerConfig, config, source)
    stated = outer.decoder_config
    width, packed = _shape(shapes, "img_in.weight", 2)
    context_width = _shape(shapes, "txt_in.weight", 2)[1]
    head_dim = _shape(shapes, "transformer_blocks.0.attn.norm_q.weight", 1)[0]
    image_scale = outer.vlm_cond_position_scale_factor or stated.vlm_cond_position_scale_factor or 0.25
    video_scale = outer.video_position_scale_factor or stated.video_position_scale_factor or 1.0
    result = MMDiTConfig(
        channels=_divided(packed, stated.patch_size**2, "img_in.weight's columns", "patch_size ** 2", source),
        patch_size=stated.patch_size,
        context_width=context_width,
        layers=_depth(shapes, "transformer_blocks.", source),
        heads=_divided(width, head_dim, "img_in.weight's rows", "norm_q.weight's length", source),
        head_dim=head_dim,
        rope_axes=(stated.axes_dims_rope[0], stated.axes_dims_rope[1], stated.axes_dims_rope[2]),
        image_scale=image_scale,  # the official code takes both scales from the outer level
        select_layers=tuple(outer.vlm_select_layer),
    )
    _agree(source, "video_position_scale_factor", video_scale, 1.0)
    _agree(source, "num_layers", stated.num_layers, result.layers)
    _agree(source, "num_attention_heads", stated.num_attention_heads, result.heads)
    _agree(source, "attention_head_dim", stated.attention_head_dim, result.head_dim)
    _agree(source, "joint_attention_dim", stated.joint_attention_dim, result.context_width)
    _agree(source, "patch_size ** 2 * 16", stated.patch_size**2 * LATENT_CHANNELS, packed)
    if sum(result.rope_axes) != head_dim:
        raise RuntimeError(
            f"{source}: axes_dims_rope {result.rope_axes} add up to {sum(result.rope_axes)}, "
            f"the head dimension is {head_dim}"
        )
    return result


def vision_config(shapes: Shapes, stated: VLMConfig, source: str) -> VisionConfig:
    """Returns the vision tower's sizes from its weights' shapes and `vlm/config.json`.

    Raises:
        RuntimeError: the weights hold no such tower, or contradict the JSON file.
    """
    width, _, patch, _ = _shape(shapes, "vision_model.embeddings.patch_embedding.weight", 4)
    places = _shape(shapes, "vision_model.embeddings.position_embedding", 3)[1]
    result = VisionConfig(
        width=width,
        layers=_depth(shapes, "vision_model.encoder.layers.", source),
        heads=stated.vision_config.num_attention_heads,
        mlp_width=_shape(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        image_size=stated.force_image_size or stated.vision_config.image_size,
        eps=stated.vision_config.layer_norm_eps,
        downsample=stated.downsample_ratio,
        output_width=_shape(shapes, "mlp1.1.weight", 2)[0],
    )
    rows, side = result.image_size // patch, round(1 / result.downsample)
    _divided(result.image_size, patch, "the image size", "the patch size", source)
    _agree(source, "(image size / patch size) ** 2 + 1", rows**2 + 1, places)
    _divided(width, result.heads, "the vision tower's width", "num_attention_heads", source)
    _divided(rows, side, "the rows of patches", "1 / downsample_ratio", source)
    _agree(source, "width / downsample_ratio ** 2", width * side**2, _shape(shapes, "mlp1.1.weight", 2)[1])
    return result


def language_config(shapes: Shapes, stated: LanguageSection, source: str) -> LanguageConfig:
    """Returns Qwen3's configuration from its weights' shapes and `llm_config`.

    Raises:
        RuntimeError: the weights hold no Qwen3, or contradict the JSON file.
    """
    layer = "language_model.model.layers.0"
    vocabulary, width = _shape(shapes, "language_model.model.embed_tokens.weight", 2)
    head_dim = _shape(shapes, f"{layer}.self_attn.q_norm.weight", 1)[0]
    rows = {name: _shape(shapes, f"{layer}.self_attn.{name}_proj.weight", 2)[0] for name in ("q", "k")}
    heads, shared = (_divided(rows[name], head_dim, f"{name}_proj's rows", "head_dim", source) for name in ("q", "k"))
    _divided(heads, shared, "num_attention_heads", "num_key_value_heads", source)
    sizes = {
        "hidden_size": width,
        "intermediate_size": _shape(shapes, f"{layer}.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": _depth(shapes, "language_model.model.layers.", source),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
    }
    for key, found in sizes.items():
        _agree(source, key, getattr(stated, key), found)
    scaling = stated.rope_parameters or stated.rope_scaling
    theta = stated.rope_theta or (scaling.rope_theta if scaling else None) or 10000.0
    stretched = None
    if scaling and scaling.rope_type != "default":
        stretched = scaling.model_dump(exclude_none=True, exclude={"rope_theta"})
    return LanguageConfig(
        **sizes,
        rope_theta=theta,
        rope_scaling=stretched,
        rms_norm_eps=stated.rms_norm_eps,
        max_position_embeddings=stated.max_position_embeddings,
        attention_bias=stated.attention_bias,
    )


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    found = shapes.get(name)
    if found is None or len(found) != dimensions or 0 in found:
        raise RuntimeError(f"not an InternVL-U checkpoint: {name} has shape {found}, {dimensions} axes expected")
    return tuple(found)


def _depth(shapes: Shapes, prefix: str, source: str) -> int:
    """Returns how many layers there are: their numbers must be 0 to one below that."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
    numbers = {int(match.group(1)) for name in shapes if (match := pattern.match(name))}
    if numbers and max(numbers) + 1 != len(numbers):
        raise RuntimeError(
            f"{source}: {len(numbers)} layers {prefix}N found, the last of them {max(numbers)}: some between are "
            "missing"
        )
    return len(numbers)


def _divided(value: int, divisor: int, what: str, by: str, source: str) -> int:
    if value % divisor:
        raise RuntimeError(f"{source}: {what} {value} found, a multiple of {by} ({shown(divisor)}) expected")
    return value // divisor


def _agree(source: str, key: str, stated: object, expected: object) -> None:
    if stated is not None and stated != expected:
        raise RuntimeError(f"{source} says {key} = {shown(stated)}, {expected!r} expected")
