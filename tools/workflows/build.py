"""Build the shipped workflows in a real ComfyUI page and save them, and draw the pictures of the help pages.

    python dev.py nox -s workflows [-- NAME ...]

NAME is a graph of graphs.py or a node; without any, all are made. For each graph: workflows/FILE.json (user
interface; graphs.py says what the file is called), tests/workflows/NAME.api.json (the same graph in the API's format),
demo/workflows/NAME.json (with the nano model's values) and workflows/FILE.jpg (its card in the template browser, see
cards.py). For some graphs: subgraphs/FILE.json, see blueprints.py. For each node: web/docs/NODE.jpg, which its help
page shows, see wiring.py. The pictures that workflows load are drawn first, see pictures.py. What all of it was made
from is written down, see made_from.py.

The session runs `python -m tools.workflows.build --comfyui FOLDER`, with .venv's Python and the oldest supported
ComfyUI, so that all later ones can open the files; what wants a newer one (graphs.WANTS) is left as it is there, and
made by that command with the newer ComfyUI's folder and packages. It needs chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ..comfyui import Server
from ..demo import server
from ..fetch import version_of
from . import blueprints, cards, graphs, layout, made_from, nano_graphs, pictures, wiring

ROOT = Path(__file__).resolve().parents[2]
PACK = "internvl-u"
WINDOW = (1600, 900)  # CSS pixels, in which a whole workflow is shown on opening


def open_page(browser, url: str) -> Page:
    """Returns a page with an empty graph and nothing around it."""
    page = browser.new_page(viewport={"width": 2800, "height": 1400})
    page.set_default_timeout(120_000)
    page.goto(url)
    page.wait_for_function("!!window.app?.extensionManager && !!window.LiteGraph?.registered_node_types.MarkdownNote")
    page.wait_for_function("!!LiteGraph.registered_node_types.InternVLU_LoadModel")
    page.wait_for_timeout(2000)  # the page opens its own default graph and dialogs
    page.keyboard.press("Escape")
    if page.evaluate("LiteGraph.vueNodesMode"):
        raise SystemExit("Nodes 2.0 is on, where nodes have other sizes. Turn it off in ComfyUI's settings.")
    page.evaluate("app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
    return page


def build(page: Page, name: str, steps: list[list[tuple]], note: str | None, sizes: dict) -> None:
    """Puts a graph, or these nodes of it, into the page. Steps are titled groups where there is a note."""
    names = {node[0] for column in steps for _, nodes in column for nodes in nodes for node in nodes}
    links = [re.split(r"[. ]", link) for link in wiring.links(name).split(", ")]
    links = [link for link in links if {link[0], link[2]} <= names]
    values = {"columns": steps, "links": links, "note": note, "sizes": sizes, "titles": graphs.TITLES}
    values |= {"first": graphs.first(name) if note else [], "green": graphs.GREEN, "brown": graphs.BROWN}
    values["clear"] = graphs.CLEAR.get(name, 3)
    page.evaluate(
        layout.BUILD, values | {"colours": graphs.COLOURS, "grouped": note is not None, "loaders": graphs.LOADERS}
    )


def view(nodes: list[dict]) -> dict:
    """Returns the canvas's scale and offset on opening. Without them Nodes 2.0 in frontend 1.32 piles the nodes up."""
    width, height = (max(node["pos"][i] + node["size"][i] for node in nodes) + 30 for i in (0, 1))
    scale = int(min(0.8, (WINDOW[0] - 110) / width, (WINDOW[1] - 200) / height) * 100) / 100
    left = max(80, (WINDOW[0] - width * scale) / 2)
    top = max(150, (WINDOW[1] - height * scale) / 2)
    return {"scale": scale, "offset": [round(left / scale), round(top / scale)]}


def app_view(name: str) -> dict:
    """Returns what the app view shows of a workflow, in the form of a workflow's `extra`; {} if it has none."""
    if name not in graphs.APPS:
        return {}
    ids = {node: number for number, (node, *_) in enumerate(graphs.nodes(name), 1)}
    inputs, outputs = graphs.APPS[name]
    shown = [[ids[node], widget] for node, _, widget in (one.partition(".") for one in inputs.split())]
    return {"linearData": {"inputs": shown, "outputs": [ids[node] for node in outputs.split()]}}


def finish(workflow: dict, name: str, versions: dict[str, str]) -> dict:
    """Returns a saved workflow with what the page does not write: a lasting id, and where each node comes from."""
    for node in workflow["nodes"]:
        pack = PACK if node["type"].startswith("InternVLU_") else "comfy-core"
        node["properties"] |= {"Node name for S&R": node["type"], "cnr_id": pack, "ver": versions[pack]}
    kept = ("frontendVersion", "reroutes", "linkExtensions")
    extra = {"ds": view(workflow["nodes"])} | {key: workflow["extra"][key] for key in kept if key in workflow["extra"]}
    extra |= app_view(name.removeprefix("nano/"))
    return workflow | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{name}")), "revision": 0, "extra": extra}


