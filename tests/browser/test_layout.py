"""Nothing covers anything: on opening with Nodes 2.0, and after a run with live previews with both kinds of nodes.

test_browser.py opens every workflow with canvas nodes.
"""

from __future__ import annotations

import json

import pytest
from pack.tools.workflows import graphs

from . import layout
from .test_browser import SET_SMALL, TIMEOUT, WORKFLOWS, open_template

PREVIEWED = """() => app.graph.nodes.filter(node => node.type.includes('Sample') && node.inputs?.some(
  input => input.name === 'latent_image')).every(node => node.imgs?.length
  || document.querySelector(`[data-node-id="${node.id}"] img`))"""


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes 2.0"])
def page(request, browser, server):
    """ComfyUI's page, with previews on: the server gives them."""
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(TIMEOUT)
    settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": request.param}
    page.request.post(f"{server.url}/api/settings", data=settings)
    page.goto(server.url)
    page.wait_for_function("!!window.app?.extensionManager?.workflow?.activeWorkflow")
    yield page
    page.request.post(f"{server.url}/api/settings", data={"Comfy.VueNodes.Enabled": False})
    page.close()


@pytest.mark.parametrize("name", ["masked_edit", "think_then_draw", "draw_ask_draw_again"])
def test_nothing_is_covered_after_a_run_with_previews(page, server, name):
    open_template(page, name)
    page.evaluate(SET_SMALL)
    before = server.get("/history").keys()
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function(PREVIEWED)
    while not server.get("/history").keys() - before:
        page.wait_for_timeout(100)
    page.wait_for_timeout(500)
    page.evaluate(layout.FIT)
    boxes = layout.boxes(page)
    assert layout.overlaps(boxes) == []
    assert layout.crossed(page, boxes) == []
    assert layout.outside(page, boxes) == []


def test_nothing_is_covered_in_any_workflow_on_opening(page):
    if not page.evaluate("LiteGraph.vueNodesMode"):
        pytest.skip("test_browser.py does this with canvas nodes")
    covered = {}
    for name in graphs.FILES:
        file = WORKFLOWS / f"{graphs.file_name(name)}.json"
        page.evaluate("graph => app.loadGraphData(graph)", json.loads(file.read_text(encoding="utf-8")))
        page.evaluate(layout.FIT)
        page.wait_for_function(layout.DRAWN)
        boxes = layout.boxes(page)
        found = [layout.overlaps(boxes), layout.crossed(page, boxes), layout.outside(page, boxes)]
        if found != [[], [], []]:
            covered[name] = found
    assert covered == {}
