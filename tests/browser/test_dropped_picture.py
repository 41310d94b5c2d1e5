"""A picture of the command line, dropped onto ComfyUI's page: its graph opens and draws the same picture again."""

from __future__ import annotations

import base64
import json

import numpy
import pytest
from pack.internvl_u.__main__ import main
from PIL import Image

from .test_browser import SHOWN

DROP = """async data => {
  const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
  await app.handleFile(new File([bytes], "a.png", {type: "image/png"}));
}"""
OPENED = "prompt => app.graph.nodes.some(node => node.widgets?.some(widget => widget.value === prompt))"
VALUES = """() => Object.fromEntries(app.graph.nodes.flatMap(node =>
  (node.widgets ?? []).map(widget => [`${node.type}.${widget.name}`, widget.value])))"""


@pytest.fixture(scope="module")
def page(browser, server):
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(60_000)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function("!!window.app?.extensionManager?.workflow?.activeWorkflow")
    return page


@pytest.mark.parametrize("kind", ["thought", "edit"])
def test_its_graph_opens_and_draws_the_same(page, server, tmp_path, same_picture, kind):
    reference, out = server.base / "input" / "dropped.png", tmp_path / "a.png"
    Image.new("RGB", (64, 64), "white").save(reference)
    thought = ("--thought", "a blue square 中", "--width", 96, "--height", 64)
    more = ("--image", reference) if kind == "edit" else thought
    line = ("draw", "--model", "nano", "--prompt", f"a red circle, {kind}", "--steps", 3, "--seed", 77, *more)
    assert main([str(part) for part in (*line, "--out", out)]) == 0
    before = set((server.base / "output").glob("*.png"))
    page.evaluate(DROP, base64.b64encode(out.read_bytes()).decode())
    page.wait_for_function(OPENED, arg=f"a red circle, {kind}")
    values = page.evaluate(VALUES)
    assert values["InternVLU_EncodePrompt.prompt"] == f"a red circle, {kind}"
    assert (values["InternVLU_SampleLatent.seed"], values["InternVLU_SampleLatent.steps"]) == (77, 3)
    assert values["InternVLU_LoadModel.model_name"].startswith("nano InternVL-U")
    assert values.get("LoadImage.image") == ("dropped.png" if kind == "edit" else None)
    with page.expect_response("**/prompt") as answer:
        page.evaluate("app.queuePrompt(0)")
    told = answer.value.json()
    assert "prompt_id" in told, json.dumps(told)
    server.outputs(server.wait(told["prompt_id"]))
    page.wait_for_function(f"({SHOWN})() > 0")
    (saved,) = set((server.base / "output").glob("*.png")) - before
    with Image.open(saved) as picture, Image.open(out) as drawn:
        same_picture(numpy.asarray(picture.convert("RGB")), numpy.asarray(drawn.convert("RGB")))
        assert drawn.info["parameters"] == drawn.text["parameters"] and "workflow" in picture.text
