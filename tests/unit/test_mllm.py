import pytest
import torch
from pack.internvl_u import prompt
from pack.internvl_u.checkpoint import open_checkpoint
from pack.internvl_u.encoder import Encoder
from pack.internvl_u.images import to_rgb
from pack.internvl_u.load import load_mllm
from pack.internvl_u.tokenizer import IMG_UNCOND, PAD
from PIL import Image

HERE = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_mllm(checkpoint)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder.from_checkpoint(open_checkpoint(checkpoint))


@torch.inference_mode()
def test_context_equals_the_official_hidden_states(model, encoder, case, near):
    made = prompt.branch_prompts(encoder.tokenizer, case.prompt)
    wanted = [(tokens, ()) for tokens in (made.conditional, made.partial, made.unconditional)]
    for i, context in enumerate(encoder.encode(model, wanted, **HERE)):
        near(context, case.context(i), 1e-5)
    (alone,) = encoder.encode(model, wanted[:1], **HERE)
    near(alone, case.context(0), 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("system", [None, "Draw."])
@pytest.mark.parametrize("files", [0, 1])
@pytest.mark.parametrize("text", ["go", "a much longer wish than the prompt without words, so that nothing is padded"])
def test_the_padding_before_a_thought_is_attended(model, encoder, golden, near, text, files, system):
    """As if the pads were words: the official code's own definition, for a thought that was typed."""
    pictures = [to_rgb(Image.open(file)) for file in golden("edit_one").images[:files]]
    features = encoder.image_features(model, pictures, **HERE)
    thought = encoder.tokenizer.encode_thought("a thought typed by hand")
    made = prompt.branch_prompts(encoder.tokenizer, text, images=files, grid=4, system=system, thought=thought)
    tokens = made.conditional
    assert (tokens.ids[0] == encoder.tokenizer.special[PAD]) == (text == "go")
    whole = encoder.embed(model, tokens, features, **HERE)
    expected = states_of(model, encoder, whole)[tokens.user_start :]
    near(encoder.encode(model, [(tokens, features)], **HERE)[0], expected, 1e-6)
    pads = tokens.ids.count(encoder.tokenizer.special[PAD])
    without = states_of(model, encoder, whole[:, pads:])[tokens.user_start - pads :]
    error = ((without - expected).norm() / expected.norm()).item()
    assert error > 0.05 if pads else error == 0


@torch.inference_mode()
def test_prompts_with_different_system_turns_are_kept_apart(model, encoder, near):
    texts = [
        prompt.branch_prompts(encoder.tokenizer, "a cat", system=system).conditional for system in ("one", "another")
    ]
    together = encoder.encode(model, [(tokens, ()) for tokens in texts], **HERE)
    for tokens, context in zip(texts, together):
        near(context, encoder.encode(model, [(tokens, ())], **HERE)[0], 1e-6)


@pytest.fixture
def tokens_read(model, count_reads):
    return count_reads(model)


@torch.inference_mode()
def test_the_system_turn_is_read_once(model, encoder, tokens_read):
    made = prompt.branch_prompts(encoder.tokenizer, "a cat")
    encoder.encode(model, [(made.conditional, ()), (made.unconditional, ())], **HERE)
    user = [len(tokens.ids) - tokens.user_start for tokens in (made.conditional, made.unconditional)]
    assert tokens_read == [made.conditional.user_start, *user]


@torch.inference_mode()
def test_image_features_equal_the_official_ones(model, encoder, golden, near):
    case = golden("edit_one")
    near(model.image_features(case["pixel_values"]), case["image_features"], 1e-5)
    with Image.open(case.images[0]) as image:
        (seen,) = encoder.image_features(model, [to_rgb(image)], **HERE)
    near(seen, case["image_features"][:1], 1e-5)


@torch.inference_mode()
def test_special_tokens_take_their_own_rows(model, encoder):
    token = encoder.tokenizer.special[IMG_UNCOND]
    embedded = model.embed([1, token, 2], encoder.tokenizer.special_token_rows, torch.device("cpu"))[0]
    table = model.language_model.model.embed_tokens.weight
    assert torch.equal(embedded[1], model.special_token_embedding.weight[9])
    assert torch.equal(embedded[[0, 2]], table[[1, 2]])


def states_of(model, encoder, embedded):
    """Returns the chosen layers' hidden states of embeddings that are read at once."""
    return model.language_model(embedded, layers=encoder.layers)[1][0]
