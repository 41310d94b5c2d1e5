"""Measures the machine's limits: how fast it reads memory that no cache holds, and how fast it multiplies matrices.

A token cannot be written faster than all weights that it needs are read once. The bandwidth is the fastest of several
ways to read, the arithmetic the fastest of several shapes: a limit that something measured here beats would be none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .report import make_parser, show
from .timing import seconds

BYTES = 1 << 30
"""Read in each call: more than any cache holds."""
COLUMNS = 4096
SHAPES = ((512, 4096, 4096), (2048, 2048, 2048), (2048, 4096, 4096))
"""Rows, inner and outer width of products."""
REPEATS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.inference_mode()
def bandwidth(device: torch.device | str = "cpu", size: int = BYTES, repeats: int = REPEATS) -> dict[str, float]:
    """Returns bytes a second of each way to read `size` bytes of memory."""
    device = torch.device(device)
    return {name: size / _fastest(read, device, repeats) for name, read in _reads(device, size)}


@torch.inference_mode()
def arithmetic(
    dtype: torch.dtype, device: torch.device | str = "cpu", shapes=SHAPES, repeats: int = REPEATS
) -> dict[str, float]:
    """Returns operations a second of products of matrices; a multiplication and an addition are two."""
    device, found = torch.device(device), {}
    for rows, inner, outer in shapes:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(outer, inner, device=device).to(dtype)

        def multiply(left=left, right=right) -> torch.Tensor:
            return torch.nn.functional.linear(left, right)

        found[f"{rows}x{inner}x{outer}"] = 2 * rows * inner * outer / _fastest(multiply, device, repeats)
    return found


def best_bandwidth(device: torch.device | str = "cpu") -> float:
    """Returns the most bytes a second seen."""
    return max(bandwidth(device).values())


def best_arithmetic(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Returns the most operations a second seen."""
    return max(arithmetic(dtype, device).values())


def _reads(device: torch.device, size: int) -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.int64, torch.bfloat16):
        values = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        yield f"sum of {str(dtype)[6:]}", values.sum
    values, vector = torch.ones(size // 4, device=device), torch.ones(COLUMNS, device=device)
    yield "sum of float32", values.sum
    yield "largest of float32", values.max
    yield "matrix and vector of float32", partial(torch.mv, values.view(-1, COLUMNS), vector)


def _fastest(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    return min(seconds(run, device) for _ in range(repeats))


def rows(device: str = "cpu") -> list[dict]:
    """Returns all limits as rows of a table."""
    found = [{"limit": f"memory, {name}", "GB/s": rate / 1e9} for name, rate in bandwidth(device).items()]
    for name, dtype in DTYPES.items():
        rates = arithmetic(dtype, device)
        found += [{"limit": f"{name} product {shape}", "TFLOP/s": rate / 1e12} for shape, rate in rates.items()]
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="what to measure")
    parser.add_argument("--threads", type=int, help="of torch; None: its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    show(rows(arguments.device), arguments.json, device=arguments.device, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
