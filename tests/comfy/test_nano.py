"""The shipped workflows with the nano model, in a running ComfyUI: what is drawn and said is judged by its meaning."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("scipy")

from training.data import scenes
from training.data.scenes import Scene, Thing
from training.eval import detector

MODEL = "internvl-u-nano"
DEMO = Path(__file__).parent.parent.parent / "demo" / "input"
PICTURES = Path(__file__).parent.parent.parent / "web" / "pictures"
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


def test_the_first_steps_draw_as_they_come(server, shipped_graph):
    graph = shipped_graph("first_steps_with_nano")
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    picture = Image.fromarray(server.picture(entry, server.find(graph, "SaveImage")))
    assert picture.size == (256, 256)
    assert names(detector.detect(picture.resize((SIDE, SIDE)))) == ["blue square", "red circle"]


def test_edges_say_where_and_words_say_what_with_the_lora_in_the_box(server, shipped_graph, put_picture):
    graph = shipped_graph("control_with_edges")
    loading = graph[server.find(graph, "LoadImage")]["inputs"]
    shutil.copyfile(PICTURES / loading["image"], server.base / "input" / loading["image"])
    found, shape = drawn(server, graph)
    assert shape == (4 * SIDE, 4 * SIDE, 3) and lies_at(found, 0.75, 0.75)
    moved = Scene(SIDE, SIDE, "beige", (Thing("star", "blue", "medium", 0.25, 0.5),))
    loading["image"] = put_picture(moved, "moved.png")
    assert lies_at(drawn(server, graph)[0], 0.25, 0.5)
    graph[server.find(graph, "InternVLU_LoadLoRA")]["inputs"]["strength_model"] = 0.0
    assert not lies_at(drawn(server, graph)[0], 0.25, 0.5)


def lies_at(found, x, y):
    """Whether a red star on white is all that there is, within half a step of the grid of a place."""
    near = [abs(thing.x - x) < 1 / 8 and abs(thing.y - y) < 1 / 8 for thing in found.things]
    return found.background == "white" and names(found) == ["red star"] and near == [True]


def test_a_painted_part_is_changed_and_the_rest_stays_to_the_pixel(server, nano_graph):
    source = DEMO / "nano_masked.png"
    shutil.copyfile(source, server.base / "input" / source.name)
    graph = nano_graph("masked_edit", prompt="make the circle green", image=source.name, largest_size=SIDE)
    saver, scaler = server.find(graph, "SaveImage"), server.find(graph, "ImageScaleToMaxDimension")
    graph["before"] = {"class_type": "SaveImage", "inputs": {"images": [scaler, 0], "filename_prefix": "before"}}
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    before, after = server.picture(entry, "before"), server.picture(entry, saver)
    assert names(detector.detect(Image.fromarray(after))) == ["blue square", "green circle"]
    half = SIDE // 2  # only the left one is painted
    assert (after[:, half:] == before[:, half:]).all() and (after[:, :half] != before[:, :half]).any()


def test_each_prompt_of_a_batch_is_drawn_into_a_file_of_its_name(server, nano_graph):
    graph = nano_graph("batch_of_prompts", text="a large red circle\na large green square on a black background")
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    files = server.files(entry, server.find(graph, "SaveImage"))
    assert ["red" in file.name for file in files] == [True, False]
    seen = [detector.detect(Image.open(file).convert("RGB")) for file in files]
    assert [(one.background, names(one)) for one in seen] == [("white", ["red circle"]), ("black", ["green square"])]


def test_the_parts_of_a_picture_have_prompts_of_their_own(server, nano_graph):
    graph = nano_graph("regions", seed=2)
    for node in graph.values():
        if node["class_type"] == "ConditioningSetAreaPercentage":
            node["inputs"] |= {"width": 0.5, "height": 1.0}  # nano_graph has put the picture's in
    for node, prompt in zip(
        (node for node in graph.values() if node["class_type"] == "InternVLU_EncodePrompt"),
        ("a red circle", "a blue square"),
        strict=True,
    ):
        node["inputs"]["prompt"] = prompt
    reading, _ = drawn(server, graph)
    places = {thing.name: thing.x for thing in reading.things}
    assert places["red circle"] < 0.5 < places["blue square"]


def test_a_story_goes_on_from_picture_to_picture(server, nano_graph):
    graph = nano_graph("story_in_three_pictures")
    texts = [node["inputs"] for node in graph.values() if node["class_type"] == "PrimitiveStringMultiline"]
    story = ("a red circle to the left of a blue square", "make the circle green", "make the background black")
    for inputs, text in zip(texts, story, strict=True):
        inputs["value"] = text
    reading, _ = drawn(server, graph)
    assert reading.background == "black" and names(reading) == ["blue square", "green circle"]


def test_a_picture_that_is_not_right_is_drawn_again(server, nano_graph):
    graph = nano_graph("draw_judge_draw_again", prompt="a red circle")
    question = graph[server.find(graph, "PrimitiveStringMultiline")]["inputs"]

    def samplers_run(text):
        question["value"] = text
        server.post("/free", {"unload_models": False, "free_memory": True})
        events, _ = server.listen(graph)
        run = {data["node"] for kind, data in events if kind == "executing" and data["node"]}
        return sum(graph[node]["class_type"] == "InternVLU_SampleLatent" for node in run if node in graph)

    assert samplers_run("is there a green star?") == 3
    assert samplers_run("is there a red circle?") == 1


def test_a_chat_answers_about_the_picture_that_it_was_given(server, nano_graph, put_picture):
    picture = put_picture(BEFORE, "before.png")
    given = {"message": "which shape is red?", "action": "answer", "reads": "last picture alone", "image": picture}
    assert said(server, nano_graph("chat", **given)) == "Circle"
