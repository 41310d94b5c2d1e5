"""The CLIP of Load InternVL-U: core's nodes that encode and write texts, by their own code."""

import copy
import importlib
import io
import logging
from types import SimpleNamespace

import numpy
import pytest
import torch
from pack.tests.lora_files import LANGUAGE_LAYERS, random_change
from PIL import Image
from safetensors.torch import save_file

TEXT = "a red square on a white table"


@pytest.fixture
def clips(native, checkpoint):
    """The module, and a CLIP over a freshly loaded MLLM in fp32."""
    module = importlib.import_module("pack.native.clip")
    mllm = importlib.import_module("pack.native.mllm").load_mllm(str(checkpoint), torch.float32)
    return SimpleNamespace(module=module, mllm=mllm, clip=module.CLIP(mllm))


def scheduled(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def lora(mllm):
    shapes = {name: tuple(one.shape) for name, one in mllm.model.named_parameters()}
    return {
        f"text_encoders.{layer}.lora_{letter}.weight": matrix
        for layer, pair in random_change(shapes, LANGUAGE_LAYERS, 0.3).items()
        for letter, matrix in zip("BA", pair)
    }


def test_a_text_is_encoded_as_by_encode_and_an_empty_one_is_its_negative(clips):
    positive, negative, _ = clips.mllm.encode(TEXT)
    ours, empty, blank = (scheduled(clips.clip, text) for text in (TEXT, "", " \n"))
    assert torch.equal(ours[0][0], positive[0][0])
    assert torch.equal(empty[0][0], negative[0][0]) and torch.equal(blank[0][0], negative[0][0])
    assert torch.equal(clips.clip.encode(TEXT), positive[0][0])
    cond, pooled = clips.clip.encode_from_tokens(clips.clip.tokenize(TEXT), return_pooled=True)
    assert torch.equal(cond, positive[0][0]) and pooled.shape == (1, 1)


def test_weights_and_patcher_are_the_mllms_own(clips):
    assert clips.clip.patcher is clips.mllm.patcher
    clone = clips.clip.clone()
    assert type(clone) is type(clips.clip)
    assert clone.patcher is not clips.clip.patcher and clone.patcher.model is clips.mllm.model
    assert clips.clip.get_ram_usage() == 0 < clips.mllm.get_ram_usage()
    assert clips.clip.get_key_patches().keys() == clips.mllm.patcher.get_key_patches().keys()


def test_a_lora_of_cores_loader_changes_its_own_clip_alone(clips):
    import comfy.sd

    before = scheduled(clips.clip, TEXT)[0][0]
    _, changed = comfy.sd.load_lora_for_models(None, clips.clip, lora(clips.mllm), 1.0, 0.5)
    after = scheduled(changed, TEXT)[0][0]
    assert (after - before).norm() / before.norm() > 1e-2
    assert torch.equal(scheduled(clips.clip, TEXT)[0][0], before)
    assert torch.equal(clips.mllm.encode(TEXT)[0][0][0], before)
    assert torch.equal(scheduled(changed.clone(), TEXT)[0][0], after)


def test_cores_loader_and_ours_make_the_same_of_a_lora(clips, tmp_path, near):
    import comfy.sd

    save_file(lora(clips.mllm), tmp_path / "lora.safetensors")
    _, changed = comfy.sd.load_lora_for_models(None, clips.clip, lora(clips.mllm), 1.0, 0.5)
    apply_lora = importlib.import_module("pack.native.lora").apply_lora
    _, mllm, _ = apply_lora(None, clips.mllm, tmp_path / "lora.safetensors", 1.0, 0.5)
    near(scheduled(changed, TEXT)[0][0], mllm.encode(TEXT)[0][0][0], 1e-6)
    near(scheduled(clips.module.CLIP(mllm), TEXT)[0][0], mllm.encode(TEXT)[0][0][0], 1e-6)


@pytest.mark.parametrize("dtype", ["Q8_0", "int8", "fp8_scaled"])
def test_a_lora_of_cores_loader_works_on_smaller_files_as_with_ours(clips, checkpoint, tmp_path, near, dtype):
    import comfy.sd

    if dtype.startswith("Q"):
        pytest.importorskip("gguf")
    convert = importlib.import_module("pack.internvl_u.convert").convert
    _, language, _ = convert(checkpoint, tmp_path, dtype)
    mllm = importlib.import_module("pack.native.mllm").load_mllm(str(language), None)
    clip = clips.module.CLIP(mllm)
    before = scheduled(clip, TEXT)[0][0]
    assert torch.equal(before, mllm.encode(TEXT)[0][0][0])
    file = lora(clips.mllm)
    save_file(file, tmp_path / "lora.safetensors")
    _, changed = comfy.sd.load_lora_for_models(None, clip, file, 1.0, 0.5)
    after = scheduled(changed, TEXT)[0][0]
    _, ours, _ = importlib.import_module("pack.native.lora").apply_lora(
        None, mllm, tmp_path / "lora.safetensors", 1.0, 0.5
    )
    expected = ours.encode(TEXT)[0][0][0]
    near(after - before, expected - before, 1e-5)
    assert torch.equal(scheduled(clip, TEXT)[0][0], before)


def test_a_lora_beside_the_weights_changes_its_own_clip_alone(clips, near):
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass of LoRAs")
    before = scheduled(clips.clip, TEXT)[0][0]
    _, added = comfy.sd.load_lora_for_models(None, clips.clip, lora(clips.mllm), 1.0, 0.5)
    _, bypassed = comfy.sd.load_bypass_lora_for_models(None, clips.clip, lora(clips.mllm), 1.0, 0.5)
    expected = scheduled(added, TEXT)[0][0]
    near(scheduled(bypassed, TEXT)[0][0], expected, 1e-4)
    assert torch.equal(scheduled(clips.clip, TEXT)[0][0], before)
    assert torch.equal(clips.mllm.encode(TEXT)[0][0][0], before)


@pytest.mark.parametrize("scheduling", [False, True])
def test_hooks_change_the_text_where_they_are_and_leave_nothing_behind(clips, scheduling):
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks

    before = scheduled(clips.clip, TEXT)[0][0]
    hooks = comfy.hooks.create_hook_lora(lora(clips.mllm), 1.0, 1.0)
    (hooked,) = SetClipHooks().apply_hooks(clips.clip, scheduling, True, hooks)
    (after, options), *_ = scheduled(hooked, TEXT)
    assert (after - before).norm() / before.norm() > 1e-2
    assert options["hooks"] is hooks
    assert torch.equal(scheduled(clips.clip, TEXT)[0][0], before)
    assert torch.equal(clips.mllm.encode(TEXT)[0][0][0], before)
    assert torch.equal(scheduled(hooked, TEXT)[0][0], after)


def test_it_writes_what_answer_writes(clips, golden):
    system = importlib.import_module("pack.internvl_u.prompt").SYSTEM_ANSWER
    config = importlib.import_module("pack.internvl_u.generation").GenerationConfig
    image = torch.rand(2, 40, 56, 3, generator=torch.Generator().manual_seed(1))
    pictures = importlib.import_module("pack.native.images").to_pil_images([image], clips.mllm.encoder.sizes)
    for given, shown in (({}, ()), ({"image": image}, pictures), ({"images": [image[:1], image[1:]]}, pictures)):
        expected = clips.mllm.generate("what is it", system=system, images=shown, config=config(12))
        ids = clips.clip.generate(clips.clip.tokenize("what is it", **given), do_sample=False, max_length=12)
        assert ids == expected
        assert clips.clip.decode(ids) == clips.mllm.encoder.tokenizer.decode(expected)
    sampled = config(12, temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=5)
    expected = clips.mllm.generate("what is it", system=system, config=sampled)
    settings = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 5}
    assert clips.clip.generate(clips.clip.tokenize("what is it"), max_length=12, **settings) == expected


