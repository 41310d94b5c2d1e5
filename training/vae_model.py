"""The network of the nano VAE: an AutoencoderKLQwenImage with narrow layers, run on single frames, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageResidualBlock,
    QwenImageRMS_norm,
)
from torch import nn

from internvl_u.vae import LATENTS_MEAN, LATENTS_STD
from internvl_u.weights import save_weights

LATENTS = 16
CONFIG = {
    "attn_scales": [],
    "base_dim": 8,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(LATENTS_MEAN),
    "latents_std": list(LATENTS_STD),
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": LATENTS,
}
POSTERIOR_STD = 0.05
"""What the encoder calls its own uncertainty, in normalised units: a constant, for those who sample from it."""


def run_frame(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns the output of a part of diffusers' VAE for one frame, [B, C, H, W] in and out.

    For one frame the causal convolutions see zeros for the past, so only the last slice of their kernels counts, and
    the convolutions over time are skipped.
    """
    if isinstance(module, QwenImageCausalConv3d):
        return F.conv2d(x, module.weight[:, :, -1], module.bias, padding=module.kernel_size[-1] // 2)
    if isinstance(module, QwenImageRMS_norm):
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-12)
        return (wide * inverse * module.gamma.view(1, -1, 1, 1)).to(x.dtype)
    if isinstance(module, QwenImageResidualBlock):
        h = run_frame(module.conv1, F.silu(run_frame(module.norm1, x)))
        h = run_frame(module.conv2, F.silu(run_frame(module.norm2, h)))
        return h + (run_frame(module.conv_shortcut, x) if module.in_dim != module.out_dim else x)
    if isinstance(module, QwenImageResample):
        down, conv = module.resample
        up = module.mode.startswith("upsample")
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest-exact") if up else down(x))
    if isinstance(module, QwenImageAttentionBlock):
        return attend_frame(module, x)
    raise TypeError(type(module).__name__)


def attend_frame(module: QwenImageAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """Returns x with self-attention over all its positions added, [B, C, H, W]."""
    batch, channels, height, width = x.shape
    qkv = module.to_qkv(run_frame(module.norm, x)).flatten(2).transpose(1, 2)[:, None]
    mixed = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
    return x + module.proj(mixed[:, 0].transpose(1, 2).reshape(batch, channels, height, width))


def run_mid_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns the output of the middle block of the encoder or decoder, [B, C, H, W]."""
    for part in (block.resnets[0], block.attentions[0], block.resnets[1]):
        x = run_frame(part, x)
    return x


def encode_frame(model: AutoencoderKLQwenImage, images: torch.Tensor) -> torch.Tensor:
    """Returns the mean latents [B, 16, h, w], not normalised, of images [B, 3, 8 h, 8 w] in [-1, 1]."""
    encoder = model.encoder
    x = run_frame(encoder.conv_in, images)
    for block in encoder.down_blocks:
        x = run_frame(block, x)
    x = run_mid_block(encoder.mid_block, x)
    x = run_frame(encoder.conv_out, F.silu(run_frame(encoder.norm_out, x)))
    return run_frame(model.quant_conv, x)[:, :LATENTS].float()


def decode_frame(model: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Returns images [B, 3, 8 h, 8 w], not clamped, from what `model.post_quant_conv` takes, [B, 16, h, w]."""
    decoder = model.decoder
    x = run_frame(decoder.conv_in, run_frame(model.post_quant_conv, latents))
    x = run_mid_block(decoder.mid_block, x)
    for block in decoder.up_blocks:
        for part in (*block.resnets, *(block.upsamplers or ())):
            x = run_frame(part, x)
    return run_frame(decoder.conv_out, F.silu(run_frame(decoder.norm_out, x))).float()


def new_model(seed: int) -> AutoencoderKLQwenImage:
    """Returns a VAE with random weights, zero where a single frame never looks."""
    torch.manual_seed(seed)
    model = AutoencoderKLQwenImage.from_config(CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 4 and name.endswith("weight"):
            inputs = parameter.shape[1] * parameter.shape[-1] * parameter.shape[-2]
            # Residual branches begin small, so that the twenty of them do not add up to a flood.
            gain = 0.3 if name.endswith("conv2.weight") or "proj" in name else 1.0
            nn.init.normal_(parameter, std=gain * inputs**-0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    clear_unused(model)
    return model


@torch.no_grad()
def clear_unused(model: AutoencoderKLQwenImage) -> None:
    """Sets to zero the weights that only films need."""
    for name, module in model.named_modules():
        if isinstance(module, QwenImageCausalConv3d):
            if "time_conv" in name:
                module.weight.zero_()
                module.bias.zero_()
            else:
                module.weight[:, :, :-1] = 0


@torch.no_grad()
def fold_statistics(model: AutoencoderKLQwenImage) -> None:
    """Makes the encoder give latents that the released mean and spread normalise, and the decoder take them.

    Before, the model works with normalised latents; what it makes of an image does not change.
    """
    to_latent, from_latent = model.quant_conv, model.post_quant_conv
    mean, std = torch.tensor(LATENTS_MEAN), torch.tensor(LATENTS_STD)
    to_latent.weight[:LATENTS] *= std.view(-1, 1, 1, 1, 1)
    to_latent.bias[:LATENTS] = to_latent.bias[:LATENTS] * std + mean
    to_latent.weight[LATENTS:] = 0
    to_latent.bias[LATENTS:] = 2 * (POSTERIOR_STD * std).log()
    from_latent.weight /= std.view(1, -1, 1, 1, 1)
    from_latent.bias -= from_latent.weight[:, :, -1, 0, 0] @ mean


@torch.no_grad()
def unfold_statistics(model: AutoencoderKLQwenImage) -> None:
    """Takes back `fold_statistics`; only the encoder's spread is not brought back."""
    to_latent, from_latent = model.quant_conv, model.post_quant_conv
    mean, std = torch.tensor(LATENTS_MEAN), torch.tensor(LATENTS_STD)
    to_latent.weight[:LATENTS] /= std.view(-1, 1, 1, 1, 1)
    to_latent.bias[:LATENTS] = (to_latent.bias[:LATENTS] - mean) / std
    from_latent.bias += from_latent.weight[:, :, -1, 0, 0] @ mean
    from_latent.weight *= std.view(1, -1, 1, 1, 1)


def load_unfolded(folder: Path) -> AutoencoderKLQwenImage:
    """Returns a trained model as it was before `fold_statistics`, in fp32."""
    model = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.float32)
    unfold_statistics(model)
    return model


def save_model(model: AutoencoderKLQwenImage, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json and the weights of a folded model in the released layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKLQwenImage", "_diffusers_version": "0.35.1", **CONFIG}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_weights(folder / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
