"""InternVL-U Chat and a history through the other nodes, in a running ComfyUI: judged by meaning on the nano model."""

import importlib
import json

import pytest
from PIL import Image

pytest.importorskip("scipy")

from training.data import scenes
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


def chat_graph(message, action="answer", model_name=NANO, picture=None, **values):
    """A graph of Load and Chat, with what comes out saved and shown."""
    nodes = {
        "load": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": model_name, "precision": "fp32"}},
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


def test_the_last_text_and_picture_come_again_without_a_message(server):
    _, drawing, first = said(server, chat_graph("a red circle", "draw", seed=1))
    conversation = gone_on("", drawing)
    text, chat, entry = said(server, chat_graph("", conversation=conversation))
    assert (text, chat["turns"], chat["before"]) == ("", '{"turns": []}', 2)
    assert (server.picture(entry, "save") == server.picture(first, "save")).all()


def test_before_the_first_picture_nothing_runs_on(server):
    text, chat, entry = said(server, chat_graph("how many shapes are there?", "answer"))
    assert "save" not in entry["outputs"] and json.loads(chat["turns"])["turns"][1]["text"] == text


def test_a_run_is_a_function_of_its_inputs(server):
    """Pictures are named by their values, so that a conversation given again by hand is the same one."""
    graphs = [chat_graph("a blue star", "draw", seed=5) for _ in range(2)]
    graphs[1]["chat"]["inputs"]["conversation"] = '{"turns": []}'  # another key for ComfyUI's cache
    first, second = (said(server, graph)[1]["turns"] for graph in graphs)
    assert first == second and "InternVL-U/chat/" in first
    file = file_of(server, json.loads(first)["turns"][1]["pictures"][0])
    assert file.parent == server.base / "output" / "InternVL-U" / "chat"
    assert not [one for one in file.parent.iterdir() if one.suffix != ".png"]


@pytest.fixture
def before_png(server):
    scenes.render(BEFORE).save(server.base / "input" / "before.png")
    return "before.png"


def test_a_connected_picture_is_shown_once_and_can_be_asked_about_and_edited(server, before_png):
    conversation = ""
    steps = (
        ("answer", "what colour is the square?", "Blue"),
        ("edit the last picture", "make the circle green", ("white", ["blue square", "green circle"])),
        ("answer", "which shape is green?", "Circle"),
    )
    for action, message, wanted in steps:
        graph = chat_graph(message, action, picture=before_png, conversation=conversation)
        text, chat, _ = said(server, graph)
        conversation = gone_on(conversation, chat)
        assert judge(server, action, wanted, text, json.loads(chat["turns"])["turns"][-1])
    turns = json.loads(conversation)["turns"]
    assert ["pictures" in turn for turn in turns] == [True, False, False, True, False, False]
    graph = chat_graph("<image> what colour is the circle?", "answer", picture=before_png, conversation=conversation)
    text, chat, _ = said(server, graph)
    assert text == "Red" and json.loads(chat["turns"])["turns"][0]["pictures"] == turns[0]["pictures"]


def test_the_picture_has_the_typed_size_and_scales(server):
    sizes = {"width": 96, "height": 64, "steps": 2}
    entries = [
        said(server, chat_graph("a red circle", "draw", **sizes, **more))[2]
        for more in ({}, {"all_cfg": 1.0}, {"all_cfg": 1.0, "scales": "as typed"})
    ]
    automatic, ignored, typed = (server.picture(entry, "save") for entry in entries)
    assert automatic.shape == (64, 96, 3)
    assert (automatic == ignored).all() and (automatic != typed).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"action": "edit the last picture"}, "no picture found to edit"),
        ({"action": "draw", "model": None}, "no MODEL or no VAE found"),
        ({"action": "think and draw", "vae": None}, "no MODEL or no VAE found"),
        ({"conversation": "[1]"}, "holds a list, a JSON object expected"),
        ({"conversation": '{"turns": [{"role": "user", "pictures": ["none.png [output]"]}]}'}, "cannot be opened"),
        ({"conversation": '{"turns": [{"role": "user", "pictures": ["../../x.png [temp]"]}]}'}, "one inside ComfyUI"),
        ({"conversation": '{"turns": [{"role": "user", "pictures": ["x.png [models]"]}]}'}, "or [temp] expected"),
        ({"history": ["load", 2]}, "a history expected"),
    ],
)
def test_a_message_that_cannot_be_answered_ends_with_a_sentence(server, values, message):
    graph = chat_graph("make it blue", **values)
    if "history" in values:  # over a link of any type
        graph["any"] = {"class_type": "PreviewAny", "inputs": {"source": ["chat", 0]}}
    graph["chat"]["inputs"] = {key: value for key, value in graph["chat"]["inputs"].items() if value is not None}
    answer = server.queue(graph)
    if "prompt_id" not in answer:
        assert "history" in values and "mismatch" in json.dumps(answer)
        return
    entry = server.wait(answer["prompt_id"])
    assert entry["status"]["status_str"] == "error" and message in server.error(entry)


