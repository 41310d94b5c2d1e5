"""A graph whose model is not there, opened in a real browser: what it says at once, and what it offers."""

from __future__ import annotations

import pytest

from .test_in_step import open_saved, values
from .test_text import READY, SET_NODES_2

DOWNLOADS = [
    f"download InternVL-U (8.2 GB) from {site} to models/InternVL-U" for site in ("Hugging Face", "ModelScope")
]
CARD = ".internvlu-missing"
LINE = ".internvlu-missing-line"
HAS_BOX = "app.graph.nodes[0].widgets.some(widget => widget.name === 'missing_model')"


@pytest.fixture(scope="module")
def newcomer(new_server):
    def prepare(base):
        for model in (base / "models" / "InternVL-U").iterdir():
            model.unlink()

    return new_server("missing", prepare)


@pytest.fixture
def page(browser, newcomer):
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(30_000)
    page.request.post(f"{newcomer.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(newcomer.url)
    page.wait_for_function(READY)
    yield page
    page.evaluate(SET_NODES_2, False)
    page.close()


def told(page) -> list[str]:
    return page.locator(f"{CARD}:visible").all_inner_texts()


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_a_missing_model_is_told_once_on_opening_and_its_download_is_one_click(page, newcomer, nodes_2):
    page.evaluate(SET_NODES_2, nodes_2)
    open_saved(page, "InternVLU_LoadModel", ["InternVL-U", "auto", "auto", "auto"])
    page.evaluate("app.canvas.ds.reset()")
    page.locator(LINE).first.wait_for()
    (card,) = told(page)
    for part in ('The model "InternVL-U" is not here', "8.2 GB", "models/InternVL-U", "Nothing is downloaded before"):
        assert part in card
    assert 'The model "InternVL-U" is not here. It has 8.2 GB' in page.locator(LINE).first.inner_text()
    page.locator(CARD).get_by_role("button", name="Download 8.2 GB from ModelScope").click()
    assert values(page, "model_name") == (DOWNLOADS[1],)
    assert told(page) == []
    assert "Run downloads 8.2 GB from ModelScope to models/InternVL-U" in page.locator(LINE).first.inner_text()
    assert newcomer.get("/history") == {} and list((newcomer.base / "models" / "InternVL-U").iterdir()) == []


def test_a_card_that_was_closed_stays_closed_for_that_graph(page):
    open_saved(page, "InternVLU_LoadModel", ["InternVL-U", "auto", "auto", "auto"])
    page.locator(CARD).get_by_role("button", name="Close").click()
    page.evaluate("async () => app.loadGraphData(app.graph.serialize())")  # as an undo does
    page.wait_for_function(HAS_BOX)
    assert told(page) == []


def test_the_refusal_of_a_run_is_one_error_with_the_remedy_first(page):
    open_saved(page, "InternVLU_LoadModel", ["InternVL-U", "auto", "auto", "auto"])
    page.evaluate("""() => {
      const shown = LiteGraph.createNode('PreviewAny');
      app.graph.add(shown);
      app.graph.nodes[0].connect(0, shown, 0);
    }""")
    with page.expect_response("**/prompt") as answer:
        page.evaluate("app.queuePrompt(0)")
    (node,) = answer.value.json()["node_errors"].values()
    (error,) = node["errors"]
    assert error["details"].startswith("model_name - Download it: choose "), error


def test_a_model_that_is_there_is_not_spoken_of_and_one_that_comes_clears_the_word(page, newcomer, checkpoint):
    place = newcomer.base / "models" / "InternVL-U" / "mine"
    open_saved(page, "InternVLU_LoadModel", ["mine", "auto", "auto", "auto"])
    page.wait_for_function(HAS_BOX)
    place.symlink_to(checkpoint)
    try:
        page.evaluate("app.refreshComboInNodes()")
        page.wait_for_function(f"!{HAS_BOX}")
        page.reload()
        page.wait_for_function(READY)
        open_saved(page, "InternVLU_LoadModel", ["mine", "auto", "auto", "auto"])
        assert told(page) == [] and not page.evaluate(HAS_BOX)
        open_saved(page, "InternVLU_LoadModel", ["other", "auto", "auto", "auto"])
        page.wait_for_function(HAS_BOX)
        page.locator(CARD).get_by_role("button", name="Take mine").click()
        assert values(page, "model_name") == ("mine",) and not page.evaluate(HAS_BOX)
    finally:
        place.unlink()


def test_the_word_on_the_node_is_no_part_of_the_job_and_none_of_the_workflow(page):
    open_saved(page, "InternVLU_LoadModel", ["InternVL-U", "auto", "auto", "auto"])
    page.wait_for_function(HAS_BOX)
    assert page.evaluate("app.graph.nodes[0].serialize().widgets_values") == ["InternVL-U", "auto", "auto", "auto"]
    inputs = page.evaluate("async () => Object.values((await app.graphToPrompt()).output)[0].inputs")
    assert set(inputs) == {"model_name", "precision", "mllm_name", "vae_name"}
