"""Choices and the numbers that they stand for, in a real browser: changed as a user does it, in both node styles."""

from __future__ import annotations

import json
import re

import pytest

from .test_text import READY, SET_NODES_2

NODE = "app.graph.nodes[0]"
ADD = """async type => {
  await app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
  app.canvas.ds.reset();
  const node = LiteGraph.createNode(type);
  node.pos = [300, 150];
  app.graph.add(node);
}"""
VALUES = f"() => Object.fromEntries({NODE}.widgets.map(widget => [widget.name, widget.value]))"
# What the arrows and menus of the canvas do with a widget, in their own words.
CHANGE = f"""([name, value]) => {{
  const widget = {NODE}.widgets.find(widget => widget.name === name);
  widget.setValue(value, {{ e: undefined, node: {NODE}, canvas: app.canvas }});
}}"""
SAVED = "([type, values]) => ({ last_node_id: 1, last_link_id: 0, links: [], version: 0.4, \
nodes: [{ id: 1, type, pos: [300, 150], size: [300, 200], widgets_values: values, properties: {} }] })"
TOASTS = ".p-toast-message:visible"


@pytest.fixture(scope="module")
def page(browser, server):
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(30_000)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function(READY)
    return page


@pytest.fixture(params=[False, True], ids=["classic", "nodes 2.0"])
def nodes_2(request, page):
    page.evaluate(SET_NODES_2, request.param)
    yield request.param
    page.evaluate(SET_NODES_2, False)


def change(page, nodes_2: bool, name: str, value) -> None:
    """Changes a widget: through its field in Nodes 2.0, as the canvas does in the classic style."""
    if not nodes_2:
        page.evaluate(CHANGE, [name, value])
        return
    field = page.locator(".lg-node-widget").filter(has_text=re.compile(f"^{name}$")).locator("input").first
    field.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(str(value))
    page.keyboard.press("Tab")


def shown(page, nodes_2: bool, name: str) -> str:
    """Returns what the field of a widget shows; the canvas draws its value."""
    if not nodes_2:
        return str(page.evaluate(VALUES)[name])
    row = page.locator(".lg-node-widget").filter(has_text=re.compile(f"^{name}"))
    return row.locator("input").first.input_value() if row.locator("input").count() else row.inner_text()


def values(page, *names: str) -> tuple:
    found = page.evaluate(VALUES)
    return tuple(found[name] for name in names)


def test_a_preset_writes_its_size_and_a_typed_number_makes_it_custom(page, nodes_2):
    page.evaluate(ADD, "InternVLU_CreateLatent")
    page.evaluate(CHANGE, ["preset", "1024 x 576"])
    page.wait_for_timeout(200)
    assert values(page, "preset", "width", "height") == ("1024 x 576", 1024, 576)
    assert (shown(page, nodes_2, "width"), shown(page, nodes_2, "height")) == ("1024", "576")
    change(page, nodes_2, "width", 640)
    page.wait_for_timeout(200)
    assert values(page, "preset", "width", "height") == ("custom", 640, 576)
    assert "custom" in shown(page, nodes_2, "preset") and shown(page, nodes_2, "width") == "640"
    page.evaluate(CHANGE, ["preset", "512 x 512"])
    change(page, nodes_2, "width", 512)
    page.wait_for_timeout(200)
    assert values(page, "preset", "width", "height") == ("512 x 512", 512, 512)


def test_a_budget_writes_its_tokens_and_a_typed_number_makes_it_custom(page, nodes_2):
    page.evaluate(ADD, "InternVLU_WriteThought")
    page.evaluate(CHANGE, ["budget", "long: 1024"])
    page.wait_for_timeout(200)
    assert values(page, "budget", "max_new_tokens") == ("long: 1024", 1024)
    assert shown(page, nodes_2, "max_new_tokens") == "1024"
    change(page, nodes_2, "max_new_tokens", 300)
    page.wait_for_timeout(200)
    assert values(page, "budget", "max_new_tokens") == ("custom", 300)


