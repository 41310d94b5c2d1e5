"""The networks of the nano vision tower and language model, and their forward pass on packed examples."""

from __future__ import annotations

import dataclasses

import torch

from internvl_u.config import LanguageConfig, MLLMConfig, VisionConfig
from internvl_u.mllm import MLLM
from internvl_u.qwen3 import attend
from internvl_u.tokenizer import ROW_TOKENS, Tokenizer

from .data.sft_data import Batch

IMAGE_SIZE = 112
VISION = VisionConfig(
    width=128,
    layers=3,
    heads=4,
    mlp_width=512,
    patch_size=14,
    image_size=IMAGE_SIZE,
    eps=1e-6,
    downsample=0.5,
    output_width=192,
)


def language_config(tokenizer: Tokenizer, vocabulary: int) -> dict:
    """Returns the configuration of the nano Qwen3."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": tokenizer.special["<|im_end|>"],
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "pad_token_id": tokenizer.special["<|im_end|>"] + 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


def new_model(tokenizer: Tokenizer, vocabulary: int, seed: int = 0) -> MLLM:
    """Returns the nano model with random weights."""
    settings = language_config(tokenizer, vocabulary)
    language = LanguageConfig(**{field.name: settings[field.name] for field in dataclasses.fields(LanguageConfig)})
    model = MLLM(MLLMConfig(VISION, language), device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if name.endswith(("ls1", "ls2")):
                weight.fill_(1.0)
            elif "norm" in name or name == "mlp1.0.weight":
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 2 and "embed" not in name:
                weight.normal_(0, weight.shape[1] ** -0.5 * 0.7, generator=generator)
            else:
                weight.normal_(0, 0.02, generator=generator)
    with torch.no_grad():
        model.mlp1[0].bias.zero_()
    return model


def embed_tokens(model: MLLM, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns the batch's embeddings [B, T, width], its images' features in place.

    `rows` [vocabulary] is the special row of each token, -1 where it has none.
    """
    table = model.language_model.model.embed_tokens(batch.ids)
    row = rows[batch.ids]
    result = torch.where((row >= 0)[..., None], model.special_token_embedding(row.clamp(min=0)), table)
    if not len(batch.image_slots):
        return result
    features = model.image_features(batch.pixels)
    cells = torch.arange(features.shape[1], device=features.device)
    where = batch.image_slots[:, 0, None] * batch.ids.shape[1] + batch.image_slots[:, 1, None] + cells
    flat = result.flatten(0, 1).index_copy(0, where.flatten(), features.flatten(0, 1).to(result.dtype))
    return flat.view_as(result)


def special_rows(tokenizer: Tokenizer, vocabulary: int) -> torch.Tensor:
    """Returns the special row of each token [vocabulary], -1 where it has none."""
    rows = torch.full((vocabulary,), -1)
    for row, name in enumerate(ROW_TOKENS):
        rows[tokenizer.special[name]] = row
    return rows


def attention_bias(mask: torch.Tensor) -> torch.Tensor:
    """Returns what is added to the attention's scores for a mask that is True where a token may look."""
    kind = mask.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def logits(model: MLLM, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns the logits [M, vocabulary] of the target tokens."""
    embeddings = embed_tokens(model, rows, batch)
    hidden, _ = model.language_model(embeddings, mask=attention_bias(batch.mask), positions=batch.positions)
    return model.language_model.lm_head(hidden.flatten(0, 1)[batch.sources])


def use_plain_attention(model: MLLM) -> None:
    """Has the language model's attention computed step by step: torch's own is slow backwards on the CPU."""
    for layer in model.language_model.model.layers:
        layer.self_attn.attend = plain_attention


def plain_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Returns the attention [B, H, T, E], step by step under an additive mask; see `internvl_u.qwen3.attend`."""
    if mask is None or mask.dtype == torch.bool:
        return attend(query, keys, values, mask)
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (one.repeat_interleave(repeats, dim=1) for one in (keys, values))
    scores = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values


def compile_layers(model: MLLM) -> None:
    """Has the layers compiled: most of their time is spent on what is fused then."""
    use_plain_attention(model)
    for layer in model.language_model.model.layers:
        layer.compile(dynamic=False)
    for layer in model.vision_model.encoder.layers:
        layer.compile(dynamic=True)
