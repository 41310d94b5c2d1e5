import pytest
import torch
from pack.internvl_u.mmdit import scaled_dot_product, time_embedding
from pack.internvl_u.pipeline import load_mmdit
from pack.internvl_u.positions import Span
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_mmdit(checkpoint)


def edit_branches(model, case):
    """The three branches of an edit, and the reference latents of the first two."""
    result = []
    for branch in range(3):
        layout = case.layout(branch)
        references = [case["ref_latents_0"].shape[-2:]] if any(span.is_image for span in layout) else []
        result.append(model.branch(case.context(branch), layout, case["noise"].shape[-2:], references))
    return result


@torch.inference_mode()
def test_every_step_of_text_to_image_equals_the_official_velocity(model, case, near):
    size = case["noise"].shape[-2:]
    branches = [model.branch(case.context(i), (Span(len(case.context(i))),), size, ()) for i in (0, 2)]
    for latent, time, expected in zip(case["mmdit_in"], case["mmdit_t"], case["mmdit_out"]):
        velocity = model(latent.expand(2, -1, -1, -1), time_embedding(time[:2]), branches)
        near(velocity, expected[[0, 2]])
        assert torch.equal(case["mmdit_out"][0][1], case["mmdit_out"][0][2])


@torch.inference_mode()
def test_every_step_of_an_edit_equals_the_official_velocity(model, golden, near):
    case = golden("edit_one")
    branches = edit_branches(model, case)
    reference = case["ref_latents_0"].expand(2, -1, -1, -1)
    for latent, time, expected in zip(case["mmdit_in"], case["mmdit_t"], case["mmdit_out"]):
        both = model(latent.expand(2, -1, -1, -1), time_embedding(time[:2]), branches[:2], [reference])
        near(both, expected[:2])
        near(model(latent, time_embedding(time[2:]), branches[2:]), expected[2:])


@torch.inference_mode()
def test_samples_of_a_batch_do_not_see_each_other(model, case):
    size = case["noise"].shape[-2:]
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 5, 9, 1, 5)
    latents = torch.randn(len(lengths), 16, *size, generator=generator)
    contexts = [torch.randn(n, 128, generator=generator) for n in lengths]
    branches = [model.branch(context, (Span(len(context)),), size, ()) for context in contexts]
    time = time_embedding(torch.tensor([999.0, 500.0, 3.0, 999.0, 0.0]))
    together = model(latents, time, branches)
    for i, branch in enumerate(branches):
        alone = model(latents[i : i + 1], time[i : i + 1], [branch])
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)


@torch.inference_mode()
def test_odd_latents_come_back_in_their_size(model):
    latents = torch.randn(1, 16, 7, 9)
    branch = model.branch(torch.randn(3, 128), (Span(3),), (7, 9), ())
    assert model(latents, time_embedding(torch.tensor([10.0])), [branch]).shape == latents.shape


def test_each_token_meets_its_own_stream_only(model, case):
    """The last block needs no query of the context: only the picture goes on."""
    asked = []

    def attention(query, key, value):
        asked.append((query.shape[2], key.shape[2]))
        return scaled_dot_product(query, key, value)

    size = case["noise"].shape[-2:]
    branch = model.branch(case.context(0), (Span(len(case.context(0))),), size, ())
    with torch.inference_mode():
        model(case["noise"], time_embedding(torch.tensor([999.0])), [branch], attention=attention)
    picture = size[0] * size[1] // 4
    whole = picture + len(case.context(0))
    assert asked == [(whole, whole), (picture, whole)]


def test_a_wrong_number_of_branches_is_refused(model):
    branch = model.branch(torch.zeros(3, 128), (Span(3),), (4, 4), ())
    with pytest.raises(ValueError, match="1 branches found for 2 samples"):
        model(torch.zeros(2, 16, 4, 4), time_embedding(torch.zeros(2)), [branch])


def test_names_are_the_checkpoints_keys(model, checkpoint):
    keys = load_file(checkpoint / "generation_decoder" / "model.safetensors").keys()
    assert {f"decoder.{name}" for name in model.state_dict()} == keys - {"encoder_padding_token"}
