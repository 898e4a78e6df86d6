"""Join, leave, death and cut, by hundreds of seeds: no step twice, samples once, equal bits, nobody waits for a joiner."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from shoal.ids import NodeId
from shoal.network.graph import Link
from shoal.training import member as m
from shoal.training.ledger import Compute, Entry
from shoal.training.samples import SampleOrder
from tests.training.run_world import RunWorld

NUM_SEEDS = 300
NUM_STEPS = 16
A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def play(seed: int) -> RunWorld:
    world = RunWorld(seed, num_steps=NUM_STEPS, num_devices=2 + seed % 3)
    rng = world.rng
    for _ in range(rng.randint(1, 5)):
        world.run(rng.uniform(0.0, 0.8))
        fault = rng.choice(["join", "leave", "die", "restart", "cut"])
        veterans = world.veterans()
        others = [name for name in world.devices if name not in veterans]
        # Of two voters the second cannot go on without the first: it cannot tell a death from a cut.
        voters = max((core.committed for core in world.cores.values()), key=lambda record: record.epoch).voters
        if fault == "restart" and len(veterans) > 1:
            # The others may have no quorum until it is back.
            name = rng.choice(others + veterans)
            world.die(name)
            world.run(rng.uniform(0.0, 2.5))
            world.come_back(name)
        elif fault == "join" or min(len(veterans), len(set(voters) & set(world.cores))) < 3:
            world.start()
        elif fault == "die":
            world.die(rng.choice(others + veterans))
        elif fault == "leave":
            world.leave(rng.choice(veterans))
        else:
            side = set(rng.sample(sorted(world.cores), rng.randint(1, len(world.cores) - 1)))
            world.part(side, rng.uniform(0.0, 1.0))
    quiet_since_s = world.now_s
    while len(world.committed) < NUM_STEPS:
        assert world.now_s < quiet_since_s + 60.0, f"seed {seed}: it does not go on after faults have stopped"
        world.run(0.2)
    world.run(0.5)
    world.invariants.ends(quiet_since_s)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 50))
def test_a_run_under_any_churn(first: int) -> None:
    num_replayed = num_redone = 0
    checked: Counter[str] = Counter()
    for seed in range(first, first + 50):
        world = play(seed)
        num_replayed += world.num_replayed
        num_redone += world.num_redone
        assert sorted(world.committed) == list(range(NUM_STEPS)), f"seed {seed}"
        expected = [tuple(world.order.samples(world.order.interval(step))) for step in range(NUM_STEPS)]
        for name, device in world.devices.items():
            if device.core.phase is m.Phase.ACTIVE:
                assert device.model == expected, f"seed {seed}: {name}"
                assert device.core.entries == [world.committed[step] for step in range(NUM_STEPS)]
        checked += world.invariants.checked
    assert all(checked[f"I{number}"] for number in range(1, 9)), checked
    assert num_replayed > 0
    assert num_redone > 0


def test_nobody_waits_for_a_joiner_to_pull_its_state() -> None:
    world = RunWorld(3, num_steps=400, num_devices=3)
    world.run(3.0)
    assert len(world.veterans()) == 3
    began_s = world.now_s
    world.transfer_s = 4.0
    name = world.start()
    world.run(4.0)
    assert world.devices[name].core.phase is m.Phase.PULLING
    times = [at_s for at_s in world.applied_at_s if at_s > began_s]
    longest_s = max(later - earlier for earlier, later in pairwise(times))
    before = [at_s for at_s in world.applied_at_s if at_s <= began_s]
    assert longest_s <= max(later - earlier for earlier, later in pairwise(before)), "a step took longer than any before"
    world.run(2.0)
    assert world.devices[name].core.phase is m.Phase.ACTIVE
    assert world.num_replayed > 20, "all that was applied meanwhile"
    world.run(0.5)
    assert any(name in dict(entry.parts) for entry in world.committed.values())


def test_a_minority_neither_applies_nor_commits_and_comes_back_with_the_bits_of_the_others() -> None:
    world = RunWorld(6, num_steps=400, num_devices=3)
    world.run(3.0)
    lone = world.names[2]
    world.part({lone}, 3.0)
    alone = world.devices[lone].core.applied
    assert world.devices[world.names[0]].core.applied > alone + 5
    world.run(4.0)
    core = world.devices[lone].core if lone in world.devices else None
    assert core is not None
    assert core.phase is m.Phase.ACTIVE
    assert abs(core.applied - world.devices[world.names[0]].core.applied) <= 1


def test_a_joiner_whose_bits_are_others_begins_anew() -> None:
    order = SampleOrder(0, 100, 4)
    joiner = m.Member(B, order)
    joiner.step(m.Adopted(3, (A,), (B,)), 0.0)
    entry = Entry(0, 1, ((A, order.interval(0)),), "x")
    assert m.Follow((A,)) in joiner.step(m.StateHad((entry,)), 0.0)
    following = Entry(1, 1, ((A, order.interval(1)),), "y")
    effects = joiner.step(m.Replayed(following, "z"), 0.0)
    assert effects[-1] == m.Restart("step 1 leads to other bits here than at its donor")
    assert not joiner.has_state


def test_a_joiner_that_has_what_was_lost_begins_anew() -> None:
    order = SampleOrder(0, 100, 4)
    entry = Entry(0, 1, ((A, order.interval(0)),), "x")
    joiner = m.Member(B, order)
    joiner.step(m.Adopted(3, (A, C), (B,)), 0.0)
    joiner.step(m.StateHad((entry,)), 0.0)
    assert m.Report(0, True, True) in joiner.step(m.CaughtUp(), 0.0)
    joiner.step(m.Adopted(4, (C, B), ()), 0.0)
    # C had not applied step 0 when A died.
    effects = joiner.step(m.Heard(C, m.Status(4, -1, "", 1.0, is_new=False)), 0.0)
    assert effects[-1] == m.Restart("step 0 is applied here, and not in the group")


def test_without_a_quorum_a_sum_waits() -> None:
    order = SampleOrder(0, 100, 4)
    founder = m.Member(A, order, history=())
    assert founder.step(m.Adopted(1, (A,), ()), 0.0)[-1] == Compute(1, 0, order.interval(0))
    founder.step(m.Halted(), 0.0)
    assert founder.step(m.Summed(1, 0, is_changing=False), 0.0) == []
    assert founder.step(m.Resumed(), 0.0) == [m.Apply(0)]
    effects = founder.step(m.StepApplied(0, "x"), 0.0)
    assert Compute(1, 1, order.interval(1)) in effects
    assert founder.step(m.Confirmed(1, 1), 0.0) == [], "alone, it knew that step 0 is committed"


def test_an_epoch_opens_with_what_its_members_measured_of_each_other() -> None:
    founder = m.Member(A, SampleOrder(0, 100, 4), history=())
    founder.step(m.Measured({B: 7.0, C: 5.0}), 0.0)
    founder.step(m.Adopted(1, (A, B), ()), 0.0)
    status = m.Status(1, -1, "", 1.0, is_new=True, received_bytes_per_s={A: 9.0})
    (opened,) = [effect for effect in founder.step(m.Heard(B, status), 0.0) if isinstance(effect, m.Open)]
    assert opened.rates == {Link(B, A): 7.0, Link(A, B): 9.0}, "C is no member of it"


def test_the_first_step_waits_for_as_many_as_are_wanted() -> None:
    founder = m.Member(A, SampleOrder(0, 100, 4), history=(), members_min=2)
    assert founder.step(m.Adopted(1, (A,), ()), 0.0) == [m.Report(-1, True, True)]
    assert m.Snapshot(1) in founder.step(m.Adopted(2, (A,), (B,)), 0.0)
    founder.step(m.Adopted(3, (A, B), ()), 0.0)
    effects = founder.step(m.Heard(B, m.Status(3, -1, "", 3.0, is_new=True)), 0.0)
    assert m.Open(3, (A, B), {}) in effects
    (compute,) = [effect for effect in effects if isinstance(effect, Compute)]
    assert len(compute.part) == 3, "nobody has measured the joiner yet"
