"""InternVL-U Decode."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.defaults import LARGEST
from ..native.vae import decode
from .inputs import checked


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
                io.Vae.Input("vae"),
                io.Latent.Input("samples"),
                io.Int.Input(
                    "width", default=0, min=0, max=LARGEST, tooltip="Final width in pixels, Lanczos. 0: as drawn."
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=LARGEST, tooltip="Final height in pixels, Lanczos. 0: as drawn."
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    @checked
    def execute(cls, vae: io.Vae.Type, samples: io.Latent.Type, width: int, height: int) -> io.NodeOutput:
        return io.NodeOutput(decode(vae, samples, width, height))
