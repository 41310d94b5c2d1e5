"""InternVL-U Decode."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.defaults import LARGEST
from ..native import compat
from ..native.vae import decode
from .inputs import check_choice, checked

AS_EDITED, AS_DRAWN = "as the edited picture", "as drawn"
"""A graph in API format that names neither is older than the choice and gets the second."""


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
                io.Combo.Input(
                    "size",
                    options=[AS_EDITED, AS_DRAWN],
                    default=AS_EDITED,
                    optional=True,
                    tooltip="Counts where width and height are 0. As the edited picture: an edit comes out with as "
                    "many pixels as its first picture has, up to 4096 a side, Lanczos. As drawn: as the latent is, in "
                    "multiples of 16 pixels. What was drawn from text alone is the same either way.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The pictures, 8 bits deep as the official pipeline hands them out.")],
            **compat.search_aliases("vae decode", "latent to image", "decode"),
        )

    @classmethod
    @checked
    def execute(
        cls, vae: io.Vae.Type, samples: io.Latent.Type, width: int, height: int, size: str = AS_DRAWN
    ) -> io.NodeOutput:
        check_choice("size", size, (AS_EDITED, AS_DRAWN))
        return io.NodeOutput(decode(vae, samples, width, height, size == AS_EDITED))
