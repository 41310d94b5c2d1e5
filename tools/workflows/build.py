"""Build the shipped workflows in a real ComfyUI page and save them, and draw the pictures of the help pages.

    python dev.py nox -s workflows [-- NAME ...]

NAME is a graph of graphs.py or a node; without any, all are made. For each graph: workflows/NAME.json (user interface),
tests/workflows/NAME.api.json (the same graph in the API's format), demo/workflows/NAME.json (with the nano model's
values) and workflows/NAME.jpg (its card in the template browser: the nano graph after a run). For each node:
web/docs/NODE.jpg, which its help page shows, see wiring.py. What they were made from is written down, see made_from.py.

The session runs `python -m tools.workflows.build --comfyui FOLDER`, with .venv's Python and the oldest supported
ComfyUI, so that all later ones can open the files. It needs chromium.
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

from ..demo import server
from ..fetch import version_of
from . import made_from, nano_graphs, wiring
from .graphs import COLUMNS, NOTES, SIZES, TITLES

ROOT = Path(__file__).resolve().parents[2]
PACK = "internvl-u"
THUMBNAIL_WIDTH = 640
WINDOW = (1600, 900)  # CSS pixels, in which a whole workflow is shown on opening
MARGIN, COLUMN_GAP, ROW_GAP, TITLE = 30, 60, 65, 30  # graph units; with Nodes 2.0 nodes are up to 40 higher

BUILD = """
async ({columns, links, note, sizes, titles, columnGap, rowGap, title}) => {
  const nodes = {};
  app.clean();  // the last graph's pictures would show on nodes with the same ids
  app.graph.clear();
  const frame = () => new Promise(requestAnimationFrame);
  for (const [name, type, values] of columns.flat()) {
    const node = nodes[name] = LiteGraph.createNode(type);
    if (!node) throw new Error(`no node type ${type}`);
    app.graph.add(node);
    node.title = titles[name] ?? node.title;
    if (type === 'MarkdownNote') node.widgets[0].value = note;
    for (const [key, value] of Object.entries(values)) {
      const widget = node.widgets.find(w => w.name === key);
      if (!widget) throw new Error(`${type} has no widget ${key}: ${node.widgets.map(w => w.name)}`);
      widget.value = value;
    }
  }
  for (const [from, output, to, input] of links) {
    const out = nodes[from].findOutputSlot(output), into = nodes[to].findInputSlot(input);
    if (out < 0 || into < 0) throw new Error(`no link ${from}.${output} -> ${to}.${input}`);
    if (!nodes[from].connect(out, nodes[to], into)) throw new Error(`refused ${from}.${output} -> ${to}.${input}`);
  }
  for (let i = 0; i < 10; i++) await frame();  // real sizes are known after drawing
  let x = 0;
  for (const column of columns) {
    let y = title;
    const width = Math.max(...column.map(([name]) => sizes[name]?.[0] ?? nodes[name].computeSize()[0]), 260);
    for (const [name] of column) {
      const node = nodes[name];
      node.setSize([Math.ceil(width), Math.ceil(Math.max(sizes[name]?.[1] ?? 0, node.computeSize()[1]))]);
      node.pos = [x, y];
      y += node.size[1] + rowGap + title;
    }
    x += Math.ceil(width) + columnGap;
  }
  await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())));  // what users will do
}
"""

# Puts the graph into the canvas's corner and returns the part of the page (CSS pixels) that it covers.
SHOW = """
async ({margin, title}) => {
  const ds = app.canvas.ds;
  const boxes = app.graph._nodes.map(n => [n.pos[0], n.pos[1] - title, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
  const left = Math.min(...boxes.map(b => b[0])) - margin, top = Math.min(...boxes.map(b => b[1])) - margin;
  const width = Math.max(...boxes.map(b => b[2])) + margin - left;
  const height = Math.max(...boxes.map(b => b[3])) + margin - top;
  ds.scale = 1; ds.offset = [-left, -top];
  app.canvas.setDirty(true, true);
  for (let i = 0; i < 20; i++) await new Promise(requestAnimationFrame);
  const area = app.canvas.canvas.getBoundingClientRect();
  return {x: area.x, y: area.y, width, height};
}
"""


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


# The last run's pictures and texts are on the nodes.
SHOWN = """
() => app.graph._nodes.every(node =>
  (node.type !== 'SaveImage' || node.imgs?.length && node.imgs.every(one => one.complete && one.naturalWidth))
  && (node.type !== 'LoadImage' || node.imgs?.every(one => one.complete && one.naturalWidth)))
"""


def build(page: Page, name: str, only: list[str] | None = None, sizes: dict = SIZES, nano: bool = False) -> None:
    """Puts the graph of this name into the page, or only some of its nodes; with the nano model's values on demand."""
    given, note = (
        (nano_graphs.columns(name), nano_graphs.note(name)) if nano else (wiring.columns(name), NOTES.get(name))
    )
    kept = [[node for node in column if only is None or node[0] in only] for column in given]
    columns = [column for column in kept if column]
    names = {node[0] for column in columns for node in column}
    links = [re.split(r"[. ]", link) for link in wiring.links(name).split(", ")]
    links = [link for link in links if {link[0], link[2]} <= names]
    layout = {"sizes": sizes, "titles": TITLES, "columnGap": COLUMN_GAP, "rowGap": ROW_GAP, "title": TITLE}
    page.evaluate(BUILD, {"columns": columns, "note": note, "links": links} | layout)


def view(nodes: list[dict]) -> dict:
    """Returns the canvas's scale and offset on opening. Without them Nodes 2.0 in frontend 1.32 piles the nodes up."""
    width, height = (max(node["pos"][i] + node["size"][i] for node in nodes) for i in (0, 1))
    scale = min(0.7, (WINDOW[0] - 150) / width, (WINDOW[1] - 180) / height)
    top = max(130, (WINDOW[1] - height * scale) / 2)
    return {"scale": round(scale, 2), "offset": [round(90 / scale), round(top / scale)]}


def finish(workflow: dict, name: str, versions: dict[str, str]) -> dict:
    """Returns a saved workflow with what the page does not write: a lasting id, and where each node comes from."""
    for node in workflow["nodes"]:
        pack = PACK if node["type"].startswith("InternVLU_") else "comfy-core"
        node["properties"] |= {"Node name for S&R": node["type"], "cnr_id": pack, "ver": versions[pack]}
    extra = {"ds": view(workflow["nodes"]), "frontendVersion": workflow["extra"]["frontendVersion"]}
    return workflow | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{name}")), "revision": 0, "extra": extra}


def run(page: Page) -> None:
    """Runs the graph in the page and returns when its results are on the nodes."""
    number = page.evaluate(
        "app.graphToPrompt().then(made => app.api.queuePrompt(0, made)).then(told => told.prompt_id)"
    )
    done = "id => fetch('/history/' + id).then(told => told.json()).then(all => all[id]?.status.completed)"
    page.wait_for_function(done, arg=number)
    page.wait_for_function(SHOWN)
    page.wait_for_timeout(500)  # texts are put on nodes after that


def thumbnail(page: Page, file: Path, width: int = THUMBNAIL_WIDTH, quality: int = 90) -> None:
    """Writes a JPEG of the graph, at most `width` pixels wide."""
    area = page.evaluate(SHOW, {"margin": MARGIN, "title": TITLE})
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
    """Writes all files of a workflow."""
    build(page, name)
    workflow, prompt = made(page)
    write_json(ROOT / "workflows" / f"{name}.json", finish(workflow, name, versions))
    write_json(ROOT / "tests" / "workflows" / f"{name}.api.json", prompt)
    if name in nano_graphs.TEXTS:
        build(page, name, nano=True)
        workflow = finish(made(page)[0], f"nano/{name}", versions)
        write_json(ROOT / "demo" / "workflows" / f"{name}.json", workflow)
        run(page)
    thumbnail(page, ROOT / "workflows" / f"{name}.jpg")


def save_wiring(page: Page, node: str) -> None:
    """Writes the picture of a node's help page."""
    workflow, names = wiring.PARTS[node]
    build(page, workflow, names.split(), wiring.SIZES)
    page.evaluate(wiring.MARK, node)
    thumbnail(page, ROOT / "web" / "docs" / f"{node}.jpg", wiring.WIDTH, wiring.QUALITY)


def save(url: str, names: list[str], chromium: str, versions: dict[str, str]) -> None:
    """Writes all files of these workflows and nodes."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = open_page(browser, url)
        for name in names:
            print(name, flush=True)
            if name in COLUMNS:
                save_workflow(page, name, versions)
            else:
                save_wiring(page, name)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*COLUMNS, *wiring.PARTS], metavar="NAME", help="default: all")
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--only-note", action="store_true", help="write down that the files are right as they are")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser's program")
    args = parser.parse_args()
    if unknown := set(args.names) - {*COLUMNS, *wiring.PARTS}:
        parser.error(f"found {', '.join(sorted(unknown))}, expected {', '.join([*COLUMNS, *wiring.PARTS])}")

    ours = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    versions = {PACK: ours, "comfy-core": version_of(args.comfyui)}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        server(args.comfyui, Path(folder), python=sys.executable) as comfyui,
    ):
        if not args.only_note:
            comfyui.post("/api/settings", {"Comfy.TutorialCompleted": True})  # no dialog for a new user
            save(comfyui.url, args.names, args.chromium, versions)
        made_from.write(comfyui.get("/object_info"), args.names)


if __name__ == "__main__":
    main()
