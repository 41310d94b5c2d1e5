"""What the JSON files of a checkpoint may say: data of strangers, whose types and ranges are checked when read.

Keys that we do not use are ignored, also by the libraries behind us, which never see them. Sizes that the weights'
shapes tell are not believed here: `config` compares them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .defaults import LARGEST, LONGEST_CONTEXT, SMALLEST
from .files import describe, in_short, shown

LARGEST_JSON = 64 << 20
"""Bytes; the released files have some kilobytes, an index of thousands of tensors some hundred."""

Count = Annotated[int, Field(ge=1)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
PositionScale = Annotated[float, Field(ge=1e-3, le=1e3)]
Colours = Annotated[list[float], Field(min_length=3, max_length=3)]
Spreads = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
Pixels = Annotated[int, Field(ge=SMALLEST, le=LARGEST)]
Schema = TypeVar("Schema", bound="Section")


class Section(BaseModel):
    """One JSON object: numbers are numbers and finite, and nothing is taken for something else."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class ModelIndex(Section):
    """model_index.json."""

    class_name: str | None = Field(None, alias="_class_name")


class ShardIndex(Section):
    """*.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str] = {}


class RopeScaling(Section):
    """How Qwen3's positions are stretched to contexts longer than it was trained with."""

    rope_type: Literal["default", "linear", "dynamic", "yarn"] = "default"
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] | None = None
    factor: Annotated[float, Field(ge=1, le=1e3)] | None = None
    original_max_position_embeddings: Annotated[int, Field(ge=1, le=LONGEST_CONTEXT)] | None = None
    attention_factor: Annotated[float, Field(gt=0, le=1e3)] | None = None
    beta_fast: Annotated[float, Field(gt=0, le=1e6)] | None = None
    beta_slow: Annotated[float, Field(gt=0, le=1e6)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, value: Any) -> Any:
        return value | {"rope_type": value["type"]} if isinstance(value, dict) and "type" in value else value


class LanguageSection(Section):
    """`llm_config` of vlm/config.json: what no shape of Qwen3's weights tells, and the sizes to compare."""

    model_type: Literal["qwen3"]
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] = False
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] | None = None
    rope_scaling: RopeScaling | None = None
    rope_parameters: RopeScaling | None = None
    max_position_embeddings: Annotated[int, Field(ge=16, le=LONGEST_CONTEXT)] = 32768
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count | None = None


class VisionSection(Section):
    """`vision_config` of vlm/config.json."""

    num_attention_heads: Count = 16
    image_size: Annotated[int, Field(ge=1, le=LARGEST)] = 448
    layer_norm_eps: Epsilon = 1e-6
    qk_normalization: Literal[False] = False
    norm_type: Literal["layer_norm"] = "layer_norm"
    qkv_bias: Literal[True] = True


class VLMConfig(Section):
    """vlm/config.json."""

    llm_config: LanguageSection
    vision_config: VisionSection = VisionSection()
    force_image_size: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    downsample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    select_layer: Literal[-1] = -1
    ps_version: Literal["v2"] = "v2"


class TransformerSection(Section):
    """`decoder_config` of generation_decoder/config.json."""

    patch_size: Annotated[int, Field(ge=1, le=16)] = 2
    axes_dims_rope: Annotated[list[Annotated[int, Field(ge=2, multiple_of=2)]], Field(min_length=3, max_length=3)] = [
        16,
        56,
        56,
    ]
    num_layers: Count | None = None
    num_attention_heads: Count | None = None
    attention_head_dim: Count | None = None
    joint_attention_dim: Count | None = None
    vlm_cond_position_scale_factor: PositionScale | None = None
    video_position_scale_factor: float | None = None


class TransformerConfig(Section):
    """generation_decoder/config.json."""

    decoder_config: TransformerSection = TransformerSection()
    decoder_projector_type: Literal["identity"] = "identity"
    vlm_select_layer: Annotated[list[Annotated[int, Field(ge=-1000, le=1000)]], Field(min_length=1, max_length=64)] = [
        -1,
        -2,
    ]
    vlm_cond_position_scale_factor: PositionScale | None = None
    video_position_scale_factor: float | None = None
    gen_image_width: Pixels = 512
    gen_image_height: Pixels = 512


class VisionProcessing(Section):
    """`image_processor_kwargs` of processor_config.json."""

    image_mean: Colours = [0.485, 0.456, 0.406]  # ImageNet's, which the vision tower was trained with
    image_std: Spreads = [0.229, 0.224, 0.225]


