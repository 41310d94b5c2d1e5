"""The flow transformer as a ComfyUI diffusion model: same weights and arithmetic, with ComfyUI's hooks around."""

from __future__ import annotations

import functools

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch.nn import functional

from ...internvl_u.mmdit import MMDiT, pack


class NativeMMDiT(MMDiT):
    """`MMDiT` called as ComfyUI calls a diffusion model; block patches, wrappers and attention choices work."""

    def forward(
        self, x, timesteps, context=None, control=None, transformer_options=None, contexts=(), ref_latents=(), **_
    ):
        """Returns the velocity of `x` [B, 16, h, w] or [B, 16, 1, h, w], in its shape.

        `timesteps` are the sinusoids [B, 256] that `InternVLU.process_timestep` makes; `contexts` holds one
        `PromptContext` a sample.

        Raises:
            ValueError: `x` is a video, or a ControlNet is attached.
        """
        options = {} if transformer_options is None else transformer_options
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options),
        ).execute(x, timesteps, context, control, contexts, ref_latents, options)

    def _forward(self, x, timesteps, context, control, contexts, ref_latents, transformer_options):
        if control is not None:
            raise ValueError(
                "a ControlNet is attached, but none exists for InternVL-U: use it on another model of a chain"
            )
        latents = single_frame(x)
        image, grid = self.tokens(latents, [single_frame(reference) for reference in ref_latents])
        picture = grid[0] * grid[1]
        branches = [one.at(tuple(latents.shape[-2:])) for one in contexts]
        packing = pack(branches, image)
        text = torch.cat([branch.context.to(image) for branch in branches])
        text = self.txt_in(self.txt_norm(text))

        modulation = functional.silu(self.time_text_embed(timesteps.to(image.dtype)))
        options = transformer_options.copy()
        options["total_blocks"], options["block_type"] = len(self.transformer_blocks), "double"
        attention = functools.partial(_attention, options=options)
        for i, block in enumerate(self.transformer_blocks):
            options["block_index"] = i
            last = picture if i + 1 == len(self.transformer_blocks) else None
            image, text = _run(i, block, image, text, modulation, packing, attention, last, options)
        return self.velocity(image, modulation, grid, latents.shape[-2:]).reshape(x.shape)


def single_frame(latents: torch.Tensor) -> torch.Tensor:
    """Returns latents [B, 16, h, w] from the same or from [B, 16, 1, h, w].

    Raises:
        ValueError: there are several frames.
    """
    if latents.ndim == 5:
        if latents.shape[2] != 1:
            raise ValueError(f"a latent of {latents.shape[2]} frames found, 1 expected: InternVL-U draws no videos")
        return latents[:, :, 0]
    return latents


def _attention(query, key, value, options):
    heads = query.shape[1]
    return optimized_attention(query, key, value, heads, skip_reshape=True, transformer_options=options)


def _run(index, block, image, text, modulation, packing, attention, last, options):
    def original(args):
        img, txt = block(args["img"], args["txt"], args["vec"], args["pe"], attention, last)
        return {"img": img, "txt": txt}

    args = {"img": image, "txt": text, "vec": modulation, "pe": packing, "transformer_options": options}
    replace = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
    out = original(args) if replace is None else replace(args, {"original_block": original})
    for patch in options.get("patches", {}).get("double_block", ()):
        out = patch({**out, "x": None, "block_index": index, "transformer_options": options})
    return out["img"], out["txt"]
