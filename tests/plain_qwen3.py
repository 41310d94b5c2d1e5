"""transformers' Qwen3 with the weights of ours: what ours is compared with."""

import dataclasses

import torch


def plain_qwen3(language):
    """Returns transformers' Qwen3ForCausalLM of one of our language models."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = Qwen3Config.from_dict(dataclasses.asdict(language.config) | {"tie_word_embeddings": False})
    settings._attn_implementation = "sdpa"
    settings.sliding_window = None  # 4.51 warns of one even where it is not used
    model = Qwen3ForCausalLM(settings).eval()
    model.load_state_dict(language.state_dict())
    return model.to(language.lm_head.weight.dtype)


@torch.inference_mode()
def written(model, embedded, stops, **settings):
    """Returns the ids that transformers' generate writes after embeddings [1, tokens, width]."""
    return model.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        **settings,
    )[0].tolist()
