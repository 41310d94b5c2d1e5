"""Times the writing of text: ours against transformers' own generate on the plain model, same weights, greedy.

Every contestant writes the same number of tokens, and they must be the same tokens. Without --model a random one of
few layers is written to a temporary folder first; a model that ends its texts early cannot be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from internvl_u import prompt
from internvl_u.checkpoint import open_checkpoint
from internvl_u.encoder import Encoder
from internvl_u.generation import GenerationConfig, generate
from internvl_u.load import load_mllm

from .host import pack_module, use_comfyui
from .random_weights import LANGUAGE, write_checkpoint
from .report import add_device, make_parser, resolve_dtype, show
from .timing import median, take_turns

CPU_LAYERS = 4
SYSTEM = "You answer in words."
QUESTION = "Describe a harbour town at dawn, its boats and its people, in as many words as you like."
Write = Callable[[int], list[int]]


@contextlib.contextmanager
def model_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yields --model, or a temporary folder with a random model of --layers layers."""
    if arguments.model:
        yield arguments.model
        return
    with tempfile.TemporaryDirectory() as folder:
        dtype = str(resolve_dtype(arguments)).removeprefix("torch.")
        layers = {"language_layers": arguments.layers, "vision_layers": 1, "mmdit_layers": 1}
        write_checkpoint(Path(folder), dtype=dtype, **layers)
        yield Path(folder)


def make_library(root: Path, *, dtype: torch.dtype, device: torch.device) -> dict[str, Write]:
    """Returns our writer and transformers' own generate, on one model in memory."""
    encoder = Encoder.from_checkpoint(open_checkpoint(root))
    model = load_mllm(root, dtype=dtype, device=device)
    opening = prompt.generation_prompt(encoder.tokenizer, QUESTION, system=SYSTEM)
    embedded = encoder.embed(model, opening, (), device=device, dtype=dtype)

    def ours(tokens: int) -> list[int]:
        return generate(
            encoder, model, opening, config=GenerationConfig(max_new_tokens=tokens), device=device, dtype=dtype
        )

    def plain(tokens: int) -> list[int]:
        return model.language_model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=device),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(encoder.tokenizer.stops),
            pad_token_id=encoder.tokenizer.stops[0],
        )[0].tolist()

    return {"transformers": plain, "ours": ours}


def make_native(root: Path, precision: str) -> Write:
    """Returns our writer in ComfyUI, which must be importable."""
    _, model, _ = pack_module("native.load").load(root, precision)
    config = pack_module("internvl_u.generation").GenerationConfig

    def ours(tokens: int) -> list[int]:
        return model.generate(QUESTION, system=SYSTEM, config=config(max_new_tokens=tokens))

    return ours


def check_lengths(written: dict[str, list[int]], tokens: int) -> None:
    """Makes sure that all wrote the wished number of tokens.

    Raises:
        ValueError: one stopped early.
    """
    lengths = {name: len(ids) for name, ids in written.items()}
    if set(lengths.values()) != {tokens}:
        raise ValueError(f"{lengths} tokens written, {tokens} each expected: give a model of random_weights.py")


@torch.inference_mode()
def measure(contestants: dict[str, Write], tokens: int, repeats: int, device: torch.device) -> list[dict]:
    """Returns a row for each contestant. The first token is the prompt's share, and counts."""
    written = {name: run(tokens) for name, run in contestants.items()}
    check_lengths(written, tokens)
    alone = take_turns({name: lambda run=run: run(1) for name, run in contestants.items()}, repeats, device)
    whole = take_turns({name: lambda run=run: run(tokens) for name, run in contestants.items()}, repeats, device)
    rows = []
    for name in contestants:
        first, total = median(alone[name]), median(whole[name])
        rows.append(
            {
                "contestant": name,
                "tokens": tokens,
                "seconds": total,
                "first token": first,
                "tokens a second": tokens / total,
                "times transformers": median(whole["transformers"]) / total,
                "same tokens": written[name] == written["transformers"],
            }
        )
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint folder of random_weights.py")
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help="also measure inside this ComfyUI")
    parser.add_argument("--layers", type=int, help=f"of the random model; None: {CPU_LAYERS} on a CPU, else all")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each contestant")
    add_device(parser)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), resolve_dtype(arguments)
    arguments.layers = arguments.layers or (CPU_LAYERS if device.type == "cpu" else LANGUAGE["num_hidden_layers"])

    version = use_comfyui(arguments.comfyui, device.type) if arguments.comfyui else None
    with model_folder(arguments) as root:
        contestants = make_library(root, dtype=dtype, device=device)
        if version:
            precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
            contestants["ours in ComfyUI"] = make_native(root, precision)
        rows = measure(contestants, arguments.tokens, arguments.repeats, device)
    show(rows, arguments.json, dtype=str(dtype), device=str(device), comfyui=version)


if __name__ == "__main__":
    main()
