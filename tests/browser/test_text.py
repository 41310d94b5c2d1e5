"""The text on InternVL-U Think in a real browser: while it is written, cancelled, reloaded and copied."""

from __future__ import annotations

import time

import pytest

TIMEOUT = 30_000  # ms
# The tiny model stops at random, so several seeds are tried where a text has to be long.
SEEDS = (82, 31, 33, 15, 16, 81, *range(100, 120))

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
TEXT = f"() => {THINK}?.widgets.find(widget => widget.name === 'live_text').element.querySelector('textarea').value"


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


def cancel_long_text(page, server) -> None:
    """Cancels a job whose text was seen to change on the node, and that did not end by itself before."""
    for seed in SEEDS:
        before, texts = server.get("/history").keys(), set()
        queue(page, seed=seed, max_new_tokens=8192)
        deadline = time.monotonic() + TIMEOUT / 1000
        while len(texts) <= 4 and not server.get("/history").keys() - before:
            texts.add(page.evaluate(TEXT))
            assert time.monotonic() < deadline, f"the node showed only {texts}"
            page.wait_for_timeout(50)
        page.evaluate("app.extensionManager.command.execute('Comfy.Interrupt')")
        kinds = [kind for kind, _ in wait(page, server, before)["status"]["messages"]]
        if "execution_interrupted" in kinds and len(texts) > 4:
            return
        assert "execution_success" in kinds, kinds
    pytest.fail("no seed gave a text that was long enough to be cancelled")


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
