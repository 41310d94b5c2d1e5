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


def steps(name: str, wanted: list[str]) -> list[list[tuple]]:
    """Returns some nodes of a graph, column by column, as one step without a title each."""
    columns = [nodes for column in graphs.steps(name) for _, inner in column for nodes in inner]
    kept = [[node for node in nodes if node[0] in wanted] for nodes in columns]
    return [[("", [nodes])] for nodes in kept if nodes]


def links(name: str) -> str:
    """Returns a graph's links."""
    return graphs.LINKS[name]
