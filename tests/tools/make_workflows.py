"""Build the shipped workflows in a real ComfyUI page and save them.

    python tests/tools/make_workflows.py --url http://127.0.0.1:8188 [--chromium /usr/bin/chromium] [NAME ...]

For each graph below: workflows/NAME.json (user interface), workflows/NAME.jpg (its card in the template browser) and
tests/workflows/NAME.api.json (the same graph in the API's format). Needs Playwright for Python. Run it against the
oldest supported ComfyUI, so that all later ones can open the files, with only this pack and a checkpoint (the test one
will do) in models/InternVL-U/InternVL-U.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import urllib.request
import uuid
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PACK = "internvl-u"
THUMBNAIL_WIDTH = 640
VIEW = {"scale": 0.7, "offset": [130, 240]}  # on opening; without one, Nodes 2.0 in frontend 1.32 piles the nodes up
MARGIN, COLUMN_GAP, ROW_GAP, TITLE = 30, 60, 50, 30  # graph units

FOLDER = """Put the whole model folder into **models/InternVL-U/InternVL-U**, from Hugging Face \
([InternVL-U/InternVL-U](https://huggingface.co/InternVL-U/InternVL-U)) or ModelScope \
([OpenGVLab/InternVL-U](https://modelscope.cn/models/OpenGVLab/InternVL-U)), then press **R**."""
CHANGE = "Change the **prompt** first (English or Chinese), then the **seed** and the size **preset**."
NOTES = {
    "text_to_image": f"""## Text to image

{FOLDER}

{CHANGE}

Official values: **steps** 20, **all_cfg** 4.5, **part_cfg** 2.0. Higher **all_cfg** follows the words more closely; \
**part_cfg** changes nothing without reference images.
""",
    "text_to_image_custom_sampling": f"""## Text to image, custom sampling

{FOLDER}

Guider, sampler, scheduler and noise are nodes of their own here, so that each can be exchanged. As they are, they \
draw what **InternVL-U Sampler** draws.

Official values: **steps** 20, **all_cfg** 4.5. **VAE Decode** works like **InternVL-U Decode**, half a level of 255 \
darker.
""",
    "text_to_image_ksampler": f"""## Text to image, KSampler

{FOLDER}

{CHANGE}

Typical values: **steps** 20, **cfg** 4.5 (it is all_cfg), **euler**, **simple**. For the official solver and schedule \
take **InternVL-U Sampler** instead.
""",
}

PROMPT = "a red fox reading a newspaper in a sunny kitchen, watercolour"
START = [
    [
        ("load", "InternVLU_LoadModel", {"model_name": "InternVL-U", "precision": "auto"}),
        ("latent", "InternVLU_CreateLatent", {"preset": "1024 x 1024", "width": 1024, "height": 1024, "batch_size": 1}),
    ],
    [("encode", "InternVLU_EncodePrompt", {"prompt": PROMPT}), ("note", "MarkdownNote", {})],
]
SAVE = [("save", "SaveImage", {"filename_prefix": "InternVL-U"})]
FIXED = {"control_after_generate": "fixed"}
STEPS = {"steps": 20, "denoise": 1.0}
GUIDANCE = {"all_cfg": 4.5, "part_cfg": 2.0}
SAMPLER = FIXED | {"seed": 1234} | STEPS | GUIDANCE
KSAMPLER = FIXED | {"seed": 1234} | STEPS | {"cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}

# Columns from left to right, each from top to bottom: (name, node type, values). Ids follow this order.
COLUMNS = {
    "text_to_image": [
        *START,
        [
            ("sample", "InternVLU_SampleLatent", SAMPLER),
            ("decode", "InternVLU_DecodeLatent", {"width": 0, "height": 0}),
        ],
        SAVE,
    ],
    "text_to_image_custom_sampling": [
        *START,
        [
            ("noise", "RandomNoise", FIXED | {"noise_seed": 1234}),
            ("guider", "InternVLU_CreateGuider", GUIDANCE),
            ("solver", "InternVLU_SelectSampler", {}),
            ("steps", "InternVLU_ScheduleSteps", STEPS),
        ],
        [("sample", "SamplerCustomAdvanced", {}), ("decode", "VAEDecode", {})],
        SAVE,
    ],
    "text_to_image_ksampler": [
        *START,
        [("sample", "KSampler", KSAMPLER), ("decode", "VAEDecode", {})],
        SAVE,
    ],
}

# "node.output node.input, ..."
ENCODE = "load.MLLM encode.mllm, load.MODEL {0}.model, encode.positive {0}.positive, encode.negative {0}.negative, "
PARTS = "noise.NOISE sample.noise, guider.GUIDER sample.guider, solver.SAMPLER sample.sampler, "
PARTS += "steps.SIGMAS sample.sigmas, "
DECODE = "latent.LATENT sample.latent_image, sample.{} decode.samples, load.VAE decode.vae, decode.IMAGE save.images"
LINKS = {
    "text_to_image": ENCODE.format("sample") + DECODE.format("LATENT"),
    "text_to_image_custom_sampling": ENCODE.format("guider") + PARTS + DECODE.format("output"),
    "text_to_image_ksampler": ENCODE.format("sample") + DECODE.format("LATENT"),
}

# Where the contents need more room than a node takes by itself.
SIZES = {"note": (380, 260), "encode": (380, 220), "save": (400, 490)}

BUILD = """
async ({columns, links, note, sizes, columnGap, rowGap, title}) => {
  const nodes = {};
  app.graph.clear();
  const frame = () => new Promise(requestAnimationFrame);
  for (const [name, type, values] of columns.flat()) {
    const node = nodes[name] = LiteGraph.createNode(type);
    if (!node) throw new Error(`no node type ${type}`);
    app.graph.add(node);
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

SHRINK = """
async ([png, width]) => {
  const picture = await createImageBitmap(await (await fetch('data:image/png;base64,' + png)).blob());
  const height = Math.round(picture.height * width / picture.width);
  const small = await createImageBitmap(picture, {resizeWidth: width, resizeHeight: height, resizeQuality: 'high'});
  const canvas = Object.assign(document.createElement('canvas'), {width, height});
  canvas.getContext('2d').drawImage(small, 0, 0);
  return canvas.toDataURL('image/jpeg', 0.9).split(',')[1];
}
"""


def open_page(browser, url: str) -> Page:
    """Returns a page with an empty graph and nothing around it."""
    page = browser.new_page(viewport={"width": 2800, "height": 1400})
    page.goto(url)
    page.wait_for_function("!!window.app?.extensionManager && !!window.LiteGraph?.registered_node_types.MarkdownNote")
    page.wait_for_function("!!LiteGraph.registered_node_types.InternVLU_LoadModel")
    page.wait_for_timeout(2000)  # the page opens its own default graph and dialogs
    page.keyboard.press("Escape")
    if page.evaluate("LiteGraph.vueNodesMode"):
        raise SystemExit("Nodes 2.0 is on, where nodes have other sizes. Turn it off in ComfyUI's settings.")
    page.evaluate("app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
    return page


def build(page: Page, name: str) -> None:
    """Puts the graph of this name into the page."""
    links = [re.split(r"[. ]", link) for link in LINKS[name].split(", ")]
    layout = {"sizes": SIZES, "columnGap": COLUMN_GAP, "rowGap": ROW_GAP, "title": TITLE}
    page.evaluate(BUILD, {"columns": COLUMNS[name], "note": NOTES[name], "links": links} | layout)


def finish(workflow: dict, name: str, versions: dict[str, str]) -> dict:
    """Returns a saved workflow with what the page does not write: a lasting id, and where each node comes from."""
    for node in workflow["nodes"]:
        pack = PACK if node["type"].startswith("InternVLU_") else "comfy-core"
        node["properties"] |= {"Node name for S&R": node["type"], "cnr_id": pack, "ver": versions[pack]}
    extra = {"ds": VIEW, "frontendVersion": workflow["extra"]["frontendVersion"]}
    return workflow | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{name}")), "revision": 0, "extra": extra}


def thumbnail(page: Page) -> bytes:
    """Returns a JPEG of the graph."""
    png = page.screenshot(clip=page.evaluate(SHOW, {"margin": MARGIN, "title": TITLE}))
    return base64.b64decode(page.evaluate(SHRINK, [base64.b64encode(png).decode(), THUMBNAIL_WIDTH]))


def write_json(file: Path, value: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(COLUMNS), metavar="NAME", help="default: all")
    parser.add_argument("--url", required=True, help="a running ComfyUI")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser's program")
    args = parser.parse_args()

    with urllib.request.urlopen(f"{args.url}/system_stats") as answer:
        core = json.load(answer)["system"]["comfyui_version"]
    ours = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox", "--disable-gpu"])
        page = open_page(browser, args.url)
        for name in args.names:
            build(page, name)
            made = page.evaluate("app.graphToPrompt().then(made => JSON.stringify([made.workflow, made.output]))")
            workflow, prompt = json.loads(made)
            write_json(ROOT / "workflows" / f"{name}.json", finish(workflow, name, {PACK: ours, "comfy-core": core}))
            write_json(ROOT / "tests" / "workflows" / f"{name}.api.json", prompt)
            (ROOT / "workflows" / f"{name}.jpg").write_bytes(thumbnail(page))
        browser.close()


if __name__ == "__main__":
    main()
