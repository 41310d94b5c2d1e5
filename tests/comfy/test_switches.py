"""What a graph does by itself: a thinking switch, scales that know of a thought, and choices that overrule numbers."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

WRITING = {"max_new_tokens": 8, "how": "greedy", "temperature": 0.7, "top_p": 0.9, "beams": 3, "seed": 0}
THOUGHT = "a green leaf in a hand"


@pytest.fixture
def no_page(comfyui, native, monkeypatch):
    """ComfyUI's server as it is for a job that came from no page."""
    import server as comfy_server

    monkeypatch.setattr(comfy_server.PromptServer, "instance", SimpleNamespace(client_id=None), raising=False)


@pytest.fixture
def drawn(server, graph, golden):
    """Draws text to image, with a thought over a link where one is given; returns the latent and the new log lines."""

    def run(name="text_to_image", thought=None, prompt=None, **values):
        nodes = server.with_latent(graph(name, golden("cot_t2i"), **values))
        encode = nodes[server.find(nodes, "InternVLU_EncodePrompt")]["inputs"]
        if prompt is not None:
            encode["prompt"] = prompt
        if thought is not None:
            nodes["thought"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": thought}}
            encode["thought"] = ["thought", 0]
        kinds = ("InternVLU_SampleLatent", "InternVLU_CreateGuider")
        (sampler,) = [node["inputs"] for node in nodes.values() if node["class_type"] in kinds]
        sampler.pop("scales", None)  # as graphs were before there was this choice
        sampler |= {key: value for key, value in values.items() if key == "scales"}
        before = len(server.log.read_text())
        latent = server.latent(server.run(nodes))
        return latent, server.log.read_text()[before:]

    return run


@pytest.mark.parametrize("name", ["text_to_image", "text_to_image_custom_sampling"])
def test_automatic_scales_are_the_official_ones_of_a_thought_and_say_so(drawn, name):
    typed, _ = drawn(name, THOUGHT, all_cfg=3.5, part_cfg=1.5)
    automatic, log = drawn(name, THOUGHT, scales="automatic")
    assert (automatic == typed).all()
    assert "prompt cfg 3.5 and picture cfg 1.5 taken (all_cfg, part_cfg), the official values" in log


def test_scales_that_a_user_has_typed_count_whatever_there_is(drawn):
    old, _ = drawn("text_to_image", THOUGHT)  # a prompt from before there was this choice
    as_typed, log = drawn("text_to_image", THOUGHT, scales="as typed")
    assert (as_typed == old).all() and "official values" not in log
    for typed in ({"all_cfg": 4.0}, {"part_cfg": 1.0, "all_cfg": 3.0}):
        plain, _ = drawn("text_to_image", THOUGHT, **typed)
        automatic, log = drawn("text_to_image", THOUGHT, scales="automatic", **typed)
        assert (automatic == plain).all() and "official values" not in log
    thought, _ = drawn("text_to_image", THOUGHT, scales="automatic")
    assert (thought != old).any()


def test_without_a_thought_automatic_scales_are_the_typed_ones(drawn):
    plain, _ = drawn("text_to_image")
    for thought in (None, ""):
        automatic, log = drawn("text_to_image", thought, scales="automatic")
        assert (automatic == plain).all() and "official values" not in log


def test_a_thought_that_is_the_prompt_of_a_bypassed_think_is_none(drawn):
    plain, _ = drawn("text_to_image", prompt="a cat on a mat")
    bypassed, log = drawn("text_to_image", " a cat on a mat ", prompt="a cat on a mat", scales="automatic")
    assert (bypassed == plain).all() and "official values" not in log
    other, _ = drawn("text_to_image", "a cat on a mat, red", prompt="a cat on a mat")
    assert (other != plain).any()


@pytest.mark.parametrize("linked", [False, True], ids=["typed", "over a link"])
def test_thinking_that_is_off_gives_an_empty_thought_and_loads_no_model(server, linked):
    nodes = {
        "model": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": "tiny", "precision": "fp32"}},
        "text": {
            "class_type": "InternVLU_WriteThought",
            "inputs": {"mllm": ["model", 1], "prompt": f"off {linked}", **WRITING, "think": False},
        },
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}},
    }
    if linked:
        nodes["switch"] = {"class_type": "PrimitiveBoolean", "inputs": {"value": False}}
        nodes["text"]["inputs"]["think"] = ["switch", 0]
    server.post("/free", {"unload_models": True, "free_memory": True})
    events, _ = server.listen(nodes)
    ran = [data["node"] for kind, data in events if kind == "executing"]
    assert "text" in ran and "model" not in ran
    texts = [data["output"]["text"] for kind, data in events if kind == "executed"]
    assert texts == [[""], [""]]
    nodes["text"]["inputs"]["think"] = True
    events, _ = server.listen(nodes)
    assert "model" in [data["node"] for kind, data in events if kind == "executing"]
    assert [data["output"]["text"] for kind, data in events if kind == "executed"][0] != [""]


