"""InternVL-U Chat and a history through the other nodes, in a running ComfyUI: judged by meaning on the nano model."""

import json

import pytest
from PIL import Image

pytest.importorskip("scipy")

from training.data.scenes import Scene, Thing
from training.eval import detector

NANO = "internvl-u-nano"
ALONE = "last picture alone"
BEFORE = Scene(
    64, 64, "white", (Thing("circle", "red", "medium", 0.25, 0.5), Thing("square", "blue", "medium", 0.75, 0.5))
)
TURNS = [
    ("draw", "a red circle to the left of a blue square", ("white", ["blue square", "red circle"])),
    ("answer", "what colour is the square?", "Blue"),
    ("answer", "how many shapes are there?", "2"),
    ("edit the last picture", "make the circle green", ("white", ["blue square", "green circle"])),
    ("answer", "which shape is green?", "Circle"),
    ("edit the last picture", "remove the square", ("white", ["green circle"])),
    ("answer", "how many shapes are there?", "1"),
    ("think and edit", "turn the circle pink", ("white", ["pink circle"])),
    ("edit the last picture", "make the background black", ("black", ["pink circle"])),
    ("answer", "what colour is the background?", "Black"),
]


def chat_graph(message, action="answer", model=NANO, picture=None, **values):
    """A graph of Load and Chat, with what comes out saved and shown."""
    nodes = {
        "load": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": model, "precision": "fp32"}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["chat", 1], "filename_prefix": "chat"}},
    }
    inputs = {"mllm": ["load", 1], "model": ["load", 0], "vae": ["load", 2], "message": message, "action": action}
    inputs |= {"reads": ALONE, "width": 0, "height": 0, "steps": 20, "seed": 0, "max_new_tokens": 100}
    inputs |= {"scales": "automatic", "all_cfg": 4.5, "part_cfg": 2.0}
    if picture:
        nodes["picture"] = {"class_type": "LoadImage", "inputs": {"image": picture}}
        inputs["image1"] = ["picture", 0]
    nodes["chat"] = {"class_type": "InternVLU_Chat", "inputs": inputs | values}
    return nodes


def said(server, graph):
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    return entry["outputs"]["chat"]["text"][0], entry["outputs"]["chat"]["chat"][0], entry


def gone_on(conversation, chat):
    """What the page keeps: the turns of the run after those before."""
    turns = json.loads(conversation)["turns"] if conversation else []
    assert chat["before"] == len(turns)
    return json.dumps({"turns": turns + json.loads(chat["turns"])["turns"]})


def file_of(server, name):
    path, _, folder = name.rpartition(" [")
    return server.base / folder.removesuffix("]") / path


def judged(server, name):
    reading = detector.detect(Image.open(file_of(server, name)))
    return reading.background, sorted(thing.name for thing in reading.things)


def judge(server, action, wanted, text, turn):
    if isinstance(wanted, str):
        return text == wanted
    return judged(server, turn["pictures"][-1]) == wanted


def talk_ten_turns(server, reads):
    conversation, right = "", []
    for seed, (action, message, wanted) in enumerate(TURNS):
        graph = chat_graph(message, action, reads=reads, conversation=conversation, seed=seed)
        text, chat, _ = said(server, graph)
        conversation = gone_on(conversation, chat)
        right.append(judge(server, action, wanted, text, json.loads(chat["turns"])["turns"][-1]))
    return conversation, right


def test_ten_turns_of_questions_and_edits_are_right(server):
    """With each message for itself and the last picture: the nano model has not learned conversations."""
    conversation, right = talk_ten_turns(server, ALONE)
    assert right == [True] * 10
    turns = json.loads(conversation)["turns"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 10
    assert [bool(turn.get("pictures")) for turn in turns[1::2]] == [action != "answer" for action, *_ in TURNS]
    assert "pink circle" in turns[15]["thought"]
