"""The shipped graphs with values for the nano model: data for build.py, cards.py and the demo."""

from __future__ import annotations

import json
from pathlib import Path

from . import graphs

TWINS = Path(__file__).resolve().parents[2] / "tests" / "workflows"

MODEL = "internvl-u-nano"
NOTE = """## {title}, nano

{hint}

The **nano model** knows flat shapes only: circle, square, triangle, star, cross, ring in red, green, blue, yellow, \
orange, purple, pink, cyan, on white, black, grey, brown, navy or beige, in English and a little Chinese. It draws \
64 x 64 pixels.

With the released model take the workflow of the same name under **internvl-u**: it is the same graph.
"""

BEFORE, AFTER, MASKED = {"image": "nano_before.png"}, {"image": "nano_after.png"}, {"image": "nano_masked.png"}
RIDDLE = {"value": "a shape with three sides in the colour of grass, the background like snow"}
PROMPT = {"prompt": "a red circle to the left of a blue square"}

SHOWN = {"width": 256, "height": 256}  # 64 pixels are hard to see

VALUES = {
    "load": {"model_name": MODEL},
    "latent": {"preset": "custom", "width": 64, "height": 64},
    "scale": {"largest_size": 64},
    "image": BEFORE,
    "image1": BEFORE,
    "image2": AFTER,
    "InternVLU_DecodeLatent": SHOWN,
}
"""Values by node, or by its type, in all graphs."""

EDIT = "Try **make the background navy**, **remove the square**, **move the circle to the top**."
THINK = "The thought names the plain scene: the picture is drawn from it, and would be another one without it."
HINTS = {
    "text_to_image": "Try **three pink stars on a navy background** or **a large green square on black**.",
    "text_to_image_custom_sampling": "It draws what **text to image** draws, from separate parts.",
    "text_to_image_ksampler": "ComfyUI's own sampler: near to what **text to image** draws.",
    "edit": EDIT,
    "masked_edit": f"Only what is painted over may change. {EDIT}",
    "picture_to_picture": "The prompt describes the new picture; a lower **denoise** keeps more of the old one.",
    "think_then_draw": THINK,
    "edit_the_thought_then_draw": f"Change the text in **Thought to draw from** and run again. {THINK}",
    "think_then_edit": f"The thought tells what there is and what there will be. {EDIT}",
    "chat": "Try **make the square yellow** with **edit the last picture**. nano has not learned conversations: "
    "**reads** is **last picture alone**.",
    "ask_about_a_picture": "Try **where is the circle?**, **how many shapes are there?**, **which shape is blue?**",
    "compare_two_pictures": "Try **is the background the same?** or **which has more shapes?**",
    "draw_ask_draw_again": "The model describes its own picture, and draws the description.",
    "draw_judge_draw_again": "Try **is there a green star?**: no picture is right, and the third one is taken.",
    "story_in_three_pictures": EDIT,
    "batch_of_prompts": "Add a line: **two yellow crosses on a brown background**.",
    "grid_of_scales": EDIT,
    "regions": "Masks in place of areas cut through shapes: nano puts each where it likes.",
    "hires_second_pass": "The second picture has 96 x 96 pixels, and the shapes of the first one.",
}
"""What each graph's note adds; there are nano graphs for these."""

TEXTS = {
    "first_steps_with_nano": {"load": {"model_name": MODEL}},
    "train_a_lora": {"load": {"model_name": MODEL}},
    "control_with_edges": {
        "load": {"model_name": MODEL},
        "image": {"image": graphs.SHAPE},
        "decode": {"width": 0, "height": 0},
    },
    "text_to_image": {"encode": PROMPT},
    "text_to_image_custom_sampling": {"encode": PROMPT},
    "text_to_image_ksampler": {"encode": PROMPT},
    "edit": {"encode": {"prompt": "make the circle green"}},
    "masked_edit": {
        "image": MASKED,
        "encode": {"prompt": "make the circle green"},
        "decode": {"width": 0, "height": 0},
    },
    "picture_to_picture": {"encode": {"prompt": "a green circle to the left of an orange square"}},
    "think_then_draw": {"prompt": RIDDLE},
    "edit_the_thought_then_draw": {
        "prompt": RIDDLE,
        "thought": {
            "value": "A shape with three sides is a triangle. A carrot is orange. The deep sea is navy. "
            "So: an orange triangle on a navy background."
        },
    },
    "think_then_edit": {"prompt": {"value": "turn the square into a star"}},
    "ask_about_a_picture": {"answer": {"question": "describe the picture."}},
    "compare_two_pictures": {"answer": {"question": "what changed?"}},
    "draw_ask_draw_again": {"encode": PROMPT, "answer": {"question": "describe the picture."}},
    "chat": {"chat": {"message": "which shape is red?", "reads": "last picture alone"}},
    "draw_judge_draw_again": {"encode": PROMPT, "question": {"value": "is there a red circle?"}},
    "story_in_three_pictures": {
        "prompt": {"value": PROMPT["prompt"]},
        "prompt2": {"value": "make the circle green"},
        "prompt3": {"value": "make the background black"},
    },
    "batch_of_prompts": {
        "prompts": {
            "text": "three pink stars on a navy background\na large green square on a beige background\n"
            "a cyan ring above an orange triangle"
        }
    },
    "grid_of_scales": {
        "scales": {"all_cfg": "0.5, 4.5", "part_cfg": "0, 2"},
        "encode": {"prompt": "make the circle green"},
        "grid": {"cell_width": 256, "cell_height": 256, "padding": 4},
    },
    "regions": {"sample": {"seed": 2}, "left": {"prompt": "a red circle"}, "right": {"prompt": "a blue square"}},
    "hires_second_pass": {"encode": PROMPT, "sample2": {"denoise": 0.4}},
}
"""Values by graph and node."""


def values(name: str, node: str, kind: str) -> dict:
    """Returns the nano model's values for a node of a graph."""
    return VALUES.get(kind, {}) | VALUES.get(node, {}) | TEXTS.get(name, {}).get(node, {})


def steps(name: str) -> list[list[tuple]]:
    """Returns the steps of a graph with the nano model's values."""

    def put(node: str, kind: str, given: dict) -> tuple:
        return (node, kind, given | values(name, node, kind))

    return [
        [(title, [[put(*node) for node in nodes] for nodes in columns]) for title, columns in column]
        for column in graphs.steps(name)
    ]


def twin(name: str) -> dict:
    """Returns a shipped workflow in the API's format."""
    return json.loads((TWINS / f"{name}.api.json").read_text(encoding="utf-8"))


def api(name: str) -> dict:
    """Returns a graph in the API's format: the shipped workflow's twin with the nano model's values put in."""
    graph = twin(name)
    for number, (node, kind, _) in enumerate(graphs.nodes(name), 1):  # ids follow this order, see graphs.py
        if graph[str(number)]["class_type"] != kind:
            raise ValueError(f"node {number} of {name}.api.json is no {kind} ({node}): build the workflow anew")
        inputs = graph[str(number)]["inputs"]
        inputs |= {key: value for key, value in values(name, node, kind).items() if key in inputs}
    return graph


def note(name: str) -> str:
    """Returns what the graph's note says."""
    return NOTE.format(title=graphs.file_name(name), hint=HINTS[name])
