"""The shipped workflows with the nano model, in a running ComfyUI: what is said is judged by its meaning."""

import pytest
from pack.training import world
from pack.training.world import Scene, Thing

MODEL = "internvl-u-nano"
SIDE = 128
BEFORE = Scene(
    SIDE, SIDE, "white", (Thing("circle", "red", "medium", 0.25, 0.5), Thing("square", "blue", "medium", 0.75, 0.5))
)


@pytest.fixture
def put_picture(server):
    """Draws a scene into ComfyUI's input folder; returns the file's name."""

    def put(scene, name):
        world.draw(scene).save(server.base / "input" / name)
        return name

    return put


def said(server, graph):
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    return next(output["text"][0] for output in entry["outputs"].values() if "text" in output)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what colour is the square?", "Blue"),
        ("which shape is red?", "Circle"),
        ("how many shapes are there?", "2"),
        ("what colour is the background?", "White"),
        ("is there a green star?", "No"),
        ("what is to the left of the square?", "The red circle"),
    ],
)
def test_a_question_about_a_picture_is_answered(server, shipped_graph, put_picture, question, answer):
    graph = shipped_graph(
        "ask_about_a_picture", model_name=MODEL, question=question, image=put_picture(BEFORE, "before.png")
    )
    assert said(server, graph) == answer


def test_two_pictures_are_compared(server, shipped_graph, put_picture):
    graph = shipped_graph("compare_two_pictures", model_name=MODEL, question="what changed?")
    first, second = (name for name, node in graph.items() if node["class_type"] == "LoadImage")
    graph[first]["inputs"]["image"] = put_picture(BEFORE, "before.png")
    after = Scene(SIDE, SIDE, "navy", BEFORE.things)
    graph[second]["inputs"]["image"] = put_picture(after, "after.png")
    assert said(server, graph) == "The background became navy"
