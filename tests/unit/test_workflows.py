"""Rules for the shipped workflows: what is beside each, and what is in it."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = ROOT / "workflows"
TWINS = ROOT / "tests" / "workflows"
NAMES = sorted(file.stem for file in WORKFLOWS.glob("*.json"))
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
OURS = {
    node_id
    for file in (ROOT / "nodes").glob("*.py")
    for node_id in re.findall(r'node_id="(\w+)"', file.read_text(encoding="utf-8"))
}
# Each is in the oldest supported ComfyUI, and none was renamed since.
CORE = {
    *("ImageCompositeMasked", "ImageScaleToMaxDimension", "KSampler", "LoadImage", "MarkdownNote", "MaskComposite"),
    *("PreviewAny", "PrimitiveStringMultiline", "RandomNoise", "SamplerCustomAdvanced", "SaveImage"),
    *("SetLatentNoiseMask", "SolidMask", "VAEDecode", "VAEEncode"),
}
ABSOLUTE = re.compile(r'"(/|[A-Za-z]:\\|file:)|/(home|Users|root|tmp)/')


def read(folder, name, ending=".json"):
    return json.loads((folder / f"{name}{ending}").read_text(encoding="utf-8"))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_each_workflow_has_a_card_and_a_twin_in_the_format_of_the_api():
    assert NAMES and {file.stem for file in WORKFLOWS.glob("*.jpg")} == set(NAMES)
    assert {file.name for file in TWINS.iterdir()} == {f"{name}.api.json" for name in NAMES}
    assert {file.suffix for file in WORKFLOWS.iterdir()} == {".json", ".jpg"}


def test_it_is_in_the_format_that_all_frontends_read(name):
    workflow = read(WORKFLOWS, name)
    assert workflow["version"] == 0.4 and workflow["id"] and workflow["extra"]["frontendVersion"]
    assert len({read(WORKFLOWS, other)["id"] for other in NAMES}) == len(NAMES)


def test_each_node_is_ours_or_core_and_tells_where_it_comes_from(name):
    for node in read(WORKFLOWS, name)["nodes"]:
        ours = node["type"] in OURS
        assert ours or node["type"] in CORE, node["type"]
        properties = node["properties"]
        assert properties["cnr_id"] == ("internvl-u" if ours else "comfy-core"), node["type"]
        assert properties["ver"] == VERSION if ours else re.fullmatch(r"\d+\.\d+\.\d+", properties["ver"])
        assert properties["Node name for S&R"] == node["type"]


def test_it_needs_no_file_but_the_model_and_the_picture_that_comes_with_comfyui(name):
    text = (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")
    assert not ABSOLUTE.search(text) and not ABSOLUTE.search((TWINS / f"{name}.api.json").read_text(encoding="utf-8"))
    for node in read(TWINS, name, ".api.json").values():
        assert node["inputs"].get("model_name", "InternVL-U") == "InternVL-U"
        assert node["class_type"] != "LoadImage" or node["inputs"]["image"] == "example.png"


def test_it_carries_a_note_and_no_text_of_an_earlier_run(name):
    nodes = read(WORKFLOWS, name)["nodes"]
    (note,) = [node for node in nodes if node["type"] == "MarkdownNote"]
    assert note["widgets_values"][0].startswith("## ")
    assert not [node for node in nodes if "internvl_u_text" in node["properties"]]


def test_its_twin_is_the_same_graph(name):
    workflow, twin = read(WORKFLOWS, name), read(TWINS, name, ".api.json")
    types = {str(node["id"]): node["type"] for node in workflow["nodes"] if node["type"] != "MarkdownNote"}
    assert {node_id: node["class_type"] for node_id, node in twin.items()} == types
    drawn = sorted((str(link[1]), link[2], str(link[3])) for link in workflow["links"])
    named = [(*value, node_id) for node_id, node in twin.items() for value in node["inputs"].values() if is_link(value)]
    assert sorted(named) == drawn


def is_link(value):
    return isinstance(value, list)
