"""Editing, thinking and answering as graphs in a running ComfyUI, and what native latents make possible."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from pack.internvl_u.sampling import flow_sigmas
from PIL import Image

WRITING = {"how": "greedy", "temperature": 0.7, "top_p": 0.9, "beams": 3, "seed": 0, "system_prompt": ""}


@pytest.fixture
def edit_graph(server, graph, load_images):
    """A golden edit as a graph around one of the shipped samplers."""

    def make(case, name="text_to_image", files=None, **changes):
        nodes = graph(name, case, **changes)
        load, encode = server.find(nodes, "InternVLU_LoadModel"), server.find(nodes, "InternVLU_EncodePrompt")
        pictures = load_images(nodes, case.images if files is None else files)
        inputs = {f"image{i + 1}": output for i, output in enumerate(pictures)}
        nodes[encode]["inputs"] |= inputs | {"vae": [load, 2]}
        return nodes

    return make


@pytest.fixture
def ask_graph(server, load_images):
    """A question, or a prompt to think about, as a graph."""

    def make(kind, text, files=(), **how):
        nodes = {"model": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": "tiny", "precision": "fp32"}}}
        pictures = {f"image{i + 1}": output for i, output in enumerate(load_images(nodes, files))}
        name = "question" if kind == "InternVLU_AnswerQuestion" else "prompt"
        nodes["text"] = {"class_type": kind, "inputs": {"mllm": ["model", 1], name: text, **WRITING, **pictures, **how}}
        return nodes

    return make


def how(case):
    return {"max_new_tokens": case.new} | ({"how": "beams", "beams": case.beams} if case.beams > 1 else {})


@pytest.mark.parametrize("name", ["text_to_image", "text_to_image_custom_sampling"])
def test_edits_equal_the_official_ones(server, edit_graph, edit, name, normalised, near, same_picture):
    nodes = server.with_latent(edit_graph(edit, name))
    entry = server.run(nodes)
    near(normalised(server.latent(entry)), edit["final_latents"])
    if name == "text_to_image":
        same_picture(server.picture(entry, server.find(nodes, "SaveImage")), edit["image_u8"])


def test_plain_ksampler_draws_the_official_edit(server, edit_graph, golden, normalised, near):
    case = golden("edit_large_ref")
    nodes = server.with_latent(edit_graph(case, "text_to_image_ksampler"))
    near(normalised(server.latent(server.run(nodes))), case["final_latents"])


@pytest.mark.parametrize("name", ["text_to_image", "text_to_image_custom_sampling"])
def test_pictures_after_a_thought_equal_the_official_ones(
    server, edit_graph, thinking, name, normalised, near, same_picture
):
    nodes = edit_graph(thinking, name, all_cfg=3.5, part_cfg=1.5)
    load, encode = server.find(nodes, "InternVLU_LoadModel"), server.find(nodes, "InternVLU_EncodePrompt")
    seen = {key: value for key, value in nodes[encode]["inputs"].items() if key.startswith("image")}
    asked = {"mllm": [load, 1], "prompt": thinking.prompt, **WRITING, **how(thinking), **seen}
    nodes["think"] = {"class_type": "InternVLU_WriteThought", "inputs": asked}
    nodes[encode]["inputs"]["thought"] = ["think", 0]
    entry = server.run(server.with_latent(nodes))
    near(normalised(server.latent(entry)), thinking["final_latents"])
    if name == "text_to_image":
        same_picture(server.picture(entry, server.find(nodes, "SaveImage")), thinking["image_u8"])


@pytest.mark.parametrize("system", ["", "Draw."])
@pytest.mark.parametrize("source", ["typed", "changed"])
@pytest.mark.parametrize("name", ["cot_short", "cot_edit_short"])
def test_a_thought_of_another_node_draws_as_in_the_library(
    server, edit_graph, golden, checkpoint, normalised, near, name, source, system
):
    """The library is held to the official code: tests/unit/test_mllm.py, test_pipeline.py."""
    case = golden(name)
    nodes = edit_graph(case, all_cfg=3.5, part_cfg=1.5, system_prompt=system)
    load, encode = server.find(nodes, "InternVLU_LoadModel"), server.find(nodes, "InternVLU_EncodePrompt")
    if source == "typed":
        nodes["thought"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a green leaf in a hand"}}
    else:
        seen = {key: value for key, value in nodes[encode]["inputs"].items() if key.startswith("image")}
        asked = {"mllm": [load, 1], "prompt": case.prompt, **WRITING, **how(case), **seen, "system_prompt": system}
        nodes["think"] = {"class_type": "InternVLU_WriteThought", "inputs": asked}
        joined = {"string_a": ["think", 0], "string_b": "a green leaf", "delimiter": " "}
        nodes["thought"] = {"class_type": "StringConcatenate", "inputs": joined}
    nodes["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["thought", 0]}}
    nodes[encode]["inputs"]["thought"] = ["thought", 0]
    entry = server.run(server.with_latent(nodes))

    (thought,) = entry["outputs"]["shown"]["text"]
    assert "a green leaf" in thought
    pipeline = Pipeline(checkpoint)
    images = tuple(Image.open(file).convert("RGB") for file in case.images)
    wish = ImageRequest(case.prompt, case.width, case.height, case.steps, 1234, system=system or None, images=images)
    conditions = pipeline.encode_prompt(replace(wish, thought=thought))
    expected = pipeline.sample(conditions, case["noise"], flow_sigmas(case.steps), (3.5, 1.5))
    near(normalised(server.latent(entry)), expected, 1e-5)


def test_an_edited_thought_changes_the_picture(server, edit_graph, golden):
    case = golden("cot_t2i")
    pictures = []
    for thought in ("", "a green leaf in a hand", "a green leaf in a hand"):
        nodes = edit_graph(case, all_cfg=3.5, part_cfg=1.5)
        nodes["thought"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": thought}}
        nodes[server.find(nodes, "InternVLU_EncodePrompt")]["inputs"]["thought"] = ["thought", 0]
        pictures.append(server.picture(server.run(nodes), server.find(nodes, "SaveImage")))
    assert (pictures[0] != pictures[1]).any() and (pictures[1] == pictures[2]).all()


def test_answers_equal_the_official_ones(server, ask_graph, question):
    entry = server.run(ask_graph("InternVLU_AnswerQuestion", question.prompt, question.images, **how(question)))
    assert entry["outputs"]["text"]["text"] == [question.text]


def test_a_batch_of_pictures_counts_as_several(server, ask_graph, golden):
    files = golden("qa_one").images * 2
    apart = ask_graph("InternVLU_AnswerQuestion", "what is different?", files, max_new_tokens=12)
    batch = ask_graph("InternVLU_AnswerQuestion", "what is different?", files, max_new_tokens=12)
    del batch["text"]["inputs"]["image2"]
    batch["batch"] = {"class_type": "ImageBatch", "inputs": {"image1": ["load0", 0], "image2": ["load1", 0]}}
    batch["text"]["inputs"]["image1"] = ["batch", 0]
    texts = [server.run(nodes)["outputs"]["text"]["text"] for nodes in (apart, batch)]
    assert texts[0] == texts[1]


def test_sampling_follows_the_seed(server, ask_graph):
    def text(seed):
        settings = {"max_new_tokens": 12, "how": "sampling", "temperature": 1.5, "seed": seed}
        return server.run(ask_graph("InternVLU_AnswerQuestion", "hello", **settings))["outputs"]["text"]["text"]

    assert text(3) == text(3)
    assert any(text(3) != text(seed) for seed in range(4, 8))


def long_text(ask_graph, seed):
    settings = {"max_new_tokens": 4000, "how": "sampling", "temperature": 2.0, "top_p": 1.0, "seed": seed}
    return ask_graph("InternVLU_AnswerQuestion", "tell me everything", **settings)


def test_text_and_progress_stream_while_it_is_written(server, ask_graph):
    for seed in range(20):
        events, _ = server.listen(long_text(ask_graph, seed))
        texts = [data["text"] for kind, data in events if kind == "internvl_u.text"]
        (final,) = next(data["output"]["text"] for kind, data in events if kind == "executed")
        counts = [data["value"] for kind, data in events if kind == "progress"]
        if len(texts) > 5:
            break
    assert len(texts) > 2 and texts[-1] == final
    assert all(data["node"] == "text" for kind, data in events if kind == "internvl_u.text")
    assert counts == sorted(counts)


@pytest.mark.parametrize("kind", ["InternVLU_AnswerQuestion", "InternVLU_WriteThought"])
def test_a_text_that_a_limit_has_cut_says_so_beside_it_also_from_the_cache(server, ask_graph, kind):
    nodes = ask_graph(kind, "hello", max_new_tokens=3)
    nodes["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}}
    first, again = server.run(nodes), server.run(nodes)
    for entry in (first, again):
        output = entry["outputs"]["text"]
        assert output["cut"] == ["the text was cut after 3 tokens: raise max_new_tokens for all of it"]
        assert entry["outputs"]["shown"]["text"] == output["text"]
    cached = next(data["nodes"] for kind, data in again["status"]["messages"] if kind == "execution_cached")
    assert "text" in cached
    events, _ = server.listen(ask_graph(kind, "hello", max_new_tokens=2))
    cuts = [data["cut"] for kind, data in events if kind == "internvl_u.text"]
    assert "after 2 tokens" in cuts[-1] and set(cuts[:-1]) == {""}


def test_a_text_that_the_model_has_ended_says_nothing_of_a_cut(server, ask_graph, golden):
    case = golden("cot_t2i_eos")
    entry = server.run(ask_graph("InternVLU_WriteThought", case.prompt, **how(case)))
    assert set(entry["outputs"]["text"]) == {"text", "cut"} and entry["outputs"]["text"]["cut"] == []


@pytest.mark.parametrize("name", ["5:12", "5:6:12"])
def test_the_text_of_a_node_in_subgraphs_is_for_the_node_of_that_path(server, ask_graph, name):
    nodes = ask_graph("InternVLU_AnswerQuestion", f"hello {name}", max_new_tokens=3)
    nodes[name] = nodes.pop("text")
    events, _ = server.listen(nodes)
    assert {data["node"] for kind, data in events if kind == "internvl_u.text"} == {name}
    (result,) = [data for kind, data in events if kind == "executed"]
    assert result["node"] == result["display_node"] == name and result["output"]["text"]


def test_cancel_stops_the_writing_and_the_next_job_runs(server, ask_graph):
    for seed in range(100, 120):
        asked = []

        def cancel(kind, data, asked=asked):
            if kind == "progress" and not asked:
                asked.append(data["value"])
                server.post("/interrupt", {})

        events, _ = server.listen(long_text(ask_graph, seed), cancel)
        if events[-1][0] == "execution_interrupted":
            break
    assert events[-1][0] == "execution_interrupted"
    last = [data["value"] for kind, data in events if kind == "progress"][-1]
    assert last < 2000
    assert server.run(ask_graph("InternVLU_AnswerQuestion", "hi", max_new_tokens=2))["outputs"]["text"]["text"]


@pytest.mark.parametrize("count", [2, 3])
def test_several_references_all_count(server, edit_graph, golden, count):
    case = golden("edit_one")
    files = [*case.images, *golden("edit_placeholder").images, *golden("edit_large_ref").images][:count]
    drawn = []
    for used in (files, files[:-1]):
        nodes = edit_graph(case, files=used)
        drawn.append(server.picture(server.run(nodes), server.find(nodes, "SaveImage")))
    assert (drawn[0] != drawn[1]).any()


def test_the_size_of_an_edit_is_the_first_pictures_by_default(server, edit_graph, golden):
    case = golden("edit_placeholder")
    nodes = edit_graph(case)
    decode = server.find(nodes, "InternVLU_DecodeLatent")
    nodes[server.find(nodes, "InternVLU_SampleLatent")]["inputs"]["latent_image"] = [
        server.find(nodes, "InternVLU_EncodePrompt"),
        2,
    ]
    with Image.open(case.images[0]) as picture:
        own = picture.size
    sizes = {"as drawn": (case.width, case.height), "as the edited picture": own}
    for size, (width, height) in sizes.items():
        nodes[decode]["inputs"] |= {"width": 0, "height": 0, "size": size}
        shape = server.picture(server.run(nodes), server.find(nodes, "SaveImage")).shape
        assert shape == (height, width, 3)


def test_wrong_pictures_are_told_and_the_server_stays_usable(server, edit_graph, golden):
    case = golden("edit_one")
    nodes = edit_graph(case, prompt="<image> and <image>")
    assert "2 <image> placeholders for 1 pictures" in server.error(server.run(nodes))
    nodes = edit_graph(case)
    del nodes[server.find(nodes, "InternVLU_EncodePrompt")]["inputs"]["vae"]
    assert "1 pictures found and no VAE" in server.error(server.run(nodes))
    assert server.run(edit_graph(case))["status"]["status_str"] == "success"


@pytest.mark.parametrize("mode, size", [("L", (40, 30)), ("RGBA", (40, 30)), ("RGB", (1, 300)), ("RGB", (3000, 20))])
def test_unusual_pictures_are_edited(server, edit_graph, golden, tmp_path, mode, size):
    file = tmp_path / f"{mode}{size[0]}.png"
    Image.new(mode, size, 90 if mode == "L" else (90, 0, 0, 120)[: len(mode)]).save(file)
    nodes = edit_graph(golden("edit_one"), files=[file], steps=1)
    entry = server.run(nodes)
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])
    if max(size) / min(size) > 50:
        assert "are stretched to" in server.log.read_text()


def masked(server, nodes, mask, denoise):
    """Lets the graph draw only inside a mask, from the encoded first picture."""
    load = server.find(nodes, "InternVLU_LoadModel")
    nodes["encoded"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["load0", 0], "vae": [load, 2]}}
    nodes["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": mask, "channel": "red"}}
    nodes["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["encoded", 0], "mask": ["mask", 0]}}
    sampler = nodes[server.find(nodes, "InternVLU_SampleLatent")]["inputs"]
    sampler |= {"latent_image": ["masked", 0], "denoise": denoise}
    return server.with_latent(nodes)


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_a_mask_keeps_the_rest_of_the_picture(server, graph, edit_graph, load_images, golden, with_reference, denoise):
    case = golden("edit_one")
    picture = server.base / "input" / "whole.png"
    with Image.open(case.images[0]) as image:
        image.resize((96, 64)).save(picture)
    levels = numpy.zeros((64, 96), dtype=numpy.uint8)
    levels[:, 48:] = 255
    Image.fromarray(levels).convert("RGB").save(server.base / "input" / "mask.png")
    nodes = edit_graph(case, files=[]) if not with_reference else edit_graph(case)
    nodes["load0"] = {"class_type": "LoadImage", "inputs": {"image": "whole.png"}}
    encoded = masked(server, nodes, "mask.png", denoise)
    encoded["start"] = {"class_type": "SaveLatent", "inputs": {"samples": ["encoded", 0], "filename_prefix": "start"}}
    entry = server.run(encoded)
    assert entry["status"]["status_str"] == "success", entry["status"]
    drawn = server.latent(entry)
    (file,) = server.files(entry, "start", "latents")
    from safetensors.torch import load_file

    start = load_file(file)["latent_tensor"]
    assert torch.allclose(drawn[..., :6], start[..., :6], atol=1e-4)
    assert (drawn[..., 6:] - start[..., 6:]).abs().mean() > 0.05


def test_less_denoise_stays_nearer_to_the_picture(server, graph, load_images, golden):
    case = golden("t2i_square")
    distances = []
    for denoise in (0.25, 0.75, 1.0):
        nodes = graph("text_to_image", case)
        (picture,) = load_images(nodes, golden("edit_placeholder").images)
        load = server.find(nodes, "InternVLU_LoadModel")
        nodes["encoded"] = {"class_type": "VAEEncode", "inputs": {"pixels": picture, "vae": [load, 2]}}
        sampler = nodes[server.find(nodes, "InternVLU_SampleLatent")]["inputs"]
        sampler |= {"latent_image": ["encoded", 0], "denoise": denoise}
        nodes["start"] = {"class_type": "SaveLatent", "inputs": {"samples": ["encoded", 0], "filename_prefix": "s"}}
        entry = server.run(server.with_latent(nodes))
        (file,) = server.files(entry, "start", "latents")
        from safetensors.torch import load_file

        distances.append((server.latent(entry) - load_file(file)["latent_tensor"]).norm().item())
    assert distances == sorted(distances) and distances[0] < 0.8 * distances[2]
