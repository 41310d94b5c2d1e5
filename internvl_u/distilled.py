"""The mark of a transformer that draws in few evaluations: how many, said by a weight that nothing reads.

`python -m internvl_u distill` writes a LoRA after which one branch and few steps are enough, and a user of it must know
how many. A safetensors file's metadata is lost on the way through a LoRA loader, a merge or a conversion; weights are
not. The text stream of the last block ends there, in the official code too, so the bias of its MLP changes no picture:
a LoRA of few steps adds the mark to that bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

MARK = b"turbo"
_UNIT = 256
"""What a code is multiplied by: above any trained bias, and 255 times it is exact in 16 bits of either kind."""
_UNREAD = re.compile(r"transformer_blocks\.(\d+)\.txt_mlp\.net\.2\.bias$")
MOST_EVALUATIONS = 255


def marked_layer(names: Iterable[str]) -> str:
    """Returns the layer whose bias nothing reads, of a transformer with weights of these names.

    Raises:
        ValueError: there is none.
    """
    found = [match for name in names if (match := _UNREAD.search(name))]
    if not found:
        raise ValueError("no transformer_blocks found, the weights of a transformer expected")
    return max(found, key=lambda match: int(match[1]))[0].removesuffix(".bias")


def mark(width: int, evaluations: int) -> torch.Tensor:
    """Returns what is added to that bias [width], fp32.

    Raises:
        ValueError: it is too short, or the evaluations are not 1 to 255.
    """
    if not 1 <= evaluations <= MOST_EVALUATIONS:
        raise ValueError(f"{evaluations} evaluations found, 1 to {MOST_EVALUATIONS} expected")
    codes = torch.tensor([*MARK, evaluations], dtype=torch.float32)
    if width < len(codes):
        raise ValueError(f"a transformer {width} wide found, {len(codes)} at least expected")
    return torch.cat([codes * _UNIT, torch.zeros(width - len(codes))])


def evaluations_of(bias: torch.Tensor) -> int | None:
    """Returns how many evaluations that bias, or what is added to it, stands for; None without a mark."""
    if bias.ndim != 1 or len(bias) <= len(MARK):
        return None
    codes = (bias[: len(MARK) + 1].detach().float().cpu() / _UNIT).round().tolist()
    *letters, evaluations = codes
    return int(evaluations) if letters == list(MARK) and 1 <= evaluations <= MOST_EVALUATIONS else None


def evaluations_in(weights: Mapping[str, torch.Tensor]) -> int | None:
    """Returns how many evaluations a transformer of these weights by name draws in; None if it was not distilled."""
    return evaluations_of(weights[f"{marked_layer(weights)}.bias"])
