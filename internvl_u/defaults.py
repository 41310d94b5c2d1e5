"""The values that the official code uses where nobody says otherwise, and the ranges of ours. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Guidance(NamedTuple):
    """The two strengths: of the words (`all_cfg`) and of the reference images (`part_cfg`)."""

    all_cfg: float
    part_cfg: float


GUIDANCE, GUIDANCE_WITH_THOUGHT = Guidance(4.5, 2.0), Guidance(3.5, 1.5)
"""Without and with a chain of thought."""
STEPS = 20
"""Denoising steps."""
LONGEST_SCHEDULE = 100_000
"""The most noise levels: below denoise 1 the end of a longer schedule is taken."""
LONGEST_CONTEXT = 1 << 20
"""The most tokens that any language model of ours reads; the released one reads 40,960."""
BEAMS = 256
"""The most beams of a search."""
MOST_PICTURES = 1000
"""The most pictures that one command draws."""
THOUGHT_TOKENS, ANSWER_TOKENS = 200, 512
"""The longest thought; the longest answer, which is ours."""
CHARACTERS = 1_000_000
"""The longest text: no context of tokens is as long, and nothing longer is even cut into tokens."""
IMAGES = 64
"""The most images that a prompt may have; each takes 256 tokens of the released model's context."""
REFERENCE_SIZES = {"official": None, "768 x 768": 768, "512 x 512": 512, "256 x 256": 256}
"""What InternVL-U Encode calls the most pixels of a reference image, and the side of a square of that area."""
SMALLEST, LARGEST = 16, 4096
"""Pixels per side."""
FILE_DTYPES = ("bfloat16", "fp8_e4m3fn", "fp8_scaled", "fp8_scaled_old", "fp8_e5m2", "float16", "int8", "int8_convrot")
"""What `convert` writes. fp8_scaled: one scale per matrix, in the two spellings of ComfyUI; int8: one per row, and with
convrot the columns of each group are rotated first."""
MAP_KINDS, MAP_THRESHOLDS, MAP_SIZE = ("canny", "colour", "scribble"), (0.4, 0.8), 1024
"""Maps that `pairs` makes; thresholds of edges, those of ComfyUI's Canny; the most pixels, as a square's side."""
GGUF_DTYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")
"""What `convert` writes as GGUF, the finest first."""
PARTS = ("vlm", "generation_decoder", "vae")
"""The parts of a checkpoint, by the names of their folders."""
FOLDERS = (*PARTS, "processor", "scheduler")
"""All folders of the released layout."""
REPOSITORY, MODELSCOPE_REPOSITORY = "InternVL-U/InternVL-U", "OpenGVLab/InternVL-U"
RELEASED_SIZE = "8.2 GB"
MODEL_FOLDER = Path("models", "InternVL-U", "InternVL-U")
"""Where a model goes, from ComfyUI's folder on."""
HOW_TO_GET = (
    f"Download {REPOSITORY} from Hugging Face (or {MODELSCOPE_REPOSITORY} from ModelScope), by "
    "`python -m internvl_u download --to FOLDER` or by hand, with its subfolders "
    "vlm, generation_decoder, vae, scheduler and processor"
)
NANO = "nano"
"""What the command line calls the nano model that comes with the pack."""
NANO_FOLDERS = (("nano",), ("..", "demo", "internvl-u-nano"))
"""Where it lies from this package on: in an installed library, and in the pack's folder."""
NANO_LORAS, NANO_EDGES = "loras", "internvl_u_nano_edges.safetensors"
"""The folder of its LoRAs within its own, and the one of them that draws along an edge map."""
NANO_CHOICE = "nano InternVL-U (in the box: flat shapes, 64 x 64 pixels)"
"""What Load InternVL-U calls it."""
NANO_NOTE = (
    "nano model: knows flat shapes (circle, square, triangle, star, cross, ring) of 64 x 64 pixels, in English, and "
    "shows how everything works"
)
"""What it is, wherever it is loaded; what matters first, because a node is narrow."""
