"""The text on InternVL-U Think in a real browser: while it is written, cut, cancelled, reloaded and copied."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pack.internvl_u.checkpoint import open_checkpoint
from pack.internvl_u.encoder import Encoder
from safetensors.torch import load_file, save_file

TIMEOUT = 30_000  # ms
CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoint"

READY = """!!window.app?.extensionManager?.workflow?.activeWorkflow
  && !!window.LiteGraph?.registered_node_types?.InternVLU_WriteThought"""
BUILD = """async () => {
  await app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
  const add = (type, x) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 60];
    app.graph.add(node);
    return node;
  };
  const load = add('InternVLU_LoadModel', 20);
  const think = add('InternVLU_WriteThought', 420);
  load.widgets.find(widget => widget.name === 'model_name').value = 'tiny';
  load.connect(1, think, think.findInputSlot('mllm'));
  think.connect(0, add('PreviewAny', 980), 0);
}"""
THINK = "app.graph.nodes.find(node => node.type === 'InternVLU_WriteThought')"
VALUES = f"() => Object.fromEntries({THINK}.widgets.map(widget => [widget.name, widget.value]))"
SET = f"values => {THINK}.widgets.forEach(widget => {{ widget.value = values[widget.name] ?? widget.value; }})"
SET_MODEL = """name => {
  const load = app.graph.nodes.find(node => node.type === 'InternVLU_LoadModel');
  load.widgets.find(widget => widget.name === 'model_name').value = name;
}"""
TEXT = f"() => {THINK}?.widgets.find(widget => widget.name === 'live_text').element.querySelector('textarea').value"
CUT = TEXT.replace("'textarea').value", "'.internvlu-cut').textContent")
# Whether the line on the node that is shown can be seen: Nodes 2.0 moves the node's element to another place.
CUT_SHOWN = "!!document.querySelector('.internvlu-cut')?.checkVisibility()"
SET_NODES_2 = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
TO_SUBGRAPH = f"() => app.graph.convertToSubgraph(new Set([{THINK}])).node.id"
INNER = "id => app.graph.getNodeById(id).subgraph.nodes.find(node => node.type === 'InternVLU_WriteThought')"


@pytest.fixture(scope="module")
def page(browser, server):
    """ComfyUI's page with Load, Think and Preview as Text."""
    context = browser.new_context(viewport={"width": 1600, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function(READY)
    page.evaluate(BUILD)
    return page


def shown(text: str) -> str:
    """Returns a text as a browser's text field gives it back."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def queue(page, **values) -> None:
    sampling = {"prompt": "a cat", "how": "sampling", "temperature": 2, "top_p": 1, "control_after_generate": "fixed"}
    page.evaluate(SET, sampling | values)
    page.evaluate("app.queuePrompt(0)")


def wait(page, server, before: set) -> dict:
    """Waits for the one job that is not in `before` and returns its history entry."""
    deadline = time.monotonic() + TIMEOUT / 1000
    while not (new := server.get("/history").keys() - before):
        assert time.monotonic() < deadline, "the job did not end"
        page.wait_for_timeout(50)
    page.wait_for_timeout(500)  # the last events
    return server.get("/history")[new.pop()]


def written(page, server, **values) -> str:
    """Runs a short job and returns the node's text in its history."""
    before = server.get("/history").keys()
    queue(page, max_new_tokens=40, **values)
    return next(output["text"][0] for output in wait(page, server, before)["outputs"].values())


@contextlib.contextmanager
def endless_model(server) -> Iterator[str]:
    """Has a model beside the tiny one whose likeliest token ends no text: the rows of those that do are zero."""
    folder = server.base / "models" / "InternVL-U" / "endless"
    shutil.copytree(CHECKPOINT, folder)
    try:
        _silence(folder)
        yield folder.name
    finally:
        shutil.rmtree(folder)  # other tests of this server look at its models


def _silence(folder: Path) -> None:
    stops = list(Encoder.from_checkpoint(open_checkpoint(CHECKPOINT)).tokenizer.stops)
    for file in (folder / "vlm").glob("*.safetensors"):
        weights = load_file(file)
        if "language_model.lm_head.weight" in weights:
            weights["language_model.lm_head.weight"][stops] = 0
            save_file(weights, file)
    config = folder / "vlm" / "config.json"
    settings = json.loads(config.read_text())
    settings["llm_config"]["max_position_embeddings"] = 40960
    config.write_text(json.dumps(settings))


def cancel_long_text(page, server) -> None:
    """Cancels a job whose text was seen to change on the node."""
    with endless_model(server) as name:
        page.evaluate(SET_MODEL, name)
        _cancel_long_text(page, server)
    page.evaluate(SET_MODEL, "tiny")
    page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")  # else a reload forgets it


def _cancel_long_text(page, server) -> None:
    before, texts = server.get("/history").keys(), set()
    queue(page, how="greedy", max_new_tokens=8192)
    deadline = time.monotonic() + TIMEOUT / 1000
    while len(texts) <= 4:
        texts.add(page.evaluate(TEXT))
        assert time.monotonic() < deadline and not server.get("/history").keys() - before, (
            f"the node showed only {texts}"
        )
        page.wait_for_timeout(20)
    page.evaluate("app.extensionManager.command.execute('Comfy.Interrupt')")
    kinds = [kind for kind, _ in wait(page, server, before)["status"]["messages"]]
    assert "execution_interrupted" in kinds, kinds


def reload(page) -> None:
    # The frontend stores a changed graph half a second later. A timer of the page's own comes after that one, however
    # busy the machine is.
    page.evaluate("() => new Promise(done => setTimeout(done, 1500))")
    page.reload()
    page.wait_for_function(READY)
    page.wait_for_function(f"!!{THINK}")


def test_a_cancelled_text_stays_on_the_node_as_far_as_it_came_and_the_next_job_runs(page, server):
    cancel_long_text(page, server)
    text = page.evaluate(TEXT)
    assert text
    reload(page)
    assert page.evaluate(TEXT) == text
    after = shown(written(page, server, seed=1))
    assert after != text
    assert page.evaluate(TEXT) == after


def test_the_finished_text_is_the_output_and_stays_with_all_values_after_a_reload(page, server):
    text = written(page, server, seed=2)
    assert page.evaluate(TEXT) == shown(text)
    preview = page.evaluate("app.graph.nodes.find(node => node.type === 'PreviewAny').widgets.map(w => w.value)")
    assert text in preview

    values = page.evaluate(VALUES)
    reload(page)
    assert page.evaluate(TEXT) == shown(text)
    assert page.evaluate(VALUES) == values
    assert (values["seed"], values["control_after_generate"]) == (2, "fixed")


def test_the_text_is_no_input_of_the_job_and_no_saved_widget_value(page):
    made = page.evaluate(f"async () => [(await app.graphToPrompt()).output[{THINK}.id], {THINK}.serialize()]")
    inputs, saved = made[0]["inputs"], made[1]
    assert "live_text" not in inputs
    assert len(saved["widgets_values"]) == len(page.evaluate(VALUES)) - 1
    assert saved["properties"]["internvl_u_text"]


def test_the_button_copies_the_text(page, server):
    text = written(page, server, seed=3)
    page.evaluate("app.canvas.ds.reset()")
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    assert shown(page.evaluate("navigator.clipboard.readText()")) == shown(text)


def cut_text(page, server, seed=4) -> tuple[str, str]:
    """Runs a job whose text a limit ends; returns the text and what its history says of the cut."""
    before = server.get("/history").keys()
    queue(page, max_new_tokens=5, seed=seed)
    (output,) = [output for output in wait(page, server, before)["outputs"].values() if output.get("cut")]
    assert output["text"][0]
    return output["text"][0], output["cut"][0]


def whole_text(page, server) -> str:
    """Runs jobs until the model ends a text itself."""
    for seed in range(40):
        before = server.get("/history").keys()
        queue(page, max_new_tokens=2000, seed=seed)
        outputs = wait(page, server, before)["outputs"].values()
        if not any(output.get("cut") for output in outputs):
            return next(output["text"][0] for output in outputs)
    pytest.fail("no seed gave a text that the model ended itself")


def test_a_text_that_a_limit_has_cut_says_so_below_until_the_next_one(page, server):
    text, sentence = cut_text(page, server)
    assert sentence == "the text was cut after 5 tokens: raise max_new_tokens for all of it"
    assert page.evaluate(CUT) == sentence and page.evaluate(TEXT) == shown(text)
    page.evaluate("app.canvas.ds.reset()")
    page.wait_for_function(CUT_SHOWN)
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    assert shown(page.evaluate("navigator.clipboard.readText()")) == shown(text)
    reload(page)
    assert page.evaluate(CUT) == sentence

    whole = whole_text(page, server)
    assert page.evaluate(TEXT) == shown(whole)
    assert page.evaluate(CUT) == "" and not page.evaluate(CUT_SHOWN)


def test_a_result_from_the_cache_says_that_it_was_cut(page, server):
    _, sentence = cut_text(page, server, seed=5)
    page.evaluate(f"() => {{ {THINK}.properties = {{}}; }}")
    before = server.get("/history").keys()
    queue(page, max_new_tokens=5, seed=5)
    entry = wait(page, server, before)
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert str(page.evaluate(f"{THINK}.id")) in cached
    assert page.evaluate(CUT) == sentence


def test_nodes_2_shows_that_a_text_was_cut(page, server):
    page.evaluate(SET_NODES_2, True)
    try:
        _, sentence = cut_text(page, server, seed=6)
        page.wait_for_function(CUT_SHOWN)
        assert page.evaluate("document.querySelector('[data-node-id] .internvlu-cut').innerText") == sentence
    finally:
        page.evaluate(SET_NODES_2, False)


def test_the_text_of_a_node_in_a_subgraph_is_on_that_node(page, server):
    """The last of these tests: the graph stays changed."""
    outer = page.evaluate(TO_SUBGRAPH)
    inner = f"({INNER})({outer})"
    before = server.get("/history").keys()
    page.evaluate(f"() => {{ {inner}.properties = {{}}; }}")
    page.evaluate(f"seed => {{ {inner}.widgets.find(widget => widget.name === 'seed').value = seed; }}", 7)
    page.evaluate(f"() => {{ {inner}.widgets.find(widget => widget.name === 'max_new_tokens').value = 3; }}")
    page.evaluate("app.queuePrompt(0)")
    outputs = wait(page, server, before)["outputs"]
    path = f"{outer}:{page.evaluate(f'{inner}.id')}"
    properties = page.evaluate(f"{inner}.properties")
    assert properties.pop("internvl_u_key")
    assert properties == {
        "internvl_u_text": outputs[path]["text"][0],
        "internvl_u_cut": outputs[path]["cut"][0],
    }
