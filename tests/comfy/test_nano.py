"""The shipped workflows with the nano model, in a running ComfyUI: what is drawn and said is judged by its meaning."""

import pytest
from PIL import Image

pytest.importorskip("scipy")

from training.data import scenes
from training.data.scenes import Scene, Thing
from training.eval import detector

MODEL = "internvl-u-nano"
SIDE = 64
BEFORE = Scene(
    SIDE, SIDE, "white", (Thing("circle", "red", "medium", 0.25, 0.5), Thing("square", "blue", "medium", 0.75, 0.5))
)


@pytest.fixture
def nano_graph(shipped_graph):
    """Reads a shipped workflow in API format, for the nano model."""

    def make(name, **values):
        graph = shipped_graph(name, **{"model_name": MODEL, "preset": "custom", "width": SIDE, "height": SIDE} | values)
        for node in graph.values():
            if node["class_type"] == "InternVLU_DecodeLatent":
                node["inputs"] |= {"width": 0, "height": 0}
        return graph

    return make


@pytest.fixture
def put_picture(server):
    """Draws a scene into ComfyUI's input folder; returns the file's name."""

    def put(scene, name):
        scenes.render(scene).save(server.base / "input" / name)
        return name

    return put


def drawn(server, graph):
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    saver = [name for name, node in graph.items() if node["class_type"] == "SaveImage"][-1]
    picture = server.picture(entry, saver)
    return detector.detect(Image.fromarray(picture)), picture.shape


def said(server, graph):
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    return next(output["text"][0] for output in entry["outputs"].values() if "text" in output)


def names(reading):
    return sorted(thing.name for thing in reading.things)


@pytest.mark.parametrize("name", ["text_to_image", "text_to_image_custom_sampling", "text_to_image_ksampler"])
def test_a_red_circle_is_drawn_to_the_left_of_a_blue_square(server, nano_graph, name):
    graph = nano_graph(name, prompt="a red circle to the left of a blue square")
    reading, shape = drawn(server, graph)
    assert shape == (SIDE, SIDE, 3)
    assert reading.background == "white" and names(reading) == ["blue square", "red circle"]
    seen = {thing.name: thing for thing in reading.things}
    assert detector.relation(seen["red circle"], seen["blue square"]) == "left"


@pytest.mark.parametrize(
    ("instruction", "background", "things"),
    [
        ("make the circle green", "white", ["blue square", "green circle"]),
        ("remove the square", "white", ["red circle"]),
        ("make the background black", "black", ["blue square", "red circle"]),
        ("replace the square with a yellow star", "white", ["red circle", "yellow star"]),
    ],
)
def test_an_edit_changes_what_it_names_and_keeps_the_rest(
    server, nano_graph, put_picture, instruction, background, things
):
    graph = nano_graph("edit", prompt=instruction, image=put_picture(BEFORE, "before.png"))
    reading, _ = drawn(server, graph)
    assert reading.background == background and names(reading) == things
    before = detector.detect(scenes.render(BEFORE))
    stayed = [thing for thing in before.things if thing.name in things]
    assert all(any(detector.is_kept(old, new) for new in reading.things) for old in stayed)


def test_a_riddle_is_drawn_after_thinking(server, nano_graph):
    riddle = "a shape with three sides in the colour of grass, on a ground like the night"
    reading, _ = drawn(server, nano_graph("think_then_draw", value=riddle))
    assert reading.background == "black" and names(reading) == ["green triangle"]


def test_an_edit_is_thought_over_first(server, nano_graph, put_picture):
    graph = nano_graph("think_then_edit", value="turn the square pink", image=put_picture(BEFORE, "before.png"))
    reading, _ = drawn(server, graph)
    assert reading.background == "white" and names(reading) == ["pink square", "red circle"]


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
def test_a_question_about_a_picture_is_answered(server, nano_graph, put_picture, question, answer):
    graph = nano_graph("ask_about_a_picture", question=question, image=put_picture(BEFORE, "before.png"))
    assert said(server, graph) == answer


def test_two_pictures_are_compared(server, nano_graph, put_picture):
    graph = nano_graph("compare_two_pictures", question="what changed?")
    first, second = (name for name, node in graph.items() if node["class_type"] == "LoadImage")
    graph[first]["inputs"]["image"] = put_picture(BEFORE, "before.png")
    after = Scene(SIDE, SIDE, "navy", BEFORE.things)
    graph[second]["inputs"]["image"] = put_picture(after, "after.png")
    assert said(server, graph) == "The background became navy"


def test_the_model_draws_what_it_says_of_its_picture(server, nano_graph):
    graph = nano_graph("draw_ask_draw_again", question="describe the picture.")
    drawing = next(node for node in graph.values() if node["class_type"] == "InternVLU_EncodePrompt")
    drawing["inputs"]["prompt"] = "a large purple star on a beige background"
    reading, _ = drawn(server, graph)
    assert reading.background == "beige" and names(reading) == ["purple star"]
