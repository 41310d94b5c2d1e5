"""What makes it fast keeps the picture: compiling, step caches, and work that is not done twice."""

import pytest
import torch


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
        contexts[-1].branch_for(tuple(case["noise"].shape[-2:]))
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


def test_the_empty_prompt_is_encoded_once(loaded, golden, monkeypatch):
    encoded = []
    model = loaded.mllm.patcher.model
    original = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda x, *args, **kwargs: encoded.append(x.shape[1]) or original(x, *args, **kwargs)
    )
    first = loaded.mllm.encode("a cat")
    second = loaded.mllm.encode("a dog")
    assert len(encoded) == 3
    assert torch.equal(first[1][0][0], second[1][0][0])
    loaded.mllm.encode("a dog", system="something else")
    assert len(encoded) == 5


def test_the_vision_tower_sees_each_picture_once(loaded, golden, monkeypatch):
    from PIL import Image

    seen = []
    model = loaded.mllm.patcher.model
    original = model.image_features
    monkeypatch.setattr(model, "image_features", lambda pixels: seen.append(pixels.shape) or original(pixels))
    pictures = [Image.open(file).convert("RGB") for file in golden("edit_one").images]
    loaded.mllm.encode("a cat", images=pictures, vae=loaded.vae)
    assert len(seen) == 1
