"""InternVL-U Decode in a real browser: what was saved before it had a choice of sizes keeps what it gave."""

from __future__ import annotations

import pytest

TIMEOUT = 30_000  # ms
LOAD = """async values => {
  const node = LiteGraph.createNode('InternVLU_DecodeLatent');
  app.graph.clear();
  app.graph.add(node);
  if (values) {
    const saved = app.graph.serialize();
    saved.nodes[0].widgets_values = values;
    await app.loadGraphData(saved);
  }
  const [loaded] = app.graph.nodes;
  const read = Object.fromEntries(loaded.widgets.map(widget => [widget.name, widget.value]));
  return [read, loaded.serialize().widgets_values];
}"""


@pytest.fixture(scope="module")
def page(browser, server):
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function("!!window.app?.extensionManager?.workflow?.activeWorkflow")
    page.wait_for_function("!!LiteGraph.registered_node_types.InternVLU_DecodeLatent")
    return page


def test_a_new_node_gives_an_edit_its_pictures_size(page):
    assert page.evaluate(LOAD, None)[0] == {"width": 0, "height": 0, "size": "as the edited picture"}


@pytest.mark.parametrize("size", ["as the edited picture", "as drawn"])
def test_a_saved_choice_is_kept(page, size):
    read, again = page.evaluate(LOAD, [5, 0, size])
    assert read == {"width": 5, "height": 0, "size": size} and again == [5, 0, size]


def test_a_workflow_from_before_the_choice_stays_as_drawn(page):
    read, again = page.evaluate(LOAD, [5, 7])
    assert read == {"width": 5, "height": 7, "size": "as drawn"} and again == [5, 7, "as drawn"]
