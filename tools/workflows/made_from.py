"""What each shipped workflow and help page was made from, so that a test can say when one is out of date.

made_from.json holds a hash for each: of the nodes as ComfyUI describes them in /object_info, of what graphs.py and
nano_graphs.py say of the graph, and for cards of the nano model's weights. `nox -s workflows` writes it; after a change
that needs no new files, `python dev.py nox -s workflows -- --only-note NAME` does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from . import blueprints, cards, graphs, nano_graphs, wiring

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_suffix(".json")
NAMES = [*graphs.FILES, *blueprints.BLUEPRINTS, *wiring.PARTS]
OURS = "InternVLU_"
# Widgets that list what lies in folders, and what the machine has.
LISTING_WIDGETS = {"model_name", "mllm_name", "vae_name", "lora_name", "device"}
OF_AN_INPUT = ("default", "min", "max", "step", "round", "multiline", "display_name", "options")
OF_A_NODE = ("name", "display_name", "output", "output_name")
EXPLANATIONS = ("tooltip", "description", "category", "output_tooltips")  # on help pages, not in workflows and pictures


def hashes(info: dict) -> dict[str, str]:
    """Returns the hash of what each workflow and each help page is made from, `info` being ComfyUI's /object_info."""
    kinds = ((graphs.FILES, of_workflow), (blueprints.BLUEPRINTS, of_blueprint), (wiring.PARTS, of_node))
    return {name: digest(of(name, info)) for names, of in kinds for name in names}


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def of_workflow(name: str, info: dict) -> dict:
    """Returns what a workflow's files are made from."""
    steps = [[title for title, _ in column] for column in graphs.steps(name)]
    used = {"note", *(node for node, *_ in graphs.nodes(name))}
    made = {
        "note": graphs.note(name),
        "steps": steps,
        "sizes": {node: size for node, size in graphs.sizes(name).items() if node in used},
        "first": graphs.first(name),
        **drawn(name, graphs.nodes(name), info),
    }
    made["app"] = graphs.APPS.get(name)
    made["card"] = [asdict(cards.CARDS[name]), weights()]
    if graphs.NANO_EDGES in json.dumps(made["columns"]):
        made["card"] += weights(lora=True)
    if name in nano_graphs.HINTS:
        made["nano"] = [nano_graphs.steps(name), nano_graphs.note(name)]
    return made


def of_blueprint(name: str, info: dict) -> dict:
    """Returns what a blueprint is made from."""
    one = blueprints.BLUEPRINTS[name]
    used = [node for node in graphs.nodes(one.workflow) if node[0] in one.nodes.split()]
    return {"blueprint": asdict(one), **drawn(one.workflow, used, info)}


def of_node(name: str, info: dict) -> dict:
    """Returns what a help page is made from: the node, and the graph in its picture."""
    workflow, parts = wiring.PARTS[name]
    used = wiring.nodes(workflow, parts.split())
    return {"node": ours(info[name], EXPLANATIONS), "sizes": wiring.SIZES, **drawn(workflow, used, info)}


def drawn(name: str, used: list[tuple], info: dict) -> dict:
    """Returns what a picture of some of a graph's nodes shows."""
    links = [link.split() for link in wiring.links(name).split(", ")]
    links = [link for link in links if {end.split(".")[0] for end in link} <= {node for node, *_ in used}]
    columns = [[node, kind, values, graphs.TITLES.get(node), graphs.SIZES.get(node)] for node, kind, values in used]
    return {"columns": columns, "links": links, "nodes": [described(node, links, info) for node in used]}


def described(node: tuple, links: list[list[str]], info: dict) -> object:
    """Returns what the graph depends on in a node: all of ours; of ComfyUI's own only the inputs that are used.

    More would differ between versions of ComfyUI that all open the same file.
    """
    name, kind, values = node
    if kind.startswith(OURS):
        return ours(info[kind])
    if kind in graphs.NEWER:
        return kind
    inputs = {key: one[0] for group in info[kind]["input"].values() for key, one in group.items()}
    linked = [into.split(".")[1] for _, into in links if into.split(".")[0] == name]
    wanted = sorted({*linked, *(key for key in values if key != "control_after_generate")})
    return {key: "COMBO" if isinstance(inputs.get(key), list) else inputs.get(key) for key in wanted}


def ours(node: dict, also: tuple[str, ...] = ()) -> dict:
    """Returns a node's description without what depends on the machine, its files or ComfyUI's version."""

    def options(name: str, given: dict) -> dict:
        unsteady = ("default", "options") if name in LISTING_WIDGETS else ()
        return {key: given[key] for key in (*OF_AN_INPUT, *also) if key in given and key not in unsteady}

    inputs = {
        group: [[name, kind, *(options(name, one) for one in rest)] for name, (kind, *rest) in fields.items()]
        for group, fields in node["input"].items()
        if group != "hidden"
    }
    return {"input": inputs, **{key: node[key] for key in (*OF_A_NODE, *also) if key in node}}


def weights(lora: bool = False) -> list[str]:
    """Returns the hashes of the nano model's weights, or of its LoRA: cards show what they draw."""
    folder = ROOT / "demo" / nano_graphs.MODEL
    files = sorted(folder.rglob("*.safetensors"))
    return [_hash(file) for file in files if lora == (file.parent.name == "loras")]


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def read() -> dict[str, str]:
    """Returns the hashes of what the files in the repository were made from."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(info: dict, names: list[str]) -> None:
    """Writes down what the files of these workflows and help pages were made from, just now."""
    today, before = hashes(info), read() if FILE.is_file() else {}
    kept = {name: today[name] if name in names else before.get(name, "unknown") for name in NAMES}
    FILE.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
