"""Empty InternVL-U Latent."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.defaults import LARGEST, SMALLEST
from ..internvl_u.images import drawn_size
from ..native import compat
from ..native.progress import show_note
from ..native.sampler import empty_latent
from .inputs import CUSTOM, checked

SIDE = 1024
PRESETS = ("1024 x 1024", "1024 x 768", "768 x 1024", "1024 x 576", "576 x 1024", "512 x 512")


def _side(name: str) -> io.Int.Input:
    tooltip = "Pixels, rounded down to a multiple of 16. A number that is typed sets the preset to custom."
    return io.Int.Input(name, default=SIDE, min=SMALLEST, max=LARGEST, tooltip=tooltip)


class CreateLatent(io.ComfyNode):
    """A size to an empty LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_CreateLatent",
            display_name="Empty InternVL-U Latent",
            category="InternVL-U",
            description="An empty latent of the size to draw.",
            **compat.search_aliases(
                "empty latent", "size", "resolution", "width", "height", "aspect ratio", "text to image"
            ),
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    tooltip="Width x height in pixels within the range that the model was trained for (512 x 512 to "
                    "1024 x 1024). custom takes the two numbers below; the page keeps both in step.",
                ),
                _side("width"),
                _side("height"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures are drawn at once."),
            ],
            outputs=[io.Latent.Output(tooltip="Empty, for the sampler's latent_image.")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    @checked
    def execute(cls, preset: str, width: int, height: int, batch_size: int) -> io.NodeOutput:
        if preset not in (CUSTOM, *PRESETS):
            raise ValueError(f"preset {preset!r} found, one of {', '.join((CUSTOM, *PRESETS))} expected")
        if preset != CUSTOM:
            typed, (width, height) = (width, height), map(int, preset.split(" x "))
            if typed not in ((width, height), (SIDE, SIDE)):
                told = f"preset {preset} counts, {typed[0]} x {typed[1]} does not: choose custom for it"
                show_note(cls.hidden, told, log=True)
        return io.NodeOutput(empty_latent(*drawn_size(width, height), batch_size))
