"""Rules for the shipped workflows: what is beside each, and what is in it."""

import json
import re
from pathlib import Path

import pytest
from pack.internvl_u.defaults import NANO_CHOICE, NANO_EDGES
from pack.tools.workflows import graphs, hearts
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = ROOT / "workflows"
TWINS = ROOT / "tests" / "workflows"
PICTURES = ROOT / "web" / "pictures"
FILES = graphs.FILES  # name: what the file is called after "InternVL-U "
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
OURS = {
    node_id
    for file in (ROOT / "nodes").glob("*.py")
    for node_id in re.findall(r'node_id="(\w+)"', file.read_text(encoding="utf-8"))
}
# Each is in the oldest supported ComfyUI, and none was renamed since.
CORE = {
    *("CLIPTextEncode", "Canny", "CheckpointLoaderSimple", "ControlNetApplyAdvanced", "ControlNetLoader"),
    *("ConditioningCombine", "ConditioningSetAreaPercentage", "EmptyLatentImage", "ImageCompositeMasked", "ImageGrid"),
    *("ImageScaleBy", "ImageScaleToMaxDimension", "ImageUpscaleWithModel", "KSampler", "LatentUpscaleBy", "LoadImage"),
    *("LoadImageDataSetFromFolder", "LoadImageTextDataSetFromFolder", "LoraLoaderModelOnly", "LoraModelLoader"),
    *("LossGraphNode", "MarkdownNote", "PreviewAny", "PreviewImage", "SaveLoRA", "TrainLoraNode"),
    *("PrimitiveStringMultiline", "RandomNoise", "SamplerCustomAdvanced", "SaveImage", "SaveImageTextDataSetToFolder"),
    *("SetLatentNoiseMask", "UpscaleModelLoader", "VAEDecode", "VAEEncode"),
}
NANO, CONTROL = "first_steps_with_nano", "control_with_edges"
OF_NANO = {NANO, "train_a_lora", "load_a_trained_lora", CONTROL}
ABSOLUTE = re.compile(r'"(/|[A-Za-z]:\\|file:)|/(home|Users|root|tmp)/')


def shipped(name):
    return json.loads((WORKFLOWS / f"{graphs.file_name(name)}.json").read_text(encoding="utf-8"))


def twin(name):
    return json.loads((TWINS / f"{name}.api.json").read_text(encoding="utf-8"))


@pytest.fixture(params=FILES)
def name(request):
    return request.param


def test_each_workflow_has_a_card_and_a_twin_in_the_format_of_the_api():
    titles = {graphs.file_name(name) for name in FILES}
    assert len(titles) == len(FILES)
    for ending in ("json", "jpg"):
        assert {file.stem for file in WORKFLOWS.glob(f"*.{ending}")} == titles
    assert {file.suffix for file in WORKFLOWS.iterdir()} == {".json", ".jpg"}
    assert {file.name for file in TWINS.iterdir()} == {f"{name}.api.json" for name in FILES}


def test_its_file_name_is_a_title_that_any_system_and_any_address_takes(name):
    assert re.fullmatch(r"InternVL-U [A-Za-z, ]+", graphs.file_name(name))


def test_its_card_is_square_small_and_no_other_ones(name):
    file = WORKFLOWS / f"{graphs.file_name(name)}.jpg"
    assert file.stat().st_size < 40_000
    with Image.open(file) as card:
        assert card.size == (512, 512)
    others = [other.read_bytes() for other in WORKFLOWS.glob("*.jpg") if other != file]
    assert file.read_bytes() not in others


def test_it_is_in_the_format_that_all_frontends_read(name):
    workflow = shipped(name)
    assert workflow["version"] == 0.4 and workflow["id"] and workflow["extra"]["frontendVersion"]
    assert len({shipped(other)["id"] for other in FILES}) == len(FILES)


def test_the_first_steps_draw_a_small_picture_with_the_model_in_the_box():
    assert (graphs.NANO_CHOICE, graphs.NANO_EDGES) == (NANO_CHOICE, NANO_EDGES)
    for name in OF_NANO - {CONTROL}:  # which draws in the size of its picture
        nodes = [node["inputs"] for node in twin(name).values() if node["class_type"] == "InternVLU_CreateLatent"]
        assert [(node["preset"], node["width"], node["height"]) for node in nodes] == [("custom", 64, 64)]
    assert {name for name in FILES if "nano" in json.dumps(twin(name))} == OF_NANO


