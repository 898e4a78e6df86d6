"""The core of the all-reduce over hundreds of networks with chance: each contribution once, the same bits, nothing left."""

from __future__ import annotations

import random

import msgspec
import pytest

from shoal.errors import RemoteProtocolError
from shoal.exchange.core import (
    STEPS_OPEN_MAX,
    Add,
    AllReduce,
    Arrived,
    ChunkHeader,
    Contribute,
    Drop,
    Enter,
    Finished,
    Phase,
    Send,
    deal,
)
from shoal.ids import NodeId
from shoal.topology.fapt import netstorm
from shoal.topology.star import star
from tests.exchange.simulation import Network, expected, once_each, random_plan
from tests.topology.testbed import small

NUM_SEEDS = 300


def begin(network: Network, rng: random.Random, epoch: int, sizes: list[int], at_s: float, spread_s: float) -> None:
    """Every member enters the epoch and contributes when it likes."""
    for member in network.members:
        begin_s = at_s + rng.uniform(0.0, spread_s)
        network.at(begin_s, member, Enter(epoch, network.plan))
        for step, num_chunks in enumerate(sizes):
            begin_s += rng.uniform(0.0, spread_s)
            network.at(begin_s, member, Contribute(step, num_chunks))


def check_whole(network: Network, epoch: int, sizes: list[int]) -> None:
    plan = network.plan
    for step, num_chunks in enumerate(sizes):
        results = network.results[epoch, step]
        assert set(results) == set(plan.members)
        trees = deal(plan.shares, num_chunks)
        bits = tuple(expected(plan, trees[chunk], epoch, step, chunk) for chunk in range(num_chunks))
        for result in results.values():
            assert result.counts == (once_each(len(plan.members)),) * num_chunks
            assert result.bits == bits


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 50))
def test_each_contribution_once_and_the_same_bits(first: int) -> None:
    for seed in range(first, first + 50):
        rng = random.Random(seed)
        network = Network(random_plan(rng), rng)
        sizes = [rng.randint(1, 12) for _ in range(rng.randint(1, STEPS_OPEN_MAX))]
        begin(network, rng, 0, sizes, 0.0, rng.choice([0.0, 1.0, 20.0]))
        network.run()
        check_whole(network, 0, sizes)
        assert network.left_over == []
        assert network.passed <= {link for tree in network.plan.trees for link in tree.links}


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 50))
def test_an_abort_leaves_nothing(first: int) -> None:
    """Everybody enters the next epoch at a time of its own, with frames of the old one on their way and some done."""
    num_discarded = 0
    for seed in range(first, first + 50):
        rng = random.Random(f"abort/{seed}")
        network = Network(random_plan(rng), rng)
        num_chunks = rng.randint(1, 12)
        for member in network.members:
            network.at(0.0, member, Enter(0, network.plan))
            network.at(rng.uniform(0.0, 2.0), member, Contribute(0, num_chunks))
        abort_s = rng.uniform(2.0, 12.0)
        again = [rng.randint(1, 12) for _ in range(rng.randint(1, 4))]
        begin(network, rng, 1, again, abort_s, rng.choice([0.0, 3.0]))
        network.run()
        check_whole(network, 1, again)
        assert network.left_over == []
        # What was finished before the abort is whole; each member has finished or discarded it.
        done = network.results[0, 0]
        assert len({result.bits for result in done.values()}) <= 1
        assert all(set(result.counts) == {once_each(len(network.members))} for result in done.values())
        assert set(done) | {member for member, epoch, _ in network.discarded if epoch == 0} == set(network.members)
        num_discarded += len(network.discarded)
    assert num_discarded > 0, "no seed aborted anything"


