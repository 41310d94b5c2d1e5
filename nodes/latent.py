"""Empty InternVL-U Latent."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.defaults import LARGEST, SMALLEST
from ..internvl_u.images import drawn_size
from ..native.sampler import empty_latent
from .inputs import checked

CUSTOM = "custom"
PRESETS = ("1024 x 1024", "1024 x 768", "768 x 1024", "1024 x 576", "576 x 1024", "512 x 512")


def _side(name: str) -> io.Int.Input:
    tooltip = "Pixels, for preset custom. Rounded down to a multiple of 16."
    return io.Int.Input(name, default=1024, min=SMALLEST, max=LARGEST, tooltip=tooltip)


class CreateLatent(io.ComfyNode):
    """A size to an empty LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_CreateLatent",
            display_name="Empty InternVL-U Latent",
            category="InternVL-U",
            description="An empty latent of the size to draw.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    tooltip="Width x height in pixels within the range that the model was trained for (512 x 512 to "
                    "1024 x 1024). custom takes the two numbers below.",
                ),
                _side("width"),
                _side("height"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures are drawn at once."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    @checked
    def execute(cls, preset: str, width: int, height: int, batch_size: int) -> io.NodeOutput:
        if preset not in (CUSTOM, *PRESETS):
            raise ValueError(f"preset {preset!r} found, one of {', '.join((CUSTOM, *PRESETS))} expected")
        if preset != CUSTOM:
            width, height = (int(side) for side in preset.split(" x "))
        return io.NodeOutput(empty_latent(*drawn_size(width, height), batch_size))