def test_a_second_of_a_video_is_one_picture(clips, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        type(clips.mllm), "write", lambda self, prompt, images, *_: prompts.append((prompt, images)) or [0]
    )
    video, picture = torch.rand(49, 32, 32, 3), torch.rand(1, 48, 32, 3)
    tokens = clips.clip.tokenize("what happens", video=video, image=picture)
    clips.clip.generate(tokens, do_sample=False)
    ((prompt, images),) = prompts
    assert [image.size for image in images] == [(32, 32)] * 3 + [(32, 48)]
    assert numpy.abs(numpy.asarray(images[1]) / 255 - video[24].numpy()).max() < 0.01
    text = clips.mllm.encoder.tokenizer.decode(prompt.ids)
    assert all(f"Frame{i}: " in text for i in (1, 2, 3)) and "Frame4" not in text and "what happens" in text
    assert len(prompt.images) == 4


def test_without_the_template_a_text_is_gone_on_with_as_it_is(clips, monkeypatch):
    prompts = []
    monkeypatch.setattr(type(clips.mllm), "write", lambda self, prompt, *_: prompts.append(prompt) or [0])
    clips.clip.generate(clips.clip.tokenize("once upon a time", skip_template=True), do_sample=False)
    assert clips.mllm.encoder.tokenizer.decode(prompts[0].ids) == "once upon a time"
    with pytest.raises(ValueError, match="an empty text found"):
        clips.clip.generate(clips.clip.tokenize("", skip_template=True))


