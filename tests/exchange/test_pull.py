"""A state from several shelves at once, over real sockets: bit by bit the same, whatever one of them does."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest

from shoal.exchange.pull import ByteArray, Puller, Shelf
from shoal.ids import NodeId

NUM_BYTES = 3_000_001


class Donors:
    """Shelves with the same state, each behind local sockets that can be cut."""

    def __init__(self, *names: str, share: float = 1.0) -> None:
        self.state = np.random.default_rng(7).integers(0, 256, NUM_BYTES, np.uint8)
        self.shelves = {NodeId(name): Shelf(share=share) for name in names}
        self.ends: dict[NodeId, list[socket.socket]] = {node: [] for node in self.shelves}
        self.threads: list[threading.Thread] = []
        for shelf in self.shelves.values():
            self.put(shelf, self.state)

    def put(self, shelf: Shelf, state: ByteArray) -> None:
        shelf.put("state", state, version=5, about=b"step 5", num_sources=len(self.shelves))

    def dial(self, node: NodeId) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.ends[node].append(theirs)
        thread = threading.Thread(target=self.shelves[node].serve, args=(theirs,), daemon=True)
        thread.start()
        self.threads.append(thread)
        return ours

    def cut(self, node: NodeId) -> None:
        for end in self.ends[node]:
            end.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        for thread in self.threads:
            thread.join(2.0)
            assert not thread.is_alive()


def test_several_donors_give_one_state() -> None:
    donors = Donors("a", "b", "c")
    puller = Puller(donors.dial)
    fetched = puller.fetch("state", donors.shelves)
    assert fetched is not None
    assert (fetched.data == donors.state).all()
    assert (fetched.manifest.version, fetched.about) == (5, b"step 5")
    assert sum(fetched.complete.num_shards.values()) == len(fetched.manifest.hashes) == 12
    assert puller.fetch("gradient/6", donors.shelves) is None
    donors.shelves[NodeId("a")].put("gradient/6", donors.state[:10], version=6, about=b"", num_sources=3)
    again = puller.fetch("gradient/6", donors.shelves)
    assert again is not None
    assert again.data.tobytes() == donors.state[:10].tobytes()
    puller.close()
    donors.end()


@pytest.mark.slow
def test_a_donor_that_has_the_state_a_moment_later_gives_its_share() -> None:
    donors = Donors("a", "b", "c", share=0.002)
    late = NodeId("c")
    donors.shelves[late].share = 1.0
    donors.shelves[late].take("state")
    puller = Puller(donors.dial)
    timer = threading.Timer(0.1, donors.put, (donors.shelves[late], donors.state))
    timer.start()
    fetched = puller.fetch("state", donors.shelves)
    timer.join()
    assert fetched is not None
    assert (fetched.data == donors.state).all()
    assert fetched.complete.num_shards[late] > 0
    puller.close()
    donors.end()


@pytest.mark.slow
def test_a_donor_that_dies_in_the_middle_and_one_that_has_other_bits() -> None:
    donors = Donors("a", "b", "c", "d")
    wrong = donors.state.copy()
    wrong[1_000_000] ^= 1
    donors.put(donors.shelves[NodeId("d")], wrong)

    class Slow(Shelf):
        def _send(self, *arguments: object) -> None:
            time.sleep(0.05)
            super()._send(*arguments)  # type: ignore[arg-type]

    for name in ("a", "b"):
        donors.shelves[NodeId(name)] = Slow(share=1.0)
        donors.put(donors.shelves[NodeId(name)], donors.state)
    puller = Puller(donors.dial)
    donors.shelves[NodeId("c")] = Slow(share=1.0)
    donors.put(donors.shelves[NodeId("c")], donors.state)
    threading.Timer(0.12, donors.cut, (NodeId("a"),)).start()
    fetched = puller.fetch("state", donors.shelves)
    assert fetched is not None
    assert (fetched.data == donors.state).all()
    assert NodeId("d") not in fetched.complete.num_shards, "its manifest is another"
    assert 1 <= fetched.complete.num_shards[NodeId("a")] <= 4
    donors.cut(NodeId("b"))
    donors.cut(NodeId("c"))
    donors.shelves = {NodeId("a"): donors.shelves[NodeId("a")]}
    time.sleep(0.05)
    assert puller.fetch("state", donors.shelves) is not None, "it is dialled again"
    puller.close()
    donors.end()


def test_wrong_bytes_under_a_right_manifest_are_asked_of_another() -> None:
    donors = Donors("a", "b")
    lying = donors.shelves[NodeId("b")]
    item = lying.get("state")
    assert item is not None
    lying._items["state"] = item._replace(data=memoryview(bytes(NUM_BYTES)))
    puller = Puller(donors.dial)
    fetched = puller.fetch("state", donors.shelves)
    assert fetched is not None
    assert (fetched.data == donors.state).all()
    assert set(fetched.complete.num_shards) == {NodeId("a")}
    puller.close()
    donors.end()


def test_a_shelf_that_rests_half_the_time_gives_all_of_it() -> None:
    sent, received = socket.socketpair()
    shelf = Shelf(share=0.5)
    state = np.zeros(1 << 20, np.uint8)
    shelf.put("state", state, version=0, about=b"", num_sources=1)
    thread = threading.Thread(target=shelf.serve, args=(sent,), daemon=True)
    thread.start()
    puller = Puller(lambda _: received)
    fetched = puller.fetch("state", [NodeId("a")])
    assert fetched is not None
    assert shelf.bytes_sent == state.nbytes
    puller.close()
    thread.join(2.0)
    assert not thread.is_alive()
