"""What InternVL-U Encode, Decode and Answer take besides the official inputs: in graphs of a running ComfyUI."""

import importlib
from types import SimpleNamespace

import numpy
import pytest
import torch
from pack.internvl_u.generation import GenerationConfig
from pack.internvl_u.tasks import QUESTIONS
from PIL import Image

from .test_modes import ask_graph, edit_graph  # noqa: F401 - fixtures


@pytest.fixture
def picture(tmp_path):
    """Makes a picture of squares; returns the file."""

    def make(width, height, seed=0):
        levels = numpy.random.default_rng(seed).integers(0, 255, (height // 10 + 1, width // 10 + 1, 3), numpy.uint8)
        file = tmp_path / f"of {width} x {height}, {seed}.png"
        Image.fromarray(levels).resize((width, height)).save(file)
        return file

    return make


def run(server, nodes):
    entry = server.run(nodes)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    return entry


def test_a_negative_prompt_changes_negative_alone_and_none_is_the_official_picture(loaded, golden):
    case = golden("t2i_square")
    plain, empty, written = (
        loaded.mllm.encode(case.prompt, **settings)
        for settings in ({}, {"negative_prompt": " "}, {"negative_prompt": "a dog"})
    )
    for i in (0, 1):
        assert torch.equal(plain[i][0][0], empty[i][0][0])
    assert torch.equal(plain[0][0][0], written[0][0][0])
    assert plain[1][0][0].shape != written[1][0][0].shape
    again = loaded.mllm.encode(case.prompt)
    assert torch.equal(again[1][0][0], plain[1][0][0])


def test_the_inputs_of_older_graphs_draw_what_they_drew(server, edit_graph, golden, same_picture):  # noqa: F811
    case = golden("edit_one")
    nodes = edit_graph(case)
    encode, decode = (server.find(nodes, f"InternVLU_{kind}") for kind in ("EncodePrompt", "DecodeLatent"))
    save = server.find(nodes, "SaveImage")
    older = server.picture(run(server, nodes), save)
    same_picture(older, case["image_u8"])
    nodes[encode]["inputs"] |= {"negative_prompt": "", "reference_size": "official"}
    nodes[decode]["inputs"] |= {"size": "as drawn"}
    assert (server.picture(run(server, nodes), save) == older).all()
    nodes[encode]["inputs"] |= {"negative_prompt": "a dog"}
    assert (server.picture(run(server, nodes), save) != older).any()
    nodes[encode]["inputs"] |= {
        "negative_prompt": "",
        "reference_size": "256 x 256",
    }  # more than the small model's most
    assert (server.picture(run(server, nodes), save) == older).all()


def edited(server, edit_graph, file, width=0, height=0, **more):  # noqa: F811
    case = SimpleNamespace(images=(file,), width=64, height=64, steps=1, prompt="x")
    nodes = edit_graph(case, width=width, height=height)
    encode, decode = (server.find(nodes, f"InternVLU_{kind}") for kind in ("EncodePrompt", "DecodeLatent"))
    nodes[server.find(nodes, "InternVLU_SampleLatent")]["inputs"]["latent_image"] = [encode, 2]
    del nodes[server.find(nodes, "InternVLU_CreateLatent")]
    nodes[decode]["inputs"].pop("size", None)  # as graphs were before there was one
    nodes[decode]["inputs"] |= more
    return nodes


@pytest.mark.parametrize("size", [(1000, 700), (333, 77), (40, 30)])
def test_an_edit_comes_out_with_the_pixels_of_its_picture(server, edit_graph, picture, size):  # noqa: F811
    nodes = edited(server, edit_graph, picture(*size), size="as the edited picture")
    save = server.find(nodes, "SaveImage")
    assert server.picture(run(server, nodes), save).shape == (size[1], size[0], 3)
    drawn = edited(server, edit_graph, picture(*size))
    height, width, _ = server.picture(run(server, drawn), save).shape
    assert (width, height) != size and width % 16 == height % 16 == 0
    typed = edited(server, edit_graph, picture(*size), 50, 0, size="as the edited picture")
    assert server.picture(run(server, typed), save).shape == (height, 50, 3)


def test_a_latent_that_was_scaled_on_its_way_is_decoded_as_drawn(server, edit_graph, picture):  # noqa: F811
    nodes = edited(server, edit_graph, picture(1000, 700), size="as the edited picture")
    decode, save = server.find(nodes, "InternVLU_DecodeLatent"), server.find(nodes, "SaveImage")
    plain = server.picture(run(server, edited(server, edit_graph, picture(1000, 700))), save).shape
    scaled = {"samples": nodes[decode]["inputs"]["samples"], "upscale_method": "bilinear", "scale_by": 2.0}
    nodes["scaled"] = {"class_type": "LatentUpscaleBy", "inputs": scaled}
    nodes[decode]["inputs"]["samples"] = ["scaled", 0]
    assert server.picture(run(server, nodes), save).shape == (2 * plain[0], 2 * plain[1], 3)


def test_a_picture_with_more_than_4096_pixels_a_side_is_decoded_as_drawn(server, edit_graph, picture):  # noqa: F811
    nodes = edited(server, edit_graph, picture(4097, 40), size="as the edited picture")
    assert server.picture(run(server, nodes), server.find(nodes, "SaveImage")).shape[1] < 4097


def test_the_size_is_kept_by_cores_samplers(server, edit_graph, picture):  # noqa: F811
    nodes = edited(server, edit_graph, picture(100, 70), size="as the edited picture")
    sampler = nodes[server.find(nodes, "InternVLU_SampleLatent")]
    linked = {key: value for key, value in sampler["inputs"].items() if isinstance(value, list)}
    how = {"seed": 1, "steps": 1, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    sampler |= {"class_type": "KSampler", "inputs": linked | how}
    assert server.picture(run(server, nodes), server.find(nodes, "SaveImage")).shape == (70, 100, 3)


def test_eight_inputs_count_as_one_batch_of_eight(server, edit_graph, picture, golden):  # noqa: F811
    files = [picture(64, 64, seed) for seed in range(8)]
    nodes = edit_graph(golden("edit_one"), files=files, steps=1)
    save = server.find(nodes, "SaveImage")
    apart = server.picture(run(server, nodes), save)
    encode = nodes[server.find(nodes, "InternVLU_EncodePrompt")]["inputs"]
    whole = ["load0", 0]
    for i in range(1, 8):
        nodes[f"batch{i}"] = {"class_type": "ImageBatch", "inputs": {"image1": whole, "image2": [f"load{i}", 0]}}
        whole = [f"batch{i}", 0]
        del encode[f"image{i + 1}"]
    encode["image1"] = whole
    assert (server.picture(run(server, nodes), save) == apart).all()
    encode["image1"] = ["load0", 0]
    assert (server.picture(run(server, nodes), save) != apart).any()


@pytest.mark.parametrize("kind", ["InternVLU_EncodePrompt", "InternVLU_WriteThought", "InternVLU_AnswerQuestion"])
def test_more_than_64_pictures_are_refused_before_any_work(server, ask_graph, kind):  # noqa: F811
    nodes = ask_graph(kind, "x", max_new_tokens=1)
    for i, count in ((1, 60), (8, 5)):
        empty = {"width": 8, "height": 8, "batch_size": count, "color": 0}
        nodes[f"many{i}"] = {"class_type": "EmptyImage", "inputs": empty}
        nodes["text"]["inputs"][f"image{i}"] = [f"many{i}", 0]
    nodes["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}}
    told = server.error(server.run(nodes))
    assert "65 pictures found, 64 expected at most" in told


@pytest.mark.parametrize("task", ["as written", *QUESTIONS])
def test_a_task_asks_its_question(server, ask_graph, golden, task):  # noqa: F811
    """The nano model knows none of these questions; that it answers shows that they arrive."""
    files = golden("edit_one").images
    model = {"model_name": "internvl-u-nano", "precision": "fp32"}
    asked = ask_graph("InternVLU_AnswerQuestion", "what colour is it?", files, max_new_tokens=30, task=task)
    plain = "what colour is it?" if task == "as written" else f"{QUESTIONS[task]}\nwhat colour is it?"
    typed = ask_graph("InternVLU_AnswerQuestion", plain, files, max_new_tokens=30)
    answers = []
    for nodes in (asked, typed):
        nodes["model"]["inputs"] = model
        answers.append(run(server, nodes)["outputs"]["text"]["text"][0])
    assert answers[0] == answers[1] and answers[0]


@pytest.mark.parametrize(("count", "told"), [(16, 0), (17, 1)])
def test_many_pictures_in_a_question_are_told_of_on_the_node(native, loaded, monkeypatch, count, told):
    module, notes = importlib.import_module("pack.native.generate"), []
    monkeypatch.setattr(module, "show_note", lambda hidden, text: notes.append(text))
    monkeypatch.setattr(module, "show", lambda *given: None)
    monkeypatch.setattr(module, "write", lambda *given: ([], ""))
    pictures = [torch.zeros(count - 1, 8, 8, 3), None, torch.zeros(1, 8, 8, 3)]
    module.answer(loaded.mllm, "what?", "", pictures, GenerationConfig(1), None)
    assert len(notes) == told and all("17 pictures go in, 64 at most" in note for note in notes)


def page_workflow(mode, as_objects=False):
    link = {"id": 7, "origin_id": 2, "origin_slot": 0, "target_id": 3, "target_slot": 1, "type": "IMAGE"}
    inputs = [{"name": "mllm", "link": None}, {"name": "image1", "link": 7}, {"name": "image2", "link": None}]
    return {
        "nodes": [
            {"id": 2, "type": "LoadImage", "title": "Load Image", "mode": mode},
            {"id": 3, "type": "InternVLU_EncodePrompt", "mode": 0, "inputs": inputs},
        ],
        "links": [link if as_objects else list(link.values())],
    }


@pytest.mark.parametrize("as_objects", [False, True])
@pytest.mark.parametrize(("mode", "how"), [(0, None), (2, "muted"), (4, "bypassed")])
def test_a_picture_that_a_bypassed_node_keeps_back_is_told_of(native, mode, how, as_objects):
    module = importlib.import_module("pack.native.workflow")
    hidden = SimpleNamespace(unique_id="3", extra_pnginfo={"workflow": page_workflow(mode, as_objects)})
    told = module.unheard(hidden, ["image1", "image2"])
    expected = f"image1 is connected, but Load Image is {how}: nothing comes from there"
    assert told == ([expected] if how else [])
    assert module.unheard(hidden, ["image2"]) == []  # a bypassed node that hands its own input on


@pytest.mark.parametrize(
    "info",
    [None, {}, {"workflow": None}, {"workflow": {"nodes": 5}}, {"workflow": {"nodes": [{}], "links": []}}]
    + [{"workflow": {**page_workflow(4), "links": links}} for links in (None, [[]], [{}], [5])],
)
def test_a_workflow_of_another_form_is_left_alone(native, info):
    module = importlib.import_module("pack.native.workflow")
    for node in ("3", "5:3", "99"):
        assert module.unheard(SimpleNamespace(unique_id=node, extra_pnginfo=info), ["image1"]) == []


def test_an_edit_without_its_picture_is_told_of_in_the_log(server, ask_graph):  # noqa: F811
    nodes = {
        "1": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": "tiny", "precision": "fp32"}},
        "3": {"class_type": "InternVLU_EncodePrompt", "inputs": {"mllm": ["1", 1], "prompt": "turn it red, please"}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 2]}},
    }
    answer = server.post("/prompt", {"prompt": nodes, "extra_data": {"extra_pnginfo": {"workflow": page_workflow(4)}}})
    assert server.wait(answer["prompt_id"])["status"]["status_str"] == "success"
    assert "node 3: image1 is connected, but Load Image is bypassed" in server.log.read_text()


@pytest.mark.parametrize(
    ("length", "count", "places"),
    [(20, 8, [0, 3, 5, 8, 11, 14, 16, 19]), (5, 1, [2]), (5, 2, [0, 4]), (3, 8, [0, 1, 2]), (4, 4, [0, 1, 2, 3])],
)
def test_frames_are_picked_evenly_from_the_first_to_the_last(native, length, count, places):
    images = importlib.import_module("pack.native.images")
    picked, report = images.pick_frames(torch.arange(length).reshape(-1, 1, 1, 1), count)
    assert picked.flatten().tolist() == places and report == f"{len(places)} of {length} pictures"


@pytest.mark.parametrize(("answer", "right"), [("Yes.", True), ("yes, there is", True), ("是的", True), ("No", False)])
def test_a_judge_goes_by_how_the_answer_begins(native, monkeypatch, answer, right):
    module, notes = importlib.import_module("pack.native.judge"), []
    tokenizer = SimpleNamespace(decode=lambda ids: answer)
    encoder = SimpleNamespace(
        tokenizer=tokenizer, sizes=importlib.import_module("pack.internvl_u.images").ReferenceSizes()
    )
    model = SimpleNamespace(encoder=encoder, generate=lambda text, **settings: [len(settings["images"])])
    monkeypatch.setattr(module, "check_mllm", lambda model: None)
    monkeypatch.setattr(module, "LiveText", lambda *given: SimpleNamespace(end=lambda: None))
    monkeypatch.setattr(module, "show_note", lambda hidden, text: notes.append(text))
    assert module.judge(model, "is it?", torch.zeros(2, 8, 8, 3), None) == (right, answer)
    assert notes == [f"{'right' if right else 'not right'}: {answer}"]
