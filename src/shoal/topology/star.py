"""A parameter server at one site: everybody sends to it and gets the result from it, over the same links. A baseline.

Devices on the way pass on and do not sum, so the server's links carry everybody's gradients.
"""

from __future__ import annotations

from shoal.ids import NodeId
from shoal.topology.paths import Capacities, members_of, routes_from, routes_to
from shoal.topology.tree import NoSpanningTree, Plan, Tree, plan_of


def star(root: NodeId, capacities: Capacities) -> Plan:
    """The star at `root`, by the cheapest route from and to each member.

    Raises:
        NoSpanningTree: a device cannot reach the root, or the root cannot reach it.
    """
    up, down = routes_to(root, capacities), routes_from(root, capacities)
    members = [member for member in members_of(capacities) if member != root]
    if lost := [member for member in members if member not in up or member not in down]:
        raise NoSpanningTree(f"{', '.join(lost)} and {root} cannot reach each other over measured links")
    tree = Tree(root=root, up=tuple(up[member] for member in members), down=tuple(down[member] for member in members))
    return plan_of("star", [tree], [1.0], capacities)
