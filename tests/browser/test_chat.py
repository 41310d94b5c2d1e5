"""The conversation on InternVL-U Chat in a real browser, with the nano model."""

from __future__ import annotations

import json
import time

import pytest

TIMEOUT = 60_000  # ms
READY = """!!window.app?.extensionManager?.workflow?.activeWorkflow
  && !!window.LiteGraph?.registered_node_types?.InternVLU_Chat"""
BUILD = """async () => {
  await app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
  const add = (type, x) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 60];
    app.graph.add(node);
    return node;
  };
  const load = add('InternVLU_LoadModel', 20);
  const chat = add('InternVLU_Chat', 420);
  load.widgets.find(widget => widget.name === 'model_name').value = 'internvl-u-nano';
  ['model', 'mllm', 'vae'].forEach((name, i) => load.connect(i, chat, chat.findInputSlot(name)));
  chat.connect(1, add('PreviewImage', 960), 0);
  app.canvas.ds.reset();
}"""
CHAT = "app.graph.nodes.find(node => node.type === 'InternVLU_Chat')"
SET = f"values => {CHAT}.widgets.forEach(widget => {{ widget.value = values[widget.name] ?? widget.value; }})"
VALUE = f"name => {CHAT}.widgets.find(widget => widget.name === name).value"
SET_NODES_2 = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
BUBBLES = ".internvlu-turn"
ALONE = {"reads": "last picture alone", "control_after_generate": "fixed", "steps": 4}


