"""Runs with real sockets and threads: together as alone, joins, deaths, leaves, and what is left on disk."""

from __future__ import annotations

import struct
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shoal.errors import DamagedFile, DeviceRefused, DeviceUnreachable
from shoal.exchange.runner import Exchange, FloatArray
from shoal.ids import NodeId
from shoal.lab.linear_model import Linear
from shoal.runs import checkpoint as checkpoints
from shoal.runs import run as run_module
from shoal.runs.run import StepDone
from shoal.topology.tree import Plan
from shoal.training.samples import SampleOrder
from tests.runs.members import GLOBAL_BATCH, NUM_SAMPLES, Member, alone, wait

NUM_STEPS = 30
pytestmark = pytest.mark.slow


def check_ledger(members: list[Member], num_steps: int) -> None:
    """Every sample once per pass, the same ledger and the same bits everywhere."""
    first = members[0].run.entries
    assert [entry.step for entry in first] == list(range(num_steps))
    for member in members:
        assert member.run.entries == first
        for step, digest in member.digests.items():
            assert digest.startswith(first[step].digest), f"step {step}"
    order = members[0].order
    for entry in first:
        parts = [part for _, part in entry.parts if len(part)]
        interval = order.interval(entry.step)
        assert (parts[0].first, parts[-1].stop) == (interval.first, interval.stop)
        assert all(one.stop == other.first for one, other in pairwise(parts))


def test_three_together_learn_what_one_does_alone() -> None:
    founder = Member(members_min=3, num_steps=NUM_STEPS)
    members = [founder, *(Member(peers=(founder.run.address,), num_steps=NUM_STEPS) for _ in range(2))]
    for member in members:
        member.end()
    losses, weights = alone(NUM_STEPS)
    check_ledger(members, NUM_STEPS)
    for member in members:
        np.testing.assert_allclose([done.loss for done in member.done], losses, rtol=2e-4)
        np.testing.assert_allclose(member.trainee.w, weights, rtol=1e-3, atol=1e-5)
        assert member.trainee.seen[0] == NUM_STEPS
        assert {done.num_members for done in member.done} == {3}
    assert len({member.trainee.digest() for member in members}) == 1


def test_a_plan_changes_between_steps_where_measured_rates_did(monkeypatch: pytest.MonkeyPatch) -> None:
    founder = Member(members_min=3, num_steps=30, compute_s=0.03, padding=100_000)
    members = [
        founder,
        *(Member(peers=(founder.run.address,), num_steps=30, compute_s=0.03, padding=100_000) for _ in range(2)),
    ]
    slow = members[2].run

    def told(member: Member) -> dict[NodeId, float]:
        """One device's links become fifty times slower in the middle."""
        rate = 50e6 if founder.run._core.applied < 12 else 1e6
        nodes = [other.run.me for other in members if other is not member]
        return {node: rate if slow.me in (node, member.run.me) else 50e6 for node in nodes}

    plans: list[set[Plan]] = [set() for _ in members]
    for member, seen in zip(members, plans, strict=True):
        monkeypatch.setattr(member.run.rates, "bytes_per_s", lambda member=member: told(member))

        def note(done: StepDone, member: Member = member, seen: set[Plan] = seen) -> None:
            opened = member.run._opened
            if opened is not None and opened.plan is not None:
                seen.add(opened.plan)
            member._note(done)

        member.run.on_step = note
    for member in members:
        member.end()
    check_ledger(members, 30)
    np.testing.assert_allclose([done.loss for done in founder.done], alone(30)[0], rtol=1e-3)
    assert plans[0] == plans[1] == plans[2]
    assert len(plans[0]) > 1


def break_once(exchange: Exchange, x: FloatArray, *, timeout_s: float | None = None) -> FloatArray:
    """Instead of an all-reduce, when all others wait in it."""
    time.sleep(0.2)
    exchange.abort()
    return Exchange.all_reduce(exchange, x, timeout_s=timeout_s)


def test_what_was_computed_is_reduced_again_where_only_the_exchange_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    founder = Member(members_min=3, num_steps=30, compute_s=0.02)
    members = [founder, *(Member(peers=(founder.run.address,), num_steps=30, compute_s=0.02) for _ in range(2))]
    for step in (6, 14):
        members[1].wait_step(step)
        opened = members[1].run._opened
        assert opened is not None
        assert opened.exchange is not None
        monkeypatch.setattr(opened.exchange, "all_reduce", partial(break_once, opened.exchange))
    for member in members:
        member.end()
    check_ledger(members, 30)
    assert len({entry.epoch for entry in founder.run.entries}) >= 3, "each broke an epoch"
    np.testing.assert_allclose([done.loss for done in founder.done], alone(30)[0], rtol=2e-4)
    assert all(len(member.done) == 30 for member in members)
    # Computing both steps anew would take six; where speeds were told anew meanwhile, a member's share may be another.
    assert sum(member.num_computed for member in members) <= 3 * 30 + 3


def test_links_are_measured_by_what_is_exchanged() -> None:
    founder = Member(members_min=2, num_steps=12, padding=400_000)
    second = Member(peers=(founder.run.address,), num_steps=12, padding=400_000)
    for member, other in ((founder, second), (second, founder)):
        wait(lambda member=member, other=other: member.run.rates.bytes_per_s().get(other.run.me, 0.0) > 1e6)  # type: ignore[misc]
    for member in (founder, second):
        member.end()