def open_saved(page, kind: str, saved: list) -> None:
    page.evaluate(f"async saved => app.loadGraphData(({SAVED})(saved))", [kind, saved])
    page.wait_for_function(f"!!{NODE}?.widgets?.length")


@pytest.mark.parametrize(
    ("saved", "told"),
    [(["1024 x 576", 640, 512, 1], True), (["1024 x 576", 1024, 1024, 1], False), (["custom", 640, 512, 1], False)],
    ids=["other numbers", "numbers never touched", "custom"],
)
def test_an_old_workflow_shows_the_size_that_it_draws_and_says_what_did_not_count(page, saved, told):
    page.evaluate("document.querySelectorAll('.p-toast-close-button').forEach(button => button.click())")
    page.wait_for_function(f"!document.querySelector('{TOASTS.split(':')[0]}')")
    open_saved(page, "InternVLU_CreateLatent", saved)
    page.wait_for_timeout(700)
    toasts = " ".join(page.locator(TOASTS).all_inner_texts())
    assert ("preset 1024 x 576 counts, as before; width 640, height 512 did not" in toasts) == told, toasts
    assert values(page, "preset", "width", "height") == (
        *(("1024 x 576", 1024, 576) if saved[0] != "custom" else saved[:3]),
    )


def test_an_older_sampler_keeps_its_scales_and_a_new_one_chooses_them(page):
    open_saved(page, "InternVLU_SampleLatent", [7, "fixed", 20, 4.5, 2.0, 1.0])
    assert values(page, "scales", "seed", "denoise") == ("as typed", 7, 1.0)
    open_saved(page, "InternVLU_SampleLatent", [7, "fixed", 20, 4.5, 2.0, 1.0, "automatic"])
    assert values(page, "scales") == ("automatic",)
    page.evaluate(ADD, "InternVLU_SampleLatent")
    assert values(page, "scales") == ("automatic",)


def test_widgets_have_names_that_tell_and_keep_their_ids(page):
    page.evaluate(ADD, "InternVLU_SampleLatent")
    labels = page.evaluate(f"() => Object.fromEntries({NODE}.widgets.map(widget => [widget.name, widget.label]))")
    assert (labels["all_cfg"], labels["part_cfg"]) == ("prompt cfg", "picture cfg")
    page.evaluate(ADD, "InternVLU_WriteThought")
    labels = page.evaluate(f"() => Object.fromEntries({NODE}.widgets.map(widget => [widget.name, widget.label]))")
    assert labels["how"] == "decoding"


def test_the_seed_of_a_greedy_text_is_not_part_of_the_job(page):
    page.evaluate(ADD, "InternVLU_WriteThought")
    assert values(page, "control_after_generate") == ("fixed",)
    page.evaluate(CHANGE, ["seed", 77])
    seed = "async () => (await app.graphToPrompt()).output[1]?.inputs.seed ?? \
Object.values((await app.graphToPrompt()).output)[0].inputs.seed"
    for how, sent in (("greedy", 0), ("beams", 0), ("sampling", 77)):
        page.evaluate(CHANGE, ["how", how])
        assert page.evaluate(seed) == sent
    assert json.loads(page.evaluate(f"JSON.stringify({NODE}.serialize().widgets_values)"))[6] == 77


def test_our_types_have_a_colour_of_their_own_and_the_solver_shows_its_title(page):
    page.evaluate(ADD, "InternVLU_SelectSampler")
    assert page.evaluate(f"{NODE}.size[0]") >= 270
    assert page.evaluate("app.canvas.default_connection_color_byType.INTERNVL_U_MLLM") == "#f0a04b"
    style = "getComputedStyle(document.body).getPropertyValue('--color-datatype-INTERNVL_U_MLLM').trim()"
    assert page.evaluate(style) == "#f0a04b"
