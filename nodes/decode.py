"""InternVL-U Decode."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.defaults import LARGEST
from ..native import compat
from ..native.vae import decode
from .inputs import checked


def _side(name: str) -> io.Int.Input:
    tooltip = f"Final {name} in pixels, Lanczos. 0: as drawn."
    return io.Int.Input(name, default=0, min=0, max=LARGEST, tooltip=tooltip, **compat.advanced(io.Int.Input))


class DecodeLatent(io.ComfyNode):
    """A LATENT to pictures, value for value as the official pipeline hands them out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_DecodeLatent",
            display_name="InternVL-U Decode",
            category="InternVL-U",
            description="Decodes with the official rounding: half a level of 255 brighter than VAE Decode, which "
            "works here too.",
            inputs=[
                io.Vae.Input("vae", tooltip="From Load InternVL-U."),
                io.Latent.Input("samples", tooltip="The drawn latent, from InternVL-U Sampler or another sampler."),
                _side("width"),
                _side("height"),
            ],
            outputs=[io.Image.Output(tooltip="The pictures, 8 bits deep as the official pipeline hands them out.")],
            **compat.search_aliases("vae decode", "latent to image", "decode"),
        )

    @classmethod
    @checked
    def execute(cls, vae: io.Vae.Type, samples: io.Latent.Type, width: int, height: int) -> io.NodeOutput:
        return io.NodeOutput(decode(vae, samples, width, height))
