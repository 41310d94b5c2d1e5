"""Which text a picture carries, with a real server and a real browser: that of the run that drew it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from .test_text import READY, TEXT, THINK, TO_SUBGRAPH, shown, wait

GRAPH = Path(__file__).parents[1] / "workflows" / "think_then_draw.api.json"
PROPERTY = "internvl_u_text"
SET = """([type, values]) => {
  for (const node of app.graph.nodes)
    if (node.type === type)
      for (const widget of node.widgets) widget.value = values[widget.name] ?? widget.value;
}"""


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(30_000)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function(READY)
    nodes = json.loads(GRAPH.read_text(encoding="utf-8"))
    page.evaluate("async graph => app.loadApiJson(graph, 'draw')", nodes)
    page.wait_for_function(f"!!{THINK}")
    page.evaluate(SET, ["InternVLU_LoadModel", {"model_name": "tiny"}])
    page.evaluate(SET, ["InternVLU_CreateLatent", {"preset": "custom", "width": 64, "height": 64}])
    page.evaluate(SET, ["InternVLU_SampleLatent", {"steps": 2, "seed": 1}])
    yield page
    page.close()


def think(page, **values) -> None:
    chance = {"how": "sampling", "temperature": 2, "top_p": 1, "max_new_tokens": 30, "control_after_generate": "fixed"}
    page.evaluate(SET, ["InternVLU_WriteThought", chance | values])


def draw(page, server, **sampler) -> tuple[dict, dict, list]:
    """Runs the graph; returns what the picture carries as its workflow, the job's outputs and its cached nodes."""
    page.evaluate(SET, ["InternVLU_SampleLatent", sampler | {"control_after_generate": "fixed"}])
    before = server.get("/history").keys()
    page.evaluate("app.queuePrompt(0)")
    entry = wait(page, server, before)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (name,) = [name for name, output in entry["outputs"].items() if "images" in output]
    (file,) = server.files(entry, name)
    with Image.open(file) as image:
        workflow = json.loads(image.text["workflow"])
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    return workflow, entry["outputs"], cached


def thought_in(workflow: dict) -> str | None:
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    (node,) = [node for graph in graphs for node in graph["nodes"] if node["type"] == "InternVLU_WriteThought"]
    return node["properties"].get(PROPERTY)


def text_of(outputs: dict) -> str:
    (text,) = [output["text"][0] for output in outputs.values() if "text" in output and "images" not in output][:1]
    return text


def test_each_picture_carries_the_thought_that_it_was_drawn_from(page, server):
    thoughts = []
    for seed in (201, 202):
        think(page, seed=seed)
        workflow, outputs, _ = draw(page, server, seed=seed)
        assert thought_in(workflow) == text_of(outputs)
        assert page.evaluate(TEXT) == shown(text_of(outputs))
        thoughts.append(text_of(outputs))
    assert thoughts[0] != thoughts[1]
    # The thought comes from the cache, and the picture carries it all the same.
    workflow, _, cached = draw(page, server, seed=203)
    assert str(page.evaluate(f"{THINK}.id")) in cached
    assert thought_in(workflow) == thoughts[1]
    # After a reload too, when the page remembers only what the nodes keep.
    page.evaluate("() => new Promise(done => setTimeout(done, 1500))")
    page.reload()
    page.wait_for_function(READY)
    page.wait_for_function(f"!!{THINK}")
    workflow, _, cached = draw(page, server, seed=204)
    assert str(page.evaluate(f"{THINK}.id")) in cached and thought_in(workflow) == thoughts[1]
    think(page, seed=201)
    workflow, _, _ = draw(page, server, seed=205)
    assert thought_in(workflow) == thoughts[0]


def test_a_text_of_other_inputs_is_not_queued(page, server):
    think(page, seed=211)
    workflow, _, _ = draw(page, server, seed=211)
    old = thought_in(workflow)
    think(page, seed=212)
    before = server.get("/history").keys()
    with page.expect_request("**/prompt") as request:
        page.evaluate("app.queuePrompt(0)")
    queued = json.loads(request.value.post_data)["extra_data"]["extra_pnginfo"]["workflow"]
    assert old and thought_in(queued) is None
    wait(page, server, before)
    page.evaluate(f"() => {{ {THINK}.mode = 4; }}")  # bypassed: no thought is in this run
    before = server.get("/history").keys()
    with page.expect_request("**/prompt") as request:
        page.evaluate("app.queuePrompt(0)")
    queued = json.loads(request.value.post_data)["extra_data"]["extra_pnginfo"]["workflow"]
    assert thought_in(queued) is None
    wait(page, server, before)


def test_a_picture_carries_the_thought_of_a_node_in_a_subgraph(page, server):
    page.evaluate(TO_SUBGRAPH)
    inner = "app.graph.nodes.find(node => node.subgraph).subgraph.nodes[0]"
    for seed in (221, 222):
        page.evaluate(
            f"values => {inner}.widgets.forEach(widget => {{ widget.value = values[widget.name] ?? widget.value; }})",
            {"how": "sampling", "temperature": 2, "top_p": 1, "max_new_tokens": 30, "seed": seed},
        )
        workflow, outputs, _ = draw(page, server, seed=seed)
        assert thought_in(workflow) == text_of(outputs)


def test_a_new_seed_does_not_make_a_greedy_thought_be_written_again_and_what_follows_it_is_kept(page, server):
    think(page, how="greedy", seed=5, max_new_tokens=12, prompt="a greedy cat")
    draw(page, server, seed=5)
    think(page, how="greedy", seed=6, max_new_tokens=12, prompt="a greedy cat")
    _, _, cached = draw(page, server, seed=5)
    kinds = page.evaluate("() => Object.fromEntries(app.graph.nodes.map(node => [String(node.id), node.type]))")
    assert {"InternVLU_WriteThought", "InternVLU_EncodePrompt", "InternVLU_SampleLatent"} <= {
        kinds[id] for id in cached
    }
    think(page, how="sampling", seed=7, max_new_tokens=12, prompt="a greedy cat")
    _, _, cached = draw(page, server, seed=5)
    assert "InternVLU_WriteThought" not in {kinds[id] for id in cached}


def test_while_a_text_is_written_the_node_says_how_fast_and_the_old_one_is_dimmed(page, server):
    page.evaluate(
        """() => {
          window.seen = [];
          const watch = () => {
            const box = document.querySelector('.internvlu-text');
            const state = box?.querySelector('.internvlu-state')?.textContent;
            const area = box?.querySelector('textarea');
            if (state) window.seen.push([state, area.style.opacity, area.value]);
            requestAnimationFrame(watch);
          };
          watch();
        }"""
    )
    old = None
    for seed in range(230, 260):
        think(page, seed=seed, max_new_tokens=4000, prompt="tell everything")
        page.evaluate("window.seen.length = 0")
        draw(page, server, seed=1)
        seen = page.evaluate("window.seen")
        said = [state for state, *_ in seen]
        if old and any("a second" in state for state in said) and said[0].startswith("reads"):
            break
        old = page.evaluate(TEXT)
    assert seen[0][1:] == ["0.4", old], seen[:2]
    rate = next(state for state in said if "a second" in state)
    assert " of at most 4000 tokens, " in rate and " left" in rate
    assert page.evaluate("document.querySelector('.internvlu-state').textContent") == ""
    assert page.evaluate("document.querySelector('.internvlu-text textarea').style.opacity") == "1"