def test_one_joins_one_is_killed_one_leaves() -> None:
    founder = Member(members_min=2, num_steps=90, compute_s=0.08)
    second = Member(peers=(founder.run.address,), num_steps=90, compute_s=0.08)
    founder.wait_step(5)
    third = Member(peers=(second.run.address,), num_steps=90, compute_s=0.08, padding=0)
    wait(lambda: len(third.done) > 3)
    assert third.done[0].step > 4
    fourth = Member(peers=(founder.run.address,), num_steps=90, compute_s=0.08)
    wait(lambda: len(fourth.done) > 1)
    second.crash()
    step = founder.run._core.applied
    founder.wait_step(step + 3)
    assert len(founder.run.members) == 3
    third.run.leave()
    third.end()
    assert third.run._core.applied < 89
    for member in (founder, fourth):
        member.end()
    check_ledger([founder, fourth], 90)
    assert len({member.trainee.digest() for member in (founder, fourth)}) == 1
    assert founder.num_redone <= 2
    np.testing.assert_allclose([done.loss for done in founder.done], alone(90)[0], rtol=1e-3)


def test_the_founder_and_leader_may_die() -> None:
    founder = Member(members_min=3, num_steps=30, compute_s=0.08)
    others = [Member(peers=(founder.run.address,), num_steps=30, compute_s=0.08) for _ in range(2)]
    founder.wait_step(6)
    founder.crash()
    for member in others:
        member.end()
    check_ledger(others, 30)


def test_all_are_lost_and_another_number_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    founder = Member(members_min=2, num_steps=40, compute_s=0.05, folder=tmp_path)
    second = Member(peers=(founder.run.address,), num_steps=40, compute_s=0.05)
    founder.wait_step(13)
    for member in (founder, second):
        member.crash()
    founder.run._disk.shutdown()
    found = checkpoints.newest(tmp_path)
    assert found is not None
    first_step = len(found[0].history)
    assert first_step in (10, 15)
    again = Member(num_steps=40, folder=tmp_path, members_min=3)
    others = [Member(peers=(again.run.address,), num_steps=40) for _ in range(2)]
    for member in (again, *others):
        member.end()
    assert again.done[0].step == first_step
    check_ledger([again, *others], 40)
    np.testing.assert_allclose([done.loss for done in again.done], alone(40)[0][first_step:], rtol=1e-3)
    end = checkpoints.newest(tmp_path)
    assert end is not None
    assert len(end[0].history) == 40


def test_another_script_is_refused() -> None:
    founder = Member(num_steps=1000, compute_s=0.1)
    other = Member(peers=(founder.run.address,), num_steps=1000, order=SampleOrder(3, NUM_SAMPLES, GLOBAL_BATCH + 1))
    other.thread.join(10.0)
    assert isinstance(other.error, DeviceRefused)
    assert "100, 13 and 3: start the same script" in str(other.error)
    longer = Member(peers=(founder.run.address,), num_steps=999)
    longer.thread.join(10.0)
    assert "has 1000 steps, here 999" in str(longer.error)
    stranger = Member(peers=(founder.run.address,), name="stranger")
    stranger.thread.join(10.0)
    assert isinstance(stranger.error, DeviceRefused)
    assert "is 'test', and this one is 'stranger': is it the same script?" in str(stranger.error)
    founder.run.leave()
    founder.end()


def test_a_folder_of_another_model_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    Member(num_steps=6, folder=tmp_path).end()
    left = sorted(tmp_path.iterdir())
    for _ in range(2):
        with pytest.raises(DeviceRefused, match="take another folder, or the script that wrote it"):
            Member(num_steps=6, folder=tmp_path, name="other")
    assert sorted(tmp_path.iterdir()) == left


def test_nobody_to_join_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "JOIN_S", 0.5)
    lone = Member(peers=("127.0.0.1:1",))
    lone.thread.join(10.0)
    assert isinstance(lone.error, DeviceUnreachable)
    assert str(lone.error).startswith("no member of the run answers at 127.0.0.1:1: is it started there")


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    trainee = Linear()
    state, about = trainee.state()
    saved = checkpoints.Checkpoint("test", "linear", [], about, checkpoints.state_hash(state))
    path = checkpoints.write(tmp_path, saved, state)
    found, read = checkpoints.read(path)
    assert found == saved
    trainee.w += 1
    trainee.load(read, {})
    assert not trainee.w.any()
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    assert msgspec.json.decode(data[8 : 8 + length])["w"]["shape"] == [50], "any reader of safetensors reads it"
    newer = tmp_path / "step-0000000009.safetensors"
    data[-1] ^= 1
    newer.write_bytes(data)
    with pytest.raises(DamagedFile, match="does not hold the state"):
        checkpoints.read(newer)
    newest = checkpoints.newest(tmp_path)
    assert newest is not None
    assert newest[0] == saved
    for junk in (b"", b"\x00" * 8, b"\xff" * 8, bytes(data[:100])):
        newer.write_bytes(junk)
        with pytest.raises(DamagedFile):
            checkpoints.read(newer)
