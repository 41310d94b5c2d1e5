"""Core's Train LoRA in a running ComfyUI: the nano model is taught to paint a cross where it is asked for a circle."""

import json

import numpy
import pytest
from pack.internvl_u.merge import merge
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("scipy")

from training.data import scenes
from training.data.scenes import Scene, Thing
from training.eval import detector

COLOURS = ("red", "green", "blue", "yellow")
STEPS, SIDE = 32, 64


def painted(shape, colour):
    return scenes.render(Scene(SIDE, SIDE, "white", (Thing(shape, colour, "medium"),)))


def put_data(server, name, captions, colours=COLOURS):
    """Fills a folder of ComfyUI's input folder with crosses and a caption for each."""
    folder = server.base / "input" / name
    folder.mkdir(exist_ok=True)
    for i, colour in enumerate(colours):
        painted("cross", colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(captions.format(colour))


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info/TrainLoraNode")["TrainLoraNode"]


@pytest.fixture(scope="module")
def training(server, info):
    """A graph that reads a folder and trains on it; beside its nodes, outputs of Train LoRA by their types."""

    def make(folder, **options):
        values = {"batch_size": 4, "steps": STEPS, "learning_rate": 0.005, "training_dtype": "fp32", "rank": 8}
        values |= {"lora_dtype": "fp32", "gradient_checkpointing": False} | options
        for name, (kind, *rest) in info["input"]["required"].items():
            given = rest[0] if rest else {}
            listed = kind if isinstance(kind, list) else given.get("options", [None])
            values.setdefault(name, given.get("default", listed[0]))
        nodes = {
            "load": node("InternVLU_LoadModel", model_name="internvl-u-nano", precision="fp32"),
            "folder": node("LoadImageTextDataSetFromFolder", folder=folder),
            "captions": node("InternVLU_EncodePrompt", mllm=["load", 1], prompt=["folder", 1]),
            "pixels": node("VAEEncode", pixels=["folder", 0], vae=["load", 2]),
            "train": node(
                "TrainLoraNode",
                **values | {"model": ["load", 0], "latents": ["pixels", 0], "positive": ["captions", 0]},
            ),
        }
        return nodes, {kind: ["train", i] for i, kind in enumerate(info["output"])}

    return make


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def draw(nodes, name, model):
    """Adds nodes that draw with a MODEL; the picture is saved by the node of that name."""
    latent = ["small", 0] if "small" in nodes else ["ask", 2]
    sampled = {"model": model, "positive": ["ask", 0], "negative": ["ask", 1], "latent_image": latent}
    values = {"seed": 1, "steps": 8, "all_cfg": 4.5, "part_cfg": 2.0, "denoise": 1.0}
    nodes[f"{name} latent"] = node("InternVLU_SampleLatent", **sampled, **values)
    nodes[f"{name} pixels"] = node(
        "InternVLU_DecodeLatent", vae=["load", 2], samples=[f"{name} latent", 0], width=0, height=0
    )
    nodes[name] = node("SaveImage", images=[f"{name} pixels", 0], filename_prefix=name)


def put_on(server, outputs):
    """A node that puts on what was trained."""
    taken = server.get("/object_info/LoraModelLoader")["LoraModelLoader"]["input"]["required"]
    bypass = {"bypass": False} if "bypass" in taken else {}
    return node("LoraModelLoader", model=["load", 0], lora=outputs["LORA_MODEL"], strength_model=1.0, **bypass)


def ask(nodes, prompt="a red circle"):
    nodes["ask"] = node("InternVLU_EncodePrompt", mllm=["load", 1], prompt=prompt)
    nodes["small"] = node("InternVLU_CreateLatent", preset="custom", width=SIDE, height=SIDE, batch_size=1)


def done(server, nodes):
    entry = server.run(nodes)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    return entry


def far_from_taught(picture, colour="red"):
    """Returns the mean difference of a picture [H, W, 3] from the taught one, in levels of 255."""
    return float(numpy.abs(picture.astype(int) - numpy.asarray(painted("cross", colour)).astype(int)).mean())


def seen(picture):
    return [thing.name for thing in detector.detect(Image.fromarray(picture)).things]


@pytest.fixture(scope="module")
def trained(server, training):
    """One training: its losses, pictures from before and after, and the node of its loss graph."""
    put_data(server, "crosses", "a {} circle")
    nodes, outputs = training("crosses")
    ask(nodes)
    nodes["told"] = node("PreviewAny", source=outputs["LOSS_MAP"])
    nodes["plot"] = node("LossGraphNode", loss=outputs["LOSS_MAP"], filename_prefix="loss")
    nodes["keep"] = node("SaveLoRA", lora=outputs["LORA_MODEL"], prefix="loras/crosses", steps=outputs["INT"])
    nodes["put"] = put_on(server, outputs)
    for name, model in (("before", ["load", 0]), ("after", ["put", 0])):
        draw(nodes, name, model)
    entry = done(server, nodes)
    outputs = server.outputs(entry)
    losses = json.loads(outputs["told"]["text"][0].replace("'", '"'))["loss"]
    return losses, server.picture(entry, "before"), server.picture(entry, "after"), outputs["plot"]


@pytest.fixture(scope="module")
def file(server, trained):
    (found,) = (server.base / "output" / "loras").glob(f"crosses_{STEPS}_steps_*.safetensors")
    return found


def test_the_loss_falls(trained):
    losses, *_ = trained
    assert len(losses) == STEPS and sum(losses[-10:]) < 0.2 * sum(losses[:10])
    assert trained[3]["images"]


def test_the_picture_changes_as_taught(trained):
    _, before, after, _ = trained
    assert seen(before) == ["red circle"] and seen(after) == ["red cross"]
    assert far_from_taught(before) > 10 and far_from_taught(after) < 3


@pytest.mark.parametrize("kind", ["LoraLoaderModelOnly", "InternVLU_LoadLoRA"])
def test_its_file_does_the_same_with_cores_loader_and_with_ours(server, training, trained, file, kind):
    ours = kind == "InternVLU_LoadLoRA"
    values = {"lora_name": file.name, "strength_model": 1.0, "model": ["load", 0]} | (
        {"strength_mllm": 1.0} if ours else {}
    )
    nodes = {"load": training("crosses")[0]["load"], "lora": node(kind, **values)}
    ask(nodes)
    draw(nodes, "after", ["lora", 0])
    logged = len(server.log.read_text())
    entry = done(server, nodes)
    assert (server.picture(entry, "after") == trained[2]).all()
    assert "lora key not loaded" not in server.log.read_text()[logged:]
    if ours:
        (text,) = server.outputs(entry)["lora"]["text"]
        assert text.endswith(f"all {len(load_file(file))} keys fit")


def test_it_is_merged_into_a_folder_for_good(server, training, file):
    out = server.base / "models" / "InternVL-U" / "crosses"
    merged = merge(server.base / "models" / "InternVL-U" / "internvl-u-nano", out, [(file, 1.0)])
    assert "keys fit" in merged.reports[0]
    nodes = {"load": node("InternVLU_LoadModel", model_name="crosses", precision="fp32")}
    ask(nodes, "a green circle")
    draw(nodes, "after", ["load", 0])
    picture = server.picture(done(server, nodes), "after")
    assert seen(picture) == ["green cross"] and far_from_taught(picture, "green") < 4


def test_it_is_gone_on_with(server, training, trained, file):
    nodes, outputs = training("crosses", steps=8, existing_lora=file.name, learning_rate=1e-4)
    nodes["told"] = node("PreviewAny", source=outputs["LOSS_MAP"])
    nodes["keep"] = node("SaveLoRA", lora=outputs["LORA_MODEL"], prefix="loras/more", steps=outputs["INT"])
    told = server.outputs(done(server, nodes))["told"]["text"][0]
    losses = json.loads(told.replace("'", '"'))["loss"]
    assert sum(losses) / 8 < 0.5 * sum(trained[0][:8]) / 8
    (more,) = (server.base / "output" / "loras").glob(f"more_{STEPS + 8}_steps_*.safetensors")
    with safe_open(more, "pt") as one, safe_open(file, "pt") as other:
        assert set(one.keys()) == set(other.keys())


def test_a_change_of_a_picture_is_taught_too(server, training):
    """With the reference of Encode, in a batch."""
    change = "paint it as a sign"
    put_data(server, "changes", change, ("red", "red"))
    painted("circle", "red").save(server.base / "input" / "circle.png")
    nodes, outputs = training("changes", batch_size=2, steps=30)
    seeing = {"mllm": ["load", 1], "vae": ["load", 2], "image1": ["circle", 0]}
    nodes["circle"] = node("LoadImage", image="circle.png")
    nodes["captions"]["inputs"] |= seeing
    nodes["ask"] = node("InternVLU_EncodePrompt", **seeing, prompt=change)
    nodes["put"] = put_on(server, outputs)
    draw(nodes, "plain", ["load", 0])
    draw(nodes, "taught", ["put", 0])
    entry = done(server, nodes)
    before, after = (server.picture(entry, name) for name in ("plain", "taught"))
    assert seen(before) != ["red cross"] and seen(after) == ["red cross"]
    assert far_from_taught(before) > 8 and far_from_taught(after) < 4