def test_a_cut_text_is_told_of_and_a_cancelled_one_ends(clips, caplog):
    import comfy.model_management as mm

    with caplog.at_level(logging.WARNING, "internvl_u"):
        ids = clips.clip.generate(clips.clip.tokenize("hello"), do_sample=False, max_length=1)
    assert len(ids) == 1
    assert "the text was cut after 1 tokens: raise max_length for all of it" in caplog.text
    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        clips.clip.generate(clips.clip.tokenize("hello"), do_sample=False, max_length=500)


def test_what_it_cannot_do_is_said_in_a_sentence(clips):
    clip, picture = clips.clip, torch.rand(1, 32, 32, 3)
    with pytest.raises(ValueError, match="a text with pictures found, .* InternVL-U Encode"):
        clip.encode_from_tokens_scheduled(clip.tokenize(TEXT, images=[picture]))
    with pytest.raises(ValueError, match="a sound found"):
        clip.tokenize(TEXT, audio={"waveform": torch.zeros(1, 1, 8), "sample_rate": 8})
    with pytest.raises(ValueError, match="a NoneType found, a text expected"):
        clip.tokenize(None)
    with pytest.raises(ValueError, match="tokens of 0 texts of InternVL-U found"):
        clip.encode_from_tokens({"l": [[(1, 1.0)]]})
    both = {clips.module.KEY: clip.tokenize("a")[clips.module.KEY] + clip.tokenize("b")[clips.module.KEY]}
    with pytest.raises(ValueError, match="tokens of 2 texts"):
        clip.encode_from_tokens(both)
    with pytest.raises(ValueError, match="layer -2 found, -1 expected"):
        clip.clone().clip_layer(-2)
    clip.clone().clip_layer(-1)
    for save in (clip.get_sd, clip.state_dict_for_saving):
        with pytest.raises(ValueError, match="internvl_u convert"):
            save()


