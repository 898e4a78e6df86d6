"""What a member promised outlives its process, and so does who it was."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shoal.effects import Commanded, Effect, Learned, Received, Send, Store, Stored
from shoal.errors import CannotWrite, DeviceRefused
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import MemberHere
from shoal.membership.group.core import GroupCore
from shoal.membership.group.facts import JoinGroup, Recover
from shoal.membership.messages import Commit, Record, Scope, Vote, VoteRequest
from shoal.membership.messages import Member as Listed
from shoal.membership.timing import Timing
from shoal.runs.votes import FILE, Life, Votes
from tests.runs.members import Member, wait
from tests.runs.test_run import check_ledger

RUN, ME, ONE, OTHER = GroupId("test"), NodeId("me"), NodeId("one"), NodeId("other")
TERM = 7


def tell(core: GroupCore, votes: Votes, event: object, now_s: float) -> list[Effect]:
    """With what is stored on disk before what rests on it is said."""
    said: list[Effect] = []
    for effect in core.step(event, now_s):  # type: ignore[arg-type]
        if isinstance(effect, Store):
            votes.write(effect.value)
            said += core.step(Stored(effect.key, effect.number), now_s)
        else:
            said.append(effect)
    return said


def answer(core: GroupCore, votes: Votes, candidate: NodeId, record: Record) -> Vote:
    request = VoteRequest(Scope(RUN, record.generation, record.epoch, TERM), is_trial=False)
    found = [
        effect.message
        for effect in tell(core, votes, Received(candidate, request), 100.0)
        if isinstance(effect, Send) and effect.peers == (candidate,) and isinstance(effect.message, Vote)
    ]
    assert len(found) == 1
    return found[0]


def test_a_member_that_restarts_never_votes_twice_in_one_term(tmp_path: Path) -> None:
    listed = tuple(Listed(node, 1, "active") for node in (ONE, OTHER, ME))
    record = Record(RUN, 1 << 32, 3, "", 1, ONE, listed, tuple(each.node for each in listed), 0)
    votes = Votes(tmp_path, RUN)
    assert votes.former is None
    votes.begin(Life(RUN, ME))
    core = GroupCore(RUN, ME, incarnation=1, timing=Timing(), now_s=0.0)
    for node in (ONE, OTHER):
        tell(core, votes, Learned(MemberHere(node, 1)), 0.0)
    tell(core, votes, Commanded(JoinGroup(RUN)), 0.0)
    tell(core, votes, Received(ONE, Commit(Scope(RUN, 1 << 32, 3, 1), record, 0.0)), 0.0)
    assert answer(core, votes, ONE, record).granted
    votes.close()

    again = Votes(tmp_path, RUN)
    life = again.former
    assert life is not None
    assert (life.node, life.incarnation, life.record) == (ME, 1, record)
    again.begin(Life(RUN, ME, 2, life.group))
    restarted = GroupCore(RUN, ME, incarnation=2, timing=Timing(), now_s=90.0, stored=life.group)
    assert restarted.can_vote()
    assert not answer(restarted, again, OTHER, record).granted
    assert answer(restarted, again, ONE, record).granted, "its word may be repeated"
    again.close()


def test_what_cannot_be_believed_makes_another_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    votes = Votes(tmp_path, RUN)
    with pytest.raises(DeviceRefused, match="a folder of its own"):
        Votes(tmp_path, RUN)
    votes.begin(Life(RUN, ME))
    votes.close()
    for content in (None, b"\xc1 nothing"):
        if content is not None:
            (tmp_path / FILE).write_bytes(content)
        votes = Votes(tmp_path, RUN)
        assert votes.former is None, "it knew no record, or the file is damaged"
        votes.close()
    votes = Votes(tmp_path, RUN)
    votes.begin(Life(RUN, ME))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", fail)
        votes.write(b"promise")
        assert not (tmp_path / FILE).exists(), "a word that is not on disk may be given by one that will not come back"
    votes.begin(Life(RUN, ME))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", fail)
        patched.setattr(Path, "unlink", fail)
        with pytest.raises(CannotWrite, match="neither be written nor removed"):
            votes.write(b"promise")
    votes.close()
    with pytest.raises(CannotWrite, match="cannot be written"):
        Votes(tmp_path / FILE / "below", RUN)


@pytest.mark.slow
def test_the_loss_of_one_of_two_suspends_the_other_until_it_comes_back(tmp_path: Path) -> None:
    founder = Member(members_min=2, num_steps=40, compute_s=0.03, folder=tmp_path)
    second = Member(peers=(founder.run.address,), num_steps=40, compute_s=0.03)
    founder.wait_step(6)
    founder.crash()
    node = founder.run.me
    again = Member(num_steps=40, compute_s=0.03, folder=tmp_path)
    for member in (again, second):
        member.end()
    assert again.run.me == node
    assert again.run._life.incarnation == 2
    check_ledger([second, again], 40)
    assert again.done[0].step > 5, "no step of the other's was lost"
    assert not (tmp_path / FILE).exists(), "the run is over"


@pytest.mark.slow
@pytest.mark.full
def test_who_comes_back_to_a_run_that_began_anew_gives_way(tmp_path: Path) -> None:
    founder = Member(members_min=2, num_steps=60, compute_s=0.03, folder=tmp_path / "a")
    second = Member(peers=(founder.run.address,), num_steps=60, compute_s=0.03, folder=tmp_path / "b")
    founder.wait_step(8)
    for member in (founder, second):
        member.crash()
    again = Member(num_steps=60, compute_s=0.03, folder=tmp_path / "a")
    assert "none of the 1 others" in again.run.warnings[0]
    wait(lambda: len(again.done) > 3)
    returned = Member(peers=(again.run.address,), num_steps=60, compute_s=0.03, folder=tmp_path / "b")
    assert returned.run.me == second.run.me
    for member in (again, returned):
        member.end()
    assert returned.run.me != second.run.me
    assert "begun anew" in returned.run.warnings[0]
    check_ledger([again, returned], 60)


@pytest.mark.slow
def test_two_that_start_again_together_do_not_wait_for_each_other(tmp_path: Path) -> None:
    founder = Member(members_min=2, num_steps=20, compute_s=0.02, folder=tmp_path / "a")
    address = founder.run.address
    second = Member(peers=(address,), num_steps=20, compute_s=0.02, folder=tmp_path / "b")
    founder.wait_step(6)
    for member in (founder, second):
        member.crash()
    # Where the founder looks for it, the second listens again, and waits for the founder.
    again = Member(peers=(address,), num_steps=20, folder=tmp_path / "b", listen=second.run.address)
    assert again.run.me == second.run.me
    founder = Member(members_min=2, num_steps=20, folder=tmp_path / "a", listen=address)
    assert not founder.run.peers
    for member in (founder, again):
        member.end()
    check_ledger([founder, again], 20)


@pytest.mark.slow
def test_a_run_that_lost_its_majority_is_recovered_and_who_comes_back_joins_it(tmp_path: Path) -> None:
    founder = Member(members_min=2, num_steps=70, compute_s=0.03, folder=tmp_path)
    second = Member(peers=(founder.run.address,), num_steps=70, compute_s=0.03)
    core = second.run._control.core
    core.timing = msgspec.structs.replace(core.timing, suspend_s=1.0)
    founder.wait_step(6)
    founder.crash()
    wait(lambda: second.run.statistics()["is_suspended"] is True)
    assert second.run.statistics()["num_listed"] == 2
    assert second.run.statistics()["absent"] == [founder.run.me]
    assert "1 of its 2 members does not answer" in second.run.warnings[-1]
    step = second.run._core.applied
    second.run._control.command(Recover(RUN))
    second.wait_step(step + 3)
    assert second.run.members == (second.run.me,)
    again = Member(num_steps=70, compute_s=0.03, folder=tmp_path)
    assert again.run.me == founder.run.me
    for member in (second, again):
        member.end()
    check_ledger([second, again], 70)
    assert second.done[step + 1].step == step + 1, "nothing that was here is done again"
    assert 1 << 20 < second.run.entries[-1].epoch < 1 << 21
