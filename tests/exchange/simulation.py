"""Members that exchange frames over a network with chance: delays of every length, reordered and doubled frames.

Payloads are float32 of very different sizes, so that another order of summation is seen in the bits, and beside them an
integer that counts each member's contributions in digits of its own.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np

from shoal.exchange.core import (
    Add,
    AllReduce,
    Arrived,
    Contribute,
    Discard,
    Drop,
    Effect,
    Event,
    Finished,
    Send,
    Store,
)
from shoal.ids import NodeId
from shoal.network.graph import Link
from shoal.topology.fapt import netstorm
from shoal.topology.paths import Capacities, members_of
from shoal.topology.star import star
from shoal.topology.tree import Plan, Tree, plan_of
from tests.topology.testbed import small

COUNT_BASE = 1000


class Payload(NamedTuple):
    values: np.ndarray[Any, np.dtype[np.float32]]
    counts: int


class Result(NamedTuple):
    """Of every chunk: its bits, and how often each member is in it."""

    bits: tuple[bytes, ...]
    counts: tuple[int, ...]


def once_each(num_members: int) -> int:
    return sum(COUNT_BASE**index for index in range(num_members))


def contribution(index: int, epoch: int, step: int, chunk: int) -> Payload:
    rng = np.random.default_rng([index, epoch, step, chunk])
    values = (rng.standard_normal(3) * 10.0 ** rng.integers(-6, 7, 3)).astype(np.float32)
    return Payload(values, COUNT_BASE**index)


def random_plan(rng: random.Random) -> Plan:
    """A published plan, or trees that nobody would build, with ways up and down that do not mirror each other."""
    capacities = small(rng.randint(3, 6), rng.randrange(10**6))
    members = members_of(capacities)
    kind = rng.choice(["netstorm", "star", "random"])
    if kind == "netstorm":
        return netstorm(capacities)
    if kind == "star":
        return star(rng.choice(members), capacities)
    trees = [random_tree(rng.choice(members), capacities, rng) for _ in range(rng.randint(1, 4))]
    return plan_of("random", trees, [rng.uniform(0.1, 1.0) for _ in trees], capacities)


def random_tree(root: NodeId, capacities: Capacities, rng: random.Random) -> Tree:
    def grown(neighbours: Callable[[NodeId], list[NodeId]]) -> dict[NodeId, NodeId]:
        parents: dict[NodeId, NodeId] = {}
        inside = [root]
        while len(inside) < len(members_of(capacities)):
            parent = rng.choice(inside)
            outside = [member for member in neighbours(parent) if member not in inside]
            if outside:
                member = rng.choice(outside)
                parents[member] = parent
                inside.append(member)
        return dict(sorted(parents.items()))

    up = grown(lambda parent: [link.source for link in capacities if link.target == parent])
    down = grown(lambda parent: [link.target for link in capacities if link.source == parent])
    return Tree(root=root, up=tuple(up.items()), down=tuple((parent, member) for member, parent in down.items()))


class Network:
    """All members, and frames on their way.

    Args:
        doubled: share of frames that arrive twice.
    """

    def __init__(self, plan: Plan, rng: random.Random, *, doubled: float = 0.1) -> None:
        self.plan = plan
        self.members = {member: AllReduce(member) for member in plan.members}
        self.results: defaultdict[tuple[int, int], dict[NodeId, Result]] = defaultdict(dict)
        self.discarded: set[tuple[NodeId, int, int]] = set()
        self.passed: set[Link] = set()
        self._rng, self._doubled = rng, doubled
        self._due: list[tuple[float, int, NodeId, Event, Payload | None]] = []
        self._num_due = self._num_slots = 0
        self._slots: dict[tuple[NodeId, int], Payload] = {}
        self._sums: dict[tuple[NodeId, int, int], list[Payload]] = {}
        self._index_of = {member: index for index, member in enumerate(plan.members)}

    def at(self, at_s: float, member: NodeId, event: Event, payload: Payload | None = None) -> None:
        self._num_due += 1
        heappush(self._due, (at_s, self._num_due, member, event, payload))

    def run(self, until_s: float = float("inf")) -> None:
        while self._due and self._due[0][0] <= until_s:
            now_s, _, member, event, payload = heappop(self._due)
            core = self.members[member]
            if isinstance(event, Arrived):
                assert payload is not None
                self._num_slots += 1
                event = Arrived(event.header, self._num_slots)
                self._slots[member, event.slot] = payload
            epoch = core.epoch
            if isinstance(event, Contribute):
                chunks = range(event.num_chunks)
                own = [contribution(self._index_of[member], epoch, event.step, chunk) for chunk in chunks]
                self._sums[member, epoch, event.step] = own
            for effect in core.step(event, now_s):
                # Only discards of an entered epoch are about the one before.
                self._carry_out(member, epoch if isinstance(effect, Discard) else core.epoch, effect, now_s)

    def _carry_out(self, member: NodeId, epoch: int, effect: Effect, now_s: float) -> None:
        if isinstance(effect, Add):
            sums, added = self._sums[member, epoch, effect.step], self._slots.pop((member, effect.slot))
            before = sums[effect.chunk]
            sums[effect.chunk] = Payload(before.values + added.values, before.counts + added.counts)
        elif isinstance(effect, Store):
            self._sums[member, epoch, effect.step][effect.chunk] = self._slots.pop((member, effect.slot))
        elif isinstance(effect, Drop):
            del self._slots[member, effect.slot]
        elif isinstance(effect, Send):
            header = effect.header
            payload = (
                self._sums[member, epoch, header.step][header.chunk]
                if effect.slot is None
                else self._slots[member, effect.slot]
            )
            self.passed.add(Link(member, effect.peer))
            for _ in range(2 if self._rng.random() < self._doubled else 1):
                delay_s = self._rng.expovariate(1.0) * self._rng.choice([0.1, 1.0, 10.0])
                self.at(now_s + delay_s, effect.peer, Arrived(header, 0), payload)
        elif isinstance(effect, Discard):
            del self._sums[member, epoch, effect.step]
            self.discarded.add((member, epoch, effect.step))
        else:
            assert isinstance(effect, Finished)
            sums = self._sums.pop((member, epoch, effect.step))
            assert member not in self.results[epoch, effect.step], "a step finished twice"
            self.results[epoch, effect.step][member] = Result(
                tuple(payload.values.tobytes() for payload in sums), tuple(payload.counts for payload in sums)
            )

    @property
    def left_over(self) -> list[object]:
        """What nobody will ask for any more, once nothing is on its way."""
        held = [member for member, core in self.members.items() if core.num_held]
        return [*self._slots, *self._sums, *held]


def expected(plan: Plan, tree: int, epoch: int, step: int, chunk: int) -> bytes:
    """The result's bits by a walk over the tree, without any of the code under test."""
    up: dict[NodeId, list[NodeId]] = defaultdict(list)
    for route in plan.trees[tree].up:
        up[route[-1]].append(route[0])

    def total(member: NodeId) -> np.ndarray[Any, np.dtype[np.float32]]:
        values = contribution(plan.members.index(member), epoch, step, chunk).values
        for child in sorted(up[member]):
            values = values + total(child)
        return values

    return total(plan.trees[tree].root).tobytes()
