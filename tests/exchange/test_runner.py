"""Members in threads, over real sockets."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from shoal.errors import LinkClosed, RemoteProtocolError, ShoalError
from shoal.exchange.core import ChunkHeader, Phase, deal
from shoal.exchange.runner import Exchange, FloatArray
from shoal.exchange.wire import HEADER, SocketWire, pack, pack_goodbye, unpack
from shoal.ids import NodeId
from shoal.network.graph import Link
from shoal.topology.fapt import netstorm
from shoal.topology.paths import members_of
from shoal.topology.star import star
from shoal.topology.tree import Plan
from tests.topology.testbed import SITE_1, small, table

CHUNK_BYTES = 1024


class Cluster:
    """An exchange per member, with a pair of sockets for each link."""

    def __init__(self, links: set[Link]) -> None:
        self.sockets: dict[NodeId, dict[NodeId, socket.socket]] = {}
        for link in sorted(links):
            if link.source < link.target:
                pair = socket.socketpair()
                for sock, me, peer in zip(pair, (link.source, link.target), (link.target, link.source), strict=True):
                    self.sockets.setdefault(me, {})[peer] = sock
        self.exchanges = {
            me: Exchange(me, {peer: SocketWire(sock) for peer, sock in peers.items()}, chunk_bytes=CHUNK_BYTES)
            for me, peers in sorted(self.sockets.items())
        }
        self._pool = ThreadPoolExecutor(len(self.exchanges))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.all(lambda me: self.exchanges[me].close())
        self._pool.shutdown()

    def all(self, call: Callable[[NodeId], Any]) -> dict[NodeId, Any]:
        """Calls for every member at once; an error of a member is its result."""

        def caught(me: NodeId) -> Any:
            try:
                return call(me)
            except ShoalError as error:
                return error

        return dict(zip(self.exchanges, self._pool.map(caught, self.exchanges), strict=True))

    def enter(self, epoch: int, plan: Plan) -> None:
        self.all(lambda me: self.exchanges[me].enter(epoch, plan))

    def all_reduce(self, inputs: dict[NodeId, FloatArray], *, timeout_s: float = 20.0) -> dict[NodeId, Any]:
        return self.all(lambda me: self.exchanges[me].all_reduce(inputs[me], timeout_s=timeout_s))


def inputs_of(plan: Plan, size: int, seed: int) -> dict[NodeId, FloatArray]:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-6, 7, (len(plan.members), size))
    values = (rng.standard_normal(scales.shape) * scales).astype(np.float32)
    return dict(zip(plan.members, values, strict=True))


def expected(plan: Plan, inputs: dict[NodeId, FloatArray]) -> FloatArray:
    """A walk over each chunk's tree."""
    size, chunk_size = next(iter(inputs.values())).size, CHUNK_BYTES // 4
    total = np.empty(size, dtype=np.float32)
    for chunk, tree in enumerate(deal(plan.shares, -(-size // chunk_size))):
        part = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
        children = {
            member: sorted(route[0] for route in plan.trees[tree].up if route[-1] == member) for member in plan.members
        }

        def summed(member: NodeId, part: slice = part, children: dict[NodeId, list[NodeId]] = children) -> FloatArray:
            values = inputs[member][part]
            for child in children[member]:
                values = values + summed(child)
            return values

        total[part] = summed(plan.trees[tree].root)
    return total


@pytest.mark.parametrize("size", [1, 255, 10_007])
def test_nine_sites_get_the_same_bits_by_either_plan(size: int) -> None:
    capacities = table()
    with Cluster(set(capacities)) as cluster:
        for epoch, plan in enumerate((netstorm(capacities), star(SITE_1, capacities), netstorm(capacities))):
            cluster.enter(epoch, plan)
            for seed in range(3):
                inputs = inputs_of(plan, size, seed)
                kept = {me: x.copy() for me, x in inputs.items()}
                bits = expected(plan, inputs).tobytes()
                results = cluster.all_reduce(inputs)
                assert [result.tobytes() for result in results.values()] == [bits] * 9
                assert all(np.array_equal(inputs[me], kept[me]) for me in inputs)


def test_members_that_begin_late_are_waited_for() -> None:
    capacities = small(4, 1)
    plan = netstorm(capacities)
    inputs = inputs_of(plan, 3000, 0)
    rng = random.Random(0)
    waits_s = {me: rng.uniform(0.0, 0.2) for me in plan.members}
    with Cluster(set(capacities)) as cluster:
        cluster.enter(0, plan)

        def late(me: NodeId) -> FloatArray:
            time.sleep(waits_s[me])
            return cluster.exchanges[me].all_reduce(inputs[me], timeout_s=20.0)

        results = cluster.all(late)
        assert {result.tobytes() for result in results.values()} == {expected(plan, inputs).tobytes()}


def test_a_member_that_dies_ends_it_for_all_and_the_next_epoch_is_whole() -> None:
    capacities = small(4, 2)
    members = members_of(capacities)
    plan = netstorm(capacities)
    inputs = inputs_of(plan, 5000, 0)
    with Cluster(set(capacities)) as cluster:
        cluster.enter(0, plan)
        lost = members[-1]

        def work(me: NodeId) -> Any:
            if me != lost:
                return cluster.exchanges[me].all_reduce(inputs[me], timeout_s=20.0)
            for sock in cluster.sockets[me].values():
                with contextlib.suppress(OSError):  # the other end may have been first
                    sock.shutdown(socket.SHUT_RDWR)
            return None

        results = cluster.all(work)
        assert all(isinstance(results[me], LinkClosed) for me in members if me != lost)
    left = {link: rate for link, rate in small(4, 2, density=1.0).items() if lost not in (link.source, link.target)}
    again = netstorm(left)
    with Cluster(set(left)) as cluster:
        cluster.enter(1, again)
        kept = {me: inputs[me] for me in again.members}
        results = cluster.all_reduce(kept)
        assert {result.tobytes() for result in results.values()} == {expected(again, kept).tobytes()}


def test_different_sizes_are_refused() -> None:
    capacities = small(3, 0)
    plan = netstorm(capacities)
    inputs = {me: np.ones(1000 + index * 1000, dtype=np.float32) for index, me in enumerate(plan.members)}
    with Cluster(set(capacities)) as cluster:
        cluster.enter(0, plan)
        results = cluster.all_reduce(inputs)
    assert any(isinstance(error, RemoteProtocolError) for error in results.values())
    assert all(isinstance(error, RemoteProtocolError | LinkClosed) for error in results.values())


def test_a_member_that_says_nothing_is_not_waited_for_for_ever() -> None:
    capacities = small(3, 0)
    plan = netstorm(capacities)
    with Cluster(set(capacities)) as cluster:
        cluster.enter(0, plan)
        first = plan.members[0]
        with pytest.raises(TimeoutError, match=r"longer than 0\.1 s"):
            cluster.exchanges[first].all_reduce(np.ones(10, dtype=np.float32), timeout_s=0.1)
        with pytest.raises(LinkClosed):
            cluster.exchanges[first].all_reduce(np.ones(10, dtype=np.float32))


def test_a_plan_over_a_link_that_is_not_there_is_refused() -> None:
    capacities = small(4, 0, density=1.0)
    plan = netstorm(capacities)
    me, peer = plan.members[:2]
    with Exchange(me, {}) as exchange, pytest.raises(ValueError, match=f"{me} has no wire to .*{peer}"):
        exchange.enter(0, plan)


def test_frames_say_what_they_are() -> None:
    header = ChunkHeader(3, 4, 5, 2, Phase.DOWN, 7, 1)
    data = pack(header, 1024)
    assert len(data) == HEADER.size
    assert unpack(data, payload_bytes_max=1024) == (header, 1024)
    assert unpack(pack_goodbye(), payload_bytes_max=4) is None
    with pytest.raises(RemoteProtocolError, match="at most 1020"):
        unpack(data, payload_bytes_max=1020)
    with pytest.raises(RemoteProtocolError, match="another protocol"):
        unpack(b"HTTP" + data[4:], payload_bytes_max=1024)


def test_a_link_is_timed_while_its_sender_is_never_idle() -> None:
    a, b = NodeId("a"), NodeId("b")
    pair = socket.socketpair()
    found: list[tuple[NodeId, int, float]] = []
    plan = netstorm({Link(a, b): 1.0, Link(b, a): 1.0})
    with (
        Exchange(a, {b: SocketWire(pair[0])}) as one,
        Exchange(b, {a: SocketWire(pair[1])}, observed=lambda *each: found.append(each)) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        began_s = time.monotonic()
        for exchange in (one, other):
            exchange.enter(0, plan)
        x = np.ones(2_000_000, np.float32)
        for _ in range(3):
            for total in pool.map(lambda exchange: exchange.all_reduce(x), (one, other)):
                assert total[0] == 2.0
        took_s = time.monotonic() - began_s
    assert {peer for peer, _, _ in found} == {a}
    num_bytes, seconds = sum(each[1] for each in found), sum(each[2] for each in found)
    assert x.nbytes / 2 < num_bytes <= 3.1 * x.nbytes
    assert 0 < seconds <= took_s
