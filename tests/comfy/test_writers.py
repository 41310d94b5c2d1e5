"""The contestants of benchmarks/text.py that live in ComfyUI write what the library's writes."""

import pytest
import torch

from benchmarks import host, models, text, writers


@pytest.fixture
def silent(native, checkpoint, tmp_path):
    return models.silent_copy(checkpoint, tmp_path / "tiny")


def expected(silent, ids, tokens):
    return writers.make_ours(silent, dtype=torch.float32, device=torch.device("cpu"))(ids, tokens).ids


def test_ours_in_comfyui_writes_the_same_tokens(silent, monkeypatch):
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "should_use_bf16", mm.should_use_bf16)  # which the writer replaces
    monkeypatch.setattr(host, "PACK", "pack")
    (ids,) = text.random_prompts(silent, 12, 1)
    assert writers.make_native(silent, torch.float32)(ids, 20).ids == expected(silent, ids, 20)


def test_generate_text_on_our_weights_writes_the_same_tokens(silent):
    weights = writers.language_weights(silent, torch.float32)
    try:
        core = writers.make_core(writers.language_config(silent), weights, (0,))
    except ImportError as error:
        pytest.skip(str(error))
    (ids,) = text.random_prompts(silent, 12, 1)
    written = core(ids, 20)
    assert written.ids == expected(silent, ids, 20)
    assert 0 < written.first < written.last
