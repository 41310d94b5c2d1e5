"""Load InternVL-U LoRA in graphs of a running ComfyUI."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from pack.tests.lora_files import LANGUAGE_LAYERS, LAYERS, random_change
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def folder(server, checkpoint):
    """ComfyUI's folder of LoRAs with one for each half, one for both, and what is none."""
    folder = server.base / "models" / "loras"
    shapes = {}
    for file in checkpoint.glob("*/*.safetensors"):
        shapes |= {name.removeprefix("decoder."): tuple(one.shape) for name, one in load_file(file).items()}

    def tensors(layers, prefix, size=0.3):
        change = random_change(shapes, layers, size)
        return {
            f"{prefix}{layer}.lora_{letter}.weight": matrix
            for layer, pair in change.items()
            for letter, matrix in zip("BA", pair)
        }

    drawing, language = tensors(LAYERS, "transformer."), tensors(LANGUAGE_LAYERS, "base_model.model.")
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in drawing.items()}
    flux = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}
    files = {"drawing": drawing, "language": language, "both": drawing | language, "nan": nan, "flux": flux}
    for name, content in files.items():
        save_file(content, folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes((5).to_bytes(8, "little") + b'{"a":' + bytes(16))
    (folder / "a_pickle.pt").write_bytes(b"\x80\2}q\0.")
    return folder


@pytest.fixture
def with_loras(server, graph, golden, folder):
    """The shipped text_to_image with LoRA nodes in a row: (file, strength of the MODEL, of the MLLM) each."""

    def make(*loras):
        nodes = server.with_latent(graph("text_to_image", golden("t2i_square"), steps=3))
        load, encode, sample = (
            server.find(nodes, f"InternVLU_{kind}") for kind in ("LoadModel", "EncodePrompt", "SampleLatent")
        )
        model, mllm = [load, 0], [load, 1]
        for i, (name, strength_model, strength_mllm) in enumerate(loras):
            inputs = {"model": model, "mllm": mllm, "lora_name": f"{name}.safetensors"}
            inputs |= {"strength_model": strength_model, "strength_mllm": strength_mllm}
            nodes[f"lora{i}"] = {"class_type": "InternVLU_LoadLoRA", "inputs": inputs}
            model, mllm = [f"lora{i}", 0], [f"lora{i}", 1]
        nodes[sample]["inputs"]["model"], nodes[encode]["inputs"]["mllm"] = model, mllm
        return nodes

    return make


@pytest.fixture
def latent(server, with_loras):
    def run(*loras):
        return server.latent(server.run(with_loras(*loras)))

    return run


def test_two_in_a_row_add_up_and_0_is_as_if_there_were_none(latent, near):
    plain = latent()
    both = latent(("both", 0.5, 0.75))
    assert (both - plain).norm() / plain.norm() > 1e-2
    near(latent(("drawing", 0.5, 1.0), ("language", 1.0, 0.75)), both, 1e-6)
    near(latent(("language", -2.0, 0.75), ("drawing", 0.25, 3.0), ("drawing", 0.25, 0.0)), both, 1e-5)
    assert torch.equal(latent(("both", 0.0, 0.0)), plain)
    assert torch.equal(latent(("both", 0.5, 0.0), ("both", 0.0, 0.75)), latent(("both", 0.5, 0.75)))
    half = latent(("both", 0.0, 0.75))
    assert not torch.equal(half, plain) and not torch.equal(half, both)
    assert torch.equal(latent(), plain)


def test_what_fits_is_shown_on_the_node(server, with_loras):
    nodes = with_loras(("drawing", 0.5, 0.25))
    entry = server.run(nodes)
    (text,) = entry["outputs"]["lora0"]["text"]
    assert text == "drawing.safetensors: 4 layers of the MODEL at 0.5; all 8 keys fit"
    assert text in server.log.read_text()


def test_the_note_goes_to_the_page_that_queued_the_job(comfyui, monkeypatch):
    import server as comfy_server

    progress, sent = importlib.import_module("pack.native.progress"), []
    instance = SimpleNamespace(client_id="page", send_progress_text=lambda *event: sent.append(event))
    monkeypatch.setattr(comfy_server.PromptServer, "instance", instance, raising=False)
    hidden = SimpleNamespace(unique_id="7", dynprompt=None)
    progress.show_note(hidden, "all fits")
    instance.client_id = None  # a job that came from no page
    progress.show_note(hidden, "all fits")
    assert sent == [("all fits", "7", "page")]


def test_a_half_that_is_not_connected_stays_so(server, with_loras):
    nodes = with_loras(("drawing", 0.5, 1.0))
    load = server.find(nodes, "InternVLU_LoadModel")
    del nodes["lora0"]["inputs"]["mllm"]
    encode = server.find(nodes, "InternVLU_EncodePrompt")
    nodes[encode]["inputs"]["mllm"] = [load, 1]
    whole = server.latent(server.run(with_loras(("drawing", 0.5, 1.0))))
    assert torch.equal(server.latent(server.run(nodes)), whole)
    nodes[encode]["inputs"]["mllm"] = ["lora0", 1]
    assert "an MLLM of another kind (NoneType) found" in server.error(server.run(nodes))


@pytest.mark.parametrize(
    "name, told",
    [
        ("flux", "none of its 1 keys fits the MODEL or MLLM of InternVL-U"),
        ("nan", "8 of 8 tensors hold values that are infinite or not a number (NaN)"),
        ("broken", "is not readable as safetensors"),
    ],
)
def test_files_that_are_none_for_us_end_the_job_with_a_sentence(server, with_loras, name, told):
    assert told in server.error(server.run(with_loras((name, 1.0, 1.0))))


def test_pickles_are_not_offered_and_a_missing_file_is_named(server, folder, with_loras):
    options = server.get("/object_info/InternVLU_LoadLoRA")["InternVLU_LoadLoRA"]["input"]["required"]["lora_name"]
    assert "both.safetensors" in json.dumps(options) and "a_pickle" not in json.dumps(options)
    answer = server.queue(with_loras(("nowhere", 1.0, 1.0)))
    assert "nowhere.safetensors" in json.dumps(answer["node_errors"])


def test_a_file_that_was_replaced_is_read_again(server, folder, latent):
    first = latent(("drawing", 0.5, 1.0))
    content = load_file(folder / "drawing.safetensors")
    save_file({name: 2 * tensor for name, tensor in content.items()}, folder / "new.part")
    (folder / "new.part").replace(folder / "drawing.safetensors")
    assert not torch.equal(latent(("drawing", 0.5, 1.0)), first)
    save_file(content, folder / "new.part")
    (folder / "new.part").replace(folder / "drawing.safetensors")
    assert torch.equal(latent(("drawing", 0.5, 1.0)), first)
