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
    "InternVLU_Chat": ("chat", "load chat shown"),
    "InternVLU_AddToHistory": ("history", "load image add answer"),
    "InternVLU_ListPrompts": ("batch_of_prompts", "prompts encode sample save"),
    "InternVLU_ListScales": ("grid_of_scales", "scales sample decode grid"),
    "InternVLU_PickFrames": ("frames", "load video parts frames answer"),
    "InternVLU_SelectMLLMDevice": ("two_gpus", "load device encode"),
    "InternVLU_JudgePicture": ("draw_judge_draw_again", "question decode judge2 judge1 save"),
}
GRAPHS = {
    "history": (
        [
            [graphs.LOAD, graphs.image()],
            [("add", "InternVLU_AddToHistory", {"role": "assistant", "text": "Here is the harbour."})],
            [graphs.answer("What could be added to it?")],
        ],
        "load.MLLM answer.mllm, image.IMAGE add.image, add.history answer.history",
    ),
    "frames": (
        [
            [graphs.LOAD, ("video", "LoadVideo", {"file": "video.mp4"})],
            [("parts", "GetVideoComponents", {})],
            [("frames", "InternVLU_PickFrames", {"count": 8})],
            [graphs.answer("What happens in these frames of a video?")],
        ],
        "load.MLLM answer.mllm, video.VIDEO parts.video, parts.images frames.images, frames.images answer.image1",
    ),
}
"""Graphs of pictures alone: columns of nodes, and links."""
SIZES = {
    "encode": (280, 290),
    "think": (300, 560),
    "answer": (300, 560),
    "image": (260, 330),
    "prompt": (260, 110),
    "preview": (220, 120),
    "chat": (360, 640),
    "add": (280, 110),
    "parts": (230, 0),
    "prompts": (260, 160),
    "question": (230, 100),
}

MARK = """
type => {
  const {color, bgcolor} = LGraphCanvas.node_colors.blue;
  Object.assign(app.graph._nodes.find(node => node.type === type), {color, bgcolor});
}
"""


def columns(name: str) -> list[list[tuple]]:
    """Returns a graph's nodes, column by column."""
    if name in GRAPHS:
        return GRAPHS[name][0]
    return [nodes for column in graphs.steps(name) for _, inner in column for nodes in inner]


def nodes(name: str, wanted: list[str]) -> list[tuple]:
    """Returns some nodes of a graph."""
    return [node for column in columns(name) for node in column if node[0] in wanted]


def steps(name: str, wanted: list[str]) -> list[list[tuple]]:
    """Returns some nodes of a graph, column by column, as one step without a title each."""
    kept = [[node for node in column if node[0] in wanted] for column in columns(name)]
    return [[("", [column])] for column in kept if column]


def links(name: str) -> str:
    """Returns a graph's links."""
    return GRAPHS[name][1] if name in GRAPHS else graphs.LINKS[name]
