import pytest
import torch
from pack.internvl_u import mmdit
from pack.internvl_u.load import load_mmdit
from pack.internvl_u.mmdit import scaled_dot_product, time_embedding
from pack.internvl_u.rope import Span
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_mmdit(checkpoint)


def disturbed(frequencies, how):
    """Each frequency one ulp higher, one ulp lower, as it is, or one of the three by a seed."""
    choices = [torch.nextafter(frequencies, frequencies + sign) for sign in (-1, 0, 1)]
    if how in ("down", "same", "up"):
        return choices[("down", "same", "up").index(how)]
    chosen = torch.randint(3, frequencies.shape, generator=torch.Generator().manual_seed(how))
    return torch.stack(choices).gather(0, chosen[None])[0]


def official_order(timestep, frequencies):
    return 1000 * (timestep * frequencies)


def beyond_one_ulp(expected, order=official_order):
    """Counts the frequencies of which no neighbour within one ulp gives all the expected sinusoids.

    One ulp of a frequency times the largest phase is 0.1 rad where the frequency is 1, and nothing where it is 1e-4.
    """
    timesteps, sinusoids = expected["timesteps"].float()[:, None], expected["sinusoids"].unflatten(1, (2, -1))
    errors = []
    for how in ("down", "same", "up"):
        phase = order(timesteps, disturbed(mmdit.time_frequencies(), how))
        found = torch.stack([phase.cos(), phase.sin()], dim=1)
        errors.append((found - sinusoids).abs().amax(dim=(0, 1)))
    return int((torch.stack(errors).amin(dim=0) > 2e-6).sum())


@pytest.fixture(scope="module")
def sinusoids(checkpoint):
    return load_file(checkpoint.parent / "golden" / "time.safetensors")


def test_sinusoids_are_the_official_ones_to_one_ulp_of_each_frequency(sinusoids):
    assert beyond_one_ulp(sinusoids) == 0
    timesteps = sinusoids["timesteps"].float()
    phase = official_order(timesteps[:, None], mmdit.time_frequencies())
    torch.testing.assert_close(time_embedding(timesteps), torch.cat([phase.cos(), phase.sin()], dim=1), atol=0, rtol=0)


@pytest.mark.parametrize("order", [lambda t, f: (1000 * t) * f, lambda t, f: t * (1000 * f)])
def test_another_order_of_the_products_gives_other_sinusoids(sinusoids, order):
    assert beyond_one_ulp(sinusoids, order) > 20


@torch.inference_mode()
@pytest.mark.parametrize("how", ["down", "up", 0, 1, 2])
def test_one_ulp_of_the_frequencies_leaves_the_golden_velocities(model, drawn, near, monkeypatch, how):
    """So the golden data hold on processors whose `exp` rounds otherwise."""
    frequencies = disturbed(mmdit.time_frequencies(), how)
    assert not torch.equal(frequencies, mmdit.time_frequencies())
    monkeypatch.setattr(mmdit, "time_frequencies", lambda device=None: frequencies)
    for velocities, expected in zip(velocities_of(model, drawn), drawn["mmdit_out"], strict=True):
        near(velocities, expected)


def edit_branches(model, case):
    """The three branches of an edit, and the reference latents of the first two."""
    result = []
    for branch in range(3):
        layout = case.layout(branch)
        references = [case["ref_latents_0"].shape[-2:]] if any(span.is_image for span in layout) else []
        result.append(model.branch(case.context(branch), layout, case["noise"].shape[-2:], references))
    return result


def velocities_of(model, case):
    """The velocities of the three branches at each step of a golden case."""
    branches = edit_branches(model, case)
    groups = [(branches, [])]
    if case.images:
        groups = [(branches[:2], [case["ref_latents_0"].expand(2, -1, -1, -1)]), (branches[2:], [])]
    for latent, time in zip(case["mmdit_in"], case["mmdit_t"]):
        yield torch.cat(
            [
                model(latent.expand(len(some), -1, -1, -1), time_embedding(time[: len(some)]), some, references)
                for some, references in groups
            ]
        )


@torch.inference_mode()
def test_every_step_equals_the_official_velocity(model, drawn, near):
    for velocities, expected in zip(velocities_of(model, drawn), drawn["mmdit_out"], strict=True):
        near(velocities, expected)


@torch.inference_mode()
def test_the_partial_and_the_unconditional_branch_of_text_to_image_are_one(case):
    assert torch.equal(case["mmdit_out"][0][1], case["mmdit_out"][0][2])


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
    """The last block needs no query of the context: only the image goes on."""
    asked = []

    def attention(query, key, value):
        asked.append((query.shape[2], key.shape[2]))
        return scaled_dot_product(query, key, value)

    def run_block(index, block, image, text, modulation, packing, image_tokens):
        return block(image, text, modulation, packing, attention, image_tokens)

    size = case["noise"].shape[-2:]
    branch = model.branch(case.context(0), (Span(len(case.context(0))),), size, ())
    with torch.inference_mode():
        model(case["noise"], time_embedding(torch.tensor([999.0])), [branch], run_block=run_block)
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


@torch.no_grad()
def test_float16_agrees_with_fp32_and_holds_streams_beyond_its_range(checkpoint, golden, near):
    """Gates that let both streams grow beyond 65504, and hidden states that begin there, as large models have them."""
    case = golden("t2i_square")
    model = load_mmdit(checkpoint, dtype=torch.float32)
    width = model.config.width
    for name in ("img_mod", "txt_mod"):
        gates = getattr(model.transformer_blocks[0], name)[1]
        for first in (2 * width, 5 * width):
            gates.weight[first : first + width] *= 3e4
            gates.bias[first : first + width] *= 3e4
    for out in (model.transformer_blocks[0].attn.to_out[0], model.transformer_blocks[0].attn.to_add_out):
        out.weight *= 20
        out.bias *= 20
    context = case.context(0) * 1e6
    branch = model.branch(context, case.layout(0), case["mmdit_in"][0].shape[-2:], ())
    seen = {}
    model.transformer_blocks[0].register_forward_hook(lambda module, given, streams: seen.update(now=streams))
    arguments = (time_embedding(case["mmdit_t"][0][:1]), [branch])
    expected = model(case["mmdit_in"][0][:1], *arguments)
    for stream in (context, *seen["now"]):
        assert stream.abs().max() > 65504, "so that the test can fail"
    found = model.half()(case["mmdit_in"][0][:1].half(), *arguments)
    assert found.dtype == torch.float16 and seen["now"][0].dtype == torch.float32
    near(found, expected, 1e-2)