@pytest.fixture(scope="module")
def page(browser, server):
    """ComfyUI's page with Load, Chat and Preview Image."""
    context = browser.new_context(viewport={"width": 1600, "height": 1200}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function(READY)
    return page


@pytest.fixture(autouse=True)
def built(page):
    page.evaluate(BUILD)
    page.evaluate(SET, ALONE)


def wait(page, server, before) -> dict:
    """Waits for the jobs that are not in `before` and returns the newest one's history entry."""
    deadline = time.monotonic() + TIMEOUT / 1000
    while not (new := server.get("/history").keys() - before):
        assert time.monotonic() < deadline, "the job did not end"
        page.wait_for_timeout(50)
    page.wait_for_timeout(500)  # the last events
    return server.get("/history")[new.pop()]


def send(page, server, message, action="answer", **values) -> dict:
    before = server.get("/history").keys()
    page.evaluate(SET, {"message": message, "action": action} | values)
    page.get_by_role("button", name="Send", exact=True).click()
    return wait(page, server, before)


def turns(page) -> list:
    text = page.evaluate(VALUE, "conversation")
    return json.loads(text)["turns"] if text else []


def texts(page) -> list:
    return [bubble.inner_text() for bubble in page.locator(BUBBLES).all()]


def drawn_and_asked(page, server):
    send(page, server, "a red circle", "draw")
    send(page, server, "what colour is the circle?")


def reload(page) -> None:
    page.evaluate("() => new Promise(done => setTimeout(done, 1500))")
    page.reload()
    page.wait_for_function(READY)
    page.wait_for_function(f"!!{CHAT}")


def loaded_pictures(page) -> int:
    return page.evaluate(
        "() => [...document.querySelectorAll('.internvlu-turn img')].filter(one => one.naturalWidth > 0).length"
    )


def test_the_answer_and_the_picture_appear_and_the_message_goes_to_its_turn(page, server):
    drawn_and_asked(page, server)
    assert [turn["role"] for turn in turns(page)] == ["user", "assistant"] * 2
    assert turns(page)[3]["text"] == "Red"
    assert page.evaluate(VALUE, "message") == ""
    assert len(texts(page)) == 4 and "Red" in texts(page)[3] and "a red circle" in texts(page)[0]
    page.wait_for_function("document.querySelector('.internvlu-turn img')?.naturalWidth === 64")


def test_a_reload_keeps_the_conversation_and_what_is_not_sent(page, server):
    drawn_and_asked(page, server)
    field = page.get_by_placeholder("your message")
    field.click()
    page.keyboard.type("not sent yet")
    page.mouse.click(1500, 1100)  # the frontend takes a text when its field is left
    kept = turns(page)
    reload(page)
    assert turns(page) == kept and page.evaluate(VALUE, "message") == "not sent yet"
    assert len(texts(page)) == 4
    page.wait_for_function("document.querySelector('.internvlu-turn img')?.naturalWidth === 64")


def test_a_run_without_a_new_message_adds_nothing(page, server):
    send(page, server, "a red circle", "draw")
    kept = turns(page)
    before = server.get("/history").keys()
    page.evaluate("app.queuePrompt(0)")
    entry = wait(page, server, before)
    assert entry["status"]["status_str"] == "success"
    assert turns(page) == kept and len(texts(page)) == 2


def test_the_same_message_queued_three_times_is_one_turn(page, server):
    page.evaluate(SET, {"message": "a red circle", "action": "draw", "control_after_generate": "increment"})
    before = server.get("/history").keys()
    page.evaluate("app.queuePrompt(0, 3)")
    deadline = time.monotonic() + TIMEOUT / 1000
    while len(server.get("/history").keys() - before) < 3:
        assert time.monotonic() < deadline, "the jobs did not end"
        page.wait_for_timeout(50)
    page.wait_for_timeout(500)
    assert len(turns(page)) == 2 and page.evaluate(VALUE, "message") == ""


def test_what_was_typed_while_it_ran_is_kept(page, server):
    before = server.get("/history").keys()
    page.evaluate(SET, {"message": "a red circle", "action": "draw", "steps": 60})
    page.evaluate("app.queuePrompt(0)")
    page.evaluate(SET, {"message": "the next one"})
    wait(page, server, before)
    assert turns(page)[0]["text"] == "a red circle" and page.evaluate(VALUE, "message") == "the next one"


def test_a_failed_or_interrupted_run_keeps_the_message_and_leaves_no_half_turn(page, server):
    send(page, server, "make it blue", "edit the last picture")  # there is none
    assert turns(page) == [] and page.evaluate(VALUE, "message") == "make it blue"
    page.evaluate("() => document.querySelectorAll('.p-dialog-close-button').forEach(button => button.click())")
    page.wait_for_timeout(500)

    before = server.get("/history").keys()
    page.evaluate(SET, {"message": "a red circle", "action": "draw", "steps": 1000})
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function(f"document.querySelectorAll('{BUBBLES}').length === 2")  # what is being drawn is shown
    page.evaluate("app.extensionManager.command.execute('Comfy.Interrupt')")
    kinds = [kind for kind, _ in wait(page, server, before)["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert turns(page) == [] and texts(page) == [] and page.evaluate(VALUE, "message") == "a red circle"


def test_branch_drops_what_came_later_and_say_anew_gives_the_message_back(page, server):
    drawn_and_asked(page, server)
    page.get_by_role("button", name="Branch from here").first.click()
    assert len(turns(page)) == 2 and len(texts(page)) == 2
    page.get_by_role("button", name="Say anew").first.click()
    assert turns(page) == [] and page.evaluate(VALUE, "message") == "a red circle"


def test_clear_begins_anew_and_undo_brings_it_back(page, server):
    send(page, server, "a red circle", "draw")
    kept = turns(page)
    page.get_by_role("button", name="Clear", exact=True).click()
    assert turns(page) == [] and texts(page) == []
    page.evaluate("app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for_function(f"({VALUE})('conversation') !== ''")
    assert turns(page) == kept
    page.wait_for_function(f"document.querySelectorAll('{BUBBLES}').length === 2")


def test_copy_and_export_give_the_markdown_of_the_library(page, server):
    drawn_and_asked(page, server)
    picture = turns(page)[1]["pictures"][0].removesuffix(" [output]")
    expected = (
        f"**You**\n\na red circle\n\n**InternVL-U**\n\n![{picture}](<{picture}>)\n\n"
        "**You**\n\nwhat colour is the circle?\n\n**InternVL-U**\n\nRed\n"
    )
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == expected
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    assert download.value.suggested_filename == "conversation.md"
    assert download.value.path().read_text(encoding="utf-8") == expected


def test_a_copy_of_the_node_and_a_saved_workflow_carry_the_conversation(page, server):
    send(page, server, "a red circle", "draw")
    kept = page.evaluate(VALUE, "conversation")
    saved = page.evaluate(f"async () => [{CHAT}.serialize(), (await app.graphToPrompt()).output[{CHAT}.id].inputs]")
    assert kept in saved[0]["widgets_values"] and saved[1]["conversation"] == kept and "chat" not in saved[1]
    copied = page.evaluate(
        f"() => {{ const node = {CHAT}.clone(); app.graph.add(node);"
        " return node.widgets.find(widget => widget.name === 'conversation').value; }"
    )
    assert copied == kept


def test_an_answer_that_comes_while_another_tab_is_open_is_there_on_return(page, server):
    before = server.get("/history").keys()
    page.evaluate(SET, {"message": "a red circle", "action": "draw", "steps": 60})
    page.evaluate("app.queuePrompt(0)")
    page.wait_for_function(f"document.querySelectorAll('{BUBBLES}').length === 2")
    page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    wait(page, server, before)
    page.evaluate("app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for_function(f"!!({CHAT})")
    assert [turn["text"] for turn in turns(page)] == ["a red circle", ""] and len(texts(page)) == 2


def test_nodes_2_shows_the_conversation_and_not_its_json(page, server):
    page.evaluate(SET_NODES_2, True)
    try:
        drawn_and_asked(page, server)
        box = page.locator("[data-node-id] .internvlu-chat")
        box.wait_for()
        assert box.locator(BUBBLES).count() == 4 and "Red" in box.inner_text()
        node = page.locator("[data-node-id]").filter(has=page.locator(".internvlu-chat"))
        assert "part_cfg" in node.inner_text() and "conversation" not in node.inner_text()
        assert box.bounding_box()["height"] < 900
    finally:
        page.evaluate(SET_NODES_2, False)


def test_a_chat_in_a_subgraph_keeps_its_own_conversation(page, server):
    """The last of these tests: the graph stays changed."""
    outer = page.evaluate(f"() => app.graph.convertToSubgraph(new Set([{CHAT}])).node.id")
    inner = f"app.graph.getNodeById({outer}).subgraph.nodes.find(node => node.type === 'InternVLU_Chat')"
    value = f"{inner}.widgets.find(widget => widget.name === 'conversation').value"
    before = server.get("/history").keys()
    values = {"message": "a red circle", "action": "draw"}
    page.evaluate(f"values => {inner}.widgets.forEach(w => {{ w.value = values[w.name] ?? w.value; }})", values)
    page.evaluate("app.queuePrompt(0)")
    wait(page, server, before)
    assert [turn["role"] for turn in json.loads(page.evaluate(value))["turns"]] == ["user", "assistant"]
