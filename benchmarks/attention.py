"""Times the attention of one token over the keys and values before it, by each way that torch has on a processor.

After a long text this is what writing a token takes beside reading the weights. Bytes a second are those of the keys
and values as they are stored, read once; `error` is the largest difference from attention in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from internvl_u.linear import without_onednn

from .random_weights import LANGUAGE
from .report import make_parser, show
from .timing import median, take_turns

HEADS, WIDTH = LANGUAGE["num_key_value_heads"], LANGUAGE["head_dim"]
GROUP = LANGUAGE["num_attention_heads"] // HEADS
BYTES = 256 << 20
"""Of all keys and values in bf16 together: more than any cache holds."""
SPARE = 300
"""Tokens for which there is room behind those that are read, as while a text is written."""
CPU = torch.device("cpu")


class Past(NamedTuple):
    """A layer's query [1, K, H / K, E], and its keys and values [1, K, T, E]."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def batched(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attends by two products of all heads together; the keys stand on the left, where oneDNN is faster."""
    scores = torch.bmm(keys[0], query[0].transpose(1, 2)).transpose(1, 2)
    return torch.bmm(_weights(scores), values[0])[None]


def by_head(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attends by two products for each head of keys and values."""
    heads = zip(query[0], keys[0], values[0], strict=True)
    return torch.stack([_weights(functional.linear(one, key)) @ value for one, key, value in heads])[None]


def by_query(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attends by products of one row with a matrix, which read the keys once for each query that shares them."""
    out = torch.empty_like(query)
    for head, (rows, key, value) in enumerate(zip(query[0], keys[0], values[0], strict=True)):
        for i, row in enumerate(rows):
            out[0, head, i] = torch.mv(value.t(), _weights(torch.mv(key, row)))
    return out


def _weights(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores.float() * WIDTH**-0.5, -1).to(scores.dtype)


def cast_first(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attends in float32 after casting all keys and values."""
    return functional.scaled_dot_product_attention(query.float(), keys.float(), values.float())


@torch.inference_mode()
def measure(tokens: int, size: int, repeats: int) -> list[dict]:
    """Returns a row for each way: milliseconds of one layer, and bytes of keys and values read in a second."""
    stored = 2 * HEADS * tokens * WIDTH
    layers = [_layer(tokens) for _ in range(max(2, size // (2 * stored)))]
    half = [Past(*(one.bfloat16() for one in layer)) for layer in layers]
    sdpa = functional.scaled_dot_product_attention
    ways: dict[str, tuple[Attend, list[Past], bool]] = {
        "scaled_dot_product_attention": (sdpa, half, False),
        "scaled_dot_product_attention, oneDNN": (sdpa, half, True),
        "two products, oneDNN": (batched, half, True),
        "two products a head, oneDNN": (by_head, half, True),
        "two products a query": (by_query, half, False),
        "cast to float32 first": (cast_first, half, False),
        "stored in float32": (sdpa, layers, False),
        "stored in float16": (sdpa, [Past(*(one.half() for one in layer)) for layer in layers], False),
    }
    runs = {name: partial(_run, *way, tokens) for name, way in ways.items()}
    runs["a plain sum"] = partial(_read, half)
    times = take_turns(runs, repeats, CPU)
    exact = sdpa(*_first(layers[0], tokens))
    found = []
    for name in runs:
        each, way = median(times[name]) / len(layers), ways.get(name)
        itemsize = way[1][0].keys.element_size() if way else 2
        error = (way[0](*_first(way[1][0], tokens)).float() - exact).abs().max().item() if way else ""
        row = {"tokens": tokens, "way": name, "ms a layer": 1000 * each, "GB/s": stored * itemsize / each / 1e9}
        found.append(row | {"error": error})
    return found


def _layer(tokens: int) -> Past:
    room = (1, HEADS, tokens + SPARE, WIDTH)
    return Past(torch.randn(1, HEADS, GROUP, WIDTH), torch.randn(room), torch.randn(room))


def _first(layer: Past, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer.query, layer.keys.narrow(2, 0, tokens), layer.values.narrow(2, 0, tokens)


def _run(attend: Attend, layers: list[Past], onednn: bool, tokens: int) -> None:
    with contextlib.nullcontext() if onednn else without_onednn(CPU):
        for layer in layers:
            attend(*_first(layer, tokens))


def _read(layers: list[Past]) -> None:
    for layer in layers:
        for one in layer[1:]:
            one.view(torch.float32).sum()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096], help="tokens before the one")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each way")
    arguments = parser.parse_args()
    rows = [row for context in arguments.contexts for row in measure(context, BYTES, arguments.repeats)]
    show(rows, arguments.json, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
