"""The folder for PEFT on the official code: what that computed with it, and what we compute with it and with the file.

`tests/data/peft` holds a random LoRA of both parts as `write_adapter` writes it (rank 2, alpha 3). official.safetensors
has contexts, the velocities of all steps and the picture of the golden case t2i_square by the official code, with
`PeftModel.from_pretrained(generation_decoder.decoder, "both-peft/transformer")` and
`PeftModel.from_pretrained(vlm.language_model, "both-peft/language_model")`, in fp32 on a CPU.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from pack.internvl_u.load import load_mllm, load_mmdit
from pack.internvl_u.mmdit import time_embedding
from pack.internvl_u.pipeline import ImageRequest, Pipeline
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "data" / "peft"
FILE = FOLDER / "both.safetensors"
NAMES = {"transformer": "diffusion_model.", "language_model": "text_encoders.language_model."}


@pytest.fixture(scope="module")
def official():
    return load_file(FOLDER / "official.safetensors")


@pytest.fixture(scope="module")
def case(golden):
    return golden("t2i_square")


def velocities(model, case, contexts):
    """The velocities of the three branches at the steps of the official run."""
    size = case["noise"].shape[-2:]
    branches = [model.branch(context, case.layout(i), size, ()) for i, context in enumerate(contexts)]
    found = load_file(FOLDER / "official.safetensors")["mmdit_in"]
    for latent, time in zip(found, case["mmdit_t"], strict=True):
        yield model(latent.expand(3, -1, -1, -1), time_embedding(time), branches)


def cut(contexts, case):
    return [context[mask] for context, mask in zip(contexts, case["context_mask"], strict=True)]


@torch.inference_mode()
def test_the_file_gives_the_officials_contexts_velocities_and_picture(checkpoint, official, case, near, same_picture):
    pipeline = Pipeline(checkpoint, loras=[(FILE, 1.0)])
    request = ImageRequest(case.prompt, case.width, case.height, case.steps, seed=1234)
    contexts = pipeline.encode_prompt(request)
    expected = cut(official["context"], case)
    near(contexts.conditional[0], expected[0], 1e-5)
    near(contexts.unconditional[0], expected[2], 1e-5)
    for found, wanted in zip(velocities(pipeline._mmdit(), case, expected), official["mmdit_out"], strict=True):
        near(found, wanted)
    same_picture(pipeline.draw(request), official["image_u8"])
    with pytest.raises(AssertionError, match="relative error"):
        near(official["mmdit_out"], case["mmdit_out"], 0.1)
    with pytest.raises(AssertionError, match="relative error"):
        near(official["context"], case["context"], 0.1)


@torch.inference_mode()
def test_peft_gives_our_modules_the_officials_velocities(checkpoint, official, case, near):
    peft = pytest.importorskip("peft")
    model = load_mmdit(checkpoint)
    peft.PeftModel.from_pretrained(model, FOLDER / "both-peft" / "transformer")
    expected = cut(official["context"], case)
    for found, wanted in zip(velocities(model, case, expected), official["mmdit_out"], strict=True):
        near(found, wanted)


@torch.inference_mode()
def test_peft_gives_our_language_model_the_officials_contexts(checkpoint, official, case, near):
    peft = pytest.importorskip("peft")
    pipeline, mllm = Pipeline(checkpoint), load_mllm(checkpoint)
    peft.PeftModel.from_pretrained(mllm.language_model, FOLDER / "both-peft" / "language_model")
    pipeline.use({"mllm": mllm})
    contexts = pipeline.encode_prompt(ImageRequest(case.prompt, case.width, case.height))
    expected = cut(official["context"], case)
    near(contexts.conditional[0], expected[0], 1e-5)
    near(contexts.unconditional[0], expected[2], 1e-5)


def test_what_is_written_today_is_what_the_official_code_was_given(tmp_path):
    pytest.importorskip("peft")
    from pack.internvl_u.finetune.adapter import PEFT_FOLDER, AdapterSettings, write_adapter

    tensors, parts = load_file(FILE), {}
    for part, folder in PEFT_FOLDER.items():
        own = {name.removeprefix(NAMES[folder]): tensor for name, tensor in tensors.items() if NAMES[folder] in name}
        parts[part] = {name: tensor for name, tensor in own.items() if not name.endswith(".alpha")}
    file, folder = write_adapter(
        tmp_path / "both.safetensors", parts, AdapterSettings(rank=2, alpha=3.0), {"base": "tiny"}
    )
    again = load_file(file)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    for name in PEFT_FOLDER.values():
        before, now = (load_file(one / name / "adapter_model.safetensors") for one in (FOLDER / "both-peft", folder))
        assert before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in before)
        assert (
            len(before) == 48 if name == "transformer" else re.fullmatch(r"base_model\.model\.model\..*", min(before))
        )
        configs = [
            json.loads((one / name / "adapter_config.json").read_text()) for one in (FOLDER / "both-peft", folder)
        ]
        for config in configs:
            config.pop("peft_version")
        shared = configs[0].keys() & configs[1].keys()
        assert {"r", "lora_alpha", "target_modules", "peft_type"} <= shared
        assert all(configs[0][key] == configs[1][key] for key in shared)
