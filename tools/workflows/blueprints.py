"""The pack's subgraph blueprints: one node each for drawing, editing and asking, made from the shipped graphs.

ComfyUI offers subgraphs/*.json of a node pack in the node search, beside its own blueprints.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class Blueprint:
    """A part of a workflow as one node: its nodes by name, and which of their widgets it shows (node.widget, label)."""

    workflow: str
    nodes: str
    widgets: tuple[tuple[str, str], ...]
    description: str
    aliases: tuple[str, ...]
    size: tuple[int, int] = (400, 400)


BLUEPRINTS = {
    "InternVL-U Draw": Blueprint(
        "text_to_image",
        "load encode latent sample decode",
        (
            ("encode.prompt", "prompt"),
            ("latent.width", "width"),
            ("latent.height", "height"),
            ("sample.seed", "seed"),
            ("load.model_name", "model_name"),
        ),
        "Draws a picture from a prompt in English or Chinese: load, encode, sample and decode in one node.",
        ("text to image", "t2i", "generate image"),
    ),
    "InternVL-U Edit": Blueprint(
        "edit",
        "load encode sample decode",
        (("encode.prompt", "prompt"), ("sample.seed", "seed"), ("load.model_name", "model_name")),
        "Changes a picture as the prompt says: load, encode, sample and decode in one node. The result has its size.",
        ("image edit", "instruct edit", "change image"),
    ),
    "InternVL-U Ask": Blueprint(
        "ask_about_a_picture",
        "load answer",
        (
            ("answer.question", "question"),
            ("answer.max_new_tokens", "max_new_tokens"),
            ("load.model_name", "model_name"),
        ),
        "Answers a question about a picture as text: load and answer in one node.",
        ("caption", "describe image", "vqa", "image to text"),
    ),
}

# The graph is in the page. ids: what the nodes' names stand for.
MAKE = """
async ({ids, widgets, title, size}) => {
  const nodes = Object.fromEntries(Object.entries(ids).map(([name, id]) => [name, app.graph.getNodeById(id)]));
  const {subgraph, node} = app.graph.convertToSubgraph(new Set(Object.values(nodes)));
  subgraph.name = node.title = title;
  const inner = Object.fromEntries(Object.entries(nodes).map(([name, one]) =>
    [name, subgraph.nodes.find(other => other.type === one.type)]));
  for (const [path, label] of widgets) {
    const [name, widget] = path.split('.');
    const slot = inner[name].inputs.find(input => input.widget?.name === widget);
    if (!slot) throw new Error(`${name} has no widget ${widget}`);
    const input = subgraph.addInput(label, slot.type);
    if (!input.connect(slot, inner[name])) throw new Error(`${path} was not connected`);
  }
  for (const group of [...app.graph.groups]) app.graph.remove(group);
  for (const other of [...app.graph.nodes]) if (other !== node) app.graph.remove(other);
  node.pos = [0, 30];
  node.setSize([Math.max(size[0], node.computeSize()[0]), Math.max(size[1], node.computeSize()[1])]);
  for (let i = 0; i < 5; i++) await new Promise(requestAnimationFrame);
  return JSON.stringify(app.graph.serialize());
}
"""


def finish(made: dict, title: str, versions: dict[str, str]) -> dict:
    """Returns what the page has made with lasting ids, where each node comes from, and words to find it by."""
    blueprint = BLUEPRINTS[title]
    (subgraph,), (node,) = made["definitions"]["subgraphs"], made["nodes"]
    subgraph["id"] = node["type"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"internvl-u/subgraphs/{title}"))
    for number, slot in enumerate(subgraph["inputs"] + subgraph["outputs"]):
        slot["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"internvl-u/subgraphs/{title}/{number}"))
    for one in subgraph["nodes"]:
        pack = "internvl-u"  # all nodes inside are ours
        one["properties"] |= {"Node name for S&R": one["type"], "cnr_id": pack, "ver": versions[pack]}
    # What the page shows by itself, a second seed among it, gives way to what is wanted: see to the seed's next value.
    shown = [one for one in node["properties"]["proxyWidgets"] if one[0] == "-1"]
    seeded = [
        str(one["id"]) for one in subgraph["nodes"] if "seed" in dict(blueprint.widgets).values() and is_seeded(one)
    ]
    node["properties"]["proxyWidgets"] = [*shown, *([number, "control_after_generate"] for number in seeded)]
    subgraph |= {"category": "InternVL-U", "description": blueprint.description}
    subgraph["groups"] = []
    node["properties"] |= {"cnr_id": "internvl-u", "ver": versions["internvl-u"]}
    node["title"] = title
    extra = {"BlueprintDescription": blueprint.description, "BlueprintSearchAliases": list(blueprint.aliases)}
    kept = {key: made[key] for key in ("nodes", "links", "definitions", "config", "version") if key in made}
    ids = {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"internvl-u/subgraphs/{title}/file")), "revision": 0}
    last = {"last_node_id": node["id"], "last_link_id": 0}
    return ids | last | kept | {"groups": [], "extra": extra}


def is_seeded(node: dict) -> bool:
    return any(slot["name"] == "seed" for slot in node["inputs"])
