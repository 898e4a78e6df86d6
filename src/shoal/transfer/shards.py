"""Into how many shards a state is cut, who would send how many, and how fast it could be at most.

All shards but the last have the same size, so giving the next one to whoever would have it there first is the best there
is (uniform machines with release times, equal jobs). Halving shards never makes that plan worse, any other refinement may:
so sizes are halved until there are enough. With K shards from n sources the plan is at most n/K above the bound.

Source: the abstract of Chaos (arXiv 2505.12815 v2) names shards along a divisibility chain and an optimal greedy rule; what
is here is our reading of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from heapq import heapify, heapreplace

import msgspec

from shoal.ids import NodeId
from shoal.units import KIB, MIB

SHARD_BYTES_MIN, SHARD_BYTES_MAX = 256 * KIB, 8 * MIB
"""Below, requests cost more than they balance; above, one lost shard costs too much."""
SHARDS_PER_SOURCE = 50
"""At most 2 % above the bound."""
HASH_BYTES = 16


class Source(msgspec.Struct, frozen=True):
    """Who has the state; `bytes_per_s` of the way from it, above 0, and seconds until the first byte of an answer."""

    node: NodeId
    bytes_per_s: float
    latency_s: float


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """What a state of one version is made of: equal manifests, equal bits.

    `about` is the hash of what is told beside the bytes; `hashes` has one per shard, in order.
    """

    version: int
    num_bytes: int
    shard_bytes: int
    about: bytes
    hashes: tuple[bytes, ...]

    @property
    def root(self) -> str:
        """Names the manifest; donors compare it."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:32]

    def span(self, shard: int) -> tuple[int, int]:
        """The shard's first byte, and the one after its last."""
        first = shard * self.shard_bytes
        return first, min(first + self.shard_bytes, self.num_bytes)


class TransferPlan(msgspec.Struct, frozen=True):
    """How many shards each source would send, when the last is there, and the least time that any plan takes."""

    num_shards: dict[NodeId, int]
    seconds: float
    bound_s: float


def shard_hash(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(data).digest()[:HASH_BYTES]


def manifest_of(data: memoryview, *, version: int, shard_bytes: int, about: bytes) -> Manifest:
    """Of a state that lies in `data`, at least one byte."""
    spans = range(0, data.nbytes, shard_bytes)
    hashes = tuple(shard_hash(data[first : first + shard_bytes]) for first in spans)
    return Manifest(version, data.nbytes, shard_bytes, shard_hash(about), hashes)


def shard_bytes_for(num_bytes: int, num_sources: int) -> int:
    """The largest size on the chain of which there are enough for so many sources, or the smallest."""
    size = SHARD_BYTES_MAX
    while size > SHARD_BYTES_MIN and -(-num_bytes // size) < SHARDS_PER_SOURCE * num_sources:
        size //= 2
    return size


def plan(sources: Sequence[Source], *, num_shards: int, shard_bytes: int) -> TransferPlan:
    """The earliest finish that whole shards allow. Predicts and admits; who pulls adapts as it goes.

    Args:
        sources: at least one.
    """
    counts = dict.fromkeys((source.node for source in sources), 0)
    seconds = [shard_bytes / source.bytes_per_s for source in sources]
    ready = [(source.latency_s + seconds[index], index) for index, source in enumerate(sources)]
    heapify(ready)
    last_s = 0.0
    for _ in range(num_shards):
        last_s, index = ready[0]
        counts[sources[index].node] += 1
        heapreplace(ready, (last_s + seconds[index], index))
    return TransferPlan(counts, last_s, bound_s(sources, num_bytes=num_shards * shard_bytes))


def bound_s(sources: Sequence[Source], *, num_bytes: float, ingress_bytes_per_s: float | None = None) -> float:
    """No transfer is faster: the least T with sum of b_i max(0, T - l_i) >= S, and T >= min l + S/B.

    Args:
        sources: at least one.
        ingress_bytes_per_s: B, all that the receiver takes in; None: no limit known.
    """
    total_rate = waited = 0.0
    found_s = float("inf")
    by_latency = sorted(sources, key=lambda source: source.latency_s)
    for index, source in enumerate(by_latency):
        total_rate += source.bytes_per_s
        waited += source.bytes_per_s * source.latency_s
        found_s = (num_bytes + waited) / total_rate
        if index + 1 == len(by_latency) or found_s <= by_latency[index + 1].latency_s:
            break
    if ingress_bytes_per_s is None:
        return found_s
    return max(found_s, by_latency[0].latency_s + num_bytes / ingress_bytes_per_s)
