"""Times whole pictures by size and mode: encode, steps, decode; seconds, pictures a minute, and peak GPU memory.

Through the library, with one part on the device at a time. The first picture of each row warms up and loads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from internvl_u import images, sampling
from internvl_u.pipeline import ImageRequest, Pipeline

from .report import add_device, make_parser, resolve_dtype, show
from .timing import median, seconds

PROMPT = "a red fox reading a newspaper in a sunny kitchen, watercolour"
GIB = 2**30


def draw(pipeline: Pipeline, drawing: ImageRequest) -> dict[str, float]:
    """Returns the seconds that one picture's stages take."""
    kept: dict = {}

    def encode():
        kept["conditions"] = pipeline.encode_prompt(drawing)

    def sample():
        noise = images.noise(drawing.width, drawing.height, drawing.seed)
        sigmas = sampling.flow_sigmas(drawing.steps)
        kept["latent"] = pipeline.sample(kept["conditions"], noise, sigmas, drawing.guidance)

    def decode():
        kept["picture"] = pipeline.decode(kept["latent"])

    stages = {"encode s": encode, "steps s": sample, "decode s": decode}
    return {name: seconds(stage, pipeline.device) for name, stage in stages.items()}


def measure(pipeline: Pipeline, drawing: ImageRequest, repeats: int) -> dict[str, float]:
    """Returns the medians of several pictures after one to warm up, and what follows from them."""
    draw(pipeline, drawing)
    if pipeline.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = [draw(pipeline, drawing) for _ in range(repeats)]
    row = {name: median([one[name] for one in taken]) for name in taken[0]}
    whole = sum(row.values())
    row |= {"step s": row["steps s"] / drawing.steps, "picture s": whole, "pictures a minute": 60 / whole}
    if pipeline.device.type == "cuda":
        row["peak GPU GiB"] = torch.cuda.max_memory_allocated() / GIB
    return row


def main() -> None:
    parser = make_parser(__doc__)
    add_device(parser)
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a checkpoint folder, for example of random_weights")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], metavar="PX", help="sides, in pixels")
    parser.add_argument("--modes", nargs="+", choices=("t2i", "edit"), default=["t2i", "edit"])
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=3, help="pictures that count")
    arguments = parser.parse_args()
    pipeline = Pipeline(arguments.model, dtype=resolve_dtype(arguments), device=arguments.device)
    rows = []
    for mode in arguments.modes:
        for size in arguments.sizes:
            images = (Image.new("RGB", (size, size), "orange"),) if mode == "edit" else ()
            drawing = ImageRequest(PROMPT, size, size, arguments.steps, images=images)
            rows.append({"mode": mode, "pixels": size, **measure(pipeline, drawing, arguments.repeats)})
    show(rows, arguments.json, dtype=str(pipeline.dtype), device=arguments.device, steps=arguments.steps)


if __name__ == "__main__":
    main()
