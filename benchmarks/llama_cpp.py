"""llama.cpp as a writer of texts, on our own weights: it knows no architecture of our name, but it does know Qwen3.

Needs the packages gguf and xllamacpp, whose wheels carry llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

from internvl_u.checkpoint import Part, open_part

from .writers import LANGUAGE_MODEL, Writer, Written

ROOM = 64
"""Tokens of context that llama.cpp gets beyond those asked for."""
WORD = "t"
"""Token 12 is spelt "t12": no text is needed to time one, and no tokenizer to read its number."""


def check_llama_cpp() -> None:
    """Makes sure that llama.cpp can be had here, before anything is written for it.

    Raises:
        ImportError: xllamacpp or gguf is not installed.
    """
    import gguf  # noqa: F401
    import xllamacpp  # noqa: F401


def write_gguf(source: Path, file: Path, dtype: torch.dtype) -> None:
    """Writes the Qwen3 of a checkpoint folder or of our GGUF file as llama.cpp has it.

    Packed matrices are copied byte by byte, the others written in `dtype`, norms in float32. The vision tower, the
    projector and the ten rows of special tokens are left out.
    """
    import gguf

    part = open_part(source, "vlm")
    if part.layers:
        raise ValueError(f"{source} is in a format that llama.cpp does not have: give a folder or a GGUF file")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
    _describe(writer, part.config["llm_config"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, part.config["llm_config"]["num_hidden_layers"])
    for name, tensor in part.weights.items():
        if name.startswith(LANGUAGE_MODEL):
            renamed = names.get_name(name.removeprefix(LANGUAGE_MODEL), try_suffixes=(".weight",))
            _add(writer, renamed, part, name, dtype if tensor.ndim > 1 else torch.float32)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer, config: dict) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"{WORD}{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["eos_token_id"])


def _add(writer, renamed: str, part: Part, name: str, dtype: torch.dtype) -> None:
    import gguf

    tensor = part.weights[name]
    if name in part.packed:
        kind = gguf.GGMLQuantizationType[part.packed[name].format]
        writer.add_tensor(renamed, tensor.numpy(), raw_dtype=kind)
    elif dtype == torch.bfloat16:
        data = tensor.to(dtype).view(torch.uint8).numpy()
        writer.add_tensor(renamed, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(renamed, tensor.float().numpy().astype(numpy.float32))


def make_llama_cpp(file: Path, threads: int, context: int) -> Writer:
    """Returns llama.cpp's writer on a file of `write_gguf`; texts are up to `context` tokens long with their prompts.

    Raises:
        ImportError: xllamacpp is not installed.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.verbosity = context + ROOM, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)

    def write(ids: Sequence[int], tokens: int) -> Written:
        request = {"prompt": list(ids), "n_predict": tokens, "temperature": 0.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        spent = answer["timings"]
        if spent["prompt_n"] != len(ids):
            raise RuntimeError(f"llama.cpp read {spent['prompt_n']} tokens, {len(ids)} expected")
        first, rest = spent["prompt_ms"] / 1000, spent["predicted_ms"] / 1000
        words = answer["choices"][0]["text"].split(WORD)[1:]
        return Written([int(word) for word in words], first, first + rest)

    return write
