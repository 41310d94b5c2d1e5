"""Modulation of a schedule: computed once, whatever the samples and levels of a call are."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from pack.internvl_u import modulation
from pack.internvl_u.config import MMDiTConfig
from pack.internvl_u.defaults import GUIDANCE
from pack.internvl_u.load import load_mmdit
from pack.internvl_u.mmdit import MMDiT, time_embedding
from pack.internvl_u.modulation import Modulations
from pack.internvl_u.rope import Span
from pack.internvl_u.sampling import Denoiser, DrawingContexts, flow_sigmas, sample

RELEASED = MMDiTConfig(
    channels=16, patch_size=2, context_width=4096, layers=20, heads=12, head_dim=128, rope_axes=(16, 56, 56)
)
"""Sizes of the released transformer."""
PARTS = ("weight", "bias")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_mmdit(checkpoint)


@pytest.fixture
def rows(model, monkeypatch):
    """The numbers of levels that a model was asked to compute at a time."""
    asked = []
    original = model.modulation
    monkeypatch.setattr(model, "modulation", lambda time, dtype: asked.append(len(time)) or original(time, dtype))
    return asked


def sinusoids(*timesteps):
    return time_embedding(torch.tensor(timesteps, dtype=torch.float32))


def contexts_of(case):
    branches = [(case.context(branch), case.layout(branch)) for branch in range(3)]
    if not case.images:
        return DrawingContexts(branches[0], None, branches[2])
    return DrawingContexts(*branches, (case["ref_latents_0"],))


def calls_of(model):
    """Counts how often each layer of a model runs, by name; the function takes the count and begins anew."""
    calls = Counter()
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))

    def taken():
        result = dict(calls)
        calls.clear()
        return result

    return taken


def is_modulation(name):
    return "_mod." in name or name.startswith(("norm_out", "time_text_embed"))


def made(model, time):
    """What the layers give for each sample by itself."""
    parts = [model.modulation(one, torch.float32) for one in time.split(1)]
    blocks = [
        tuple(torch.cat([part.blocks[i][stream] for part in parts]) for stream in (0, 1))
        for i in range(len(model.transformer_blocks))
    ]
    return torch.cat([part.level for part in parts]), blocks, torch.cat([part.out for part in parts])


def check_made(found, model, time):
    level, blocks, out = made(model, time)
    assert torch.allclose(found.level.expand_as(level), level, atol=1e-5)
    assert torch.allclose(found.out.expand_as(out), out, atol=1e-5)
    for some, expected in zip(found.blocks, blocks, strict=True):
        for one, right in zip(some, expected, strict=True):
            assert torch.allclose(one.expand_as(right), right, atol=1e-5)


def test_a_run_reads_the_layers_of_modulation_once(checkpoint, case, near):
    model = load_mmdit(checkpoint)
    taken = calls_of(model)
    sigmas = flow_sigmas(6)
    size = tuple(case["noise"].shape[-2:])
    inputs = (model, contexts_of(case), size, GUIDANCE, torch.float32)
    denoisers = [Denoiser(*inputs, sigmas=given) for given in (None, sigmas)]
    plain = sample(denoisers[0], case["noise"], sigmas)
    before = taken()
    once = sample(denoisers[1], case["noise"], sigmas)
    after = taken()
    near(once, plain, 1e-5)
    groups = len(denoisers[0].groups)
    assert {before[name] for name in before} == {6 * groups}
    assert {name for name in after if after[name] == 1} == {name for name in before if is_modulation(name)}
    assert all(after[name] == before[name] for name in before if not is_modulation(name))


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_step_reads_less_than_70_percent_of_the_weights_at_the_released_size(with_reference):
    with torch.device("meta"):
        sizes = {name: weight.nbytes for name, weight in MMDiT(RELEASED, dtype=torch.bfloat16).named_parameters()}
    small = MMDiT(replace(RELEASED, heads=1, head_dim=16, rope_axes=(4, 6, 6), context_width=8))
    for weight in small.parameters():
        weight.fill_(0.01)
    taken = calls_of(small)
    latent, reference = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    branch = (torch.randn(3, 8), (Span(3),))
    contexts = DrawingContexts(branch, branch, branch, (reference,)) if with_reference else None
    contexts = contexts or DrawingContexts(branch, None, branch)
    sigmas = flow_sigmas(4)

    def bytes_of_steps(given):
        denoise = Denoiser(small, contexts, (4, 4), GUIDANCE, torch.float32, sigmas=given)
        result = []
        for sigma in sigmas[:-1]:
            denoise(latent, sigma)
            run = taken()
            result.append(sum(count * sizes.get(f"{name}.{part}", 0) for name, count in run.items() for part in PARTS))
        return result

    each, once = bytes_of_steps(None), bytes_of_steps(sigmas)
    whole = (2 if with_reference else 1) * sum(sizes.values())
    assert len(set(each)) == 1 and 0.98 * whole < each[0] < whole  # the last block leaves a few out
    assert once[0] <= each[0]
    assert all(some < 0.7 * each[0] for some in once[1:])


def test_samples_of_a_call_may_share_a_level_or_not(model, rows):
    known = Modulations(sinusoids(999, 700, 300))
    for timesteps in ((999,), (700, 700), (300, 999, 300), (700, 300)):
        found = known.at(model, sinusoids(*timesteps), torch.float32)
        assert len(found.out) == (1 if len(set(timesteps)) == 1 else len(timesteps))
        check_made(found, model, sinusoids(*timesteps))
    assert [count for count in rows if count > 1] == [3]


def test_levels_outside_the_schedule_are_computed_when_they_are_met_and_kept_for_a_while(model, rows):
    known = Modulations(sinusoids(999, 500))
    for timesteps in ((10,), (10, 10), (20, 10, 20), (20, 10), (999,), (500, 10), (500, 10)):
        found = known.at(model, sinusoids(*timesteps), torch.float32)
        asked = list(rows)
        check_made(found, model, sinusoids(*timesteps))
        rows[:] = asked
    assert rows == [1, 2, 2, 2]  # 10; 20 and 10; the schedule; 500 and 10, which are in no table together
    for timestep in range(30, 40):
        known.at(model, sinusoids(timestep), torch.float32)
    assert len(rows) == 14 and len(known._tables) == modulation.OTHERS
    known.at(model, sinusoids(39), torch.float32)
    known.at(model, sinusoids(999), torch.float32)
    assert len(rows) == 14
    known.at(model, sinusoids(30), torch.float32)
    assert len(rows) == 15


def test_a_long_schedule_is_kept_in_parts(model, rows):
    levels = list(range(999, 999 - 2 * modulation.LEVELS - 5, -1))
    known = Modulations(sinusoids(*levels))
    for level in levels:
        for _ in range(2):
            known.at(model, sinusoids(level), torch.float32)
    assert rows == [modulation.LEVELS, modulation.LEVELS, 5]
    check_made(
        known.at(model, sinusoids(levels[-1], levels[0]), torch.float32), model, sinusoids(levels[-1], levels[0])
    )


def test_levels_that_are_one_after_rounding_are_computed_once(model, rows):
    known = Modulations(time_embedding(torch.tensor([999.0, 998.0, 997.0, 900.0]).bfloat16()))
    known.at(model, sinusoids(1000), torch.float32)
    assert rows == [3]  # 1000, 996 and 900


def test_no_schedule_is_no_hindrance(model, rows):
    known = Modulations(sinusoids())
    check_made(known.at(model, sinusoids(5, 7), torch.float32), model, sinusoids(5, 7))


def test_what_is_kept_is_let_go(model, rows):
    known = Modulations(sinusoids(999))
    for timestep in (999, 5):
        known.at(model, sinusoids(timestep), torch.float32)
    known.clear()
    for timestep in (999, 5):
        known.at(model, sinusoids(timestep), torch.float32)
    assert rows == [1, 1, 1, 1]


def test_a_call_that_fails_leaves_nothing_half_made(model, monkeypatch):
    known = Modulations(sinusoids(999, 500))
    expected = model.modulation(sinusoids(999, 500), torch.float32).out[:1]
    with monkeypatch.context() as patch:
        patch.setattr(model, "run_once", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        for timestep in (999, 5):
            with pytest.raises(RuntimeError, match="out of memory"):
                known.at(model, sinusoids(timestep), torch.float32)
    assert torch.equal(known.at(model, sinusoids(999), torch.float32).out, expected)


def test_to_sample_all_but_the_modulation_goes_to_the_device(checkpoint):
    model = load_mmdit(checkpoint)
    assert model.to_sample(torch.device("meta")) is model
    left = {name for name, weight in model.named_parameters() if not weight.is_meta}
    assert left == {name for name, _ in model.named_parameters() if is_modulation(name)}
    assert sum(weight.nbytes for weight in model.parameters() if not weight.is_meta) > 0.3 * sum(
        weight.nbytes for weight in model.parameters()
    )


def test_a_layer_that_lies_elsewhere_lends_its_weights(checkpoint):
    model = load_mmdit(checkpoint)
    layer = model.transformer_blocks[0].img_mod
    hidden = torch.randn(3, model.config.width)
    assert torch.equal(model.run_once(layer, hidden), layer(hidden))
    assert model.run_once(layer, hidden.to("meta")).shape == (3, 6 * model.config.width)
    assert all(weight.device.type == "cpu" for weight in layer.parameters())
