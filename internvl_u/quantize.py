"""Values into the blocks of GGUF's K-quants, Q4_K, Q5_K and Q6_K, which the package `gguf` reads but does not make.

The layouts are ggml's. As in its own quantisers (k_quants of llama.cpp) several roundings of a block are tried and each
is followed by least squares; here the error is the plain square, without weights, and all blocks are searched at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

PIECE = 512 << 10
"""Values that are searched at once: their copies stay in a processor's cache."""
AFFINE_TRIES = tuple(step / 4 for step in range(-12, 5))
"""By how much the highest whole number is changed before the inverse of a scale is taken."""
SIGNED_TRIES = tuple(step / 2 for step in range(-8, 9))
_LARGEST = 65504.0  # of fp16


def quantize(values: torch.Tensor, form: str) -> torch.Tensor:
    """Returns blocks of bytes, flat, of values, flat and a whole number of blocks; `form` is a K-quant's name."""
    make = _MAKERS[form]
    return torch.cat([make(piece.float().reshape(-1, 256)).flatten() for piece in values.split(PIECE)])


def _affine_fit(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and minimum [..., 1], both from 0, so that values are nearly scale * (0 .. top) - minimum."""
    count = values.shape[-1]
    low = values.amin(-1, keepdim=True).clamp(max=0)
    span = (values.amax(-1, keepdim=True) - low).clamp(min=1e-30)
    total, squares = values.sum(-1, keepdim=True), values.square().sum(-1, keepdim=True)
    best_scale, best_minimum = span / top, -low
    best = torch.full_like(span, torch.inf)
    for change in (None, *AFFINE_TRIES):
        whole = ((values - low) * ((top + (change or 0)) / span)).round_().clamp_(0, top)
        sum_q, sum_qq = whole.sum(-1, keepdim=True), whole.square().sum(-1, keepdim=True)
        sum_qx = (whole * values).sum(-1, keepdim=True)
        if change is None:
            scale, minimum = best_scale, best_minimum
        else:
            determinant = count * sum_qq - sum_q.square()
            scale = (count * sum_qx - sum_q * total) / determinant
            minimum = (sum_q * sum_qx - sum_qq * total) / determinant
            below = minimum < 0  # a minimum is stored without a sign
            scale = torch.where(below, sum_qx / sum_qq, scale)
            minimum = minimum.clamp(min=0)
        error = squares + scale.square() * sum_qq + count * minimum.square()
        error = error - 2 * (scale * sum_qx - minimum * total + scale * minimum * sum_q)
        better = (error < best) & (scale > 0)
        best = torch.where(better, error, best)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _halved(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_LARGEST, _LARGEST).half()


def _shares(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the fp16 scale [N, 1] and the shares of it [N, K], whole numbers up to `top`, of values from 0."""
    scale = _halved(values.amax(-1, keepdim=True) / top)
    shares = (values / scale.float()).nan_to_num(0, top, 0).round().clamp(0, top)
    return scale, shares


def _affine_parts(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first 16 bytes [N, 16] of blocks [N, 256] of a format with minima, and the numbers [N, 8, 32]."""
    values = values.unflatten(1, (8, 32))
    scale, minimum = (one[..., 0] for one in _affine_fit(values, top))
    scale, scales = _shares(scale, 63)
    minimum, minima = _shares(minimum, 63)
    step, shift = (scale.float() * scales)[..., None], (minimum.float() * minima)[..., None]
    whole = ((values + shift) / step).nan_to_num(0, top, 0).round().clamp(0, top).to(torch.uint8)
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    sixes = [
        scales[:, :4] | (scales[:, 4:] >> 4 << 6),
        minima[:, :4] | (minima[:, 4:] >> 4 << 6),
        (scales[:, 4:] & 15) | (minima[:, 4:] << 4),
    ]
    return torch.cat([scale.view(torch.uint8), minimum.view(torch.uint8), *sixes], dim=1), whole


def _half_bytes(whole: torch.Tensor) -> torch.Tensor:
    """Returns the lowest 4 bits of numbers [N, 4, 2, 32] in pairs, as bytes [N, 128]."""
    return (whole[:, :, 0] & 15 | (whole[:, :, 1] & 15) << 4).flatten(1)


def _q4_k(values: torch.Tensor) -> torch.Tensor:
    head, whole = _affine_parts(values, 15)
    return torch.cat([head, _half_bytes(whole.unflatten(1, (4, 2)))], dim=1)


def _q5_k(values: torch.Tensor) -> torch.Tensor:
    head, whole = _affine_parts(values, 31)
    places = torch.arange(8, dtype=torch.uint8, device=whole.device)
    fifth = (whole >> 4 << places[:, None]).sum(1, dtype=torch.uint8)  # [N, 32]
    return torch.cat([head, fifth, _half_bytes(whole.unflatten(1, (4, 2)))], dim=1)


def _signed_fit(values: torch.Tensor) -> torch.Tensor:
    """Returns the scale [..., 1], of either sign, so that values are nearly scale * (-32 .. 31)."""
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))  # it becomes -32, which has no counterpart
    largest = torch.where(largest == 0, 1, largest)
    best, scale = torch.full_like(largest, -1.0), largest / -32
    for change in SIGNED_TRIES:
        whole = (values * ((-32 + change) / largest)).round_().clamp_(-32, 31)
        product, square = (whole * values).sum(-1, keepdim=True), whole.square().sum(-1, keepdim=True)
        gain = product.square() / square  # by how much least squares lower the error
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, product / square, scale)
    return scale


def _q6_k(values: torch.Tensor) -> torch.Tensor:
    values = values.unflatten(1, (16, 16))
    scales = _signed_fit(values)[..., 0]
    largest = scales.gather(-1, scales.abs().argmax(-1, keepdim=True))
    scale = _halved(largest / -128)
    shares = (scales / scale.float()).nan_to_num(0, 127, -128).round().clamp(-128, 127)
    whole = (values / (scale.float() * shares)[..., None]).nan_to_num(0, 31, -32).round().clamp(-32, 31)
    whole = (whole + 32).to(torch.uint8).reshape(-1, 2, 4, 32)  # [N, half, quarter, 32]
    low = (whole[:, :, :2] & 15 | (whole[:, :, 2:] & 15) << 4).flatten(1)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=whole.device)
    high = (whole >> 4 << places[:, None]).sum(2, dtype=torch.uint8).flatten(1)
    return torch.cat([low, high, shares.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], dim=1)


_MAKERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
