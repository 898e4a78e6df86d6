"""Which plan a run takes: bounds, guesses for what nobody measured, and when it changes."""

from __future__ import annotations

import random

import pytest

from shoal.ids import NodeId
from shoal.network.graph import Link
from shoal.topology.bound import bound_bytes_per_s
from shoal.topology.fapt import netstorm
from shoal.topology.policy import CHUNK_BYTES_MAX, chunk_bytes_of, has_moved, plan_for, revised
from shoal.topology.star import star

A, B, C, D = (NodeId(name) for name in "abcd")
GRADIENT_BYTES = 10e6


def mesh(rates: dict[str, float]) -> dict[Link, float]:
    """Bytes/s by pair, both ways."""
    return {
        Link(NodeId(one), NodeId(other)): rate
        for pair, rate in rates.items()
        for one, other in ((pair[0], pair[1]), (pair[1], pair[0]))
    }


SLOW_FOURTH = mesh({"ab": 50e6, "ac": 50e6, "bc": 50e6, "ad": 5e6, "bd": 10e6, "cd": 20e6})


def test_without_measurements_all_links_count_as_equal() -> None:
    plan = plan_for((A, B, C), {}, num_bytes=GRADIENT_BYTES)
    assert plan.policy == "netstorm"
    assert plan.shares == pytest.approx((1 / 3,) * 3)
    assert all(len(route) == 2 for tree in plan.trees for route in (*tree.up, *tree.down))


def test_a_device_with_slow_links_is_reached_over_all_of_them() -> None:
    plan = plan_for((A, B, C, D), SLOW_FOURTH, num_bytes=GRADIENT_BYTES)
    assert plan.rate_bytes_per_s >= 0.9 * bound_bytes_per_s(SLOW_FOURTH)
    assert plan.rate_bytes_per_s >= 1.5 * netstorm(SLOW_FOURTH).rate_bytes_per_s


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_is_at_least_as_good_as_each_published_one_and_the_same_for_all(seed: int) -> None:
    rng = random.Random(seed)
    members = [NodeId(f"n{index}") for index in range(rng.randint(2, 8))]
    links = [Link(one, other) for one in members for other in members if one != other]
    rates = {link: rng.uniform(20, 155) * 1e6 / 8 for link in links}
    plan = plan_for(members, rates, num_bytes=1e9)
    shuffled = dict(rng.sample(sorted(rates.items()), len(rates)))
    assert plan_for(rng.sample(members, len(members)), shuffled, num_bytes=1e9) == plan
    published = [netstorm(rates), *(star(root, rates) for root in members)]
    assert plan.rate_bytes_per_s >= 0.97 * max(each.rate_bytes_per_s for each in published)
    assert plan.rate_bytes_per_s <= bound_bytes_per_s(rates) * (1 + 1e-9)
    assert sum(plan.shares) == pytest.approx(1.0)


def test_a_link_that_nobody_measured_counts_as_its_other_direction() -> None:
    known = {link: rate for link, rate in SLOW_FOURTH.items() if link.target == D or D not in (link.source, link.target)}
    assert plan_for((A, B, C, D), known, num_bytes=GRADIENT_BYTES) == plan_for(
        (A, B, C, D), SLOW_FOURTH, num_bytes=GRADIENT_BYTES
    )


def test_a_plan_changes_where_that_gains_and_not_for_noise() -> None:
    plan = plan_for((A, B, C, D), SLOW_FOURTH, num_bytes=GRADIENT_BYTES)
    rng = random.Random(0)
    noisy = {link: rate * rng.uniform(0.95, 1.05) for link, rate in SLOW_FOURTH.items()}
    assert not has_moved(SLOW_FOURTH, noisy)
    assert revised(plan, noisy, num_bytes=GRADIENT_BYTES) is plan
    swapped = SLOW_FOURTH | mesh({"ad": 20e6, "cd": 5e6})
    assert has_moved(SLOW_FOURTH, swapped)
    other = revised(plan, swapped, num_bytes=GRADIENT_BYTES)
    assert other is not plan
    assert other.rate_bytes_per_s >= 0.9 * bound_bytes_per_s(swapped)
    assert revised(plan, swapped, num_bytes=1e3) is plan, "a thousand bytes gain nothing"


def test_chunks_grow_with_the_slowest_link() -> None:
    a, b = NodeId("a"), NodeId("b")
    links = {Link(a, b): 1e9, Link(b, a): 1e9}
    plan = plan_for((a, b), links, num_bytes=100e6)
    assert chunk_bytes_of(plan, {}, num_bytes=100e6) == 64 * 1024
    assert chunk_bytes_of(plan, links, num_bytes=100e6) == CHUNK_BYTES_MAX
    assert chunk_bytes_of(plan, links, num_bytes=2.2e6) == 128 * 1024, "enough of them to keep all links busy"
    assert chunk_bytes_of(plan, {**links, Link(a, b): 10e6}, num_bytes=100e6) == 64 * 1024
