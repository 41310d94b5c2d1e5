import pytest
import torch
from pack.internvl_u import mllm, prompt
from pack.internvl_u.picture import to_rgb
from PIL import Image

HERE = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def model(checkpoint):
    return mllm.load(checkpoint)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return mllm.Encoder.read(checkpoint)


@torch.inference_mode()
def test_context_equals_the_official_hidden_states(model, encoder, case, near):
    made = prompt.branches(encoder.tokenizer, case.prompt)
    for i, tokens in enumerate((made.conditional, made.partial, made.unconditional)):
        near(encoder.context(model, tokens, **HERE), case.context(i), 1e-5)


@torch.inference_mode()
def test_image_features_equal_the_official_ones(model, encoder, golden, near):
    case = golden("edit_one")
    near(model.image_features(case["pixel_values"]), case["image_features"], 1e-5)
    with Image.open(case.images[0]) as image:
        (seen,) = encoder.features(model, [to_rgb(image)], **HERE)
    near(seen, case["image_features"][:1], 1e-5)


@torch.inference_mode()
def test_special_tokens_take_their_own_rows(model, encoder):
    token = encoder.tokenizer.special[prompt.IMG_UNCOND]
    embedded = model.embed([1, token, 2], encoder.rows, torch.device("cpu"))[0]
    table = model.language_model.get_input_embeddings().weight
    assert torch.equal(embedded[1], model.special_token_embedding.weight[9])
    assert torch.equal(embedded[[0, 2]], table[[1, 2]])


def test_another_language_model_is_refused():
    with pytest.raises(RuntimeError, match="'llama' found, 'qwen3' expected"):
        mllm.build_language({"model_type": "llama"})
