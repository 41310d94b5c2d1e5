"""Values of a wrong kind over a link into each input of each node: one sentence at that node, and the server lives."""

import json
import math
from types import SimpleNamespace

import pytest

from .test_model_folders import graph

VALUES = {"None": None, "a str": "some text", "an int": 5, "a list": [1, 2], "a dict": {"a": 1}}
ASKED = {"max_new_tokens": 2, "how": "greedy", "temperature": 0.7, "top_p": 0.9, "beams": 3, "seed": 0}
PICTURES = {f"image{i}": ["picture", 0] for i in range(1, 9)}
CONDITIONS = {"model": ["load", 0], "positive": ["encode", 0], "negative": ["encode", 1]}
SCALES = {"all_cfg": 4.5, "part_cfg": 2.0}
SPEED = {"speed": "quality (official)"}
LESS = {"all_cfg_start": 0.0, "all_cfg_end": 1.0, "part_cfg_start": 0.0, "part_cfg_end": 1.0} | SPEED
NODES = {
    "InternVLU_LoadModel": {"model_name": "tiny", "precision": "fp32", "mllm_name": "auto", "vae_name": "auto"},
    "InternVLU_EncodePrompt": {"mllm": ["load", 1], "prompt": "a cat", "system_prompt": "", "vae": ["load", 2]}
    | {**PICTURES, "thought": "a black cat", "negative_prompt": "a dog", "reference_size": "official"}
    | {"history": ["history", 0]},
    "InternVLU_WriteThought": {"mllm": ["load", 1], "prompt": "a cat", **ASKED, "system_prompt": "", **PICTURES}
    | {"think": True, "budget": "custom", "history": ["history", 0]},
    "InternVLU_AnswerQuestion": {"mllm": ["load", 1], "question": "what?", **ASKED, "system_prompt": "", **PICTURES}
    | {"task": "as written", "history": ["history", 0]},
    "InternVLU_Chat": {"mllm": ["load", 1], "model": ["load", 0], "vae": ["load", 2], "message": "what?"}
    | {"action": "answer", "reads": "whole conversation", "width": 32, "height": 32, "steps": 1, "seed": 0}
    | {"max_new_tokens": 2, "scales": "automatic", **SCALES, **{f"image{i}": ["picture", 0] for i in range(1, 5)}}
    | {"history": ["history", 0], "conversation": ""},
    "InternVLU_AddToHistory": {"role": "user", "text": "hello", "history": ["history", 0], "image": ["picture", 0]},
    "InternVLU_CreateLatent": {"preset": "custom", "width": 32, "height": 32, "batch_size": 1},
    "InternVLU_SampleLatent": {
        **CONDITIONS,
        "latent_image": ["latent", 0],
        "seed": 0,
        "steps": 1,
        **SCALES,
        "denoise": 1.0,
        "scales": "automatic",
        **LESS,
    },
    "InternVLU_CreateGuider": {**CONDITIONS, **SCALES, "scales": "automatic", **LESS},
    "InternVLU_ScheduleSteps": {"steps": 4, "denoise": 1.0, **SPEED, "model": ["load", 0]},
    "InternVLU_DecodeLatent": {"vae": ["load", 2], "samples": ["drawn", 0], "width": 0, "height": 0}
    | {"size": "as drawn"},
    "InternVLU_ListPrompts": {"text": "a cat"},
    "InternVLU_ListScales": {"all_cfg": "4.5", "part_cfg": "2"},
    "InternVLU_PickFrames": {"images": ["picture", 0], "count": 1},
    "InternVLU_JudgePicture": {"mllm": ["load", 1], "image": ["picture", 0], "question": "is it red?"}
    | {"otherwise": ["picture", 0]},
    "InternVLU_SelectMLLMDevice": {"mllm": ["load", 1], "device": "cpu"},
    "InternVLU_LoadLoRA": {
        "model": ["load", 0],
        "mllm": ["load", 1],
        "lora_name": "both halves.safetensors",
        "strength_model": 1.0,
        "strength_mllm": 1.0,
    },
}
INPUTS = [(node, name) for node, inputs in NODES.items() for name in inputs]
OPTIONAL = {
    "system_prompt",
    "vae_name",
    "mllm_name",
    "thought",
    "negative_prompt",
    "reference_size",
    "size",
    "task",
    "history",
    "think",
    "budget",
    "conversation",
    *PICTURES,
}
NOT_CONNECTED = {
    "InternVLU_LoadLoRA": {"model", "mllm"},
    "InternVLU_Chat": {"model", "vae"},  # an answer needs neither
    "InternVLU_AddToHistory": {"image"},
    "InternVLU_SampleLatent": {"scales", *LESS},
    "InternVLU_CreateGuider": {"scales", *LESS},
    "InternVLU_ScheduleSteps": {"speed", "model"},
}
TEXTS = {"prompt", "question", "system_prompt", "thought", "negative_prompt", "text", "message"}
FILES = {"model_name", "mllm_name", "vae_name", "lora_name"}
# Widgets for which 5 is a good value.
FIVE = {
    "max_new_tokens",
    "beams",
    "seed",
    "batch_size",
    "count",
    "steps",
    "all_cfg",
    "part_cfg",
    "strength_model",
    "strength_mllm",
}


