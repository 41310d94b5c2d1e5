"""Times the products of one row with a matrix that no cache holds, by each kernel that torch has on a processor.

Writing a token is such products, one after the other. What matters is how many bytes of the matrix a kernel reads in a
second, beside what a plain sum reads: one that computes slower than memory is read gains nothing from smaller weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from internvl_u.linear import without_onednn

from .report import make_parser, show
from .timing import median, take_turns

SHAPES = ((6144, 2048), (2048, 6144), (2048, 2048))
"""Rows and columns of the released language model's matrices."""
BYTES = 400 << 20
"""Of all matrices of one kernel together: more than any cache holds."""
CPU = torch.device("cpu")


class Kernel(NamedTuple):
    """Products with one matrix each, the bytes of a number of it, and how long packing one takes, in milliseconds."""

    itemsize: int
    products: Sequence[Callable[[], object]]
    onednn: bool = True
    pack: float | str = ""


@torch.inference_mode()
def measure(rows: int, columns: int, size: int, repeats: int) -> list[dict]:
    """Returns a row for each kernel: microseconds a product, and bytes of the matrix a second."""
    kernels = _kernels(rows, columns, size)

    times = take_turns({name: partial(_run, one) for name, one in kernels.items()}, repeats, CPU)
    found = []
    for name, kernel in kernels.items():
        each = median(times[name]) / len(kernel.products)
        found.append(
            {
                "matrix": f"{rows} x {columns}",
                "kernel": name,
                "us a product": 1e6 * each,
                "GB/s": rows * columns * kernel.itemsize / each / 1e9,
                "ms to pack": kernel.pack,
                "times bf16": 0.0,
            }
        )
    bf16 = next(row["us a product"] for row in found if row["kernel"].startswith("bf16"))
    return [row | {"times bf16": bf16 / row["us a product"]} for row in found]


def _run(kernel: Kernel) -> None:
    with contextlib.nullcontext() if kernel.onednn else without_onednn(CPU):
        for product in kernel.products:
            product()


def _kernels(rows: int, columns: int, size: int) -> dict[str, Kernel]:
    """Returns the kernels, each with as many matrices as fill `size` bytes."""
    torch_ops: Any = torch
    row = torch.randn(columns)
    small = [
        torch.randint(-127, 128, (rows, columns), dtype=torch.int8) for _ in range(max(2, size // rows // columns))
    ]
    half = [matrix.bfloat16() for matrix in small[: max(2, len(small) // 2)]]
    narrow, ones = row.bfloat16(), torch.ones(rows, dtype=torch.bfloat16)
    whole = (row / row.abs().max() * 127).round().to(torch.int8)[None]
    found = {
        "a plain sum": Kernel(2, [matrix.view(torch.float32).sum for matrix in half]),
        "bf16, mv": Kernel(2, [partial(torch.mv, matrix, narrow) for matrix in half], onednn=False),
        "int8, _weight_int8pack_mm, row in bf16": Kernel(
            1, [partial(torch_ops._weight_int8pack_mm, narrow[None], matrix, ones) for matrix in small]
        ),
        "int8, _int_mm, row in int8": Kernel(1, [partial(torch._int_mm, whole, matrix.T) for matrix in small]),
    }
    if hasattr(torch.ops.onednn, "qlinear_prepack"):
        found["int8, oneDNN's qlinear, row as two in int8"] = _packed(small, columns)
    return found


def _packed(matrices: Sequence[torch.Tensor], columns: int) -> Kernel:
    """Returns oneDNN's kernel on matrices that it has packed anew; two rows of int8 are as exact as one of 16 bits."""
    onednn: Any = torch.ops.onednn
    rows = len(matrices[0])
    scales, zeros = torch.ones(rows), torch.zeros(rows, dtype=torch.int32)
    two = torch.randint(0, 256, (2, columns), dtype=torch.uint8)
    start = time.perf_counter()
    packed = [onednn.qlinear_prepack(matrix, None) for matrix in matrices]
    taken = 1000 * (time.perf_counter() - start) / len(packed)

    def product(one: torch.Tensor) -> torch.Tensor:
        arguments = (two, 0.01, 128, one, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return onednn.qlinear_pointwise(*arguments)

    return Kernel(1, [partial(product, one) for one in packed], pack=taken)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each kernel")
    parser.add_argument("--threads", type=int, help="of torch; None: its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [row for shape in SHAPES for row in measure(*shape, BYTES, arguments.repeats)]
    show(rows, arguments.json, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
