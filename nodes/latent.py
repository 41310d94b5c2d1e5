"""Empty InternVL-U Latent."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.picture import LARGEST, SMALLEST, drawn_size

CUSTOM = "custom"
PRESETS = ("1024 x 1024", "1024 x 768", "768 x 1024", "1024 x 576", "576 x 1024", "512 x 512")


class CreateLatent(io.ComfyNode):
    """A size to an empty LATENT."""

    @classmethod
    def define_schema(cls):
        side = {"min": SMALLEST, "max": LARGEST, "default": 1024}
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
                io.Int.Input("width", **side, tooltip="Pixels, for preset custom. Rounded down to a multiple of 16."),
                io.Int.Input("height", **side, tooltip="Pixels, for preset custom. Rounded down to a multiple of 16."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures are drawn at once."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, preset, width, height, batch_size) -> io.NodeOutput:
        if preset != CUSTOM:
            width, height = (int(side) for side in preset.split(" x "))
        from .native.sampler import empty_latent

        return io.NodeOutput(empty_latent(*drawn_size(width, height), batch_size))
