"""Times the writing of text, token by token, beside transformers, ComfyUI's own Generate Text and llama.cpp.

All get the same ids to read and write greedily, in turns. For each: time until the first token, of each token after it,
and the least that a token can take on this machine, which is to read all weights that it needs, and the keys and values
of the tokens before it, once. Reading the same weights takes a turn of its own, and so do their products with one row,
each matrix after the other and nothing else: what a token takes above those is overhead, which is what a GPU waits for.
The first token's limit is how long its operations take at the fastest multiplication of matrices seen here. Without
--model a random one is written.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from internvl_u.checkpoint import open_checkpoint, open_part
from internvl_u.defaults import FILE_DTYPES, GGUF_DTYPES
from internvl_u.linear import fitting_threads, row_product, without_onednn
from internvl_u.tokenizer import Tokenizer

from . import limits
from .busy import busy
from .host import use_comfyui
from .llama_cpp import check_llama_cpp, make_llama_cpp, write_gguf
from .models import converted, nano_model, random_model
from .random_weights import LANGUAGE
from .report import add_device, make_parser, resolve_dtype, show, version_of
from .timing import median, take_turns
from .writers import (
    LANGUAGE_MODEL,
    Writer,
    Written,
    language_config,
    language_weights,
    make_core,
    make_native,
    make_ours,
    make_transformers,
)

CPU_LAYERS = 4
CONTEXTS = (64, 1024, 4096)
TOKEN_TABLE = f"{LANGUAGE_MODEL}model.embed_tokens.weight"
TOGETHER = 3
"""Times that weights are read or multiplied in one turn."""
CONTESTANTS = ("transformers", "ours", "ours in ComfyUI", "Generate Text", "llama.cpp")
Make = Callable[[], Writer]
Key = tuple[str, str]
"""A contestant's name, and the format of the weights that it has."""