def test_a_conditioning_survives_a_file_of_plain_data_and_a_copy(clips, loaded):
    """As core's Save and Load Training Dataset write and read it."""
    cond = scheduled(clips.clip, TEXT)
    file = io.BytesIO()
    torch.save({"conditioning": [cond]}, file)
    file.seek(0)
    ((tensor, options),) = torch.load(file, weights_only=True)["conditioning"][0]
    assert torch.equal(tensor, cond[0][0])
    extra = loaded.model.model.extra_conds(cross_attn=tensor, device=tensor.device, noise=None, **options)
    expected = loaded.model.model.extra_conds(cross_attn=tensor, device=tensor.device, noise=None, **cond[0][1])
    assert extra["contexts"].cond[0].layout == expected["contexts"].cond[0].layout
    copied = copy.deepcopy(cond)
    with pytest.raises(ValueError, match="at a MODEL of another kind"):
        copied[0][1]["model_conds"]["contexts"].process_cond(1)


@pytest.fixture
def ksampler_graph(server, graph, golden):
    """The shipped graph of core's KSampler, its texts from Encode or from core's CLIP Text Encode.

    `between` are core's nodes (class, its input, other inputs) in a row between the CLIP or the positive and its user.
    """

    def make(core, *between):
        nodes = server.with_latent(graph("text_to_image_ksampler", golden("t2i_square"), steps=3))
        load, encode = (server.find(nodes, f"InternVLU_{kind}") for kind in ("LoadModel", "EncodePrompt"))
        sample = server.find(nodes, "KSampler")
        nodes[sample]["inputs"]["seed"] = 3
        if core:
            prompt = nodes[encode]["inputs"]["prompt"]
            for name, text in (("positive", prompt), ("negative", "")):
                nodes[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": [load, 3], "text": text}}
                nodes[sample]["inputs"][name] = [name, 0]
        for i, (kind, field, others) in enumerate(between):
            user, name = ("positive", "clip") if field.startswith("clip") else (sample, "positive")
            before = nodes[user]["inputs"][name]
            nodes[f"between{i}"] = {"class_type": kind, "inputs": {field: before, **others}}
            nodes[user]["inputs"][name] = [f"between{i}", 0]
        return nodes

    return make


def test_core_encodes_a_text_and_draws_the_same_picture(server, ksampler_graph):
    ours, cores = (server.latent(server.run(ksampler_graph(core))) for core in (False, True))
    assert torch.equal(cores, ours)


AGAIN = ["positive", 0]


@pytest.mark.parametrize(
    "kind, field, others, same",
    [
        ("CLIPSetLastLayer", "clip", {"stop_at_clip_layer": -1}, True),
        ("CLIPMergeSimple", "clip1", {"ratio": 0.5}, True),
        ("ConditioningCombine", "conditioning_1", {"conditioning_2": AGAIN}, True),
        ("ConditioningConcat", "conditioning_to", {"conditioning_from": AGAIN}, False),
        ("ConditioningAverage", "conditioning_to", {"conditioning_from": AGAIN, "conditioning_to_strength": 0.5}, True),
        ("ConditioningZeroOut", "conditioning", {}, False),
        ("ConditioningSetTimestepRange", "conditioning", {"start": 0.0, "end": 1.0}, True),
        ("ConditioningSetTimestepRange", "conditioning", {"start": 0.5, "end": 1.0}, False),
        ("CLIPAttentionMultiply", "clip", {"q": 1.5, "k": 1.0, "v": 1.0, "out": 1.0}, False),
    ],
)
def test_cores_nodes_between_are_understood(server, ksampler_graph, near, kind, field, others, same):
    plain = ksampler_graph(True)
    if kind == "CLIPMergeSimple":
        others = others | {"clip2": plain["positive"]["inputs"]["clip"]}
    drawn = server.latent(server.run(ksampler_graph(True, (kind, field, others))))
    expected = server.latent(server.run(plain))
    if same:
        near(drawn, expected, 1e-4)
    else:
        assert not torch.equal(drawn, expected)


@pytest.mark.parametrize(
    "kind, others, told",
    [
        ("CLIPSetLastLayer", {"stop_at_clip_layer": -2}, "layer -2 found, -1 expected"),
        ("CLIPSave", {"filename_prefix": "clip/ours"}, "`python -m internvl_u convert` writes it"),
        ("CheckpointSave", {"filename_prefix": "ours"}, "`python -m internvl_u convert` writes it"),
    ],
)
def test_cores_nodes_that_cannot_work_end_with_a_sentence(server, ksampler_graph, kind, others, told):
    nodes = ksampler_graph(True)
    nodes["refused"] = {"class_type": kind, "inputs": {"clip": nodes["positive"]["inputs"]["clip"], **others}}
    if kind == "CheckpointSave":
        load = server.find(nodes, "InternVLU_LoadModel")
        nodes["refused"]["inputs"] |= {"model": [load, 0], "vae": [load, 2]}
    if kind == "CLIPSetLastLayer":
        nodes["positive"]["inputs"]["clip"] = ["refused", 0]
    assert told in server.error(server.run(nodes))


@pytest.fixture(scope="module")
def core_nodes(server):
    return set(server.get("/object_info"))


def needs(core_nodes, name):
    if name not in core_nodes:
        pytest.skip(f"this ComfyUI has no {name}")


@pytest.mark.parametrize("pictures", [0, 1])
def test_generate_text_answers_as_answer_does(server, core_nodes, load_images, tmp_path, pictures):
    needs(core_nodes, "TextGenerate")
    loading = {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": "internvl-u-nano", "precision": "fp32"}}
    question = "Describe the picture."
    answer = {"mllm": ["load", 1], "question": question, "max_new_tokens": 24, "how": "greedy"}
    answer |= {"temperature": 0.7, "top_p": 0.9, "beams": 3, "seed": 0}
    text = {"clip": ["load", 3], "prompt": question, "max_length": 24, "sampling_mode": "off"}
    nodes = {
        "load": loading,
        "answer": {"class_type": "InternVLU_AnswerQuestion", "inputs": answer},
        "text": {"class_type": "TextGenerate", "inputs": text},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}},
    }
    if pictures:
        Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
        (image,) = load_images(nodes, [tmp_path / "red.png"])
        answer["image1"] = text["image"] = image
    outputs = server.run(nodes)["outputs"]
    assert outputs["show"]["text"] == outputs["answer"]["text"]
    assert len(outputs["show"]["text"][0]) > 3


