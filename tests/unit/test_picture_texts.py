"""What stands beside the pixels of a drawn PNG: the line that viewers read, and the graph that ComfyUI opens."""

import json
import re

import numpy
import pytest
from pack.internvl_u import graph, picture_texts
from pack.internvl_u.__main__ import main
from pack.internvl_u.defaults import Guidance
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from PIL import Image

DRAW = ("--width", "32", "--height", "32", "--steps", "1")
# What the readers of this form expect of its last line: AUTOMATIC1111's own expression.
ENTRY = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.fixture
def drawn(checkpoint, tmp_path):
    """Draws by the command line; returns the texts of the picture."""

    def run(*arguments, prompt="a cat", size=DRAW):
        out = tmp_path / "a.png"
        line = ["draw", "--model", str(checkpoint), "--prompt", prompt, *size, "--out", str(out)]
        assert main([*line, *map(str, arguments)]) == 0
        with Image.open(out) as image:
            return dict(image.text)

    return run


def entries(text):
    return {key: value.strip('"') for key, value in ENTRY.findall(text.splitlines()[-1])}


def test_viewers_read_the_prompt_and_the_settings(drawn):
    text = drawn("--seed", 7, prompt="a cat, asleep\non a sofa")["parameters"]
    assert text.splitlines()[:2] == ["a cat, asleep", "on a sofa"] and len(text.splitlines()) == 3
    assert text.splitlines()[2].startswith("Steps: 1, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 7, Size: 32x32, Model: ")
    read = entries(text)
    assert read["Model"] == "checkpoint" and read["Version"].startswith("internvl_u ")
    assert "Negative prompt" not in text and "Image CFG scale" not in text


def test_other_scripts_and_references_stand_there_too(drawn, golden):
    texts = drawn("--image", golden("edit_one").images[0], "--part-cfg", 1.25, prompt="一只猫")
    assert texts["parameters"].startswith("一只猫\n") and entries(texts["parameters"])["Image CFG scale"] == "1.25"
    assert json.loads(texts["internvl_u"])["prompt"] == "一只猫"


def test_a_name_with_a_comma_is_quoted(checkpoint, tmp_path):
    (tmp_path / "a, b: c").symlink_to(checkpoint)
    wish = ImageRequest("x", 32, 32, 1, negative_prompt="blurred")
    text = picture_texts.parameters(Pipeline(tmp_path / "a, b: c"), wish)
    assert text.splitlines()[1] == "Negative prompt: blurred"
    assert entries(text)["Model"] == "a, b: c" and entries(text)["Size"] == "32x32"


def test_the_graph_has_the_settings_and_links_that_fit(drawn, golden):
    file = golden("edit_one").images[0]
    texts = drawn("--image", file, "--thought", "a thought", "--system", "be good", "--seed", 5, size=("--steps", "1"))
    nodes = json.loads(texts["prompt"])
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert kinds["InternVLU_LoadModel"]["model_name"] == "checkpoint"
    assert kinds["InternVLU_LoadModel"]["precision"] == "fp32"
    assert kinds["LoadImage"]["image"] == file.name and kinds["PrimitiveStringMultiline"]["value"] == "a thought"
    assert kinds["InternVLU_EncodePrompt"]["system_prompt"] == "be good"
    sampler = kinds["InternVLU_SampleLatent"]
    assert (sampler["seed"], sampler["steps"], sampler["all_cfg"], sampler["part_cfg"]) == (5, 1, 3.5, 1.5)
    assert "InternVLU_CreateLatent" not in kinds, "the size is the picture's"
    page = json.loads(texts["workflow"])
    by_id = {node["id"]: node for node in page["nodes"]}
    assert len(page["links"]) == sum(isinstance(v, list) for node in nodes.values() for v in node["inputs"].values())
    for number, source, output, target, socket, type in page["links"]:
        assert by_id[source]["outputs"][output]["type"] == type == by_id[target]["inputs"][socket]["type"]
        assert number in by_id[source]["outputs"][output]["links"]
        name = by_id[target]["inputs"][socket]["name"]
        assert nodes[str(target)]["inputs"][name] == [str(source), output]


def test_no_two_nodes_of_the_page_overlap():
    size, guidance = (64, 64), Guidance(4.5, 2.0)
    wish = graph.Drawing("m", "auto", "p", "", "t", [f"{n}.png" for n in range(8)], size, False, 1, -1, guidance)
    page = graph.page_graph(graph.api_graph(wish))
    boxes = [(*node["pos"], *node["size"]) for node in page["nodes"]]
    for i, (x, y, width, height) in enumerate(boxes):
        for left, top, wide, high in boxes[:i]:
            assert x >= left + wide or left >= x + width or y >= top + high or top >= y + height
    encode = next(node for node in page["nodes"] if node["type"] == "InternVLU_EncodePrompt")
    assert [socket["name"] for socket in encode["inputs"]][-4:] == ["image5", "image6", "image7", "image8"]
    assert page["nodes"][-3]["widgets_values"][0] == 2**64 - 2, "what torch takes -1 for"


def test_more_references_than_the_node_takes_leave_the_graph_out(drawn, golden):
    given = [part for _ in range(9) for part in ("--image", golden("edit_one").images[0])]
    texts = drawn(*given)
    assert {"internvl_u", "parameters"} == set(texts)


def test_several_pictures_are_each_the_single_one_of_its_seed(checkpoint, tmp_path):
    line = ["draw", "--model", str(checkpoint), "--prompt", "a cat", *DRAW]
    assert main([*line, "--seed", "4", "--count", "2", "--out", str(tmp_path / "a.b.png")]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.b-1.png", "a.b-2.png"]
    for number, seed in ((1, 4), (2, 5)):
        assert main([*line, "--seed", str(seed), "--out", str(tmp_path / "one.png")]) == 0
        with Image.open(tmp_path / f"a.b-{number}.png") as several, Image.open(tmp_path / "one.png") as one:
            assert (numpy.asarray(several) == numpy.asarray(one)).all() and several.text == one.text
            assert json.loads(one.text["internvl_u"])["seed"] == seed


@pytest.mark.parametrize("count", ["0", "-1", "1001"])
def test_a_count_out_of_range_is_refused(checkpoint, tmp_path, capsys, count):
    line = ["draw", "--model", str(checkpoint), "--prompt", "x", "--count", count, "--out", str(tmp_path / "a.png")]
    assert main(line) == 1 and f"--count {count} found, 1 to 1000 expected" in capsys.readouterr().err


def test_each_name_of_several_is_looked_at_before_the_work(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pipeline, "draw_several", lambda *_: pytest.fail("began to draw"))
    (tmp_path / "a-2.png").mkdir()
    line = ["draw", "--model", str(checkpoint), "--prompt", "x", "--count", "2", "--out", str(tmp_path / "a.png")]
    assert main(line) == 1 and "a-2.png is a folder" in capsys.readouterr().err