@contextlib.contextmanager
def working_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yields --work, or a temporary folder."""
    if arguments.work:
        yield arguments.work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def token_bytes(source: Path, dtype: torch.dtype, context: int) -> int:
    """Returns the bytes that a token after `context` others must read: all weights but the table of tokens, the cache.

    Packed and quantised matrices count as they are stored, all else in `dtype`.
    """
    part = open_part(source, "vlm")
    read = {name: tensor for name, tensor in part.weights.items() if name.startswith(LANGUAGE_MODEL)}
    read.pop(TOKEN_TABLE)
    plain = part.plain
    weights = sum(
        tensor.numel() * (dtype.itemsize if name in plain else tensor.element_size()) for name, tensor in read.items()
    )
    config = part.config["llm_config"]
    cached = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return weights + cached * context * dtype.itemsize


class Reading:
    """The least work of a token, to be timed: reading its weights, and multiplying a row with each matrix.

    Weights that the contestants compute with as they are stored are timed mapped as they lie; those that are cast when
    they are loaded, cast. There are products of plain matrices alone.
    """

    def __init__(self, source: Path, dtype: torch.dtype, device: torch.device):
        part = open_part(source, "vlm")
        read = {name: tensor for name, tensor in part.weights.items() if name.startswith(LANGUAGE_MODEL)}
        read.pop(TOKEN_TABLE)
        plain = part.plain
        weights = {name: tensor.to(dtype) if name in plain else tensor for name, tensor in read.items()}
        self._flat = [flat_floats(tensor.to(device)) for tensor in weights.values()]
        self._device, self._products = device, []
        self._matrix = weights[f"{LANGUAGE_MODEL}model.layers.0.mlp.up_proj.weight"]
        for name, weight in weights.items():
            if name in plain and weight.ndim == 2:
                layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
                layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
                product = row_product(layer, device, dtype)
                row = torch.randn(weight.shape[1], device=device, dtype=dtype)
                self._products += [partial(product, row)] if product is not None else []

    def read(self) -> None:
        """Reads all weights."""
        for values in self._flat:
            values.sum()

    def multiply(self) -> None:
        """Multiplies one row with each plain matrix, by the kernels that writing uses."""
        with without_onednn(self._device), fitting_threads(self._matrix):
            for product in self._products:
                product()


def flat_floats(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's memory as numbers that a sum reads fastest, which are float32."""
    values = tensor.contiguous().view(torch.uint8).flatten()
    return values[: values.numel() // 4 * 4].view(torch.float32)


def read_operations(root: Path, context: int) -> int:
    """Returns the operations until the first token: products with all weights for each token read, and attention.

    The output layer is needed for the last token alone; a token attends to those before it and to itself.
    """
    config = language_config(root)
    matrices = {
        name: math.prod(shape)
        for name, shape in open_part(root, "vlm").shapes.items()
        if name.startswith(LANGUAGE_MODEL) and len(shape) == 2 and name != TOKEN_TABLE
    }
    last = matrices.pop(f"{LANGUAGE_MODEL}lm_head.weight")
    pairs = context * (context + 1) // 2
    attention = 4 * pairs * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    return 2 * (sum(matrices.values()) * context + last) + attention


def makers(arguments: argparse.Namespace, root: Path, work: Path) -> dict[Key, tuple[Path, Make]]:
    """Returns each contestant by name and format, with the weights that it reads and what makes it."""
    device, dtype = torch.device(arguments.device), resolve_dtype(arguments)
    plain = str(dtype)[6:]
    given: dict[str, object] = {}

    def shared() -> tuple[Mapping, Mapping[str, torch.Tensor], Sequence[int]]:
        if not given:
            weights = {name: tensor.to(device) for name, tensor in language_weights(root, dtype).items()}
            given["all"] = language_config(root), weights, Tokenizer(open_checkpoint(root).tokenizer()).stops
        return given["all"]

    def of_llama_cpp(source: Path, form: str) -> Writer:
        check_llama_cpp()
        file = work / f"{root.name}_{form}_{plain}_llama.gguf"
        if not file.exists():
            write_gguf(source, file.with_suffix(".part"), dtype)
            file.with_suffix(".part").rename(file)
        return make_llama_cpp(file, torch.get_num_threads(), max(arguments.contexts) + arguments.tokens)

    found: dict[Key, tuple[Path, Make]] = {}
    found["transformers", plain] = root, lambda: make_transformers(*shared())
    found["Generate Text", plain] = root, lambda: make_core(*shared())
    for form in (plain, *arguments.formats):
        source = root if form == plain else converted(root, work, form)
        found["ours", form] = source, lambda source=source: make_ours(source, dtype=dtype, device=device)
        found["ours in ComfyUI", form] = source, lambda source=source: make_native(source, dtype)
        if form == plain or form in GGUF_DTYPES:
            found["llama.cpp", form] = source, lambda source=source, form=form: of_llama_cpp(source, form)
    return {key: made for key, made in found.items() if key[0] in arguments.only}


def make_all(found: Mapping[Key, tuple[Path, Make]]) -> dict[Key, Writer]:
    """Returns the contestants that can be had here; of the others says why not."""
    writers = {}
    for key, (_, make) in found.items():
        try:
            writers[key] = make()
        except ImportError as error:
            print(f"{key[0]} is left out: {error}", file=sys.stderr)
    if not writers:
        raise RuntimeError(f"none of {', '.join(name for name, _ in found)} can be had here: nothing to measure")
    return writers


def random_prompts(root: Path, context: int, count: int) -> list[list[int]]:
    """Returns texts of random ids that stand for themselves: no special ones, which the tokenizer has at its end.

    No two begin alike, so that nobody knows a beginning from the turn before.
    """
    tokenizer = Tokenizer(open_checkpoint(root).tokenizer())
    plain = min(*tokenizer.stops, *tokenizer.special_token_rows)
    generator = torch.Generator().manual_seed(context)
    return torch.randint(plain, (count, context), generator=generator).tolist()


@torch.inference_mode()
def measure(
    writers: Mapping[Key, Writer],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    device: torch.device,
    others: Mapping[Key, Callable[[], object]] | None = None,
) -> tuple[dict[Key, list[Written]], dict[Key, float]]:
    """Returns what each has written in each turn, one for each prompt but the last, whose beginning warms up.

    `others` take turns as well; of them the median of the seconds is returned.

    Raises:
        ValueError: a text is shorter than wished.
    """
    written: dict[Key, list[Written]] = {key: [] for key in writers}

    def write(key: Key) -> None:
        written[key].append(writers[key](prompts[len(written[key])], tokens))

    *prompts, other = prompts
    for writer in writers.values():
        writer(other[: min(CONTEXTS)], 2)
    others = {key: partial(_repeat, run) for key, run in (others or {}).items()}
    for run in others.values():
        run()
    turns = {("writes", *key): partial(write, key) for key in writers} | {("does", *key): others[key] for key in others}
    times = take_turns(turns, len(prompts), device, warm_up=0)
    for (name, _), texts in written.items():
        lengths = [len(text.ids) for text in texts]
        if set(lengths) != {tokens}:
            raise ValueError(f"{name}: {lengths} tokens written, {tokens} each expected: it must not end a text")
    return written, {key: median(times[("does", *key)]) / TOGETHER for key in others}


def _repeat(run: Callable[[], object]) -> None:
    for _ in range(TOGETHER):
        run()


def agreeing(ids: Sequence[int], others: Sequence[int]) -> int:
    """Returns how many tokens are the same before the first that is not."""
    return next((i for i, (one, other) in enumerate(zip(ids, others)) if one != other), len(ids))


def _agreeing(texts: Sequence[Written], others: Sequence[Written]) -> int:
    return min(agreeing(text.ids, other.ids) for text, other in zip(texts, others))


def to_rows(
    written: Mapping[Key, list[Written]],
    context: int,
    least: Mapping[Key, float],
    products: Mapping[str, float],
    first_least: float = 0.0,
) -> list[dict]:
    """Returns a row for each contestant.

    `least` are the seconds that reading what a token needs takes, `products` those of its products by format,
    `first_least` those of computing the first.
    """
    first = next(iter(written))
    reference = median([text.token for text in written[first]])
    rows = []
    for (name, form), texts in written.items():
        each = [1000 * text.token for text in texts]
        rows.append(
            {
                "context": context,
                "contestant": name,
                "weights": form,
                "first token s": median([text.first for text in texts]),
                "its limit s": max(first_least, least[name, form]),
                "ms a token": median(each),
                "from": min(each),
                "to": max(each),
                "limit ms": 1000 * least[name, form],
                "of the limit": f"{100000 * least[name, form] / median(each):.0f}%",
                "products ms": 1000 * products[form] if form in products else "",
                "overhead ms": median(each) - 1000 * products[form] if form in products else "",
                "tokens a second": 1000 / median(each),
                f"times {first[0]}": 1000 * reference / median(each),
                "same tokens": f"{_agreeing(texts, written[first])} of {len(texts[0].ids)}",
            }
        )
    return rows


def measure_all(arguments: argparse.Namespace, root: Path, work: Path) -> tuple[list[dict], dict]:
    """Returns the rows of all contexts, and what they were measured with."""
    dtype, device = resolve_dtype(arguments), torch.device(arguments.device)
    found = makers(arguments, root, work)
    writers = make_all(found)
    longest = language_config(root)["max_position_embeddings"] - arguments.tokens
    speed = arguments.arithmetic * 1e12 if arguments.arithmetic else limits.best_arithmetic(dtype, device)
    sources = {form: found[name, form][0] for name, form in writers}
    readings = {form: Reading(source, dtype, device) for form, source in sources.items()}
    others: dict[Key, Callable[[], object]] = {("read", form): one.read for form, one in readings.items()}
    others |= {("multiply", str(dtype)[6:]): readings[str(dtype)[6:]].multiply}
    rows, rates = [], {}
    with busy(arguments.busy):
        for context in arguments.contexts:
            if context > longest:
                print(f"{context} tokens are left out: the model reads up to {longest}", file=sys.stderr)
                continue
            prompts = random_prompts(root, context, arguments.repeats + 1)
            written, seconds = measure(writers, prompts, arguments.tokens, device, others)
            products = {form: taken for (what, form), taken in seconds.items() if what == "multiply"}
            rates = {form: token_bytes(source, dtype, 0) / seconds["read", form] for form, source in sources.items()}
            for form, taken in products.items():
                rates[form] = max(rates[form], token_bytes(sources[form], dtype, 0) / taken)
            middle = context + arguments.tokens // 2
            least = {key: token_bytes(found[key][0], dtype, middle) / rates[key[1]] for key in writers}
            rows += to_rows(written, context, least, products, read_operations(root, context) / speed)
    return rows, {"GB/s": max(rates.values()) / 1e9, "TFLOP/s": speed / 1e12}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint folder that never ends a text")
    parser.add_argument("--nano", action="store_true", help="the nano model, made never to end a text")
    parser.add_argument("--layers", type=int, help=f"of the random model; None: {CPU_LAYERS} on a CPU, else all")
    parser.add_argument("--width", type=int, help="of the random model; None: the released one")
    formats = [*FILE_DTYPES, *GGUF_DTYPES]
    parser.add_argument("--formats", nargs="*", choices=formats, default=[], help="ours in these as well; converts")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens to read")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=3, help="timed texts of each contestant")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="contestants")
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help="also measure inside this ComfyUI")
    parser.add_argument("--threads", type=int, help="of torch and llama.cpp; None: torch's own choice")
    parser.add_argument("--busy", type=int, default=0, help="other processes that keep a core busy each meanwhile")
    parser.add_argument("--arithmetic", type=float, help="TFLOP/s of the first token's limit; None: likewise")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keeps written models; None: a temporary one")
    add_device(parser)
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or (CPU_LAYERS if arguments.device == "cpu" else LANGUAGE["num_hidden_layers"])
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    version = use_comfyui(arguments.comfyui, arguments.device.partition(":")[0]) if arguments.comfyui else None
    if version is None:
        arguments.only = [name for name in arguments.only if name not in ("ours in ComfyUI", "Generate Text")]
    dtype = str(resolve_dtype(arguments))
    with working_folder(arguments) as work:
        root = arguments.model or (
            nano_model(work) if arguments.nano else random_model(work, arguments.layers, arguments.width, dtype[6:])
        )
        rows, settings = measure_all(arguments, root, work)
    settings |= {
        "xllamacpp": version_of("xllamacpp"),
        "dtype": dtype,
        "device": arguments.device,
        "comfyui": version,
        "busy": arguments.busy,
    }
    show(rows, arguments.json, threads=torch.get_num_threads(), model=root.name, **settings)


if __name__ == "__main__":
    main()
