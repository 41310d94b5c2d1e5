"""What has been read, kept for the next prompt that begins the same way: prefix caching.

A prompt is read in pieces (`TokenizedPrompt.pieces`). Keys, values and hidden states of a piece depend on it and on
what is before it alone, so they are found by a digest of both. Because the pieces are the same whatever is kept, so are
the bits of the results.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch

LIMIT = 512 << 20
"""Bytes that are kept: about 4,000 tokens, or 16 pictures, of the released model in bf16."""
Digest = bytes


class Piece(NamedTuple):
    """A piece that has been read, on the CPU.

    `keys` and `values` [layers, 1, K, T, E]; `states` [T, width], what the transformer is handed; `last` [1, 1, D], the
    output after the last token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    states: torch.Tensor
    last: torch.Tensor


class PrefixCache:
    """Pieces of prompts and features of images, the latest used of them up to a limit in bytes.

    `weights` names the weights that they are made with: what others have made is not found.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit, self.bytes, self.weights = limit, 0, ""
        self._kept: OrderedDict[Digest, tuple[torch.Tensor, ...]] = OrderedDict()

    def features(self, pixels: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Returns the features of an image of pixels [1, 3, size, size], computed where they are not kept."""
        digest = self._digest(b"image", [pixels])
        kept = self._kept.get(digest)
        if kept is None:
            features = compute()
            self._keep(digest, (features,))
            return features
        self._touch([digest])
        return kept[0]

    def start(self) -> Digest:
        """Returns the digest of nothing, before which nothing is."""
        return self._digest(b"text", ())

    def after(self, before: Digest, ids: Sequence[int], features: Iterable[torch.Tensor]) -> Digest:
        """Returns the digest of a piece of ids with the features of its images, after another piece."""
        return self._digest(before + repr(tuple(ids)).encode(), features)

    def get(self, digest: Digest) -> Piece | None:
        """Returns a piece that is kept."""
        kept = self._kept.get(digest)
        return None if kept is None else Piece(*kept)

    def put(self, digest: Digest, piece: Piece) -> None:
        """Keeps a piece."""
        self._keep(digest, piece)

    def touch(self, digests: Sequence[Digest]) -> None:
        """Counts the pieces of a prompt, in their order, as used: the last goes first when there is no room."""
        self._touch(digests[::-1])

    def clear(self) -> None:
        """Gives all memory back."""
        self._kept.clear()
        self.bytes = 0

    def _digest(self, start: bytes, tensors: Iterable[torch.Tensor]) -> Digest:
        digest = hashlib.blake2b(self.weights.encode() + b"|" + start, digest_size=20)
        for tensor in tensors:
            digest.update(cast(Any, tensor.detach().cpu().contiguous().view(torch.uint8).numpy()))
        return digest.digest()

    def _keep(self, digest: Digest, tensors: tuple[torch.Tensor, ...]) -> None:
        needed = sum(one.nbytes for one in tensors)
        if digest in self._kept or needed > self.limit:
            return
        self._kept[digest] = tuple(one.cpu() for one in tensors)
        self.bytes += needed
        while self.bytes > self.limit:
            _, dropped = self._kept.popitem(last=False)
            self.bytes -= sum(one.nbytes for one in dropped)

    def _touch(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            if digest in self._kept:
                self._kept.move_to_end(digest)
