"""Trees against brute force, plans against the published figures, bounds against everything that is known to be possible."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.network.graph import Figure, Link, LinkFigures, LinkGraph
from shoal.network.link_state import LinkState
from shoal.topology.bound import bound_bytes_per_s, cut_between, cut_of, min_cut, min_partition, partition_of
from shoal.topology.fapt import fapt, level_delays, netstorm
from shoal.topology.paths import Capacities, Route, capacities_of, links_of, members_of
from shoal.topology.star import star
from shoal.topology.tree import NoSpanningTree, Plan, check, completion_s, loads_of
from tests.topology.testbed import SITE_1, drawn, mbit_s, small, table, uniform

graphs = st.builds(small, st.integers(3, 5), st.integers(0, 10**6))


def simple_paths(source: NodeId, target: NodeId, capacities: Capacities, before: Route = ()) -> Iterator[Route]:
    if source == target:
        yield (*before, source)
        return
    for link in capacities:
        if link.source == source and link.target not in before:
            yield from simple_paths(link.target, target, capacities, (*before, source))


def cost(route: Route, capacities: Capacities) -> float:
    return sum(1.0 / capacities[link] for link in links_of(route))


@settings(deadline=None, max_examples=60)
@given(graphs)
def test_every_path_of_a_fapt_is_the_cheapest_of_all(capacities: dict[Link, float]) -> None:
    members = members_of(capacities)
    for root in members:
        parents = {route[0]: route[1] for route in fapt(root, capacities).up}
        for member in members:
            if member == root:
                continue
            path = [member]
            while path[-1] != root:
                path.append(parents[path[-1]])
            best = min(simple_paths(member, root, capacities), key=lambda route: cost(route, capacities))
            assert tuple(path) == best


@settings(deadline=None, max_examples=40)
@given(graphs)
def test_no_tree_has_a_faster_slowest_path_than_the_fapt(capacities: dict[Link, float]) -> None:
    root, *others = members_of(capacities)
    choices = [[link.target for link in capacities if link.source == member] for member in others]

    def slowest(parents: dict[NodeId, NodeId]) -> float | None:
        worst = 0.0
        for member in others:
            path = [member]
            while path[-1] != root:
                path.append(parents[path[-1]])
                if len(path) > len(others) + 1:
                    return None
            worst = max(worst, cost(tuple(path), capacities))
        return worst

    trees = (dict(zip(others, parents, strict=True)) for parents in itertools.product(*choices))
    best = min(worst for worst in map(slowest, trees) if worst is not None)
    assert slowest({route[0]: route[1] for route in fapt(root, capacities).up}) == pytest.approx(best)


def test_levels_wait_for_their_slowest_link() -> None:
    a, b, c, d = (NodeId(name) for name in "abcd")
    both = {Link(a, b): 4.0, Link(a, c): 2.0, Link(b, d): 8.0}
    tree = fapt(a, both | {Link(link.target, link.source): 1.0 for link in both})
    assert level_delays(tree, both) == [1 / 2, 1 / 8]


@pytest.mark.parametrize(
    ("capacities", "of_netstorm", "of_star", "at_most"),
    [(table(), 500.0, 62.5, 560.0), (uniform(150.0), 164.5, 30.0, 240.0)],
    ids=["100/500", "150"],
)
def test_the_published_tables(capacities: dict[Link, float], of_netstorm: float, of_star: float, at_most: float) -> None:
    assert mbit_s(netstorm(capacities).rate_bytes_per_s) == pytest.approx(of_netstorm, rel=1e-3)
    assert mbit_s(star(SITE_1, capacities).rate_bytes_per_s) == pytest.approx(of_star)
    assert mbit_s(bound_bytes_per_s(capacities)) == pytest.approx(at_most)


def test_the_published_trees_are_eight_times_as_fast_as_the_star_on_the_table() -> None:
    def seconds(plan: Plan) -> float:
        return completion_s(plan, table(), num_bytes=102.4e6, chunk_bytes=256e3)

    assert seconds(star(SITE_1, table())) / seconds(netstorm(table())) == pytest.approx(8.0, rel=0.05)


def test_and_four_times_on_random_draws() -> None:
    draws = [drawn(seed) for seed in range(200)]
    of_netstorm = [netstorm(draw).rate_bytes_per_s for draw in draws]
    of_star = [star(SITE_1, draw).rate_bytes_per_s for draw in draws]
    assert statistics.mean(map(mbit_s, of_netstorm)) == pytest.approx(44.4, rel=0.05)
    assert statistics.mean(map(mbit_s, of_star)) == pytest.approx(10.7, rel=0.05)
    assert statistics.mean(of_netstorm) / statistics.mean(of_star) == pytest.approx(4.1, rel=0.05)
    # That is the ratio of the means; a draw in the middle has a little less.
    ratios = [one / other for one, other in zip(of_netstorm, of_star, strict=True)]
    assert statistics.median(ratios) == pytest.approx(3.9, rel=0.05)


def test_completion_counts_the_first_chunks_way() -> None:
    a, b, c = (NodeId(name) for name in "abc")
    line = {Link(a, b): 10.0, Link(b, a): 10.0, Link(b, c): 5.0, Link(c, b): 5.0}
    # c -> b -> a and back, a chunk of 1 byte: 0.2 + 0.1 + 0.1 + 0.2, and four hops of 1 s.
    assert completion_s(netstorm(line, roots=[a]), line, num_bytes=100.0, chunk_bytes=1.0, hop_s=1.0) == pytest.approx(
        100.0 / 5.0 + 0.6 + 4.0
    )


@settings(deadline=None, max_examples=40)
@given(graphs)
def test_no_plan_exceeds_the_bound_or_a_link(capacities: dict[Link, float]) -> None:
    most = bound_bytes_per_s(capacities) * (1 + 1e-9)
    for plan in (netstorm(capacities), *(star(root, capacities) for root in members_of(capacities))):
        assert sum(plan.shares) == pytest.approx(1.0)
        assert plan.rate_bytes_per_s <= most
        loads = loads_of(plan.trees, plan.shares)
        assert all(plan.rate_bytes_per_s * load <= capacities[link] * (1 + 1e-9) for link, load in loads.items())
        assert plan.rate_bytes_per_s * loads[plan.bottleneck] == pytest.approx(capacities[plan.bottleneck])


@settings(deadline=None, max_examples=40)
@given(graphs)
def test_the_least_cut_is_that_of_all_subsets(capacities: dict[Link, float]) -> None:
    members = members_of(capacities)
    sides = [frozenset(side) for size in range(1, len(members)) for side in itertools.combinations(members, size)]
    assert min_cut(capacities).bytes_per_s == pytest.approx(min(cut_of(side, capacities).bytes_per_s for side in sides))
    source, *_, target = members
    found = cut_between(source, target, capacities)
    between = [side for side in sides if source in side and target not in side]
    assert found.side in between
    assert found.bytes_per_s == pytest.approx(min(cut_of(side, capacities).bytes_per_s for side in between))


def test_a_partition_of_two_is_half_of_both_cuts() -> None:
    a, b = (NodeId(name) for name in "ab")
    capacities = {Link(a, b): 4.0, Link(b, a): 2.0}
    assert partition_of((frozenset({a}), frozenset({b})), capacities).bytes_per_s == 3.0
    assert bound_bytes_per_s(capacities) == 2.0


def test_many_devices_have_a_bound_too() -> None:
    capacities = small(24, 3, density=0.2)
    assert len(min_partition(capacities).parts) > 1
    assert netstorm(capacities).rate_bytes_per_s <= bound_bytes_per_s(capacities)


def test_unmeasured_links_are_not_used() -> None:
    a, b, c = (NodeId(name) for name in "abc")
    known = {Link(a, b): 1.0, Link(b, a): 2.0, Link(b, c): 3.0, Link(c, b): 4.0}
    figures = [LinkFigures(link=link, rate=Figure(rate, 0.0, 1.0, 0.0), state=LinkState.UP) for link, rate in known.items()]
    figures += [
        LinkFigures(link=Link(a, c)),
        LinkFigures(link=Link(c, a), rate=Figure(9.0, 0.0, 1.0, 0.0), state=LinkState.DOWN),
    ]
    graph = LinkGraph(at_s=0.0, version=1, devices=(), links=tuple(sorted(figures, key=lambda each: each.link)))
    assert capacities_of(graph) == known


def test_who_cannot_be_reached_is_named() -> None:
    a, b, c = (NodeId(name) for name in "abc")
    one_way = {Link(a, b): 1.0, Link(b, a): 1.0, Link(c, b): 1.0}
    with pytest.raises(NoSpanningTree, match="the link b->c is not measured"):
        fapt(a, one_way)
    with pytest.raises(NoSpanningTree, match="a, b cannot reach c"):
        fapt(c, one_way)
    with pytest.raises(NoSpanningTree, match="c and a cannot reach each other"):
        star(a, one_way)


def test_a_tree_that_does_not_span_is_refused() -> None:
    capacities = table()
    members = members_of(capacities)
    tree = fapt(SITE_1, capacities)
    check(tree, members, capacities)
    with pytest.raises(ValueError, match="not for each of"):
        check(msgspec.structs.replace(tree, up=tree.up[1:]), members, capacities)
    circle = ((NodeId("dc2"), NodeId("dc3")), (NodeId("dc3"), NodeId("dc2")), *tree.up[2:])
    with pytest.raises(ValueError, match="not to its root"):
        check(msgspec.structs.replace(tree, up=circle), members, capacities)
    with pytest.raises(ValueError, match="no known capacity"):
        check(tree, members, {link: rate for link, rate in capacities.items() if link != Link(NodeId("dc2"), SITE_1)})