def thumbnail(page: Page, file: Path, width: int, quality: int) -> None:
    """Writes a JPEG of the graph, at most `width` pixels wide."""
    area = page.evaluate(layout.SHOW, {"margin": layout.MARGIN, "title": layout.TITLE})
    with Image.open(io.BytesIO(page.screenshot(clip=area))) as picture:
        width = min(width, picture.width)
        small = picture.convert("RGB").resize((width, round(picture.height * width / picture.width)), Image.LANCZOS)
        small.save(file, quality=quality, optimize=True)


def made(page: Page) -> tuple[dict, dict]:
    """Returns the graph in the page as a workflow of the user interface, and as one of the API."""
    return tuple(
        json.loads(page.evaluate("app.graphToPrompt().then(made => JSON.stringify([made.workflow, made.output]))"))
    )


def write_json(file: Path, value: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_workflow(page: Page, name: str, versions: dict[str, str]) -> None:
    """Writes all files of a workflow but its card."""
    build(page, name, graphs.steps(name), graphs.note(name), graphs.sizes(name))
    workflow, prompt = made(page)
    write_json(ROOT / "workflows" / f"{graphs.file_name(name)}.json", finish(workflow, name, versions))
    write_json(ROOT / "tests" / "workflows" / f"{name}.api.json", prompt)
    if name in nano_graphs.HINTS:
        build(page, name, nano_graphs.steps(name), nano_graphs.note(name), graphs.sizes(name))
        write_json(ROOT / "demo" / "workflows" / f"{name}.json", finish(made(page)[0], f"nano/{name}", versions))


def save_blueprint(page: Page, title: str, versions: dict[str, str]) -> None:
    """Writes a subgraph blueprint."""
    name, wanted = blueprints.BLUEPRINTS[title].workflow, blueprints.BLUEPRINTS[title].nodes.split()
    build(page, name, graphs.steps(name), graphs.note(name), graphs.sizes(name))
    numbers = {node: number for number, (node, *_) in enumerate(graphs.nodes(name), 1) if node in wanted}
    one = blueprints.BLUEPRINTS[title]
    values = {"ids": numbers, "widgets": one.widgets, "title": title, "size": one.size}
    value = json.loads(page.evaluate(blueprints.MAKE, values))
    write_json(ROOT / "subgraphs" / f"{title}.json", blueprints.finish(value, title, versions))


def save_wiring(page: Page, node: str) -> None:
    """Writes the picture of a node's help page."""
    workflow, names = wiring.PARTS[node]
    build(page, workflow, wiring.steps(workflow, names.split()), None, wiring.SIZES)
    page.evaluate(wiring.MARK, node)
    thumbnail(page, ROOT / "web" / "docs" / f"{node}.jpg", wiring.WIDTH, wiring.QUALITY)


def save(comfyui: Server, names: list[str], chromium: str, versions: dict[str, str]) -> None:
    """Writes all files of these workflows and nodes."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = open_page(browser, comfyui.url)
        for name in names:
            print(name, flush=True)
            if name in graphs.FILES:
                save_workflow(page, name, versions)
                cards.save(comfyui, name)
            elif name in blueprints.BLUEPRINTS:
                save_blueprint(page, name, versions)
            else:
                save_wiring(page, name)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=made_from.NAMES, metavar="NAME", help="default: all")
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--only-note", action="store_true", help="write down that the files are right as they are")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser's program")
    args = parser.parse_args()
    if unknown := set(args.names) - set(made_from.NAMES):
        parser.error(f"found {', '.join(sorted(unknown))}, expected {', '.join(made_from.NAMES)}")
    names = [name for name in args.names if graphs.runs_on(name, version_of(args.comfyui))]
    for name in sorted(set(args.names) - set(names)):
        print(f"{name} stays as it is: make it with --comfyui FOLDER of ComfyUI {graphs.WANTS[name]}", flush=True)

    ours = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    versions = {PACK: ours, "comfy-core": version_of(args.comfyui)}
    pictures.save_all()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        server(args.comfyui, Path(folder), python=sys.executable) as comfyui,
    ):
        if not args.only_note:
            comfyui.post("/api/settings", {"Comfy.TutorialCompleted": True})  # no dialog for a new user
            save(comfyui, names, args.chromium, versions)
        made_from.write(comfyui.get("/object_info"), names)


if __name__ == "__main__":
    main()
