"""What a checkpoint says about itself, read from its JSON files and from the shapes of its weights.

Widths and depths come from the weights. The JSON files supply only what no shape can tell: the number of
heads, the split of the rotary axes, position scales, epsilons. Where both speak they must agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


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
class MLLMConfig:
    """The vision tower's sizes, and the checkpoint's Qwen3 configuration as it stands."""

    vision: VisionConfig
    language: Mapping


def mllm_config(shapes: Shapes, config: Mapping) -> MLLMConfig:
    """Returns the multimodal model's configuration from its weights' shapes and `vlm/config.json`.

    Raises:
        RuntimeError: see `vision_config`.
    """
    return MLLMConfig(vision_config(shapes, config), config.get("llm_config", {}))


def mmdit_config(shapes: Shapes, config: Mapping) -> MMDiTConfig:
    """Returns the transformer's sizes from its weights' shapes and `generation_decoder/config.json`.

    Raises:
        RuntimeError: the weights are not an InternVL-U transformer, or contradict the JSON file.
    """
    stated = config.get("decoder_config", {})
    scales = stated | config  # the official code takes both position scales from the outer level
    width, packed = _shape(shapes, "img_in.weight", 2)
    context_width = _shape(shapes, "txt_in.weight", 2)[1]
    head_dim = _shape(shapes, "transformer_blocks.0.attn.norm_q.weight", 1)[0]
    patch = int(stated.get("patch_size", 2))
    projector = config.get("decoder_projector_type", "identity")
    if projector != "identity":
        raise RuntimeError(f"generation_decoder: projector {projector!r} found, 'identity' expected")
    result = MMDiTConfig(
        channels=packed // patch**2,
        patch_size=patch,
        context_width=context_width,
        layers=_depth(shapes, r"transformer_blocks\.(\d+)\."),
        heads=width // head_dim,
        head_dim=head_dim,
        rope_axes=tuple(stated.get("axes_dims_rope", (16, 56, 56))),
        image_scale=float(scales.get("vlm_cond_position_scale_factor", 0.25)),
        select_layers=tuple(config.get("vlm_select_layer", (-1, -2))),
    )
    _agree("generation_decoder", scales, "video_position_scale_factor", 1.0)
    _agree("generation_decoder", stated, "num_layers", result.layers)
    _agree("generation_decoder", stated, "num_attention_heads", result.heads)
    _agree("generation_decoder", stated, "attention_head_dim", result.head_dim)
    _agree("generation_decoder", stated, "joint_attention_dim", result.context_width)
    if sum(result.rope_axes) != head_dim:
        raise RuntimeError(
            f"generation_decoder: axes_dims_rope {result.rope_axes} add up to {sum(result.rope_axes)}, "
            f"the head dimension is {head_dim}"
        )
    return result


def vision_config(shapes: Shapes, config: Mapping) -> VisionConfig:
    """Returns the vision tower's sizes from its weights' shapes and `vlm/config.json`.

    Raises:
        RuntimeError: the weights hold no such tower, or it has a feature that InternVL-U does not use.
    """
    stated = config.get("vision_config", {})
    width, _, patch, _ = _shape(shapes, "vision_model.embeddings.patch_embedding.weight", 4)
    result = VisionConfig(
        width=width,
        layers=_depth(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        heads=int(stated.get("num_attention_heads", 16)),
        mlp_width=_shape(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        image_size=int(config.get("force_image_size") or stated.get("image_size", 448)),
        eps=float(stated.get("layer_norm_eps", 1e-6)),
        downsample=float(config.get("downsample_ratio", 0.5)),
        output_width=_shape(shapes, "mlp1.1.weight", 2)[0],
    )
    for key, expected in (("qk_normalization", False), ("norm_type", "layer_norm"), ("qkv_bias", True)):
        _agree("vlm", stated, key, expected)
    _agree("vlm", config, "select_layer", -1)
    _agree("vlm", config, "ps_version", "v2")
    return result


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    found = shapes.get(name)
    if found is None or len(found) != dimensions:
        raise RuntimeError(f"not an InternVL-U checkpoint: {name} has shape {found}, {dimensions} axes expected")
    return tuple(found)


def _depth(shapes: Shapes, pattern: str) -> int:
    numbers = [int(match.group(1)) for name in shapes if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _agree(part: str, stated: Mapping, key: str, expected) -> None:
    if stated.get(key, expected) != expected:
        raise RuntimeError(f"{part}: config.json says {key} = {stated[key]!r}, {expected!r} expected")
