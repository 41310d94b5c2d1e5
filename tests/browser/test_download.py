"""A newcomer without the model, in a real browser: what the page says, and the way from there to a picture."""

from __future__ import annotations

import json

import pytest
from pack.internvl_u.defaults import NANO_CHOICE

from ..hostile.loopback_hub import Hub
from .test_browser import SET_SMALL, SHOWN, open_template

CHOICE = "download InternVL-U (8.2 GB) from Hugging Face to models/InternVL-U"
LOADER = "app.graph.nodes.find(node => node.type === 'InternVLU_LoadModel')"
WIDGET = f"{LOADER}.widgets.find(widget => widget.name === 'model_name')"


@pytest.fixture(scope="module")
def hub(checkpoint):
    with Hub(checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def page(browser, new_server, hub):
    def prepare(base):
        for model in (base / "models" / "InternVL-U").iterdir():
            model.unlink()

    server = new_server("newcomer", prepare, env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(30_000)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function("!!window.app?.extensionManager?.workflow?.activeWorkflow")
    return page


def test_a_newcomer_is_told_of_the_missing_model_chooses_its_download_and_sees_a_picture(page, hub):
    open_template(page, "text_to_image")
    page.evaluate(SET_SMALL)
    assert page.evaluate(f"{WIDGET}.value") == "InternVL-U"
    assert page.evaluate(f"{WIDGET}.options.values")[:3] == ["no model found", NANO_CHOICE, CHOICE]
    with page.expect_response("**/prompt") as answer:
        page.evaluate("app.queuePrompt(0)")
    told = answer.value.json()["node_errors"]
    (error, *_) = next(iter(told.values()))["errors"]
    assert (
        error["details"].startswith("model_name - Download it: choose ")
        and "no InternVL-U model 'InternVL-U'" in error["details"]
    )
    assert CHOICE in error["details"] and hub.asked == []
    page.keyboard.press("Escape")
    page.evaluate(f"{WIDGET}.value = {json.dumps(CHOICE)}")
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function(f"({SHOWN})() > 0", timeout=60_000)
    assert len(hub.asked) > 10
    page.evaluate("app.refreshComboInNodes()")
    page.wait_for_function(f"{WIDGET}.options.values.join() === 'InternVL-U,{NANO_CHOICE}'")


def test_a_workflow_saved_with_the_download_chosen_opens_without_that_choice(page, hub):
    open_template(page, "text_to_image")
    page.evaluate(f"{WIDGET}.value = {json.dumps(CHOICE)}")
    hub.asked.clear()
    saved = page.evaluate("app.graph.serialize()")
    assert CHOICE in json.dumps(saved)
    page.evaluate("saved => app.loadGraphData(saved)", saved)
    assert page.evaluate(f"{WIDGET}.value") == "InternVL-U"
    assert CHOICE not in page.evaluate("app.graphToPrompt().then(made => JSON.stringify(made))")
    assert hub.asked == []