def test_a_preset_overrules_typed_numbers_but_not_in_silence(server, graph, golden):
    def run(**size):
        nodes = {"size": {"class_type": "InternVLU_CreateLatent", "inputs": {"batch_size": 1, **size}}}
        nodes["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": ["size", 0], "filename_prefix": "latent"}}
        before = len(server.log.read_text())
        latent = server.latent(server.run(nodes))
        return tuple(latent.shape[-2:]), server.log.read_text()[before:]

    size, log = run(preset="1024 x 576", width=640, height=512)
    assert size == (72, 128) and "preset 1024 x 576 counts, 640 x 512 does not: choose custom for it" in log
    for values in ({"width": 1024, "height": 1024}, {"width": 1024, "height": 576}):
        size, log = run(preset="1024 x 576", **values)
        assert size == (72, 128) and "counts" not in log
    size, log = run(preset="custom", width=640, height=512)
    assert size == (64, 80) and "counts" not in log


def test_a_budget_limits_the_thought_and_says_what_it_overrules(no_page, caplog):
    inputs = importlib.import_module("pack.nodes.inputs")
    hidden = SimpleNamespace(unique_id="1", dynprompt=None, extra_pnginfo=None)
    with caplog.at_level("INFO", "internvl_u"):
        assert inputs.chosen_tokens("custom", 77, hidden) == 77
        assert inputs.chosen_tokens("official: 200", 200, hidden) == 200
        assert inputs.chosen_tokens("long: 1024", 200, hidden) == 1024  # the number was never touched
        assert caplog.messages == []
        assert inputs.chosen_tokens("long: 1024", 77, hidden) == 1024
    (told,) = caplog.messages
    assert "budget 'long: 1024' counts, max_new_tokens 77 does not: choose custom for it" in told
    with pytest.raises(ValueError, match="budget 'short' found, one of custom, official: 200, long: 1024 expected"):
        inputs.chosen_tokens("short", 77, hidden)


def test_the_bar_of_a_text_is_always_on_its_way_and_the_speed_is_told(comfyui, native):
    progress = importlib.import_module("pack.native.progress")
    shares = [progress.share_written(tokens, 1024) for tokens in range(1025)]
    assert shares == sorted(set(shares)) and shares[0] == 0 and shares[-1] == 1
    assert shares[100] == 0.5
    assert progress.share_written(3, 2) == 1
    assert progress.speed(1, 200, 0.0) == "1 of at most 200 tokens"
    assert progress.speed(51, 200, 10.0) == "51 of at most 200 tokens, 5 a second, at most 30 s left"
    assert progress.speed(51, 1024, 10.0).endswith("at most 3 min left")
    assert progress.speed(3, 8192, 10.0).endswith("at most 11.4 h left")


@pytest.mark.parametrize(
    ("workflow", "path", "expected"),
    [
        ({"nodes": [{"id": 7, "properties": {}}]}, "7", True),
        ({"nodes": [{"id": 7}]}, "7", True),
        (
            {
                "nodes": [{"id": 5, "type": "outer"}],
                "definitions": {
                    "subgraphs": [
                        {"id": "outer", "nodes": [{"id": 6, "type": "inner"}]},
                        {"id": "inner", "nodes": [{"id": 7, "properties": {}}]},
                    ]
                },
            },
            "5:6:7",
            True,
        ),
        ({"nodes": [{"id": 8}]}, "7", False),
        ({"nodes": [{"id": 5, "type": "gone"}]}, "5:7", False),
        ({"nodes": "none", "definitions": 3}, "7", False),
        ({"nodes": [3, None, {"id": 7, "properties": "none"}]}, "7", False),
        (None, "7", False),
    ],
)
def test_a_text_is_put_into_the_queued_workflow_where_its_node_is_found(no_page, workflow, path, expected):
    progress = importlib.import_module("pack.native.progress")
    hidden = SimpleNamespace(unique_id=path, dynprompt=None, extra_pnginfo={"workflow": workflow})
    progress.show(hidden, "a thought", "cut")
    assert (f"{progress.TEXT}': 'a thought'" in repr(workflow)) == expected
