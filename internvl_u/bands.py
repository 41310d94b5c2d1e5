"""Convolutions of a feature map that passes from top to bottom in bands of rows.

A band is a tensor [B, channels, rows, width]; the bands of a map, one below the other, are the map. A 3 x 3 convolution
keeps two rows of what has passed and gives what the whole map would give: there are no tiles, no overlap and no blend.
So a map is never held whole, and on a CPU a band stays in the cache from one layer to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.nn import functional

Bands = Iterable[tuple[torch.Tensor, bool]]
"""The bands of a map, and of each whether it is the last."""
Step = Callable[[torch.Tensor, bool], torch.Tensor | None]
"""Takes a band, and whether it is the last; returns what is known of the result by then, if that is any row."""
Weights = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Returns weight [out, in, 3, 3] and bias where and as a tensor is."""
EPSILON = 1e-12
"""The smallest length of a vector of channels that is not taken for zero."""
_CACHE = 2 << 20
_MEMORY = 256 << 20


def on_cpu(x: torch.Tensor) -> bool:
    """Returns whether a tensor is computed with on a CPU, where what is best was measured."""
    return x.device.type == "cpu"


def band_bytes(x: torch.Tensor) -> int:
    """Returns how many bytes a band should have: on a CPU what its cores' caches hold, elsewhere most maps whole."""
    return _CACHE * torch.get_num_threads() if on_cpu(x) else _MEMORY


def passed(bands: Bands, steps: Sequence[Step]) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yields the map behind all steps; each band goes through all of them before the next one comes."""
    for band, last in bands:
        x: torch.Tensor | None = band
        del band
        for step in steps:
            if x is not None:
                x = step(x, last)
        if x is not None:
            yield x, last


def regrouped(bands: Bands, size: int) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yields the same map in bands of about `size` bytes, one row at least."""
    held: list[torch.Tensor] = []
    for band, last in bands:
        rows = max(1, size * band.shape[2] // band.nbytes)
        pieces = deque(band.split(rows, dim=2))
        while pieces:
            held.append(pieces.popleft())
            end = last and not pieces
            if end or sum(one.shape[2] for one in held) >= rows:
                yield _joined(held), end
                held = []


def whole(bands: Bands) -> torch.Tensor:
    """Returns the map in one piece."""
    return _joined([band for band, _ in bands])


class Convolution:
    """A step: a 3 x 3 convolution with zeros around the map."""

    def __init__(self, weights: Weights):
        self._make, self._weights = weights, None
        self._held: torch.Tensor | None = None

    def __call__(self, band: torch.Tensor, last: bool) -> torch.Tensor | None:
        if self._weights is None:
            self._weights = self._prepared(*self._make(band))
        weight, bias = self._weights
        self._weights = None if last else self._weights
        if self._held is None and last:
            return self._filtered(band, weight, bias, True)
        beside = torch.zeros_like(band[:, :, :1])
        above = beside if self._held is None else self._held
        window = torch.cat([above, band, *([beside] if last else [])], dim=2)
        self._held = None if last else window[:, :, -2:].clone()
        return self._filtered(window, weight, bias, False) if window.shape[2] > 2 else None

    def _prepared(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight, bias

    def _filtered(self, window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, edge: bool) -> torch.Tensor:
        """Returns the rows of a window but the first and last; with `edge` all of them, zeros beyond it."""
        return functional.conv2d(window, weight, bias, padding=(int(edge), 1))


class Doubling(Convolution):
    """A step: twice the height and width (nearest), then a 3 x 3 convolution with zeros around the map.

    On a CPU as one transposed convolution with the kernel that both make, which has 4 products where there were 9.
    """

    def _prepared(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fused_kernel(weight) if on_cpu(weight) else weight, bias

    def _filtered(self, window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, edge: bool) -> torch.Tensor:
        if on_cpu(window):
            return functional.conv_transpose2d(window, weight, bias, stride=2, padding=(1 if edge else 3, 1))
        larger = functional.interpolate(window, scale_factor=2.0, mode="nearest-exact")
        return functional.conv2d(larger if edge else larger[:, :, 1:-1], weight, bias, padding=(int(edge), 1))


class Halving:
    """A step: a 3 x 3 convolution of stride 2, with zeros at the map's right and bottom."""

    def __init__(self, weights: Weights):
        self._make, self._weights = weights, None
        self._held: list[torch.Tensor] = []

    def __call__(self, band: torch.Tensor, last: bool) -> torch.Tensor | None:
        self._weights = self._weights or self._make(band)
        window = functional.pad(_joined([*self._held, band]), (0, 1, 0, int(last)))
        count = (window.shape[2] - 1) // 2
        self._held = [window[:, :, 2 * count :, :-1].clone()]
        return functional.conv2d(window, *self._weights, stride=2) if count > 0 else None


def fused_kernel(weight: torch.Tensor) -> torch.Tensor:
    """Returns the kernel [in, out, 4, 4] of the transposed convolution, stride 2, that `Doubling` is.

    A value of the small map lies at four places of the large one; each adds the 3 x 3 kernel, moved.
    """
    turned = weight.float().transpose(0, 1).flip(2, 3)
    moved = [functional.pad(turned, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)]
    return torch.stack(moved).sum(0).to(weight.dtype)


def normalised(band: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Returns a band over the root mean square over its channels, times `gamma` [channels, 1, 1]."""
    scale = band.shape[1] ** -0.5
    smallest = torch.finfo(band.dtype).smallest_normal * torch.finfo(band.dtype).eps
    # Squares of half precision add up in float32; the root of their mean fits into half precision again.
    length = torch.linalg.vector_norm(band, dim=1, keepdim=True, dtype=torch.float32)
    mean = length.clamp_(min=EPSILON).mul_(scale).to(band.dtype).clamp_(min=smallest)
    return (band / mean).mul_(gamma)


class Skipped:
    """What goes around some steps and is added behind them, where the bands come at other heights."""

    def __init__(self) -> None:
        self._waiting: deque[torch.Tensor] = deque()

    def keep(self, band: torch.Tensor) -> None:
        """Keeps a band."""
        self._waiting.append(band)

    def added(self, band: torch.Tensor) -> torch.Tensor:
        """Returns a band with the next rows of what is kept added, in place."""
        start, rows = 0, band.shape[2]
        while start < rows:
            kept = self._waiting.popleft()
            count = min(rows - start, kept.shape[2])
            band[:, :, start : start + count] += kept[:, :, :count]
            if count < kept.shape[2]:
                self._waiting.appendleft(kept[:, :, count:].clone())  # not a view, which would hold the whole band
            start += count
        return band


def _joined(bands: list[torch.Tensor]) -> torch.Tensor:
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=2)
