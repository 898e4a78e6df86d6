"""How fast an all-reduce could be at most: bounds that hold for whatever moves or sums whole elements.

* **Cut**: whatever set of devices is cut off, part of every element's sum has to leave it and the rest to enter it. So the
  rate is at most the capacity out of the set, and at most that into it.
* **Partition**: of p groups of devices, the first to know an element's sum has heard p - 1 messages from other groups, and
  each of the other p - 1 hears one more. So 2 (p - 1) times the rate is at most the capacity of all links between groups.

A bound comes with what proves it, and is recomputed from that alone: `Cut.bytes_per_s` is a plain sum over links. Devices'
caps are not in it; they can only lower the rate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from shoal.ids import NodeId
from shoal.topology.paths import Capacities, members_of

MEMBERS_ENUMERATED_MAX = 9
"""So many devices have 21147 partitions, a third of a second; with ten it is five times as many."""


class Cut(msgspec.Struct, frozen=True):
    """Links that leave `side` carry `bytes_per_s` together: all that the rest can learn of it."""

    side: frozenset[NodeId]
    bytes_per_s: float


class Partition(msgspec.Struct, frozen=True):
    """Links between `parts` carry 2 (p - 1) times `bytes_per_s`."""

    parts: tuple[frozenset[NodeId], ...]
    bytes_per_s: float


def cut_of(side: frozenset[NodeId], capacities: Capacities) -> Cut:
    leaving = (capacity for link, capacity in capacities.items() if link.source in side and link.target not in side)
    return Cut(side, sum(leaving))


def partition_of(parts: tuple[frozenset[NodeId], ...], capacities: Capacities) -> Partition:
    part_of = {member: index for index, part in enumerate(parts) for member in part}
    between = sum(capacity for link, capacity in capacities.items() if part_of[link.source] != part_of[link.target])
    return Partition(parts, between / (2 * (len(parts) - 1)))


def min_cut(capacities: Capacities) -> Cut:
    """The least cut between any two devices, in either direction: from one device to every other, and back."""
    first, *others = members_of(capacities)
    pairs = [pair for other in others for pair in ((first, other), (other, first))]
    return min((cut_between(*pair, capacities) for pair in pairs), key=lambda cut: cut.bytes_per_s)


def cut_between(source: NodeId, target: NodeId, capacities: Capacities) -> Cut:
    """The least cut that parts `target` from `source`: by a largest flow, along shortest paths that still have room.

    Source: Edmonds and Karp, Theoretical improvements in algorithmic efficiency for network flow problems, 1972.
    """
    room: dict[NodeId, dict[NodeId, float]] = {member: {} for member in members_of(capacities)}
    for link, capacity in capacities.items():
        room[link.source][link.target] = room[link.source].get(link.target, 0.0) + capacity
        room[link.target].setdefault(link.source, 0.0)
    # What rounding leaves of a full link is no room: without this, paths of such rests would go on being found.
    least = 1e-12 * max(capacities.values())
    while True:
        before: dict[NodeId, NodeId] = {source: source}
        waiting = deque([source])
        while waiting and target not in before:
            at = waiting.popleft()
            for neighbour, left in room[at].items():
                if left > least and neighbour not in before:
                    before[neighbour] = at
                    waiting.append(neighbour)
        if target not in before:
            return cut_of(frozenset(before), capacities)
        path = [target]
        while path[-1] != source:
            path.append(before[path[-1]])
        steps = list(zip(path[1:], path[:-1], strict=True))
        flow = min(room[start][stop] for start, stop in steps)
        for start, stop in steps:
            room[start][stop] -= flow
            room[stop][start] += flow


def min_partition(capacities: Capacities) -> Partition:
    """The partition with the least bound: of all where there are few devices, of likely ones where there are many."""
    members = members_of(capacities)
    candidates = _partitions(members) if len(members) <= MEMBERS_ENUMERATED_MAX else _merged(members, capacities)
    return min((partition_of(parts, capacities) for parts in candidates), key=lambda partition: partition.bytes_per_s)


def _partitions(members: tuple[NodeId, ...]) -> Iterator[tuple[frozenset[NodeId], ...]]:
    """All with at least two parts."""

    def grown(index: int, parts: list[list[NodeId]]) -> Iterator[tuple[frozenset[NodeId], ...]]:
        if index == len(members):
            if len(parts) > 1:
                yield tuple(frozenset(part) for part in parts)
            return
        for part in parts:
            part.append(members[index])
            yield from grown(index + 1, parts)
            part.pop()
        parts.append([members[index]])
        yield from grown(index + 1, parts)
        parts.pop()

    return grown(0, [])


def _merged(members: tuple[NodeId, ...], capacities: Capacities) -> Iterator[tuple[frozenset[NodeId], ...]]:
    """From single devices on, each time with the two parts as one that have the most capacity between them."""
    parts = [frozenset({member}) for member in members]
    while len(parts) > 1:
        yield tuple(parts)
        part_of = {member: part for part in parts for member in part}
        between: dict[frozenset[frozenset[NodeId]], float] = {}
        for link, capacity in capacities.items():
            ends = frozenset({part_of[link.source], part_of[link.target]})
            if len(ends) == 2:
                between[ends] = between.get(ends, 0.0) + capacity
        one, other = max(between, key=lambda ends: between[ends])
        parts = [part for part in parts if part not in (one, other)] + [one | other]


def bound_bytes_per_s(capacities: Capacities) -> float:
    """The least bound we can prove: gradient per second that no plan exceeds."""
    return min(min_cut(capacities).bytes_per_s, min_partition(capacities).bytes_per_s)
