"""Cheapest paths where a link costs the time it takes per unit of data, 1/capacity."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush
from itertools import pairwise

from shoal.ids import NodeId
from shoal.network.graph import Link, LinkGraph

Capacities = Mapping[Link, float]
"""Directed links and what each carries, bytes/s, above 0."""
Route = tuple[NodeId, ...]
"""Devices in the order in which something passes them: at least a sender and a receiver, none of them twice."""


def capacities_of(graph: LinkGraph) -> dict[Link, float]:
    """The links that a planner may use: up, and measured. What nobody measured has no capacity here; none is invented."""
    found = {figures.link: graph.capacity_bytes_per_s(figures.link) for figures in graph.usable_links()}
    return {link: capacity for link, capacity in found.items() if capacity}


def links_of(route: Route) -> list[Link]:
    return [Link(source, target) for source, target in pairwise(route)]


def members_of(capacities: Capacities) -> tuple[NodeId, ...]:
    """Every device at an end of a link, in order."""
    return tuple(sorted({end for link in capacities for end in (link.source, link.target)}))


def routes_to(root: NodeId, capacities: Capacities) -> dict[NodeId, Route]:
    """The cheapest route from every device that can reach `root`, without the root itself.

    Of equal ones the one with fewer hops, then the first by its ids, so that every device plans the same. A route's tail is
    the route of its second device: together they are a tree.
    """
    sources: dict[NodeId, list[tuple[NodeId, float]]] = {}
    for link, capacity in capacities.items():
        sources.setdefault(link.target, []).append((link.source, 1.0 / capacity))
    best: dict[NodeId, Route] = {}
    open_: list[tuple[float, int, Route]] = [(0.0, 1, (root,))]
    while open_:
        cost, num_devices, route = heappop(open_)
        if route[0] in best:
            continue
        best[route[0]] = route
        for source, seconds_per_byte in sources.get(route[0], ()):
            if source not in best:
                heappush(open_, (cost + seconds_per_byte, num_devices + 1, (source, *route)))
    del best[root]
    return best


def routes_from(root: NodeId, capacities: Capacities) -> dict[NodeId, Route]:
    """As `routes_to`, from `root` to every device that it can reach."""
    reversed_ = {Link(link.target, link.source): capacity for link, capacity in capacities.items()}
    return {target: route[::-1] for target, route in routes_to(root, reversed_).items()}
