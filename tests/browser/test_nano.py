"""What `python dev.py ui` shows: the nano model is chosen, and its workflows draw what they say, judged from pixels."""

import json
import sys

import pytest
from PIL import Image

pytest.importorskip("scipy")

from pack.tools import demo

from training.eval import detector

TIMEOUT = 60_000  # ms
IS_OPEN = "window.app?.extensionManager?.workflow?.activeWorkflow?.filename?.startsWith('text_to_image')"
CHOSEN = "app.graph.nodes.find(node => node.type === 'InternVLU_LoadModel').widgets[0].value"


@pytest.fixture(scope="module")
def nano(comfyui, tmp_path_factory):
    """The ComfyUI of `python dev.py ui`, with a base directory of its own."""
    with demo.server(comfyui, tmp_path_factory.mktemp("dev") / "base", python=sys.executable) as running:
        yield running


@pytest.fixture(scope="module")
def page(nano, browser):
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.request.post(f"{nano.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(demo.first_page(nano.url))
    page.wait_for_function(IS_OPEN)
    return page


def test_the_first_workflow_is_open_and_draws_its_prompt(nano, page):
    assert page.evaluate(CHOSEN) == demo.NANO
    page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
    page.wait_for_function("app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth === 256")
    (file,) = (nano.base / "output").glob("*.png")
    reading = detector.detect(Image.open(file))
    assert reading.background == "white"
    assert sorted(thing.name for thing in reading.things) == ["blue square", "red circle"]


def test_the_templates_are_the_nano_workflows_with_their_cards_and_pictures(nano):
    templates = nano.base / "custom_nodes" / demo.NANO / "example_workflows"
    names = {file.stem for file in templates.glob("*.json")}
    assert "text_to_image" in names and names == {file.stem for file in templates.glob("*.jpg")}
    for name in names:
        for node in json.loads((templates / f"{name}.json").read_text(encoding="utf-8"))["nodes"]:
            if node["type"] == "InternVLU_LoadModel":
                assert node["widgets_values"][0] == demo.NANO
            if node["type"] == "LoadImage":
                assert (nano.base / "input" / node["widgets_values"][0]).is_file()
