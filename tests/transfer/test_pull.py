"""Every shard once, near the bound, whatever sources do."""

from __future__ import annotations

import random
import statistics

import pytest

from shoal.ids import NodeId
from shoal.transfer.pull import Pull, Quarantine, Request, ShardCame, SourceFound, SourceLost, Starved, TimePassed
from shoal.transfer.shards import Source, bound_s
from tests.transfer.simulation import Transfer, sources_of

NUM_SHARDS, SHARD_BYTES = 300, 1_000_000
A, B = NodeId("a"), NodeId("b")


def begun(seed: int, *, wrong_estimates: bool) -> Transfer:
    sources = sources_of(seed)
    transfer = Transfer(sources, NUM_SHARDS, SHARD_BYTES, seed=seed)
    rng = random.Random(seed)
    for source in sources:
        factor = 4 ** rng.uniform(-0.5, 0.5) if wrong_estimates else 1.0
        transfer.tell(SourceFound(Source(source.node, source.bytes_per_s * factor, source.latency_s)))
    return transfer


@pytest.mark.parametrize("wrong_estimates", [False, True])
def test_near_the_bound_even_with_wrong_estimates(wrong_estimates: bool) -> None:
    ratios, copies = [], 0
    for seed in range(60):
        transfer = begun(seed, wrong_estimates=wrong_estimates)
        transfer.play()
        assert transfer.complete is not None
        assert sorted(transfer.kept) == list(range(NUM_SHARDS))
        assert not transfer.quarantined
        ratios.append(transfer.complete.seconds / bound_s(sources_of(seed), num_bytes=NUM_SHARDS * SHARD_BYTES))
        copies += transfer.num_sent - NUM_SHARDS
    assert statistics.median(ratios) < 1.05
    assert max(ratios) < 1.25
    assert copies < 0.03 * 60 * NUM_SHARDS


def test_a_source_that_dies_costs_its_share_only() -> None:
    ratios = []
    for seed in range(60):
        transfer = begun(seed, wrong_estimates=True)
        sources = sources_of(seed)
        best = max(sources, key=lambda source: source.bytes_per_s)
        others = [source for source in sources if source is not best]
        at_s = 0.4 * bound_s(sources, num_bytes=NUM_SHARDS * SHARD_BYTES)
        transfer.later(at_s, SourceLost(best.node))
        transfer.play()
        assert sorted(transfer.kept) == list(range(NUM_SHARDS))
        done = sum(max(0.0, at_s - source.latency_s) * source.bytes_per_s for source in sources)
        rest_s = (NUM_SHARDS * SHARD_BYTES - done) / sum(source.bytes_per_s for source in others)
        assert transfer.complete is not None
        ratios.append(transfer.complete.seconds / (at_s + rest_s))
    assert statistics.median(ratios) < 1.06
    assert max(ratios) < 1.3


def test_any_mixture_of_faults_ends_with_every_shard_or_without_sources() -> None:
    num_starved = num_quarantined = 0
    for seed in range(200):
        transfer = begun(seed, wrong_estimates=True)
        rng, nodes = transfer.rng, sorted(transfer.true)
        for node in rng.sample(nodes, rng.randint(0, len(nodes))):
            fault = rng.choice(["die", "lie", "stop"])
            if fault == "lie":
                transfer.lies.add(node)
            elif fault == "stop":
                transfer.stopped.add(node)
            else:
                transfer.later(rng.uniform(0.0, 10.0), SourceLost(node))
        transfer.play()
        if transfer.complete is None:
            num_starved += 1
            assert transfer.num_starved == 1, seed
            # Somebody who has it comes, and sends only what is missing.
            have, transfer.num_sent = len(transfer.kept), 0
            transfer.true[NodeId("new")] = new = Source(NodeId("new"), 1e7, 0.01)
            transfer.tell(SourceFound(new))
            transfer.play()
            assert transfer.num_sent <= NUM_SHARDS - have + 2
        assert sorted(transfer.kept) == list(range(NUM_SHARDS)), seed
        assert len(set(transfer.quarantined)) == len(transfer.quarantined)
        num_quarantined += len(transfer.quarantined)
        assert set(transfer.quarantined) <= transfer.lies | transfer.stopped
    assert num_starved > 0
    assert num_quarantined > 0


def test_wrong_bytes_are_asked_of_somebody_else_and_end_a_source_at_the_second_time() -> None:
    core = Pull(3, 100, now_s=0.0)
    assert core.step(SourceFound(Source(A, 100.0, 0.0)), 0.0) == [Request(A, 0), Request(A, 1)]
    assert core.step(ShardCame(A, 0, is_sound=False), 1.0) == [Request(A, 0)]
    effects = core.step(ShardCame(A, 1, is_sound=False), 2.0)
    assert effects == [Quarantine(A, "2 shards with wrong bytes"), Starved()]
    assert core.step(SourceFound(Source(A, 100.0, 0.0)), 2.0) == []
    assert core.step(SourceFound(Source(B, 100.0, 0.0)), 3.0) == [Request(B, 0), Request(B, 1)]
    assert core.step(ShardCame(A, 0, is_sound=True), 3.0) == [], "from nobody that was asked"


def test_a_stalled_source_keeps_others_from_nothing() -> None:
    core = Pull(4, 100, now_s=0.0)
    core.step(SourceFound(Source(A, 100.0, 0.0)), 0.0)
    assert core.due_s() == pytest.approx(4.0)
    assert core.step(SourceFound(Source(B, 100.0, 0.0)), 0.0) == [Request(B, 2), Request(B, 3)]
    for now_s, shard in ((1.0, 2), (2.0, 3)):
        core.step(ShardCame(B, shard, is_sound=True), now_s)
    asked = [effect.shard for effect in core.step(TimePassed(), 4.0) if isinstance(effect, Request)]
    assert set(asked) <= {0, 1}
    for now_s in (5.0, 6.0):
        for shard in (0, 1):
            core.step(ShardCame(B, shard, is_sound=True), now_s)
    assert core.is_complete


def test_what_is_there_already_is_not_asked_for() -> None:
    core = Pull(3, 100, now_s=0.0, have=frozenset({0, 2}))
    assert core.step(SourceFound(Source(A, 1.0, 0.0)), 0.0) == [Request(A, 1)]
