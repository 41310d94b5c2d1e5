"""What the pictures of the help pages show: each node as it is usually wired. Data only, for build.py."""

from __future__ import annotations

from . import graphs

WIDTH, QUALITY = 800, 80  # pixels, JPEG: each file stays below 60 kB

# Node type: the workflow, and the nodes of it that are shown.
PARTS = {
    "InternVLU_LoadModel": ("text_to_image", "load encode sample decode"),
    "InternVLU_LoadLoRA": ("with_a_lora", "load lora encode sample"),
    "InternVLU_EncodePrompt": ("edit", "load image encode sample"),
    "InternVLU_CreateLatent": ("text_to_image", "latent sample"),
    "InternVLU_SampleLatent": ("text_to_image", "load latent encode sample decode"),
    "InternVLU_CreateGuider": ("text_to_image_custom_sampling", "load encode guider sample"),
    "InternVLU_SelectSampler": ("text_to_image_custom_sampling", "noise guider solver steps sample"),
    "InternVLU_ScheduleSteps": ("text_to_image_custom_sampling", "noise guider solver steps sample"),
    "InternVLU_DecodeLatent": ("text_to_image", "load sample decode save"),
    "InternVLU_WriteThought": ("think_then_draw", "load prompt think encode"),
    "InternVLU_AnswerQuestion": ("ask_about_a_picture", "load image answer preview"),
}
# Graphs that are in no workflow, as in graphs.py.
OWN_COLUMNS = {
    "with_a_lora": [
        [graphs.LOAD],
        [("lora", "InternVLU_LoadLoRA", {"lora_name": "a_style.safetensors", "strength_model": 0.8})],
        [graphs.encode(graphs.PROMPT), graphs.SAMPLE],
    ],
}
OWN_LINKS = {
    "with_a_lora": "load.MODEL lora.model, load.MLLM lora.mllm, lora.MODEL sample.model, lora.MLLM encode.mllm, "
    "encode.positive sample.positive, encode.negative sample.negative, encode.latent sample.latent_image",
}
SIZES = {
    "encode": (280, 290),
    "think": (300, 560),
    "answer": (300, 560),
    "image": (260, 330),
    "prompt": (260, 110),
    "preview": (220, 120),
}

MARK = """
type => {
  const {color, bgcolor} = LGraphCanvas.node_colors.blue;
  Object.assign(app.graph._nodes.find(node => node.type === type), {color, bgcolor});
}
"""


def columns(name: str) -> list[list[tuple]]:
    """Returns a graph's nodes, column by column."""
    return OWN_COLUMNS[name] if name in OWN_COLUMNS else graphs.COLUMNS[name]


def links(name: str) -> str:
    """Returns a graph's links."""
    return OWN_LINKS[name] if name in OWN_LINKS else graphs.LINKS[name]
