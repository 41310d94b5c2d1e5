"""Writes the nano checkpoint in the layout of the released one, from what the stages have learnt."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from internvl_u.tokenizer import Tokenizer
from internvl_u.weights import save_weights

from . import mllm, mllm_model, mmdit, mmdit_model
from .checkpointing import load_ema
from .data.samples import OUTPUT_SIZES
from .tokenizer import vocabulary_size

SIDE = 64
"""Width and height that are drawn where nobody says otherwise."""


def export(work: Path, out: Path) -> None:
    """Writes language model, transformer and settings into `out`, beside the tokenizer and the VAE that are there."""
    tokenizer, vocabulary = Tokenizer(out / "processor"), vocabulary_size(out / "processor")
    _json(out / "model_index.json", MODEL_INDEX)
    _json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    _json(out / "processor" / "processor_config.json", PROCESSOR)
    _json(out / "vlm" / "config.json", vlm_config(mllm_model.language_config(tokenizer, vocabulary)))
    _json(out / "generation_decoder" / "config.json", decoder_config())
    _weights(out / "vlm" / "model.safetensors", load_ema(work / f"{mllm.NAME}.safetensors"))
    state = work / f"{mmdit.NAME}.safetensors"
    weights = load_ema(state) if state.exists() else mmdit_model.new_model().state_dict()
    weights = {f"decoder.{name}": value for name, value in weights.items()}
    # The released file has this token too; nothing reads it.
    weights["encoder_padding_token"] = torch.zeros(mmdit_model.CONFIG.context_width)
    _weights(out / "generation_decoder" / "model.safetensors", weights)


def _weights(file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rounded = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
    save_weights(file, rounded, {"format": "pt"})


def _json(file: Path, value: Mapping) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def vlm_config(language: Mapping) -> dict:
    """Returns `vlm/config.json`, with the settings of the released file that do not depend on size."""
    vision = mllm_model.VISION
    return {
        "anyres_image_size": False,
        "architectures": ["InternVLUChatModel"],
        "downsample_ratio": vision.downsample,
        "dynamic_image_size": True,
        "enable_multi_scale": False,
        "extra_select_layer": -1,
        "force_image_size": vision.image_size,
        "llm_config": dict(language),
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvlu_chat",
        "pad2square": False,
        "ps_version": "v2",
        "scale_downsample_ratio": vision.downsample,
        "select_layer": -1,
        "template": "qwen2_5-chat-v3",
        "thumbnail_pos": "start",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": None,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "downsample_ratio": 1.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "fullatt_block_indexes": None,
            "hidden_act": "gelu",
            "hidden_size": vision.width,
            "image_size": vision.image_size,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": vision.mlp_width,
            "layer_norm_eps": vision.eps,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "num_attention_heads": vision.heads,
            "num_channels": 3,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_size,
            "qk_normalization": False,
            "qkv_bias": True,
            "use_flash_attn": False,
            "window_size": 8,
        },
    }


def decoder_config() -> dict:
    """Returns `generation_decoder/config.json`, likewise."""
    config = mmdit_model.CONFIG
    packed = config.channels * config.patch_size**2
    return {
        "all_cfg_scale": 4.5,
        "architectures": ["InternVLUGenerationDecoder"],
        "decoder_config": {
            "attention_head_dim": config.head_dim,
            "axes_dims_rope": list(config.rope_axes),
            "in_channels": packed,
            "joint_attention_dim": config.context_width,
            "num_attention_heads": config.heads,
            "num_layers": config.layers,
            "out_channels": config.channels,
            "patch_size": config.patch_size,
            "video_position_scale_factor": 1.0,
            "vlm_cond_position_scale_factor": config.image_scale,
        },
        "decoder_projector_type": "identity",
        "discrete_timestep": False,
        "flow_shift": 3.0,
        "gen_image_height": SIDE,
        "gen_image_width": SIDE,
        "input_hidden_size": config.context_width,
        "is_composition": False,
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mask_weight_type": None,
        "max_sequence_length": 768,
        "mode_scale": 1.29,
        "model_type": "internvlu_generation_decoder",
        "output_hidden_size": config.context_width,
        "pad_to_fix_length": False,
        "padding_encoder_hidden_states": True,
        "part_cfg_scale": 2.0,
        "qk_norm": None,
        "region_weighting": False,
        "sigmas_as_weight": False,
        "torch_dtype": "bfloat16",
        "transformers_version": None,
        "vae_downsample_factor": 8,
        "vae_input_hidden_size": packed,
        "vae_projector_type": "identity",
        "video_position_scale_factor": 1.0,
        "visual_input_hidden_size": packed,
        "vlm_cond_position_scale_factor": config.image_scale,
        "vlm_select_layer": list(config.select_layers),
        "weighting_scheme": "logit_normal",
    }


MODEL_INDEX = {
    "_class_name": "InternVLUPipeline",
    "_diffusers_version": "0.35.1",
    "vlm": ["internvlu.vlm", "InternVLUChatModel"],
    "generation_decoder": ["internvlu.diffusion", "InternVLUGenerationDecoder"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "processor": ["internvlu.processing_internvlu", "InternVLUProcessor"],
}

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.35.1",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}

PROCESSOR = {
    "image_processor_kwargs": {
        "do_resize": True,
        "size": {"height": mllm_model.IMAGE_SIZE, "width": mllm_model.IMAGE_SIZE},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 12,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    },
    "image_gen_processor_class": "InternVLUDynamicResGenerationImageProcessor",
    "image_gen_processor_kwargs": {
        "do_resize": True,
        "do_pad": False,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "min_dynamic_patch": OUTPUT_SIZES.smallest_area // 8**2,
        "max_dynamic_patch": OUTPUT_SIZES.largest_area // 8**2,
        "max_length": OUTPUT_SIZES.longest_side,
        "vae_downsample_factor": 8,
        "temporal_patch_size": 1,
        "gen_down_sample_ratio": 0.5,
    },
    "image_seq_length": mllm_model.VISION.grid**2,
    "processor_class": "InternVLUProcessor",
}


def main() -> None:
    """Exports what the work folder holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the stages' states")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder")
    options = parser.parse_args()
    export(options.work, options.out)
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"{options.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
