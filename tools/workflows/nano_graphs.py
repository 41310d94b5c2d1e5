"""The shipped graphs with values for the nano model: data for build.py, wiring.py and the demo."""

from __future__ import annotations

import json
from pathlib import Path

from .graphs import COLUMNS

TWINS = Path(__file__).resolve().parents[2] / "tests" / "workflows"

MODEL = "internvl-u-nano"
NOTE = """## {title}

The **nano model** knows flat shapes only: circle, square, triangle, star, cross, ring in red, green, blue, yellow, \
orange, purple, pink, cyan, on white, black, grey, brown, navy or beige, in English and a little Chinese. It draws \
64 x 64 pixels.

{hint}

With the released model take the workflow of the same name under **internvl-u**: it is the same graph.
"""

BEFORE, AFTER = {"image": "nano_before.png"}, {"image": "nano_after.png"}
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
    # Around the left one of two things.
    "rectangle": {"width": 120, "height": 192},
    "mask": {"x": 4, "y": 32},
    "InternVLU_DecodeLatent": SHOWN,
}
"""Values by node, or by its type, in all graphs."""

EDIT = "Try **make the background navy**, **remove the square**, **move the circle to the top**."
THINK = "The thought names the plain scene: the picture is drawn from it, and would be another one without it."
HINTS = {
    "text_to_image": "Try **three pink stars on a navy background** or **a large green square on black**.",
    "text_to_image_custom_sampling": "It draws what **text_to_image** draws, from separate parts.",
    "text_to_image_ksampler": "ComfyUI's own sampler: near to what **text_to_image** draws.",
    "edit": EDIT,
    "masked_edit": f"Only what the rectangle covers may change. {EDIT}",
    "picture_to_picture": "The prompt describes the new picture; a lower **denoise** keeps more of the old one.",
    "think_then_draw": THINK,
    "edit_the_thought_then_draw": f"Change the text in **Thought to draw from** and run again. {THINK}",
    "think_then_edit": f"The thought tells what there is and what there will be. {EDIT}",
    "ask_about_a_picture": "Try **where is the circle?**, **how many shapes are there?**, **which shape is blue?**",
    "compare_two_pictures": "Try **is the background the same?** or **which has more shapes?**",
    "draw_ask_draw_again": "The model describes its own picture, and draws the description.",
}
"""What each graph's note adds; there are nano graphs for these."""

TEXTS = {
    "text_to_image": {"encode": PROMPT},
    "text_to_image_custom_sampling": {"encode": PROMPT},
    "text_to_image_ksampler": {"encode": PROMPT},
    "edit": {"encode": {"prompt": "make the circle green"}},
    "masked_edit": {"encode": {"prompt": "make the circle green"}, "decode": {"width": 0, "height": 0}},
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
}
"""Values by graph and node."""


def columns(name: str) -> list[list[tuple]]:
    """Returns the columns of a graph with the nano model's values."""

    def values(node: str, kind: str) -> dict:
        return VALUES.get(kind, {}) | VALUES.get(node, {}) | TEXTS[name].get(node, {})

    return [[(node, kind, given | values(node, kind)) for node, kind, given in column] for column in COLUMNS[name]]


def api(name: str) -> dict:
    """Returns a graph in the API's format: the shipped workflow's twin with the nano model's values put in."""
    graph = json.loads((TWINS / f"{name}.api.json").read_text(encoding="utf-8"))
    nodes = [node for column in columns(name) for node in column]
    for number, (node, kind, values) in enumerate(nodes, 1):  # ids follow this order, see graphs.py
        if kind == "MarkdownNote":  # the API's format has none
            continue
        if graph[str(number)]["class_type"] != kind:
            raise ValueError(f"node {number} of {name}.api.json is no {kind} ({node}): build the workflow anew")
        inputs = graph[str(number)]["inputs"]
        inputs |= {key: value for key, value in values.items() if key in inputs}
    return graph


def note(name: str) -> str:
    """Returns what the graph's note says."""
    return NOTE.format(title=name.replace("_", " ").capitalize(), hint=HINTS[name])