def test_generate_text_samples_with_all_its_values(server, core_nodes):
    needs(core_nodes, "TextGenerate")
    values = {"temperature": 1.5, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "seed": 1}
    values |= {"repetition_penalty": 1.05, "presence_penalty": 0.5}
    text = {"clip": ["load", 3], "prompt": "hello", "max_length": 12, "sampling_mode": "off", "thinking": True}
    nodes = {
        "load": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": "tiny", "precision": "fp32"}},
        "text": {"class_type": "TextGenerate", "inputs": text},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}},
    }
    written = []
    for change in ({"sampling_mode": "off"}, {"sampling_mode": "on"}, {"seed": 2}, {"top_k": 1}):
        values |= {name: value for name, value in change.items() if name in values}
        text |= {"sampling_mode": change.get("sampling_mode", "on")}
        text |= {f"sampling_mode.{name}": value for name, value in values.items()}
        written += server.run(nodes)["outputs"]["show"]["text"]
    greedy, first, second, likeliest = written
    assert len({greedy, first, second}) == 3
    assert likeliest[:1] == greedy[:1]  # what is written counts from the second token on


def test_generate_ltx2_prompt_writes_something(server, core_nodes):
    needs(core_nodes, "TextGenerateLTX2Prompt")
    text = {"clip": ["load", 3], "prompt": "a red square turns", "max_length": 12, "sampling_mode": "off"}
    nodes = {
        "load": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": "internvl-u-nano", "precision": "fp32"}},
        "text": {"class_type": "TextGenerateLTX2Prompt", "inputs": text},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}},
    }
    assert server.run(nodes)["outputs"]["show"]["text"][0]