def test_the_page_is_told_while_it_writes_and_which_turns_came(server):
    events, previews = server.listen(chat_graph("a star with five points", "think and draw", seed=11))
    told = [data for kind, data in events if kind == "internvl_u.chat"]
    written = [data["text"] for kind, data in events if kind == "internvl_u.text"]
    assert written and previews
    (chat,) = told
    assert chat["node"] == "chat" and chat["before"] == 0 and len(json.loads(chat["turns"])["turns"]) == 2


def test_a_conversation_out_of_single_nodes_is_the_one_of_chat(server, before_png):
    """Encode adds the prompt, Add to History the picture, Answer both turns; Think adds nothing."""
    graph = chat_graph("is there a green star?", "answer", reads="whole conversation")
    writing = {"max_new_tokens": 40, "how": "greedy", "temperature": 0.7, "top_p": 0.9, "beams": 3, "seed": 0}
    ours = {
        "picture": ("LoadImage", {"image": before_png}),
        "think": ("InternVLU_WriteThought", {"mllm": ["load", 1], "prompt": "a red circle", **writing}),
        "encode": (
            "InternVLU_EncodePrompt",
            {"mllm": ["load", 1], "prompt": "a red circle", "thought": ["think", 0], "history": ["think", 1]},
        ),
        "drawn": (
            "InternVLU_AddToHistory",
            {"role": "assistant", "text": "", "history": ["encode", 3], "image": ["picture", 0]},
        ),
        "ask": (
            "InternVLU_AnswerQuestion",
            {"mllm": ["load", 1], "question": "how many?", "history": ["drawn", 0], **writing},
        ),
        "said": ("InternVLU_AddToHistory", {"role": "user", "text": "well", "history": ["ask", 1]}),
    }
    graph |= {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in ours.items()}
    graph["chat"]["inputs"]["history"] = ["said", 0]
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    # Chat's own box begins after the history, and its picture output is the one of the history.
    assert entry["outputs"]["chat"]["chat"][0]["before"] == 0
    assert (server.picture(entry, "save") == scenes.render(BEFORE)).all()


@pytest.fixture
def single_nodes(native):
    return importlib.import_module("pack.native.chat"), importlib.import_module("pack.native.generate")


class Unshown:
    """A text that no page shows."""

    def __init__(self, *_):
        pass

    def __call__(self, ids):
        pass

    def end(self):
        pass


def test_what_single_nodes_add_to_a_history(loaded, single_nodes, monkeypatch):
    chat, generate = single_nodes
    library = importlib.import_module("pack.internvl_u.chat")
    config = importlib.import_module("pack.internvl_u.generation").GenerationConfig(3)
    monkeypatch.setattr(generate, "LiveText", Unshown)
    for name in ("show", "show_note"):
        monkeypatch.setattr(generate, name, lambda *_: None)
    hidden = type("Hidden", (), {"unique_id": "1"})()
    picture = chat.as_image(scenes.render(BEFORE))
    before = chat.add_turn(None, "user", "look", [picture, None])
    thought = generate.think(loaded.mllm, "a cat", None, [], config, hidden, before)
    assert thought.history == before
    answer = generate.answer(loaded.mllm, "what?", "Talk.", [picture], config, hidden, before)
    asked, replied = answer.history.turns[1:]
    assert (asked.text, asked.pictures[0].image) == ("what?", scenes.render(BEFORE))
    assert replied == library.Turn("assistant", answer.text)
    assert generate.answer(loaded.mllm, "what?", "Talk.", [], config, hidden).history.turns[0].text == "what?"
    with pytest.raises(ValueError, match="neither a text nor a picture found"):
        chat.add_turn(None, "user", " ", [None])
    with pytest.raises(ValueError, match="a value of type str found, a history expected"):
        chat.add_turn("no history", "user", "hello", [])
