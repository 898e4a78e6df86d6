"""One order of all samples, the same for every member, whoever is there: step k owns the k-th interval of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from heapq import heapify, heapreplace

import msgspec

from shoal.ids import NodeId

_ROUNDS = 4


class Interval(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Positions [first, stop) of one pass over the data."""

    data_epoch: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


class SampleOrder(msgspec.Struct, frozen=True):
    """All passes over `num_samples` samples, `global_batch` to a step. The last step of a pass is shorter, never padded."""

    seed: int
    num_samples: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.global_batch < 1:
            raise ValueError(f"{self.num_samples} samples in batches of {self.global_batch}: both are at least 1")

    def interval(self, step: int) -> Interval:
        """What step `step`, counted from 0, owns."""
        data_epoch, index = divmod(step, -(-self.num_samples // self.global_batch))
        first = index * self.global_batch
        return Interval(data_epoch, first, min(first + self.global_batch, self.num_samples))

    def sample(self, data_epoch: int, position: int) -> int:
        """Which sample stands at a position of a pass: each once, in another order in every pass, without a table.

        A Feistel network over the next power of four, applied again until it falls among the samples.
        """
        half_bits = max(1, (self.num_samples - 1).bit_length() + 1 >> 1)
        mask = (1 << half_bits) - 1
        index = position
        while True:
            left, right = index >> half_bits, index & mask
            for number in range(_ROUNDS):
                key = f"{self.seed}/{data_epoch}/{number}/{right}".encode()
                scrambled = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") & mask
                left, right = right, left ^ scrambled
            index = left << half_bits | right
            if index < self.num_samples:
                return index

    def samples(self, interval: Interval) -> list[int]:
        return [self.sample(interval.data_epoch, position) for position in range(interval.first, interval.stop)]


def split(interval: Interval, samples_per_s: Mapping[NodeId, float]) -> dict[NodeId, Interval]:
    """A part of the interval for every member, so that the last one is ready as early as can be.

    Each sample goes to who would have it done first; with equal samples that is the best there is. A part may be empty.

    Args:
        samples_per_s: of each member, above 0.
    """
    counts = dict.fromkeys(sorted(samples_per_s), 0)
    ready = [(1.0 / samples_per_s[member], member) for member in counts]
    heapify(ready)
    for _ in range(len(interval)):
        _, member = ready[0]
        counts[member] += 1
        heapreplace(ready, ((counts[member] + 1) / samples_per_s[member], member))
    parts, first = {}, interval.first
    for member, count in counts.items():
        parts[member] = Interval(interval.data_epoch, first, first + count)
        first += count
    return parts
