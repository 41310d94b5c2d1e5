"""Convolutions of a feature map that passes from top to bottom in bands of rows.

A band is a tensor [B, channels, rows, width]; the bands of a map, one below the other, are the map. A 3 x 3 convolution
keeps two rows of what has passed and gives what the whole map would give: there are no tiles, no overlap and no blend.
So a map is never held whole, and on a CPU a band stays in the cache from one layer to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch.nn import functional

Bands = Iterable[torch.Tensor]
EPSILON = 1e-12
"""The smallest length of a vector of channels that is not taken for zero."""
_CACHE = 4 << 20
_MEMORY = 256 << 20


def on_cpu(x: torch.Tensor) -> bool:
    """Returns whether a tensor is computed with on a CPU, where what is best was measured."""
    return x.device.type == "cpu"


def band_bytes(x: torch.Tensor) -> int:
    """Returns how many bytes a band should have: on a CPU what its cores' caches hold, elsewhere most maps whole."""
    return _CACHE * torch.get_num_threads() if on_cpu(x) else _MEMORY


def regrouped(bands: Bands, size: int) -> Iterator[torch.Tensor]:
    """Yields the same map in bands of about `size` bytes, one row at least."""
    held: list[torch.Tensor] = []
    for band in bands:
        rows = max(1, size * band.shape[2] // band.nbytes)
        for piece in band.split(rows, dim=2):
            held.append(piece)
            if sum(one.shape[2] for one in held) >= rows:
                yield _joined(held)
                held = []
    if held:
        yield _joined(held)


def convolved(bands: Bands, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the map under a 3 x 3 convolution with zeros around it; `weight` is [out, in, 3, 3]."""
    for window, edge in _windows(bands):
        yield functional.conv2d(window, weight, bias, padding=(edge, 1))


def doubled(bands: Bands, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the map at twice its height and width (nearest), under a 3 x 3 convolution with zeros around it.

    On a CPU as one transposed convolution with the kernel that both make, which has 4 products where there were 9.
    """
    fused = None
    for window, edge in _windows(bands):
        if on_cpu(window):
            fused = fused_kernel(weight) if fused is None else fused
            yield functional.conv_transpose2d(window, fused, bias, stride=2, padding=(1 if edge else 3, 1))
            continue
        larger = functional.interpolate(window, scale_factor=2.0, mode="nearest-exact")
        yield functional.conv2d(larger if edge else larger[:, :, 1:-1], weight, bias, padding=(edge, 1))


def fused_kernel(weight: torch.Tensor) -> torch.Tensor:
    """Returns the kernel [in, out, 4, 4] of the transposed convolution, stride 2, that `doubled` is.

    A value of the small map lies at four places of the large one; each adds the 3 x 3 kernel, moved.
    """
    turned = weight.float().transpose(0, 1).flip(2, 3)
    moved = [functional.pad(turned, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)]
    return torch.stack(moved).sum(0).to(weight.dtype)


def halved(bands: Bands, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the map under a 3 x 3 convolution of stride 2, with zeros at its right and bottom."""
    held: list[torch.Tensor] = []
    for band, last in _with_last(bands):
        window = functional.pad(_joined([*held, band]), (0, 1, 0, int(last)))
        count = (window.shape[2] - 1) // 2
        if count > 0:
            yield functional.conv2d(window, weight, bias, stride=2)
        held = [window[:, :, 2 * count :, :-1].clone()]


def normalised(band: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Returns a band over the root mean square over its channels, times `gamma` [channels, 1, 1]."""
    scale = band.shape[1] ** -0.5
    smallest = torch.finfo(band.dtype).smallest_normal * torch.finfo(band.dtype).eps
    # Squares of half precision add up in float32; the root of their mean fits into half precision again.
    length = torch.linalg.vector_norm(band, dim=1, keepdim=True, dtype=torch.float32)
    mean = length.clamp_(min=EPSILON).mul_(scale).to(band.dtype).clamp_(min=smallest)
    return (band / mean).mul_(gamma)


class Skipped:
    """What goes around some layers and is added behind them, where the bands come at other heights."""

    def __init__(self) -> None:
        self._waiting: deque[torch.Tensor] = deque()

    def keep(self, band: torch.Tensor) -> None:
        """Keeps a band."""
        self._waiting.append(band)

    def added(self, bands: Bands) -> Iterator[torch.Tensor]:
        """Yields each band with the kept rows of the same height added, in place."""
        for band in bands:
            start, rows = 0, band.shape[2]
            while start < rows:
                kept = self._waiting.popleft()
                count = min(rows - start, kept.shape[2])
                band[:, :, start : start + count] += kept[:, :, :count]
                if count < kept.shape[2]:
                    self._waiting.appendleft(kept[:, :, count:])
                start += count
            yield band


def _windows(bands: Bands) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields windows with a row more above and below than they stand for; of a single band itself, and 1 for that."""
    held: torch.Tensor | None = None
    for band, last in _with_last(bands):
        if held is None and last:
            yield band, 1
            return
        beside = torch.zeros_like(band[:, :, :1])
        window = torch.cat([beside if held is None else held, band, *([beside] if last else [])], dim=2)
        if window.shape[2] > 2:
            yield window, 0
        held = window[:, :, -2:].clone()


def _with_last(bands: Bands) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yields each band, and whether it is the last."""
    waiting: torch.Tensor | None = None
    for band in bands:
        if waiting is not None:
            yield waiting, False
        waiting = band
    if waiting is not None:
        yield waiting, True


def _joined(bands: list[torch.Tensor]) -> torch.Tensor:
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=2)
