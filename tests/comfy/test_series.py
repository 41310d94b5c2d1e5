"""The graphs of docs/series.md, as they stand there, with the nano model in a running ComfyUI."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("scipy")

from training.data import scenes
from training.data.scenes import Scene, Thing
from training.eval import detector

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "series.md"
SIDE = 64
BEFORE = Scene(
    SIDE, SIDE, "white", (Thing("circle", "red", "medium", 0.25, 0.5), Thing("square", "blue", "medium", 0.75, 0.5))
)


@pytest.fixture(scope="module")
def written():
    """Reads a graph of the document; `values` are put in wherever an input of that name is no link."""
    found = re.findall(r"```json (\w+)\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)

    def read(name, **values):
        (text,) = [text for key, text in found if key == name]
        graph = json.loads(text)
        values = {"model_name": "internvl-u-nano", "preset": "custom", "width": 0, "height": 0} | values
        for node in graph.values():
            for key, value in values.items():
                if key in node["inputs"] and not isinstance(node["inputs"][key], list):
                    node["inputs"][key] = value
        return graph

    read.names = [key for key, _ in found]
    return read


@pytest.fixture
def run(server):
    def make(graph):
        entry = server.run(graph)
        assert entry["status"]["status_str"] == "success", server.error(entry)
        return entry

    return make


def seen(file):
    with Image.open(file) as image:
        reading = detector.detect(image.convert("RGB"))
    return reading.background, sorted(thing.name for thing in reading.things)


def test_every_graph_of_the_document_is_tested(written):
    assert written.names == ["prompts", "grid", "story", "judge", "regions", "captions", "frames"]


def test_each_prompt_of_a_table_is_drawn_into_a_file_of_its_name(server, written, run):
    graph = written("prompts")
    entry = run(graph)
    files = server.files(entry, "save")
    assert [file.name.rpartition("_0")[0] for file in files] == ["first", "second"]
    assert [seen(file) for file in files] == [("white", ["red circle"]), ("black", ["blue square"])]
    alone = written("prompts", text="a red circle")
    alone["draw"]["inputs"]["seed"] = 7
    assert (server.picture(run(alone), "save") == _pixels(files[0])).all()
    log = server.log.read_text()
    assert log.count("Traceback") == 0 or "InternVLU_ListPrompts" not in log


def _pixels(file):
    import numpy

    with Image.open(file) as image:
        return numpy.asarray(image.convert("RGB"))


def test_a_grid_has_a_row_for_each_part_cfg_and_a_column_for_each_all_cfg(server, written, run):
    scenes.render(BEFORE).save(server.base / "input" / "series.png")
    entry = run(written("grid", image="series.png", steps=8))
    files = server.files(entry, "save")
    labels = [f"all_cfg {words:g} part_cfg {pictures:g}" for pictures in (1, 2) for words in (2.5, 4.5)]
    assert [file.name.rpartition("_0")[0] for file in files] == labels
    assert len({_pixels(file).tobytes() for file in files}) == 4
    grid = server.picture(entry, "save grid")
    assert grid.shape == (2 * 256 + 4, 2 * 256 + 4, 3)
    single = written("grid", image="series.png", steps=8, all_cfg="4.5", part_cfg="1")
    assert (server.picture(run(single), "save") == _pixels(files[1])).all()


def test_a_story_goes_on_from_the_picture_before(server, written, run):
    entry = run(written("story"))
    pages = [seen(server.files(entry, f"save {page}")[0]) for page in (1, 2, 3)]
    assert pages[0] == ("white", ["blue square", "red circle"])
    assert pages[1] == ("white", ["blue square", "green circle"])
    assert pages[2] == ("black", ["blue square", "green circle"])


@pytest.mark.parametrize(
    ("question", "drawn"),
    [("is there a red circle?", {"draw 1"}), ("is there a green star?", {"draw 1", "draw 2", "draw 3"})],
)
def test_a_picture_is_drawn_again_only_while_it_is_not_right(server, written, question, drawn):
    graph = written("judge", value=question)
    for i in (1, 2, 3):
        graph[f"draw {i}"]["inputs"]["seed"] = 100 * len(drawn) + i  # nothing of it is in the cache
    events, _ = server.listen(graph)
    assert events[-1][0] == "execution_success"
    run = {data["node"] for kind, data in events if kind == "executing"}
    assert {name for name in run if name and name.startswith("draw")} == drawn
    notes = [data for kind, data in events if kind == "executed" and data["node"] == "save"]
    (image,) = notes[0]["output"]["images"]
    kept = server.base / "output" / image["filename"]
    last = {name: node for name, node in graph.items() if not name.startswith("judge")}
    last["save"]["inputs"]["images"] = [f"decode {len(drawn)}", 0]
    assert (server.picture(server.run(last), "save") == _pixels(kept)).all()


def test_the_judge_says_what_it_saw_to_cores_switch(server, written, run):
    if "ComfySwitchNode" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no If/Else Switch")
    for question, chosen in (("is there a red circle?", 1), ("is there a green star?", 2)):
        graph = written("judge", value=question)
        del graph["judge 2"], graph["judge 1"]["inputs"]["otherwise"]
        choice = {"switch": ["judge 1", 1], "on_true": ["decode 1", 0], "on_false": ["decode 2", 0]}
        graph["switch"] = {"class_type": "ComfySwitchNode", "inputs": choice}
        graph["save"]["inputs"]["images"] = ["switch", 0]
        found = server.picture(run(graph), "save")
        graph["save"]["inputs"]["images"] = [f"decode {chosen}", 0]
        assert (server.picture(run(graph), "save") == found).all()


def test_the_judge_alone_hands_its_picture_on(server, written, run):
    graph = written("judge", value="is there a green star?")
    del graph["judge 1"]["inputs"]["otherwise"]
    found = server.picture(run(graph), "save")
    graph["save"]["inputs"]["images"] = ["decode 1", 0]
    assert (server.picture(run(graph), "save") == found).all()


def test_a_folder_is_captioned_into_texts_beside_the_pictures(server, written, run):
    folder = server.base / "input" / "dataset"
    folder.mkdir(exist_ok=True)
    scenes.render(BEFORE).save(folder / "a.png")
    scenes.render(Scene(SIDE, SIDE, "navy", BEFORE.things[:1])).save(folder / "b.png")
    server.get("/object_info/LoadImageDataSetFromFolder")
    run(written("captions", max_new_tokens=40))
    saved = server.base / "output" / "dataset"
    assert {file.suffix for file in saved.iterdir()} == {".png", ".txt"}
    texts = [file.read_text(encoding="utf-8") for file in sorted(saved.glob("*.txt"))]
    assert len(texts) == 2 and all(texts)


def test_frames_of_a_video_are_picked_and_asked_about(server, written, run):
    av, numpy = pytest.importorskip("av"), pytest.importorskip("numpy")
    file = server.base / "input" / "video.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = SIDE
        for i in range(20):
            levels = numpy.full((SIDE, SIDE, 3), 12 * i, numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode())
    graph = written("frames", max_new_tokens=8)
    graph["save"] = {"class_type": "SaveImage", "inputs": {"images": ["frames", 0], "filename_prefix": "frame"}}
    entry = run(graph)
    levels = [int(_pixels(one).mean()) for one in server.files(entry, "save")]
    assert len(levels) == 8 and levels == sorted(levels) and levels[0] < 16 and levels[-1] > 215
    assert entry["outputs"]["ask"]["text"][0]