@pytest.mark.parametrize(
    "other", [name for name in FILES if "think" in name or "thought" in name or name == "story_in_three_pictures"]
)
def test_a_thought_can_be_switched_off_and_the_scales_follow(other):
    nodes = list(twin(other).values())
    thinking = [node["inputs"] for node in nodes if node["class_type"] == "InternVLU_WriteThought"]
    drawing = [node["inputs"] for node in nodes if node["class_type"] == "InternVLU_SampleLatent"]
    assert {(node["think"], node["budget"], node["max_new_tokens"]) for node in thinking} == {(True, "custom", 200)}
    assert {(node["scales"], node["all_cfg"], node["part_cfg"]) for node in drawing} == {("automatic", 4.5, 2.0)}
    (note,) = [node for node in shipped(other)["nodes"] if node["type"] == "MarkdownNote"]
    for word in ("**budget**", "**scales** automatic"):
        assert word in note["widgets_values"][0]


def test_each_node_is_ours_or_core_and_tells_where_it_comes_from(name):
    for node in shipped(name)["nodes"]:
        ours = node["type"] in OURS
        newer = graphs.NEWER if name in graphs.WANTS else set()
        assert ours or node["type"] in CORE | newer, node["type"]
        properties = node["properties"]
        assert properties["cnr_id"] == ("internvl-u" if ours else "comfy-core"), node["type"]
        assert properties["ver"] == VERSION if ours else re.fullmatch(r"\d+\.\d+\.\d+", properties["ver"])
        assert properties["Node name for S&R"] == node["type"]


# What the user brings where the workflow is about that.
BROUGHT = {"lora_name", "ckpt_name", "control_net_name"}


def test_it_needs_no_file_but_the_model_and_the_pictures_of_the_pack(name):
    text = (WORKFLOWS / f"{graphs.file_name(name)}.json").read_text(encoding="utf-8")
    assert not ABSOLUTE.search(text) and not ABSOLUTE.search((TWINS / f"{name}.api.json").read_text(encoding="utf-8"))
    for node in twin(name).values():
        if node["class_type"] == "InternVLU_LoadModel":
            assert node["inputs"]["model_name"] == (NANO_CHOICE if name in OF_NANO else "InternVL-U")
        if node["class_type"] == "LoadImage":
            assert (PICTURES / node["inputs"]["image"]).is_file()


def test_the_page_knows_the_pictures_of_the_pack_and_no_others():
    script = (ROOT / "web" / "js" / "example_pictures.js").read_text(encoding="utf-8")
    assert set(re.findall(r'"(internvl_u_\w+\.\w+)"', script)) == {file.name for file in PICTURES.iterdir()}
    assert f'"{graphs.PICTURES}"' in script and f'"{graphs.HEARTS}"' in script


def test_each_picture_to_train_on_is_small_and_has_a_caption_and_half_of_them_are_hearts(tmp_path):
    captions = json.loads((hearts.FOLDER / hearts.CAPTIONS).read_text(encoding="utf-8"))
    files = {file.name for file in hearts.FOLDER.iterdir()}
    assert files == {*captions, hearts.CAPTIONS} and len(captions) == 40
    assert ["heart" in text for text in captions.values()] == [True] * 20 + [False] * 20
    for name in captions:
        with Image.open(hearts.FOLDER / name) as picture:
            assert picture.size == (64, 64)
    hearts.put(tmp_path)
    assert (
        len(list((tmp_path / graphs.HEARTS).glob("*.txt"))) == len(list((tmp_path / graphs.HEARTS).glob("*.png"))) == 40
    )


def test_a_workflow_that_wants_a_newer_comfyui_says_so():
    for name, version in graphs.WANTS.items():
        assert f"ComfyUI {version.rpartition('.')[0]}" in graphs.note(name)
        core = {node["properties"]["ver"] for node in shipped(name)["nodes"] if node["type"] not in OURS}
        assert all(graphs.runs_on(name, one) for one in core)


def test_the_masked_picture_keeps_the_colours_under_its_paint():
    with Image.open(PICTURES / graphs.CAT_MASKED) as masked, Image.open(PICTURES / graphs.CAT) as plain:
        painted = [
            (masked.getpixel(place)[:3], plain.getpixel(place))
            for place in ((x, y) for x in range(0, 768, 12) for y in range(0, 768, 12))
            if masked.getpixel(place)[3] == 0
        ]
    assert 100 < len(painted) < 1000  # of 4096
    assert all(max(abs(a - b) for a, b in zip(*colours)) < 60 for colours in painted)


