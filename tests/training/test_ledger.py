"""Samples exactly once, the same ledger everywhere, nothing committed that is lost: over hundreds of runs with chance."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.training.ledger import Applied, CatchUp, Committed, Compute, Entry, Grouped, Ledger, Reported, Suspend
from shoal.training.samples import Interval, SampleOrder, split
from tests.training.simulation import Run, checked_copy

NUM_SEEDS = 300
NUM_STEPS = 25
A, B = NodeId("a"), NodeId("b")


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 50))
def test_samples_exactly_once_under_any_churn(first: int) -> None:
    num_redone = 0
    for seed in range(first, first + 50):
        run = Run(seed, num_steps=NUM_STEPS)
        for fault in run.rng.choices([run.die, run.join, run.lose_all], weights=[4, 4, 1], k=run.rng.randint(0, 8)):
            run.later(fault, 30.0)
        run.play()
        num_redone += run.num_redone
        assert sorted(run.committed) == list(range(NUM_STEPS)), f"seed {seed}: not all steps were committed"
        expected = [tuple(run.order.samples(run.order.interval(step))) for step in range(NUM_STEPS)]
        for device in run.devices.values():
            assert device.model == expected
            assert device.ledger.entries == [run.committed[step] for step in range(NUM_STEPS)]
        for step, entry in run.committed.items():
            parts = [part for _, part in entry.parts if len(part)]
            assert parts[0].first == run.order.interval(step).first
            assert parts[-1].stop == run.order.interval(step).stop
            assert all(one.stop == other.first for one, other in pairwise(parts))
        steps_per_pass = -(-run.order.num_samples // run.order.global_batch)
        for begin in range(0, NUM_STEPS - steps_per_pass + 1, steps_per_pass):
            applied = [sample for batch in expected[begin : begin + steps_per_pass] for sample in batch]
            assert sorted(applied) == list(range(run.order.num_samples))
    assert num_redone > 0, "no seed computed a step again"


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(0, 3))
def test_a_pass_has_every_sample_once(seed: int, num_samples: int, data_epoch: int) -> None:
    order = SampleOrder(seed, num_samples, 16)
    assert sorted(order.sample(data_epoch, position) for position in range(num_samples)) == list(range(num_samples))


def test_passes_and_seeds_differ() -> None:
    orders = [tuple(SampleOrder(seed, 100, 100).samples(Interval(epoch, 0, 100))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    # No sample keeps its place more often than by chance (1 in 100 each).
    assert sum(sample == place for order in orders for place, sample in enumerate(order)) < 15


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), st.integers(0, 60))
def test_parts_cover_the_interval_and_nobody_could_be_ready_earlier(speeds: list[float], size: int) -> None:
    samples_per_s = {NodeId(f"m{index}"): speed for index, speed in enumerate(speeds)}
    parts = split(Interval(2, 10, 10 + size), samples_per_s)
    assert [position for part in parts.values() for position in range(part.first, part.stop)] == list(range(10, 10 + size))
    assert set(parts) == set(samples_per_s)
    ready_s = max(len(part) / samples_per_s[member] for member, part in parts.items())
    # Whatever each could do in a little less time is not enough.
    assert sum(int(ready_s * (1 - 1e-9) * speed) for speed in speeds) < max(size, 1)


def test_a_step_counts_when_everybody_has_it() -> None:
    order = SampleOrder(0, 8, 4)
    ledger = Ledger(A, order)
    assert ledger.step(Grouped(1, {A: 1.0, B: 3.0}, -1, A), 0.0) == [Compute(1, 0, Interval(0, 0, 1))]
    assert ledger.step(Applied(0, "x"), 0.0) == [Compute(1, 1, Interval(0, 4, 5))]
    assert ledger.step(Reported(B, 1, -1), 0.0) == []
    entry = Entry(0, 1, ((A, Interval(0, 0, 1)), (B, Interval(0, 1, 4))), "x")
    assert ledger.step(Reported(B, 1, 0), 0.0) == [Committed(entry)]
    assert checked_copy(entry) == entry


def test_who_is_behind_catches_up_and_keeps_the_epoch_of_the_step() -> None:
    order = SampleOrder(0, 8, 4)
    ledger = Ledger(A, order)
    ledger.step(Grouped(1, {A: 1.0, B: 1.0}, -1, A), 0.0)
    ledger.step(Suspend(), 0.0)
    with pytest.raises(ValueError, match="between two records"):
        ledger.step(Applied(0, "x"), 0.0)
    assert ledger.step(Grouped(2, {A: 1.0, B: 1.0}, 0, B), 0.0) == [CatchUp(0, B)]
    theirs = Entry(0, 1, tuple(split(order.interval(0), {A: 1.0, B: 1.0}).items()), "x")
    assert ledger.step(Applied(0, "x", theirs), 0.0) == [Compute(2, 1, Interval(0, 4, 6))]
    assert ledger.step(Reported(B, 2, 0), 0.0) == [Committed(theirs)]


def test_reports_of_others_and_of_other_epochs_do_not_count() -> None:
    ledger = Ledger(A, SampleOrder(0, 8, 4))
    ledger.step(Grouped(3, {A: 1.0, B: 1.0}, -1, A), 0.0)
    ledger.step(Applied(0, "x"), 0.0)
    assert ledger.step(Reported(B, 2, 0), 0.0) == []
    assert ledger.step(Reported(NodeId("c"), 3, 0), 0.0) == []
    with pytest.raises(ValueError, match="epoch 3 is not one after 3"):
        ledger.step(Grouped(3, {A: 1.0}, 0, A), 0.0)
    with pytest.raises(ValueError, match="the state must be had first"):
        ledger.step(Grouped(4, {A: 1.0}, 2, A), 0.0)
    with pytest.raises(ValueError, match="where 1 is next"):
        ledger.step(Applied(2, "x"), 0.0)
