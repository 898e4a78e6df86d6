"""Plans are the best there are, and the bound is one."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.transfer.shards import (
    SHARD_BYTES_MAX,
    SHARD_BYTES_MIN,
    Source,
    bound_s,
    manifest_of,
    plan,
    shard_bytes_for,
    shard_hash,
)

SOURCES = st.lists(st.tuples(st.floats(1.0, 50.0), st.floats(0.0, 2.0)), min_size=1, max_size=3).map(
    lambda pairs: [Source(NodeId(f"s{index}"), rate, latency) for index, (rate, latency) in enumerate(pairs)]
)


@given(SOURCES, st.integers(1, 8))
def test_no_other_way_to_give_out_shards_is_faster(sources: list[Source], num_shards: int) -> None:
    def seconds(counts: tuple[int, ...]) -> float:
        return max(
            source.latency_s + count * 10 / source.bytes_per_s
            for source, count in zip(sources, counts, strict=True)
            if count
        )

    ways = [way for way in product(range(num_shards + 1), repeat=len(sources)) if sum(way) == num_shards]
    found = plan(sources, num_shards=num_shards, shard_bytes=10)
    assert sum(found.num_shards.values()) == num_shards
    assert found.seconds == pytest.approx(min(seconds(way) for way in ways))
    assert found.seconds == pytest.approx(seconds(tuple(found.num_shards[source.node] for source in sources)))
    assert found.bound_s <= found.seconds * (1 + 1e-9)


@given(SOURCES, st.integers(1, 200))
def test_half_the_shard_is_never_worse_and_many_shards_reach_the_bound(sources: list[Source], num_shards: int) -> None:
    whole = plan(sources, num_shards=num_shards, shard_bytes=16)
    halves = plan(sources, num_shards=2 * num_shards, shard_bytes=8)
    assert halves.seconds <= whole.seconds * (1 + 1e-9)
    assert whole.seconds <= whole.bound_s * (1 + len(sources) / num_shards) * (1 + 1e-9)


def test_the_bound_knows_what_the_receiver_takes_in() -> None:
    sources = [Source(NodeId("a"), 10.0, 1.0), Source(NodeId("b"), 30.0, 3.0)]
    assert bound_s(sources, num_bytes=10) == pytest.approx(2.0)  # `b` would come too late to help
    assert bound_s(sources, num_bytes=60) == pytest.approx(4.0)
    assert bound_s(sources, num_bytes=60, ingress_bytes_per_s=10.0) == pytest.approx(7.0)


def test_sizes_are_halved_until_there_are_enough() -> None:
    assert shard_bytes_for(30_000_000, 3) == SHARD_BYTES_MIN
    assert shard_bytes_for(400_000_000, 3) == 2 << 20
    assert shard_bytes_for(10**12, 3) == SHARD_BYTES_MAX


def test_a_manifest_names_every_bit() -> None:
    data = bytearray(range(200)) * 5
    manifest = manifest_of(memoryview(data), version=7, shard_bytes=300, about=b"x")
    assert [manifest.span(shard) for shard in range(4)] == [(0, 300), (300, 600), (600, 900), (900, 1000)]
    assert manifest.hashes[3] == shard_hash(data[900:])
    data[999] ^= 1
    other = manifest_of(memoryview(data), version=7, shard_bytes=300, about=b"x")
    assert other.root != manifest.root
    assert other.hashes[:3] == manifest.hashes[:3]