def test_a_share_is_a_number_of_chunks_and_evenly_mixed() -> None:
    assert deal((0.5, 0.25, 0.25), 8) == (0, 1, 2, 0, 0, 1, 2, 0)
    for seed in range(50):
        rng = random.Random(seed)
        weights = [rng.uniform(0.01, 1.0) for _ in range(rng.randint(1, 9))]
        shares = [weight / sum(weights) for weight in weights]
        num_chunks = rng.randint(1, 200)
        trees = deal(shares, num_chunks)
        assert len(trees) == num_chunks
        for tree, share in enumerate(shares):
            assert abs(trees.count(tree) - share * num_chunks) < 1.0
            half = trees[: num_chunks // 2].count(tree)
            assert abs(half - trees.count(tree) / 2) <= 1.0


A, B, C = (NodeId(f"m{index}") for index in range(3))


def line() -> AllReduce:
    """The root of a tree of three, both others its children."""
    capacities = small(3, 0)
    core = AllReduce(A)
    core.step(Enter(0, star(A, dict.fromkeys(capacities, 1.0))), 0.0)
    return core


def header(edge: int, *, epoch: int = 0, step: int = 0, chunk: int = 0, tree: int = 0, hop: int = 1) -> ChunkHeader:
    return ChunkHeader(epoch, step, chunk, tree, Phase.UP, edge, hop)


def test_children_are_added_in_order_whoever_comes_first() -> None:
    core = line()
    assert core.step(Arrived(header(2), 7), 1.0) == []
    assert core.step(Contribute(0, 1), 2.0) == []
    effects = core.step(Arrived(header(1), 8), 5.0)
    assert effects[:2] == [Add(0, 0, 8), Add(0, 0, 7)]
    assert [effect.peer for effect in effects if isinstance(effect, Send)] == [B, C]
    assert effects[-1] == Finished(0, 3.0)
    assert core.step(Arrived(header(1), 9), 6.0) == [Drop(9)]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (header(1, tree=1), "tree 1 of 1"),
        (header(0), "leads elsewhere"),
        (header(1, hop=0), "leads elsewhere"),
        (header(1, hop=2), "leads elsewhere"),
        (header(1, chunk=3), "contribute different sizes"),
        (header(1, step=STEPS_OPEN_MAX + 1), "is the next to begin"),
    ],
)
def test_frames_that_do_not_fit_are_refused(bad: ChunkHeader, match: str) -> None:
    core = line()
    core.step(Contribute(0, 3), 0.0)
    with pytest.raises(RemoteProtocolError, match=match):
        core.step(Arrived(bad, 1), 0.0)


def test_different_sizes_are_seen_by_whoever_contributes_last() -> None:
    core = line()
    core.step(Arrived(header(1, chunk=5), 1), 0.0)
    with pytest.raises(RemoteProtocolError, match="different sizes"):
        core.step(Contribute(0, 5), 0.0)


def test_a_result_before_the_contribution_is_refused() -> None:
    capacities = dict.fromkeys(small(3, 0), 1.0)
    core = AllReduce(B)
    core.step(Enter(0, star(A, capacities)), 0.0)
    with pytest.raises(RemoteProtocolError, match="not contributed"):
        core.step(Arrived(msgspec.structs.replace(header(1), phase=Phase.DOWN), 1), 0.0)


def test_the_callers_order_is_checked() -> None:
    core = AllReduce(A)
    plan = netstorm(small(3, 0))
    with pytest.raises(ValueError, match="no epoch"):
        core.step(Contribute(0, 1), 0.0)
    core.step(Enter(3, plan), 0.0)
    with pytest.raises(ValueError, match="does not follow"):
        core.step(Enter(3, plan), 0.0)
    with pytest.raises(ValueError, match="step 0 is next"):
        core.step(Contribute(1, 1), 0.0)
    with pytest.raises(ValueError, match="not among"):
        AllReduce(NodeId("stranger")).step(Enter(0, plan), 0.0)
    for step in range(STEPS_OPEN_MAX):
        core.step(Contribute(step, 9), 0.0)
    with pytest.raises(ValueError, match="are open"):
        core.step(Contribute(STEPS_OPEN_MAX, 9), 0.0)
