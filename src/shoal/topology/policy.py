"""Which plan a run takes, and when it takes another: a function of rates that all members know, so all plan the same.

Candidates are NetStorm's trees with their published shares, a parameter server at each device, and both NetStorm's trees and
those in which everybody sends straight to the root, with shares by what their links have room for. The one that promises
the earliest end is taken.

Only what every system computes alike is used here (the four operations): plans must be equal, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from shoal.ids import NodeId
from shoal.network.graph import Link
from shoal.topology.fapt import fapt, netstorm
from shoal.topology.paths import Capacities
from shoal.topology.star import star
from shoal.topology.tree import NoSpanningTree, Plan, Tree, completion_s, loads_of, plan_of

CHUNK_BYTES, HOP_S = 64 * 1024, 0.001
"""Of the model by which plans are compared: a chunk, and what it waits at each device."""
CHUNK_BYTES_MAX = 256 * 1024
CHUNK_S, CHUNKS_MIN = 0.001, 16
"""A chunk costs a device about 0.1 ms beside the wire: on fast links larger ones are better, as long as there are enough to
keep all links busy at the same time."""
GAIN_MIN = 0.1
GAIN_S_MIN = 0.005
"""A new plan must end sooner by this share of an all-reduce, and by so much: less is noise, or not worth it."""
NOISE = 0.15
"""Rates that moved by no more than this share are as before."""
STARS_MAX, PACKED_MAX = 8, 16
"""For groups of more devices than this, stars and shares by room are not tried: planning would take longer than it gains."""
_PUSHES = 200
_STEEPNESS = 0.1


def plan_for(members: Sequence[NodeId], rates: Mapping[Link, float], *, num_bytes: float) -> Plan:
    """The plan for an all-reduce of `num_bytes` among at least two members.

    Args:
        rates: of links between members, bytes/s, where they were measured. A link that nobody measured counts as its other
            direction, or as the mean of all; where none was measured, all count as equal. The exchange will tell.
    """
    capacities = _filled(members, rates)
    plans = list(_candidates(tuple(sorted(members)), capacities, has_rates=bool(rates)))
    return min(plans, key=lambda plan: _seconds(plan, capacities, num_bytes))


def revised(plan: Plan, rates: Mapping[Link, float], *, num_bytes: float) -> Plan:
    """The plan to go on with: `plan` itself, unless these rates promise enough more with another."""
    capacities = _filled(plan.members, rates)
    now = plan_of(plan.policy, plan.trees, plan.shares, capacities)
    best = plan_for(plan.members, rates, num_bytes=num_bytes)
    now_s, best_s = _seconds(now, capacities, num_bytes), _seconds(best, capacities, num_bytes)
    return best if now_s - best_s > max(GAIN_S_MIN, GAIN_MIN * now_s) else plan


def has_moved(before: Mapping[Link, float], after: Mapping[Link, float]) -> bool:
    """Whether any rate is new, or differs by more than noise."""
    return any(link not in before or abs(rate - before[link]) > NOISE * before[link] for link, rate in after.items())


def chunk_bytes_of(plan: Plan, rates: Mapping[Link, float], *, num_bytes: float) -> int:
    """How large the chunks of such an exchange are, by what the slowest of the plan's links was measured to carry: a
    multiple of 64 KiB, which is also what it is until something was measured."""
    known = [rates[link] for tree in plan.trees for link in tree.links if link in rates]
    wanted = min(min(known, default=0.0) * CHUNK_S, num_bytes / CHUNKS_MIN, CHUNK_BYTES_MAX)
    return max(1, int(wanted // CHUNK_BYTES)) * CHUNK_BYTES


def _seconds(plan: Plan, capacities: Capacities, num_bytes: float) -> float:
    return completion_s(plan, capacities, num_bytes=num_bytes, chunk_bytes=min(CHUNK_BYTES, num_bytes), hop_s=HOP_S)


def _filled(members: Sequence[NodeId], rates: Mapping[Link, float]) -> dict[Link, float]:
    links = [Link(one, other) for one in sorted(members) for other in sorted(members) if one != other]
    known = [rates[link] for link in links if link in rates]
    usual = sum(known) / len(known) if known else 1.0
    return {link: rates.get(link) or rates.get(Link(link.target, link.source)) or usual for link in links}


def _candidates(members: tuple[NodeId, ...], capacities: Capacities, *, has_rates: bool) -> list[Plan]:
    plans = [netstorm(capacities)]
    if not has_rates:
        return plans
    if len(members) <= STARS_MAX:
        with suppress(NoSpanningTree):
            plans += [star(root, capacities) for root in members]
    if len(members) <= PACKED_MAX:
        straight = [_straight(root, members) for root in members]
        trees = dict.fromkeys((*straight, *(fapt(root, capacities) for root in members)))
        plans.append(packed(list(trees), capacities))
    return plans


def _straight(root: NodeId, members: Sequence[NodeId]) -> Tree:
    others = [member for member in members if member != root]
    return Tree(root, tuple((member, root) for member in others), tuple((root, member) for member in others))


def packed(trees: Sequence[Tree], capacities: Capacities) -> Plan:
    """Of these trees as much each as their links have room for: near the most that they can carry together.

    Again and again the tree that costs least gets as much as its narrowest link carries, and its links become dearer by how
    full that made them. Source: fractional packing by multiplicative weights (Garg and Koenemann, SIAM J. Comput. 37, 2007).
    """
    loads = [loads_of([tree], [1.0]) for tree in trees]
    widths = [min(capacities[link] / load for link, load in each.items()) for each in loads]
    prices = {link: 1.0 / capacity for link, capacity in capacities.items()}
    given = [0.0] * len(trees)
    for _ in range(_PUSHES):
        costs = [sum(prices[link] * load for link, load in each.items()) for each in loads]
        best = costs.index(min(costs))
        given[best] += widths[best]
        for link, load in loads[best].items():
            prices[link] *= 1.0 + _STEEPNESS * widths[best] * load / capacities[link]
    chosen = [(tree, amount) for tree, amount in zip(trees, given, strict=True) if amount > 0]
    return plan_of("packed", [tree for tree, _ in chosen], [amount for _, amount in chosen], capacities)
