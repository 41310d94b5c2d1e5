"""A replay buffer of samples, in buckets of equal size and about equal length: batches need little padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from .samples import Sample

LENGTH_BUCKETS = {False: (32, 96, 192), True: (48, 96, 192)}
"""Lengths that contexts are padded to, without and with a reference. Batches of all but the longest are compiled: each
costs half a minute at first, and is four times as fast then."""
BATCH_MULTIPLE = 8


class Bucket(NamedTuple):
    """What the samples of one batch share: rows and columns of the latent, a reference, the padded context's length."""

    rows: int
    columns: int
    has_reference: bool
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return self.rows * self.columns // 4 * (1 + self.has_reference) + self.length

    @property
    def is_longest(self) -> bool:
        """Whether no contexts are longer."""
        return self.length == LENGTH_BUCKETS[self.has_reference][-1]

    def batch_size(self, tokens: int) -> int:
        """Returns how many samples have about `tokens` tokens in all."""
        return max(BATCH_MULTIPLE, tokens // self.tokens // BATCH_MULTIPLE * BATCH_MULTIPLE)


def bucket_of(sample: Sample) -> Bucket:
    """Returns the bucket of a sample."""
    has_reference = sample.reference is not None
    length = next(length for length in LENGTH_BUCKETS[has_reference] if len(sample.context) <= length)
    return Bucket(*sample.latent.shape[-2:], has_reference, length)


class ReplayBuffer:
    """Samples to draw from; the oldest go when new ones come."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.samples: list[Sample] = []
        self.buckets: dict[Bucket, list[Sample]] = {}

    def add(self, samples: Sequence[Sample]) -> None:
        """Takes in new samples."""
        self.samples = (self.samples + list(samples))[-self.capacity :]
        self.buckets = {}
        for sample in self.samples:
            self.buckets.setdefault(bucket_of(sample), []).append(sample)

    def draw(self, rng: random.Random, tokens: int, shared_rng: random.Random) -> list[Sample]:
        """Returns samples of one bucket, about `tokens` tokens in all: always as many of a full bucket.

        Workers with equal `shared_rng` draw from the same bucket, nearly always, and so need the same time.
        """
        buckets = sorted(self.buckets)
        odds = [len(self.buckets[bucket]) * bucket.tokens for bucket in buckets]
        bucket = shared_rng.choices(buckets, odds)[0]
        return rng.sample(self.buckets[bucket], min(bucket.batch_size(tokens), len(self.buckets[bucket])))