class ReferenceProcessing(Section):
    """`image_gen_processor_kwargs` of processor_config.json; patches are latent pixels."""

    vae_downsample_factor: Annotated[int, Field(ge=1, le=64)] = 8
    min_dynamic_patch: Count = 4096
    max_dynamic_patch: Count = 16384
    max_length: Pixels | None = None

    @model_validator(mode="after")
    def _in_order(self) -> ReferenceProcessing:
        largest = (LARGEST // self.vae_downsample_factor) ** 2
        if not self.min_dynamic_patch <= self.max_dynamic_patch <= largest:
            raise ValueError(f"min_dynamic_patch at most max_dynamic_patch, and that at most {largest}")
        return self


class ProcessorConfig(Section):
    """processor/processor_config.json."""

    image_processor_kwargs: VisionProcessing = VisionProcessing()
    image_gen_processor_kwargs: ReferenceProcessing = ReferenceProcessing()


class VAEConfig(Section):
    """vae/config.json; all but the width and the latents' statistics is the same in every Qwen-Image VAE."""

    latents_mean: Annotated[list[float], Field(min_length=16, max_length=16)]
    latents_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=16, max_length=16)]
    base_dim: Annotated[int, Field(ge=1, le=4096)] = 96
    z_dim: Literal[16] = 16
    dim_mult: list[int] = [1, 2, 4, 4]
    num_res_blocks: Literal[2] = 2
    attn_scales: Annotated[list[float], Field(max_length=0)] = []
    temperal_downsample: list[bool] = [False, True, True]  # spelt so in the file

    @model_validator(mode="after")
    def _as_all_are(self) -> VAEConfig:
        if self.dim_mult != [1, 2, 4, 4] or self.temperal_downsample != [False, True, True]:
            raise ValueError("dim_mult [1, 2, 4, 4] and temperal_downsample [false, true, true]")
        return self


class Description(Section):
    """What `convert` writes into a file's metadata: the part, and what the folder's JSON files said."""

    part: Literal["vlm", "generation_decoder", "vae"] | None = None
    config: dict[str, Any] = {}
    drawing: dict[str, Any] = {}
    processor: dict[str, Any] = {}
    tokenizer: str | None = None


Group = Literal[4, 16, 64, 256]


class LayerParameters(Section):
    """What some tools write one level deeper."""

    convrot: bool = False
    convrot_groupsize: Group = 256
    group_size: Annotated[int, Field(ge=1, le=4096)] = 16
    linear_dtype: str = "int4"


class LayerFormat(Section):
    """How one layer is stored, as ComfyUI spells it."""

    format: str
    full_precision_matrix_mult: bool = False
    convrot: bool = False
    convrot_groupsize: Group = 256
    group_size: Annotated[int, Field(ge=1, le=4096)] = 16
    linear_dtype: str = "int4"
    params: LayerParameters = LayerParameters()


class QuantizationMetadata(Section):
    """ComfyUI's list of quantised layers in a file's metadata."""

    layers: dict[str, LayerFormat] = {}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it cannot be read, or is no JSON object; says what it is.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise RuntimeError(f"{path} has {size} bytes, {LARGEST_JSON} expected at most")
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise RuntimeError(describe(path, "JSON", error)) from error


def parse(text: str, source: str) -> dict[str, Any]:
    """Returns the JSON object in a text; `source` is named in errors.

    Raises:
        RuntimeError: it is no JSON object.
    """
    try:
        return _parsed(text, source)
    except ValueError as error:
        raise RuntimeError(f"{source} is not readable as JSON ({in_short(error)})") from error


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise RuntimeError(f"{source} holds a {type(value).__name__}, a JSON object expected")
    return value


def checked(schema: type[Schema], value: Mapping[str, Any], source: str) -> Schema:
    """Returns a JSON object as its schema has it; `source`, mostly a file, is named in errors.

    Raises:
        RuntimeError: with file, key, what was found and what is expected.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first, *more = error.errors(include_url=False)
        key = ".".join(map(str, first["loc"]))
        missing = first["type"] == "missing"
        found = "nothing" if missing else shown(first["input"])
        expected = "a value" if missing else first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        others = f" ({len(more)} more of its keys are wrong)" if more else ""
        raise RuntimeError(f"{source}: {key} {found} found, {expected} expected{others}") from None
