"""The shipped workflows in a real browser: opened from the template browser, and some of them run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pack.tools.fetch import version_of
from pack.tools.workflows import graphs, hearts

from . import layout

PACK = "internvl-u"  # the pack's folder in custom_nodes
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
PICTURES = ROOT / "web" / "pictures"
TIMEOUT = 30_000  # ms

SET_SMALL = """() => {
  const small = {preset: 'custom', steps: 2, max_new_tokens: 8, largest_size: 64};
  for (const node of app.graph.nodes)
    for (const widget of node.widgets ?? [])
      if (widget.name in small) widget.value = small[widget.name];
      else if (node.type.endsWith('CreateLatent') && ['width', 'height'].includes(widget.name)) widget.value = 64;
}"""
MORE = """shown => document.querySelectorAll("[data-testid^='template-workflow-']").length > shown"""
# A second tab of the same workflow is called "name (2)".
IS_OPEN = "name => app.extensionManager.workflow.activeWorkflow.filename.replace(/ \\(\\d+\\)$/, '') === name"
# The width of the picture on the node: drawn on the canvas, or an element of the page with Nodes 2.0.
SHOWN = """() => {
  const node = app.graph.nodes.find(node => node.type === 'SaveImage');
  const picture = node.imgs?.[0] ?? document.querySelector(`[data-node-id="${node.id}"] img`);
  return picture?.naturalWidth;
}"""
# The text on InternVL-U Answer, where core's Preview as Text shows the same.
WRITTEN = """() => {
  const answer = document.querySelector('.internvlu-text textarea')?.value;
  const preview = app.graph.nodes.find(node => node.type === 'PreviewAny').widgets;
  return preview.some(widget => widget.value === answer) && answer;
}"""


@pytest.fixture(scope="module")
def errors():
    """Collects uncaught errors of the page, and what is logged as an error about the pack's own files."""
    return []


@pytest.fixture(scope="module")
def page(browser, server, errors):
    """ComfyUI's page, started and with no dialog open."""
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: line.type == "error" and PACK in line.text and errors.append(line.text))
    page.set_default_timeout(TIMEOUT)
    # A new user is shown the templates at some moment after the start.
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function("!!window.app?.extensionManager?.workflow?.activeWorkflow")
    return page


def open_template(page, name: str) -> None:
    file = graphs.file_name(name)
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(PACK, exact=True).first.click()
    card = page.get_by_test_id(f"template-workflow-{file}")
    cards = dialog.locator("[data-testid^='template-workflow-']")
    cards.first.wait_for()
    while not card.count():  # the list grows when its end is looked at
        shown = cards.count()
        cards.last.scroll_into_view_if_needed()
        page.wait_for_function(MORE, arg=shown)
    card.scroll_into_view_if_needed()  # its picture is fetched only then
    card.locator("img").first.wait_for()
    card.click()
    dialog.wait_for(state="hidden")
    page.wait_for_function(IS_OPEN, arg=file)


def graph(page) -> dict:
    return json.loads(page.evaluate("JSON.stringify(app.graph.serialize())"))


def widgets(workflow: dict) -> dict:
    return {node["id"]: (node["type"], node.get("widgets_values") or []) for node in workflow["nodes"]}


def links(workflow: dict) -> dict:
    """Returns the links with the names of their inputs: the page numbers those of widgets anew."""
    names = {slot["link"]: slot["name"] for node in workflow["nodes"] for slot in node["inputs"]}
    return {number: (*ends, names[number], kind) for number, *ends, _, kind in workflow["links"]}


@pytest.mark.parametrize("name", graphs.FILES)
def test_a_shipped_workflow_opens_from_the_template_browser_as_it_was_saved(page, errors, name, comfyui):
    if not graphs.runs_on(name, version_of(comfyui)):
        pytest.skip(f"wants ComfyUI {graphs.WANTS[name]}")
    saved = json.loads((WORKFLOWS / f"{graphs.file_name(name)}.json").read_text(encoding="utf-8"))
    open_template(page, name)
    page.wait_for_timeout(500)  # an error dialog would come after the graph

    opened = graph(page)
    assert widgets(opened) == widgets(saved)
    assert links(opened) == links(saved)
    known = set(page.evaluate("Object.keys(LiteGraph.registered_node_types)"))
    assert {node["type"] for node in opened["nodes"]} <= known
    told = page.locator("[role=dialog]:visible, .p-toast-message:visible").all_inner_texts()
    assert [text for text in told if not text.startswith("Example pictures of InternVL-U")] == []
    assert errors == []
    page.evaluate(layout.FIT)
    page.wait_for_function(layout.DRAWN)
    boxes = layout.boxes(page)
    assert layout.overlaps(boxes) == [] and layout.crossed(page, boxes) == [] and layout.outside(page, boxes) == []


def test_a_workflow_brings_its_pictures_into_the_input_folder_and_says_so_once(page, server):
    for file in server.base.glob("input/internvl_u_*.*"):
        file.unlink()
    open_template(page, "edit_two_references")
    told = page.locator(".p-toast-message").filter(has_text="Example pictures of InternVL-U").last
    told.wait_for()
    assert re.search("input folder.*internvl_u_cat.jpg, internvl_u_harbour.jpg", told.inner_text(), re.S)
    assert sorted(file.name for file in server.base.glob("input/internvl_u_*.*")) == [
        "internvl_u_cat.jpg",
        "internvl_u_harbour.jpg",
    ]
    harbour = server.base / "input" / "internvl_u_harbour.jpg"
    assert harbour.read_bytes() == (PICTURES / harbour.name).read_bytes()
    harbour.write_bytes(b"the user's own")
    open_template(page, "edit_two_references")
    page.wait_for_timeout(500)
    assert harbour.read_bytes() == b"the user's own"
    harbour.unlink()


def test_a_workflow_for_a_folder_brings_one(page, server):
    open_template(page, "captions_for_a_folder")
    folder = server.base / "input" / graphs.PICTURES
    assert len(list(folder.iterdir())) == 3


def test_a_workflow_that_trains_brings_pictures_and_their_captions(page, server):
    folder = server.base / "input" / graphs.HEARTS
    for file in folder.glob("*"):
        file.unlink()
    open_template(page, "train_a_lora")
    told = page.locator(".p-toast-message").filter(has_text=graphs.HEARTS).last
    told.wait_for()
    captions = json.loads((hearts.FOLDER / hearts.CAPTIONS).read_text(encoding="utf-8"))
    assert {file.name for file in folder.iterdir()} == {
        name for picture in captions for name in (picture, picture.replace(".png", ".txt"))
    }
    assert (folder / "heart-001.txt").read_text(encoding="utf-8") == captions["heart-001.png"]
    assert (folder / "heart-001.png").read_bytes() == (hearts.FOLDER / "heart-001.png").read_bytes()


def run_small(page, name: str, done: str) -> None:
    """Runs a workflow from the page, with less work, until `done` is true in the page."""
    open_template(page, name)
    page.evaluate(SET_SMALL)
    page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
    page.wait_for_function(done)
    assert page.locator("[role=dialog]:visible").all_inner_texts() == []


@pytest.mark.parametrize(("name", "width"), [("text_to_image", 64), ("edit", 768), ("masked_edit", 64)])
def test_a_run_from_the_page_shows_the_picture_on_the_save_node(page, errors, name, width):
    run_small(page, name, f"({SHOWN})() === {width}")
    assert errors == []


def test_a_run_from_the_page_shows_the_answer_on_its_node_and_in_the_preview(page, errors):
    run_small(page, "ask_about_a_picture", f"!!({WRITTEN})()")
    assert errors == []