def test_it_carries_a_note_with_three_lines_on_what_to_change_and_no_text_of_an_earlier_run(name):
    nodes = shipped(name)["nodes"]
    (note,) = [node for node in nodes if node["type"] == "MarkdownNote"]
    assert note["widgets_values"][0].startswith(f"## {graphs.file_name(name)}\n")
    assert [line[:6] for line in note["widgets_values"][0].splitlines() if line.startswith("### ")] == [
        f"### {number}." for number in (1, 2, 3)
    ]
    assert not [node for node in nodes if "internvl_u_text" in node["properties"]]


def test_the_note_is_left_of_all_and_each_other_node_is_in_one_numbered_step(name):
    workflow = shipped(name)
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    others = [node for node in workflow["nodes"] if node is not note]
    assert note["pos"][0] + note["size"][0] < min(node["pos"][0] for node in others)
    assert [group["title"][0] for group in workflow["groups"]] == [str(i + 1) for i in range(len(workflow["groups"]))]
    for node in others:
        holding = [group for group in workflow["groups"] if is_inside(node, group["bounding"])]
        assert len(holding) == 1, (node["type"], [group["title"] for group in holding])


def is_inside(node, bounding):
    left, top, width, height = bounding
    x, y = node["pos"]
    return left <= x and top <= y - 30 and x + node["size"][0] <= left + width and y + node["size"][1] <= top + height


def test_what_is_decoded_stands_to_the_right_of_its_sampler(name):
    workflow = shipped(name)
    by_id = {node["id"]: node for node in workflow["nodes"]}
    kinds = {"InternVLU_SampleLatent", "KSampler", "SamplerCustomAdvanced"}
    for _, source, _, target, _, _ in workflow["links"]:
        source, target = by_id[source], by_id[target]
        if source["type"] in kinds:  # the live preview makes it longer
            assert target["pos"][0] >= source["pos"][0] + source["size"][0]
        if target["type"] in kinds:
            column = [node for node in by_id.values() if node["pos"][0] == target["pos"][0] and node is not target]
            assert not [node for node in column if node["pos"][1] > target["pos"][1]], "something is below a sampler"


def test_its_twin_is_the_same_graph(name):
    workflow, prompt = shipped(name), twin(name)
    types = {str(node["id"]): node["type"] for node in workflow["nodes"] if node["type"] != "MarkdownNote"}
    assert {node_id: node["class_type"] for node_id, node in prompt.items()} == types
    drawn = sorted((str(link[1]), link[2], str(link[3])) for link in workflow["links"])
    named = [
        (*value, node_id) for node_id, node in prompt.items() for value in node["inputs"].values() if is_link(value)
    ]
    assert sorted(named) == drawn


def is_link(value):
    return isinstance(value, list)


BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))


def test_there_is_a_blueprint_for_drawing_editing_and_asking():
    assert [file.stem for file in BLUEPRINTS] == ["InternVL-U Ask", "InternVL-U Draw", "InternVL-U Edit"]


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_a_blueprint_is_one_node_of_our_nodes_with_a_text_and_a_model_to_choose(file):
    blueprint = json.loads(file.read_text(encoding="utf-8"))
    (node,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and subgraph["name"] == node["title"] == file.stem
    assert {one["type"] for one in subgraph["nodes"]} <= OURS
    widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    assert widgets[0] in ("prompt", "question") and widgets[-1] == "model_name"
    assert [name for number, name in node["properties"]["proxyWidgets"] if number == "-1"] == widgets
    assert len(node["widgets_values"]) == len(widgets)
    assert blueprint["extra"]["BlueprintDescription"] and not ABSOLUTE.search(json.dumps(blueprint))


def test_the_workflows_that_draw_edit_and_ask_have_an_app_view_of_inputs_that_exist():
    for name in graphs.APPS:
        workflow = shipped(name)
        kinds = {node["id"]: node["type"] for node in workflow["nodes"]}
        view = workflow["extra"]["linearData"]
        widgets = {(int(number), key) for number, node in twin(name).items() for key in node["inputs"]}
        texts = {"preview_markdown", "live_text"}  # the page's own, which show the answer
        assert [pair for pair in view["inputs"] if tuple(pair) not in widgets and pair[1] not in texts] == []
        assert {kinds[number] for number in view["outputs"]} <= {"SaveImage", "PreviewAny"}
    assert [name for name in FILES if "linearData" in shipped(name)["extra"]] == list(graphs.APPS)