def test_a_training_dataset_is_made_saved_and_loaded(server, core_nodes, load_images, tmp_path):
    needs(core_nodes, "SaveTrainingDataset")
    nodes = {
        "load": {"class_type": "InternVLU_LoadModel", "inputs": {"model_name": "tiny", "precision": "fp32"}},
    }
    Image.new("RGB", (64, 64), "red").save(tmp_path / "train.png")
    (image,) = load_images(nodes, [tmp_path / "train.png"])
    made = {"images": image, "vae": ["load", 2], "clip": ["load", 3]}
    nodes["make"] = {"class_type": "MakeTrainingDataset", "inputs": made}
    saved = {"latents": ["make", 0], "conditioning": ["make", 1], "folder_name": "ours", "shard_size": 10}
    nodes["save"] = {"class_type": "SaveTrainingDataset", "inputs": saved}
    server.run(nodes)
    reading = {"again": {"class_type": "LoadTrainingDataset", "inputs": {"folder_name": "ours"}}}
    reading["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["again", 1]}}
    assert "pooled_output" in server.run(reading)["outputs"]["show"]["text"][0]


def test_a_lora_is_trained_in_comfyui_and_put_on(server, ksampler_graph, load_images, tmp_path):
    """Pictures and texts to Train LoRA, and what it gives to the MODEL that it was trained on."""
    info = server.get("/object_info/TrainLoraNode")["TrainLoraNode"]
    nodes = ksampler_graph(True)
    load, sample = (server.find(nodes, name) for name in ("InternVLU_LoadModel", "KSampler"))
    before = server.latent(server.run(nodes))
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png")
    red, blue = load_images(nodes, [tmp_path / "red.png", tmp_path / "blue.png"])
    nodes["batch"] = {"class_type": "ImageBatch", "inputs": {"image1": red, "image2": blue}}
    nodes["list"] = {"class_type": "RebatchImages", "inputs": {"images": ["batch", 0], "batch_size": 1}}
    made = {"images": ["list", 0], "vae": [load, 2], "clip": [load, 3]}
    nodes["make"] = {"class_type": "MakeTrainingDataset", "inputs": made}
    training = {"model": [load, 0], "latents": ["make", 0], "positive": ["make", 1]}
    for kind in ("required", "optional"):
        for name, (choices, options) in info["input"].get(kind, {}).items():
            listed = choices if isinstance(choices, list) else options.get("options", [None])
            training.setdefault(name, options.get("default", listed[0]))
    training |= {"steps": 4, "learning_rate": 0.05, "training_dtype": "fp32", "lora_dtype": "fp32"}
    nodes["train"] = {"class_type": "TrainLoraNode", "inputs": training}
    trained = ["train", info["output"].index("LORA_MODEL")]
    loading = {"model": [load, 0], "lora": trained, "strength_model": 1.0, "bypass": False}
    nodes["put"] = {"class_type": "LoraModelLoader", "inputs": loading}
    nodes[sample]["inputs"]["model"] = ["put", 0]
    logged = len(server.log.read_text())
    after = server.latent(server.run(nodes))
    assert (after - before).norm() / before.norm() > 1e-2
    assert "NOT LOADED" not in server.log.read_text()[logged:]


def test_a_lora_beside_the_weights_changes_what_is_written_too(clips):
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass of LoRAs")

    def write(clip):
        return clip.generate(clip.tokenize("tell me"), do_sample=False, max_length=12)

    before = write(clips.clip)
    _, added = comfy.sd.load_lora_for_models(None, clips.clip, lora(clips.mllm), 1.0, 0.5)
    _, bypassed = comfy.sd.load_bypass_lora_for_models(None, clips.clip, lora(clips.mllm), 1.0, 0.5)
    expected = write(added)
    assert write(bypassed) == expected != before
    assert write(clips.clip) == before
