"""Who writes texts: ours, ours in ComfyUI, transformers' generate, and ComfyUI's own Generate Text.

Each is a function of a prompt's ids and a number of tokens to write, greedily, one after the other, all on one model's
weights and in one dtype. llama.cpp is in a module of its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from internvl_u.checkpoint import open_checkpoint, open_part
from internvl_u.encoder import Encoder
from internvl_u.generation import GenerationConfig, generate
from internvl_u.load import load_mllm
from internvl_u.prompt import TokenizedPrompt

from .host import pack_module

LANGUAGE_MODEL = "language_model."


@dataclass
class Written:
    """A text's ids, and the seconds until the first and the last of them was known."""

    ids: list[int]
    first: float
    last: float

    @property
    def token(self) -> float:
        """Seconds of each token after the first."""
        return (self.last - self.first) / max(len(self.ids) - 1, 1)


Writer = Callable[[Sequence[int], int], Written]


@dataclass
class Clock:
    """Seconds since it was made, at each token."""

    start: float = field(default_factory=time.perf_counter)
    stamps: list[float] = field(default_factory=list)

    def stamp(self, *_) -> None:
        self.stamps.append(time.perf_counter() - self.start)

    def written(self, ids: Sequence[int]) -> Written:
        return Written(list(ids), self.stamps[0], self.stamps[-1])


def make_ours(source: Path, *, dtype: torch.dtype, device: torch.device) -> Writer:
    """Returns our writer on a checkpoint folder or a converted language model."""
    encoder = Encoder.from_checkpoint(open_checkpoint(source))
    model = load_mllm(source, dtype=dtype, device=device)

    def write(ids: Sequence[int], tokens: int) -> Written:
        clock = Clock()
        config = GenerationConfig(max_new_tokens=tokens)
        prompt = TokenizedPrompt(tuple(ids), (), 0, 0)
        return clock.written(
            generate(encoder, model, prompt, config=config, device=device, dtype=dtype, on_token=clock.stamp)
        )

    return write


def make_native(source: Path, dtype: torch.dtype) -> Writer:
    """Returns our writer in ComfyUI, which must be importable.

    It computes in `dtype`, where on a CPU ComfyUI would choose float32. A converted file stays as it is.
    """
    import comfy.model_management

    comfy.model_management.should_use_bf16 = lambda *_, **__: dtype == torch.bfloat16
    native = pack_module("native.mllm")
    prompts, generation = pack_module("internvl_u.prompt"), pack_module("internvl_u.generation")
    model = native.load_mllm(str(source), dtype if source.is_dir() else None)

    def write(ids: Sequence[int], tokens: int) -> Written:
        clock = Clock()
        prompt = prompts.TokenizedPrompt(tuple(ids), (), 0, 0)
        config = generation.GenerationConfig(max_new_tokens=tokens)
        return clock.written(model.write(prompt, (), config, clock.stamp))

    return write


def language_weights(root: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns Qwen3's weights of a checkpoint folder by transformers' names; in the files' dtype they stay mapped."""
    weights = open_part(root, "vlm").plain
    return {
        name.removeprefix(LANGUAGE_MODEL): tensor.to(dtype)
        for name, tensor in weights.items()
        if name.startswith(LANGUAGE_MODEL)
    }


def language_config(root: Path) -> dict:
    """Returns Qwen3's configuration, as transformers has it."""
    return open_checkpoint(root).config("vlm")["llm_config"]


def make_transformers(config: Mapping, weights: Mapping[str, torch.Tensor], stops: Sequence[int]) -> Writer:
    """Returns transformers' own generate on its own Qwen3, with its usual attention (sdpa) and cache."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.generation.streamers import BaseStreamer

    settings = Qwen3Config.from_dict({k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")})
    if not settings.use_sliding_window:
        settings.sliding_window = None  # transformers 4.51 warns of a window even where it is not used
    with torch.device("meta"):
        model = Qwen3ForCausalLM(settings)
    model.load_state_dict(weights, strict=True, assign=True)
    device = weights["lm_head.weight"].device
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)  # a buffer that no checkpoint stores
    model.eval().requires_grad_(False)

    class Stamps(BaseStreamer):
        def __init__(self, clock: Clock):
            self.clock, self.prompt = clock, True

        def put(self, value):
            if not self.prompt:
                self.clock.stamp()
            self.prompt = False

        def end(self):
            pass

    def write(ids: Sequence[int], tokens: int) -> Written:
        clock = Clock()
        given = torch.tensor([list(ids)], device=device)
        written = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
            streamer=Stamps(clock),
        )
        return clock.written(written[0, len(ids) :].tolist())

    return write


def make_core(config: Mapping, weights: Mapping[str, torch.Tensor], stops: Sequence[int]) -> Writer:
    """Returns what ComfyUI's node Generate Text runs, on ComfyUI's own Qwen3 at the checkpoint's sizes.

    Its layers are those that ComfyUI gives to every text encoder; it computes in the weights' dtype, where on a CPU the
    node would choose float32.

    Raises:
        ImportError: this ComfyUI is too old to write.
    """
    import comfy.ops
    from comfy.text_encoders import llama

    if not hasattr(llama, "BaseGenerate"):
        raise ImportError("this ComfyUI has no Generate Text: 0.33 or newer is expected")
    sizes = llama.Qwen3_8BConfig()
    for name in vars(sizes):
        if name in config:
            setattr(sizes, name, config[name])
    sizes.head_dim, sizes.rope_theta = config["head_dim"], float(_rope_theta(config))
    first = weights["lm_head.weight"]

    class Qwen3(llama.BaseLlama, llama.BaseQwen3, llama.BaseGenerate, nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama.Llama2_(sizes, device="meta", dtype=first.dtype, ops=comfy.ops.manual_cast)

        def sample_token(self, *arguments, **settings):
            chosen = super().sample_token(*arguments, **settings)
            self.clock.stamp(int(chosen))
            return chosen

    model = Qwen3()
    renamed = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in weights.items()}
    model.load_state_dict(renamed, strict=True, assign=True)
    model.eval().requires_grad_(False)

    def write(ids: Sequence[int], tokens: int) -> Written:
        model.clock = Clock()
        given = model.model.embed_tokens(torch.tensor([list(ids)], device=first.device), out_dtype=first.dtype)
        with _quiet():
            written = model.generate(
                given, do_sample=False, max_length=tokens, stop_tokens=list(stops), execution_dtype=first.dtype
            )
        return model.clock.written(written)

    return write


def _rope_theta(config: Mapping) -> float:
    return config.get("rope_theta") or config["rope_parameters"]["rope_theta"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends what a progress bar writes nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
