"""What `python dev.py ui` shows: the nano model is chosen, and its workflows draw what they say, judged from pixels."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("scipy")

from training.eval import detector

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60_000  # ms
IS_OPEN = "window.app?.extensionManager?.workflow?.activeWorkflow?.filename?.startsWith('text_to_image')"
CHOSEN = "app.graph.nodes.find(node => node.type === 'InternVLU_LoadModel').widgets[0].value"


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """The module dev.py, with a base directory of its own."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = sys.modules["dev"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DEV = tmp_path_factory.mktemp("dev")
    module.BASE, module.SERVER_LOG = module.DEV / "base", module.DEV / "server.log"
    module.PYTHON = sys.executable
    yield module
    del sys.modules["dev"]


@pytest.fixture(scope="module")
def page(dev, comfyui, browser):
    port = dev.free_port()
    with dev.comfyui_server(comfyui, port):
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(TIMEOUT)
        page.request.post(f"http://{dev.HOST}:{port}/api/settings", data={"Comfy.TutorialCompleted": True})
        page.goto(dev.first_page(port))
        page.wait_for_function(IS_OPEN)
        yield page


def test_the_first_workflow_is_open_and_draws_its_prompt(dev, page):
    assert page.evaluate(CHOSEN) == dev.NANO
    page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
    page.wait_for_function("app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth === 256")
    (file,) = (dev.BASE / "output").glob("*.png")
    reading = detector.detect(Image.open(file))
    assert reading.background == "white"
    assert sorted(thing.name for thing in reading.things) == ["blue square", "red circle"]


def test_the_templates_are_the_nano_workflows_with_their_cards_and_pictures(dev, comfyui):
    dev.prepare_base(comfyui)
    templates = dev.BASE / "custom_nodes" / dev.NANO / "example_workflows"
    names = {file.stem for file in templates.glob("*.json")}
    assert "text_to_image" in names and names == {file.stem for file in templates.glob("*.jpg")}
    for name in names:
        for node in json.loads((templates / f"{name}.json").read_text(encoding="utf-8"))["nodes"]:
            if node["type"] == "InternVLU_LoadModel":
                assert node["widgets_values"][0] == dev.NANO
            if node["type"] == "LoadImage":
                assert (dev.BASE / "input" / node["widgets_values"][0]).is_file()
