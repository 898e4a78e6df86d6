"""NetStorm's trees, as published: the fastest aggregation path tree of every root. A baseline, chosen by name.

A tree is the union of the cheapest paths to its root, so none has a faster slowest path. Its delay is the sum over its
levels of the slowest link in each, and its share of the data is in proportion to 1/delay. The result goes down the same
tree.

What it leaves out: that several trees use one link, and that a link down is not a link up. Level delays are those of
the links away from the root, as in the released program; times of computing and of propagation are not counted there.

Source: NetStorm (arXiv 2404.11352); what the text leaves open is as in the program released with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.ids import NodeId
from shoal.network.graph import Link
from shoal.topology.paths import Capacities, members_of, routes_to
from shoal.topology.tree import NoSpanningTree, Plan, Tree, plan_of


def fapt(root: NodeId, capacities: Capacities) -> Tree:
    """The fastest aggregation path tree of `root`.

    Raises:
        NoSpanningTree: a device cannot reach the root, or a link of a path is not known in the other direction.
    """
    routes = routes_to(root, capacities)
    members = [member for member in members_of(capacities) if member != root]
    if lost := [member for member in members if member not in routes]:
        raise NoSpanningTree(f"{', '.join(lost)} cannot reach {root} over measured links")
    up = tuple(routes[member][:2] for member in members)
    if missing := [route for route in up if Link(route[1], route[0]) not in capacities]:
        raise NoSpanningTree(f"the link {missing[0][1]}->{missing[0][0]} is not measured, and the tree of {root} needs it")
    return Tree(root=root, up=up, down=tuple(route[::-1] for route in up))


def level_delays(tree: Tree, capacities: Capacities) -> list[float]:
    """Seconds per byte of the slowest link in each level, from the root down."""
    parents = {route[1]: route[0] for route in tree.down}
    delays: list[float] = []
    for member, parent in parents.items():
        level, at = 0, parent
        while at != tree.root:
            level, at = level + 1, parents[at]
        delays += [0.0] * (level + 1 - len(delays))
        delays[level] = max(delays[level], 1.0 / capacities[Link(parent, member)])
    return delays


def netstorm(capacities: Capacities, *, roots: Sequence[NodeId] | None = None) -> Plan:
    """One tree per root (every member, if None), sharing the data as their delays allow.

    Raises:
        NoSpanningTree: see `fapt`.
    """
    trees = [fapt(root, capacities) for root in roots or members_of(capacities)]
    return plan_of("netstorm", trees, [1.0 / sum(level_delays(tree, capacities)) for tree in trees], capacities)
