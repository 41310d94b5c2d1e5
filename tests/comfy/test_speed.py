"""What makes it fast keeps the picture: compiling, step caches, and work that is not done twice."""

import pytest
import torch
from pack.internvl_u import prompt
from pack.internvl_u.generation import GenerationConfig


def pytorch_attention(func, *args, **kwargs):
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **{k: v for k, v in kwargs.items() if k != "transformer_options"})


@pytest.mark.parametrize("with_reference", [False, True])
def test_the_transformer_compiles_without_a_graph_break(loaded, parts, golden, near, with_reference):
    from pack.internvl_u.mmdit import time_embedding

    torch.compiler.reset()
    case = golden("edit_one" if with_reference else "t2i_square")
    network = loaded.model.model.diffusion_model
    branches = (0, 1) if with_reference else (0, 2)
    references = [case["ref_latents_0"].expand(2, -1, -1, -1)] if with_reference else []
    grids = [reference.shape[-2:] for reference in references]
    contexts = []
    for branch in branches:
        contexts.append(parts.model.PromptContext(network, case.context(branch), case.layout(branch), grids))
        contexts[-1].branch_for(tuple(case["noise"].shape[-2:]), torch.device("cpu"))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    options = {"optimized_attention_override": pytorch_attention}
    for latent, time, expected in zip(case["mmdit_in"], case["mmdit_t"], case["mmdit_out"]):
        sinusoids = time_embedding(time[:2])
        both = latent.expand(2, -1, -1, -1)
        velocity = compiled(both, sinusoids, contexts=contexts, ref_latents=references, transformer_options=options)
        near(velocity, expected[list(branches)])


@pytest.mark.parametrize("name, tolerance", [("EasyCacheNode", 0.05), ("LazyCacheNode", 0.2)])
def test_cores_step_caches_skip_steps_and_draw_nearly_the_same(loaded, draw, golden, monkeypatch, name, tolerance):
    import comfy_extras.nodes_easycache as caches

    case = golden("t2i_square")
    calls = []
    network = loaded.model.model.diffusion_model
    original = network._forward
    monkeypatch.setattr(network, "_forward", lambda *args: calls.append(1) or original(*args))
    plain = draw(loaded.model, loaded.mllm, case, steps=20)
    whole = len(calls)
    calls.clear()
    cached = getattr(caches, name).execute(loaded.model, 0.3, 0.15, 0.95, False).result[0]
    drawn = draw(cached, loaded.mllm, case, steps=20)
    assert len(calls) < whole
    assert torch.isfinite(drawn).all() and (drawn - plain).norm() / plain.norm() < tolerance


@pytest.fixture
def read(loaded, count_reads):
    return count_reads(loaded.mllm.model)


def test_the_empty_prompt_is_encoded_once(loaded, read):
    first = loaded.mllm.encode("a cat")
    assert len(read) == 3  # the system turn, the two users' turns
    second = loaded.mllm.encode("a dog")
    assert len(read) == 4
    assert torch.equal(first[1][0][0], second[1][0][0])
    loaded.mllm.encode("a dog", system="something else")
    assert len(read) == 7


def test_think_and_encode_read_prompt_and_picture_once(loaded, read, golden):
    from PIL import Image

    picture = Image.open(golden("edit_one").images[0]).convert("RGB")
    text = "turn all that is red into something blue, and leave what is blue as it is, but make it larger than it was"
    ids = loaded.mllm.generate(text, system=prompt.SYSTEM_EDIT, images=[picture], config=GenerationConfig(10))
    assert read.count("image") == 1
    thought = loaded.mllm.encoder.tokenizer.decode_thought(ids)
    read.clear()
    encoded = loaded.mllm.encode(text, images=[picture], vae=loaded.vae, thought=thought)
    assert "image" not in read and read[0] == len(thought.ids) + 1
    read.clear()
    again = loaded.mllm.encode(text, images=[picture], vae=loaded.vae, thought=thought)
    assert read == [] and torch.equal(again[0][0][0], encoded[0][0][0])


def test_what_has_been_read_counts_as_memory_and_is_bounded(loaded):
    weights = loaded.mllm.patcher.model_size()
    assert loaded.mllm.get_ram_usage() == weights
    loaded.mllm.encode("a cat")
    used = loaded.mllm.get_ram_usage() - weights
    assert used == loaded.mllm.kept.bytes > 0
    loaded.mllm.kept.limit = used
    for text in ("one", "two", "three"):
        loaded.mllm.encode(text)
        assert loaded.mllm.get_ram_usage() - weights <= used


def test_a_clip_shares_what_has_been_read(loaded, read, parts):
    from pack.native.clip import CLIP

    loaded.mllm.encode("a cat")
    read.clear()
    clip = CLIP(loaded.mllm)
    clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    assert read == [] and clip.get_ram_usage() == 0


def test_nothing_is_kept_of_weights_that_hooks_have_changed(loaded):
    import comfy.hooks

    loaded.mllm.load(10)
    with loaded.mllm.computing() as where:
        assert where["kept"] is loaded.mllm.kept
    loaded.mllm.patcher.current_hooks = comfy.hooks.HookGroup()
    with loaded.mllm.computing() as where:
        assert where["kept"] is None


@pytest.mark.parametrize("change", ["injections", "object_patches"])
def test_nothing_is_kept_where_something_stands_beside_the_weights(loaded, change):
    setattr(loaded.mllm.patcher, change, {"x": ["something"]})
    with loaded.mllm.computing() as where:
        assert where["kept"] is None
