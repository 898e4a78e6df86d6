"""Trees for an all-reduce, and a plan that shares the data out among several.

A tree sums on the way up to its root and sends the result down. An edge of it is a route: devices between its ends pass
on what they get and do not sum, so a parameter server on a sparse network is a tree as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from shoal.ids import NodeId
from shoal.network.graph import Link
from shoal.topology.paths import Capacities, Route, links_of


class Tree(msgspec.Struct, frozen=True, array_like=True):
    """One tree over all members.

    `up` has a route from every member but the root to the member that sums for it, `down` one to every member but the root
    from the member that has the result before it. Both are in the order of those members; they need not mirror each other.
    """

    root: NodeId
    up: tuple[Route, ...]
    down: tuple[Route, ...]

    @property
    def links(self) -> list[Link]:
        """Every link as often as a chunk passes it."""
        return [link for route in (*self.up, *self.down) for link in links_of(route)]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How an all-reduce is shared out, and what that promises.

    Attributes:
        policy: the name of the rule that made it.
        members: in order.
        shares: of the data, one per tree, above 0; together 1.
        rate_bytes_per_s: gradient per second, where links are the only limit.
        bottleneck: the link that sets that rate.
    """

    policy: str
    members: tuple[NodeId, ...]
    trees: tuple[Tree, ...]
    shares: tuple[float, ...]
    rate_bytes_per_s: float
    bottleneck: Link


class NoSpanningTree(ValueError):
    """Some devices cannot reach each other over measured links; the text names them."""


def plan_of(policy: str, trees: Sequence[Tree], weights: Sequence[float], capacities: Capacities) -> Plan:
    """A plan with shares in proportion to `weights`; its trees are checked.

    Raises:
        ValueError: see `check`.
    """
    total = sum(weights)
    shares = tuple(weight / total for weight in weights)
    members = tuple(sorted({end for route in trees[0].up for end in (route[0], route[-1])} | {trees[0].root}))
    for tree in trees:
        check(tree, members, capacities)
    loads = loads_of(trees, shares)
    bottleneck = min(loads, key=lambda link: (capacities[link] / loads[link], link))
    return Plan(
        policy=policy,
        members=members,
        trees=tuple(trees),
        shares=shares,
        rate_bytes_per_s=capacities[bottleneck] / loads[bottleneck],
        bottleneck=bottleneck,
    )


def loads_of(trees: Sequence[Tree], shares: Sequence[float]) -> dict[Link, float]:
    """Bytes over each link per byte of gradient, where it is more than none."""
    loads: defaultdict[Link, float] = defaultdict(float)
    for tree, share in zip(trees, shares, strict=True):
        for link in tree.links:
            loads[link] += share
    return dict(loads)


def check(tree: Tree, members: Sequence[NodeId], capacities: Capacities) -> None:
    """Raises ValueError unless both halves span the members, end at the root, and use only links with a capacity."""
    for half, routes in (("up", tree.up), ("down", [route[::-1] for route in tree.down])):
        parents = {route[0]: route[-1] for route in routes}
        others = [member for member in members if member != tree.root]
        if tree.root not in members or [route[0] for route in routes] != others:
            raise ValueError(
                f"the tree of {tree.root} has routes {half} for {sorted(parents)}, not for each of {others} in order"
            )
        for member in others:
            at, seen = member, {member}
            while at != tree.root:
                at = parents.get(at, at)
                if at in seen:
                    raise ValueError(f"the tree of {tree.root} leads {half} from {member} to {at} and not to its root")
                seen.add(at)
    for route in (*tree.up, *tree.down):
        if len(route) < 2 or len(set(route)) != len(route):
            raise ValueError(f"the tree of {tree.root} has a route {route} that goes nowhere or in a circle")
    if missing := [link for link in tree.links if link not in capacities]:
        raise ValueError(f"the tree of {tree.root} uses {missing[0]}, which has no known capacity")


def completion_s(plan: Plan, capacities: Capacities, *, num_bytes: float, chunk_bytes: float, hop_s: float = 0.0) -> float:
    """A model of the seconds one all-reduce takes: all bytes at the plan's rate, after the first chunk's way up and down.

    Args:
        hop_s: latency and overhead of a chunk on each link.
    """
    fill_s = max(_fill_s(tree, capacities, chunk_bytes, hop_s) for tree in plan.trees)
    return num_bytes / plan.rate_bytes_per_s + fill_s


def _fill_s(tree: Tree, capacities: Capacities, chunk_bytes: float, hop_s: float) -> float:
    """The longest way of one chunk to the root and on to everybody, alone on the links."""

    def route_s(route: Route) -> float:
        return sum(hop_s + chunk_bytes / capacities[link] for link in links_of(route))

    up = {route[0]: (route[-1], route_s(route)) for route in tree.up}
    down = {route[-1]: (route[0], route_s(route)) for route in tree.down}

    def longest_s(edges: dict[NodeId, tuple[NodeId, float]]) -> float:
        def way_s(member: NodeId) -> float:
            total_s = 0.0
            while member != tree.root:
                member, edge_s = edges[member]
                total_s += edge_s
            return total_s

        return max(way_s(member) for member in edges)

    return longest_s(up) + longest_s(down)