def around(node, name, value):
    """A graph of one node with what it needs, one of its inputs linked to a value."""
    encode = {"mllm": ["load", 1], "prompt": "a cat", "system_prompt": ""}
    sample = {**NODES["InternVLU_SampleLatent"], "seed": 1}
    return {
        "load": {"class_type": "InternVLU_LoadModel", "inputs": NODES["InternVLU_LoadModel"]},
        "encode": {"class_type": "InternVLU_EncodePrompt", "inputs": encode},
        "latent": {"class_type": "InternVLU_CreateLatent", "inputs": NODES["InternVLU_CreateLatent"]},
        "drawn": {"class_type": "InternVLU_SampleLatent", "inputs": sample},
        "picture": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": 255}},
        "history": {"class_type": "InternVLU_AddToHistory", "inputs": {"role": "user", "text": "hello"}},
        "value": {"class_type": "TestsValue", "inputs": {"value": json.dumps(value)}},
        "node": {"class_type": node, "inputs": NODES[node] | {name: ["value", 0]}},
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}},
    }


def is_good(node, name, value):
    if name == "otherwise":
        return True  # it is not looked at, but handed on to the node that follows, which does
    if value is None:
        # As if nothing were connected; to Encode a VAE is missing with pictures.
        return name in OPTIONAL or name in NOT_CONNECTED.get(node, ())
    if node == "InternVLU_ListScales":
        return False  # its numbers are texts, for there are several
    if isinstance(value, str):
        return name in TEXTS
    sized = {"InternVLU_DecodeLatent", "InternVLU_Chat"}
    fits = name in FIVE or (node in sized and name in {"width", "height"})
    return value == 5 and fits


def test_the_table_has_every_input_of_every_node(littered):
    info = littered.get("/object_info")
    ours = {name: node["input"] for name, node in info.items() if name.startswith("InternVLU_")}
    inputs = [
        (node, name)
        for node, given in ours.items()
        for kind in ("required", "optional")
        for name in given.get(kind, ())
    ]
    assert sorted(inputs) == sorted(INPUTS)
    assert len(INPUTS) * len(VALUES) == 690


@pytest.mark.parametrize("node, name", INPUTS)
def test_a_value_of_a_wrong_kind_over_a_link_ends_the_job_with_one_sentence(littered, node, name):
    for kind, value in VALUES.items():
        entry = littered.run(around(node, name, value))
        errors = [data for event, data in entry["status"]["messages"] if event == "execution_error"]
        if is_good(node, name, value):
            assert not errors, f"{kind}: {errors}"
            continue
        assert errors, f"{kind} was taken"
        (told,) = errors
        sentence = told["exception_message"].strip()
        assert told["node_id"] == "node"
        if kind == "a str" and name in FILES:  # the name of a file that is not there
            assert told["exception_type"] == "FileNotFoundError" and "no" in sentence.lower().split(), told
            continue
        assert told["exception_type"] == "ValueError", f"{kind}: {told}"
        assert "\n" not in sentence and "found" in sentence, f"{kind}: {sentence}"
        assert "expected" in sentence or "connect" in sentence, f"{kind}: {sentence}"
    assert littered.run(graph())["status"]["status_str"] == "success"


@pytest.fixture(scope="module")
def inputs(comfyui):
    import importlib

    from comfy_api.latest import io

    module = importlib.import_module("pack.nodes.inputs")
    number = {"default": 1, "min": 0, "max": 9}
    whole, real = io.Int.Input("steps", **number), io.Float.Input("all_cfg", **number)
    return SimpleNamespace(check=module.check_value, whole=whole, real=real, text=io.String.Input("prompt"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10, -1, "5", None, 1j, [5]])
def test_a_number_that_is_none_or_out_of_range_is_named(inputs, value):
    for one in (inputs.whole, inputs.real):
        with pytest.raises(ValueError, match=f"{one.id}: .* found, a .*number from 0 to 9 expected"):
            inputs.check(one, value)


def test_whole_numbers_of_any_type_are_taken_and_others_are_not(inputs):
    import numpy

    for value in (5, 5.0, numpy.int64(5), numpy.float32(5), True):
        found = inputs.check(inputs.whole, value)
        assert found == int(value) and type(found) is int
    with pytest.raises(ValueError, match="steps: 2.5 found, a whole number"):
        inputs.check(inputs.whole, 2.5)
    assert type(inputs.check(inputs.real, 5)) is float
    assert inputs.check(inputs.text, "") == ""
