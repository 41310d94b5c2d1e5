"""The nano model in every format that `convert` writes, in a running ComfyUI: it draws, edits, thinks and answers."""

import shutil

import pytest
from pack.internvl_u.convert import convert
from pack.internvl_u.defaults import FILE_DTYPES, GGUF_DTYPES

from .test_gguf import run, scene, seen

COARSE = {"fp8_e5m2", "Q4_K"}
"""Formats of which one case is not sure to be right: they have to run."""


@pytest.fixture(scope="module", params=[*FILE_DTYPES, *GGUF_DTYPES])
def nano(request, server, tmp_path_factory):
    """A format, and the names of the nano model's files in it where ComfyUI keeps models."""
    source = server.base / "models" / "InternVL-U" / "internvl-u-nano"
    made = convert(source.resolve(), tmp_path_factory.mktemp("nano"), request.param)
    for file in made:
        place = server.base / "models" / file.parent.name
        place.mkdir(exist_ok=True)
        shutil.copy(file, place / file.name)
    yield request.param, made
    for file in made:
        (server.base / "models" / file.parent.name / file.name).unlink()


@pytest.fixture
def nano_graph(shipped_graph, nano):
    def make(name, **values):
        values = {"model_name": nano[1][0].name, "preset": "custom", "width": 64, "height": 64} | values
        graph = shipped_graph(name, **values)
        for node in graph.values():
            if node["class_type"] == "InternVLU_DecodeLatent":
                node["inputs"] |= {"width": 0, "height": 0}
        return graph

    return make


def test_it_draws_edits_thinks_and_answers(server, nano, nano_graph):
    picture = scene(server)
    riddle = "a shape with three sides in the colour of grass, on a ground like the night"
    ask = nano_graph("ask_about_a_picture", question="what colour is the square?", image=picture)
    found = [
        seen(server, nano_graph("text_to_image", prompt="a red circle to the left of a blue square")),
        seen(server, nano_graph("edit", prompt="make the circle green", image=picture)),
        seen(server, nano_graph("think_then_draw", value=riddle)),
        {output["text"][0] for output in run(server, ask)["outputs"].values() if "text" in output},
    ]
    expected = [
        ("white", ["blue square", "red circle"]),
        ("white", ["blue square", "green circle"]),
        ("black", ["green triangle"]),
        {"Blue"},
    ]
    right = sum(one == other for one, other in zip(found, expected))
    assert right == 4 or (nano[0] in COARSE and right >= 2), found
