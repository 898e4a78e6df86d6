"""Who acts as one: records, votes on disk, elections, suspension, recovery, and the five events."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.effects import Learned, Received, Send, Store, Stored, TimerFired
from shoal.ids import NodeId
from shoal.membership.failure import LinkChanged, MemberGone
from shoal.membership.group.ballot import GroupFile, generation_of, is_quorum, read_file, record_hash, write_file
from shoal.membership.group.changes import VOTERS_MAX, Changes
from shoal.membership.group.facts import (
    Attach,
    CheckpointDue,
    Decided,
    Doubted,
    JoinGroup,
    LeaveGroup,
    RecordAdopted,
    Recover,
    ReportProgress,
    Resumed,
    Suspended,
)
from shoal.membership.group.table import Role, Standing
from shoal.membership.messages import (
    Acknowledge,
    AskJoin,
    AskRecord,
    Attachment,
    Commit,
    GroupHeartbeat,
    GroupHeartbeatAck,
    Member,
    Propose,
    Record,
    Scope,
    Stale,
    Vote,
    VoteRequest,
)
from shoal.membership.roster import MemberRemoved
from tests.membership.devices import announced, sent
from tests.membership.group_world import KEY, RUN, TIMING, CheckedGroupCore, Group

A, B, C, D, E = (NodeId(name) for name in "abcde")


def record(*names: str, epoch: int = 5, term: int = 3, voters: str | None = None, generation: int = 1) -> Record:
    members = tuple(Member(NodeId(name), 1, "active") for name in names)
    chosen = tuple(NodeId(name) for name in (names if voters is None else voters))
    return Record(RUN, generation, epoch, "parent", term, NodeId(names[0]), members, chosen, 0)


def core_with(name: str, committed: Record, *, incarnation: int = 1, **fields: object) -> CheckedGroupCore:
    """A device as its file makes it, a lease after it started, so that it may vote."""
    file = GroupFile(committed, committed.term, None, 0, None, 1, None)
    stored = write_file(msgspec.structs.replace(file, **fields))
    return CheckedGroupCore(RUN, NodeId(name), incarnation=incarnation, timing=TIMING, now_s=-1.0, stored=stored)


def scope_of(committed: Record, term: int) -> Scope:
    return Scope(RUN, committed.generation, committed.epoch, term)


def child_of(parent: Record, term: int, first_step: int = 0) -> Record:
    changes = msgspec.structs.replace(parent, epoch=parent.epoch + 1, parent=record_hash(parent), term=term)
    return msgspec.structs.replace(changes, first_step=first_step)


# ---- quorum


@pytest.mark.parametrize(
    ("voters", "agreed", "expected"),
    [
        ("a", "a", True),
        ("ab", "a", True),
        ("ab", "b", False),
        ("abc", "ab", True),
        ("abc", "bc", True),
        ("abc", "a", False),
        ("abcd", "ab", True),
        ("abcd", "cd", False),
        ("abcd", "bcd", True),
        ("abcd", "a", False),
        ("abc", "axyz", False),
        ("", "", False),
        ("", "a", False),
    ],
)
def test_a_quorum_is_more_than_half_or_half_with_the_first(voters: str, agreed: str, expected: bool) -> None:
    committed = record("a", voters=voters)
    assert is_quorum(committed, [NodeId(name) for name in agreed]) is expected


@given(st.integers(1, 9), st.data())
def test_two_quorums_share_a_voter(number: int, data: st.DataObject) -> None:
    voters = [NodeId(f"v{index}") for index in range(number)]
    committed = msgspec.structs.replace(record("a"), voters=tuple(voters))
    one = data.draw(st.sets(st.sampled_from(voters)))
    other = data.draw(st.sets(st.sampled_from(voters)))
    if is_quorum(committed, one) and is_quorum(committed, other):
        assert one & other
    assert is_quorum(committed, voters)


def test_of_two_generations_made_at_once_one_outranks_the_other() -> None:
    assert generation_of(2, A, 1) > generation_of(1, B, 1) > 0
    assert len({generation_of(2, A, 1), generation_of(2, B, 1), generation_of(2, A, 2)}) == 3


# ---- the five events


def test_a_group_begins_with_one_device() -> None:
    group = Group("a", "b")
    group.create("a")
    assert group.parts("a") == {"a": "active"}
    assert group.leaders() == group.running() == ["a"]


def test_scale_out_a_joiner_is_a_shadow_until_it_is_ready() -> None:
    group = Group("a", "b")
    group.create("a")
    group.command(A, ReportProgress(RUN, 7, has_state=True))
    group.join("b", is_ready=False)
    assert group.parts("a") == group.parts("b") == {"a": "active", "b": "shadow"}
    group.run(5.0)
    assert group.parts("a")["b"] == "shadow"
    group.command(B, ReportProgress(RUN, 9, has_state=True, ready=True))
    group.command(A, ReportProgress(RUN, 9, has_state=True))
    group.run(0.5)
    assert group.parts("a") == group.parts("b") == {"a": "active", "b": "active"}
    assert group["b"].committed.first_step == 10, "all steps so far were without it"


def test_scale_out_a_witness_only_votes() -> None:
    group = Group("a", "b")
    group.create("a")
    group.join("b", "witness")
    assert group.parts("a") == {"a": "active", "b": "witness"}
    assert group["a"].committed.voters == (A, B)


def test_several_joiners_may_come_at_once() -> None:
    group = Group("a", "b", "c", "d")
    group.create("a")
    for name in "bcd":
        group.join(name, is_ready=False)
    for name in "bcd":
        group.command(NodeId(name), ReportProgress(RUN, 0, has_state=True, ready=True))
    group.run(1.0)
    assert set(group.parts("a").values()) == {"active"}
    assert len(set(group.epochs())) == 1


def test_scale_in_a_member_leaves_by_a_record() -> None:
    group = Group.of("a", "b", "c")
    group.command(C, LeaveGroup(RUN))
    group.run(0.5)
    assert group.parts("a") == group.parts("b") == {"a": "active", "b": "active"}
    assert group["c"].role is Role.OUTSIDE
    assert not group["c"].is_running(group.now_s)
    assert group.known(C, RecordAdopted)[-1].is_member is False
    group.run(5.0)
    assert group["c"].wants is None


def test_scale_in_a_leader_leaves_and_another_leads() -> None:
    group = Group.of("a", "b", "c")
    group.command(A, LeaveGroup(RUN))
    group.run(2.0)
    assert group["a"].role is Role.OUTSIDE
    assert group.parts("b") == {"b": "active", "c": "active"}
    assert len(group.leaders()) == 1
    assert group.running() == ["b", "c"]


def test_scale_in_a_leaver_stays_until_its_state_is_with_those_who_stay() -> None:
    """They may have been let in a moment ago, and start the epoch from a step that only the leaver has."""
    old = msgspec.structs.replace(record("a", "b", "c"), first_step=11)
    changes = Changes(B)
    changes.leaves[A] = 1
    changes.steps.update({A: 10, B: 9, C: 8})
    assert changes.next_record(old, 4) is None
    changes.steps[C] = 10
    following = changes.next_record(old, 4)
    assert following is not None
    assert [member.node for member in following.members] == [B, C]
    assert following.first_step == 11
    changes.steps[C] = 8
    changes.removed.add(A)
    assert changes.next_record(old, 4) is not None, "a removed device is not asked for anything"


def test_failure_of_a_member_is_a_record_without_it() -> None:
    group = Group.of("a", "b", "c")
    epoch = group["a"].committed.epoch
    group.kill("c")
    group.run(0.1)
    assert group.parts("a") == group.parts("b") == {"a": "active", "b": "active"}
    assert group.epochs("a", "b") == [epoch + 1] * 2
    decided = group.known(A, Decided)
    assert [fact.epoch for fact in decided] == [epoch + 1]
    assert 0 < decided[0].decide_s < 0.01, "one round trip of two milliseconds, and no timer"


def test_disconnect_link_and_connect_link_change_the_record_and_nothing_else() -> None:
    group = Group.of("a", "b", "c")
    before = group["a"].committed
    group.learn(C, LinkChanged(B, C, is_up=False))
    group.run(0.2)
    cut = group["b"].committed
    assert cut.cut_links == ((B, C),)
    assert (cut.members, cut.voters, cut.epoch) == (before.members, before.voters, before.epoch + 1)
    group.learn(C, LinkChanged(B, C, is_up=True))
    group.run(TIMING.link_hold_s - 0.3)
    assert group["b"].committed.cut_links == ((B, C),), "it has to hold first"
    group.run(1.2)
    after = group["b"].committed
    assert (after.cut_links, after.members) == ((), before.members)


def test_a_flapping_link_stays_cut() -> None:
    group = Group.of("a", "b", "c")
    group.learn(C, LinkChanged(B, C, is_up=False))
    group.run(0.2)
    epoch = group["a"].committed.epoch
    for _ in range(10):
        group.learn(C, LinkChanged(B, C, is_up=True))
        group.run(TIMING.link_hold_s / 2)
        group.learn(C, LinkChanged(B, C, is_up=False))
        group.run(TIMING.link_hold_s / 2)
    assert group["a"].committed.cut_links == ((B, C),)
    assert group["a"].committed.epoch == epoch


def test_only_a_links_target_may_report_it() -> None:
    group = Group.of("a", "b", "c")
    group.learn(C, LinkChanged(A, B, is_up=False))
    group.run(1.0)
    assert group["a"].committed.cut_links == ()


def test_what_capabilities_attach_is_agreed_on_unread() -> None:
    group = Group.of("a", "b", "c")
    plan = Attachment("plan", "h", b"\xff")
    group.command(A, Attach(RUN, plan))
    group.run(0.2)
    assert all(group[name].committed.attachments == (plan,) for name in "abc")
    group.kill("c")
    group.run(0.2)
    assert group["b"].committed.attachments == (plan,)


def test_everybody_asks_for_itself() -> None:
    group = Group.of("a", "b", "c")
    epoch = group["a"].committed.epoch
    for member in (Member(C, 7, "active"), Member(E, 1, "active")):
        group.tell(A, Received(B, AskJoin(group["b"]._scope(), member, 0)))
    group.run(0.5)
    assert group.epochs() == [epoch] * 3


def test_a_device_removed_from_the_roster_is_out() -> None:
    group = Group.of("a", "b", "c")
    group.learn(A, MemberRemoved(C))
    group.run(0.2)
    assert group.parts("b") == {"a": "active", "b": "active"}


# ---- voters


def test_voters_are_the_reachable_members_the_steadiest_first() -> None:
    group = Group("a", "b", "c")
    group.create("a", steadiness=1)
    group.join("b", steadiness=5)
    group.join("c", "witness", steadiness=3)
    assert group["a"].committed.voters == (B, C, A)


def test_voters_are_at_most_so_many() -> None:
    members = tuple(Member(NodeId(f"m{number:03}"), 1, "active") for number in range(100))
    old = msgspec.structs.replace(record("a"), members=members, voters=(members[0].node,))
    following = Changes(members[0].node).next_record(old, 4)
    assert following is not None
    assert len(following.voters) == VOTERS_MAX
    assert following.voters[0] == members[0].node
    assert len(following.members) == 100


def test_the_last_ones_with_state_stay_listed_even_if_gone() -> None:
    old = msgspec.structs.replace(record("a", "b"), members=(Member(A, 1, "witness"), Member(B, 1, "active")))
    changes = Changes(A)
    changes.gone[B] = 1
    following = changes.next_record(old, 4)
    assert following is not None
    assert [member.node for member in following.members] == [A, B]
    assert following.voters == (A,)


# ---- promises are on disk before they are given


def test_an_acknowledgement_waits_for_the_disk() -> None:
    committed = record("a", "b", "c")
    core, proposed = core_with("b", committed), child_of(committed, 4)
    effects = core.step(Received(A, Propose(scope_of(committed, 4), proposed)), 0.0)
    store = next(effect for effect in effects if type(effect) is Store)
    assert not sent(effects, Acknowledge)
    written = read_file(store.value)
    assert (written.accepted_term, written.accepted, written.promised) == (4, proposed, 4)
    effects = core.step(Stored(KEY, store.number), 0.01)
    assert [(effect.peers, effect.message) for effect in effects if type(effect) is Send] == [
        ((A,), Acknowledge(scope_of(committed, 4), record_hash(proposed)))
    ]


def test_a_vote_waits_for_the_disk() -> None:
    committed = record("a", "b", "c")
    core = core_with("b", committed)
    effects = core.step(Received(C, VoteRequest(scope_of(committed, 4), is_trial=False)), 0.0)
    store = next(effect for effect in effects if type(effect) is Store)
    assert not sent(effects, Vote)
    assert read_file(store.value).voted_for == C
    assert sent(core.step(Stored(KEY, store.number - 1), 0.01), Vote) == []
    assert sent(core.step(Stored(KEY, store.number), 0.02), Vote)[0].granted


def test_a_leaders_own_voice_counts_when_it_is_on_disk() -> None:
    group = Group.of("a", "b")
    group.slow_disks.add(A)
    group.command(A, Attach(RUN, Attachment("plan", "h", b"1")))
    group.run(0.3)
    assert group["a"].role is Role.PROPOSING, "b agreed, but half without the first voter is no quorum"


def test_a_voter_votes_once_per_term() -> None:
    committed = record("a", "b", "c")
    core = core_with("b", committed)
    assert vote(core, C, committed, 4) is True
    assert vote(core, A, committed, 4) is False
    assert vote(core, C, committed, 4) is True, "the same again, whose answer may have been lost"
    assert vote(core, A, committed, 3) is False
    assert vote(core, A, committed, 5, now_s=9.0) is True


def test_after_a_restart_with_its_file_a_voter_remembers() -> None:
    committed = record("a", "b", "c")
    core = core_with("b", committed, incarnation=2, promised=4, voted_for=C)
    assert vote(core, A, committed, 4) is False
    assert vote(core, C, committed, 4) is True
    assert vote(core, A, committed, 5, now_s=9.0) is True


def test_after_a_restart_without_its_file_nobody_votes() -> None:
    committed = record("a", "b", "c")
    core = CheckedGroupCore(RUN, B, incarnation=2, timing=TIMING, now_s=-1.0)
    core.step(Received(A, Commit(scope_of(committed, 3), committed)), 0.0)
    assert core.committed == committed
    assert vote(core, C, committed, 9, now_s=5.0) is None
    effects = core.step(Received(C, Propose(scope_of(committed, 9), child_of(committed, 9))), 5.0)
    assert not [effect for effect in effects if type(effect) is Send and type(effect.message) is Acknowledge]
    assert core.step(Stored(KEY, 99), 5.1) == []


def test_a_restarted_voter_without_its_file_votes_once_it_is_listed_anew() -> None:
    members = (Member(A, 1, "active"), Member(B, 2, "active"), Member(C, 1, "active"))
    committed = msgspec.structs.replace(record("a", "b", "c"), members=members)
    core = CheckedGroupCore(RUN, B, incarnation=2, timing=TIMING, now_s=-1.0)
    core.step(Received(A, Commit(scope_of(committed, 3), committed)), 0.0)
    assert vote(core, C, committed, 4, now_s=5.0) is True


def test_no_promise_is_given_below_one_given() -> None:
    committed = record("a", "b", "c")
    core = core_with("b", committed, promised=7, voted_for=C)
    effects = core.step(Received(A, Propose(scope_of(committed, 6), child_of(committed, 6))), 0.0)
    assert not [effect for effect in effects if type(effect) is Store]
    assert sent(effects, Stale)[0].scope.term == 7


def vote(core: CheckedGroupCore, candidate: NodeId, committed: Record, term: int, *, now_s: float = 0.0) -> bool | None:
    """Asks for a vote and lets the disk write; None for no answer."""
    effects = core.step(Received(candidate, VoteRequest(scope_of(committed, term), is_trial=False)), now_s)
    for effect in list(effects):
        if type(effect) is Store:
            effects += core.step(Stored(effect.key, effect.number), now_s)
    votes = sent(effects, Vote)
    return votes[0].granted if votes else None


# ---- elections


def test_a_lost_leader_is_replaced_within_a_lease_or_so() -> None:
    group = Group.of("a", "b", "c")
    group.close(A)
    took_s = group.wait(lambda: bool(group.leaders()))
    assert took_s < TIMING.lease_s + 4 * TIMING.stagger_s
    assert len(group.leaders()) == 1


def test_a_closed_connection_to_the_leader_is_enough() -> None:
    group = Group.of("a", "b", "c")
    group.close(A)
    group.lose("a")
    assert group.wait(lambda: bool(group.leaders())) < 4 * TIMING.stagger_s


def test_voters_stand_in_turn() -> None:
    """The first in line is asked for nothing and stands first, so one round is enough."""
    group = Group.of("a", "b", "c", "d", "e")
    group.close(A)
    group.run(2.0)
    real = [
        (who, message.scope.term) for who, _, message in group.sent if type(message) is VoteRequest and not message.is_trial
    ]
    assert {who for who, _ in real} == {B}
    assert len({term for _, term in real}) == 1


def test_a_half_cut_member_does_not_disrupt() -> None:
    """It hears nobody and is heard by all: it asks, nobody would vote for it, and no term grows."""
    group = Group.of("a", "b", "c")
    group.cuts |= {(A, C), (B, C)}
    term = group["a"].term
    group.run(10.0)
    assert group.leaders() == ["a"]
    assert group["a"].term == group["b"].term == term
    group.cuts.clear()
    group.run(1.0)
    assert group.running() == ["a", "b", "c"]
    assert group["c"].term == term


def test_one_term_has_one_leader() -> None:
    group = Group.of("a", "b", "c", "d", "e")
    led: dict[int, set[str]] = {}
    for victim in "abc":
        for _ in range(100):
            group.run(0.02)
            for name in group.leaders():
                led.setdefault(group[name].term, set()).add(name)
        if len(group.cores) > 3:
            group.kill(victim)
    assert len(led) >= 3
    assert all(len(names) == 1 for names in led.values())


def test_a_frozen_leader_that_goes_on_after_a_new_term_follows() -> None:
    group = Group.of("a", "b", "c")
    group.command(A, Attach(RUN, Attachment("plan", "h", b"1")))
    group.stopped.add(A)
    group.run(3.0)
    assert len(group.leaders()) == 1
    winner = group.leaders()[0]
    group.stopped.clear()
    group.run(1.0)
    assert group.leaders() == [winner]
    assert group["a"].role is Role.FOLLOWING
    assert len({record_hash(group[name].committed) for name in "abc"}) == 1


# ---- the unfinished record


def test_a_new_leader_proposes_the_acknowledged_record_again_unchanged() -> None:
    group = Group.of("a", "b", "c")
    plan = Attachment("plan", "h", b"1")
    group.cuts |= {(B, A), (C, A)}
    group.command(A, Attach(RUN, plan))
    group.run(0.01)
    proposed = next(message.record for _, _, message in group.sent if type(message) is Propose)
    assert group["b"].ballot.accepted == proposed
    group.close(A)
    group.lose("a")
    group.sent.clear()
    group.run(2.0)
    again = next(message.record for _, _, message in group.sent if type(message) is Propose)
    assert again == proposed
    assert group["b"].committed.attachments == group["c"].committed.attachments == (plan,)
    assert group.parts("b") == {"b": "active", "c": "active"}, "and then what came to pass meanwhile"


def test_of_several_unfinished_records_the_highest_terms_is_proposed() -> None:
    committed = record("a", "b", "c")
    low, high = child_of(committed, 4, first_step=4), child_of(committed, 5, first_step=5)
    core = core_with("a", committed, promised=5, accepted_term=4, accepted=low)
    scope = elected(core, committed)
    effects = core.step(Received(B, Vote(scope, is_trial=False, granted=True, accepted_term=5, accepted=high)), 2.0)
    assert core.role is Role.RECOVERING
    assert sent(effects, Propose)[0].record == high


def test_after_finishing_anothers_record_a_leader_asks_for_votes_anew() -> None:
    committed = record("a", "b", "c")
    unfinished = child_of(committed, 4)
    core = core_with("a", committed)
    scope = elected(core, committed)
    effects = core.step(Received(B, Vote(scope, is_trial=False, granted=True, accepted_term=4, accepted=unfinished)), 2.0)
    store = [effect.number for effect in effects if type(effect) is Store][-1]
    core.step(Stored(KEY, store), 2.0)
    effects = core.step(Received(B, Acknowledge(scope, record_hash(unfinished))), 2.1)
    assert core.committed == unfinished
    assert core.role is Role.STANDING
    assert [request.scope.epoch for request in sent(effects, VoteRequest)] == [unfinished.epoch]
    assert sent(effects, Commit)[0].record == unfinished


def elected(core: CheckedGroupCore, committed: Record) -> Scope:
    """Brings the core to where it has its own vote and waits for the others'; returns the scope of its term."""
    effects = core.step(TimerFired(KEY), 1.0)
    trial = sent(effects, VoteRequest)[0]
    assert trial.is_trial
    effects = core.step(Received(B, Vote(trial.scope, is_trial=True, granted=True)), 1.0)
    request = sent(effects, VoteRequest)[0]
    assert not request.is_trial
    assert request.scope == trial.scope
    for effect in effects:
        if type(effect) is Store:
            core.step(Stored(KEY, effect.number), 1.0)
    assert core.role is Role.STANDING
    assert request.scope.epoch == committed.epoch
    return request.scope


# ---- quorum lost


def test_a_leader_without_a_quorum_steps_down_and_all_of_its_side_stop() -> None:
    group = Group.of("a", "b", "c", "d", "e")
    group.split("ab", "cde")
    group.run(2.0)
    assert group.running() == ["c", "d", "e"]
    assert group["a"].standing is group["b"].standing is Standing.SUSPENDED
    assert [name for name in group.leaders() if name in "ab"] == []
    assert group.parts("c") == {"c": "active", "d": "active", "e": "active"}
    assert group.parts("a") == dict.fromkeys("abcde", "active")


def test_half_with_the_first_voter_goes_on() -> None:
    group = Group.of("a", "b", "c", "d")
    group.split("ab", "cd")
    group.run(3.0)
    assert group.running() == ["a", "b"]
    assert group.parts("a") == {"a": "active", "b": "active"}


def test_after_a_cut_all_agree_again_and_nothing_committed_is_lost() -> None:
    group = Group.of("a", "b", "c", "d", "e")
    group.split("ab", "cde")
    group.run(2.0)
    kept = group["c"].committed
    group.heal()
    group.run(3.0)
    assert len({record_hash(group[name].committed) for name in "abcde"}) == 1
    assert group["a"].committed.epoch > kept.epoch
    assert group.parts("a").keys() == set("abcde")
    assert group.running() == list("abcde")
    assert group.known(A, Resumed)


def test_two_devices_and_the_first_is_gone() -> None:
    group = Group.of("a", "b")
    group.kill("a")
    group.run(5.0)
    assert group.leaders() == group.running() == []
    assert group["b"].standing is Standing.SUSPENDED
    group.restart("a", 2)
    group.run(3.0)
    assert group.running() == ["b", "a"]


def test_two_devices_and_the_second_is_gone() -> None:
    group = Group.of("a", "b")
    group.kill("b")
    group.run(3.0)
    assert group.running() == ["a"]
    assert group.parts("a") == {"a": "active"}


def test_a_suspended_member_is_told_to_write_its_checkpoint_in_time() -> None:
    group = Group.of("a", "b")
    group.kill("a")
    group.run(TIMING.suspend_s + 1.0)
    suspended = group.known(B, Suspended)
    assert len(suspended) == 1
    assert group.known(B, CheckpointDue) == []
    group.run(suspended[0].hold_until_s - group.now_s)
    assert len(group.known(B, CheckpointDue)) == 1
    due_s = next(at_s for who, at_s, fact in group.facts if who == B and type(fact) is CheckpointDue)
    assert due_s <= suspended[0].hold_until_s - 0.05 * TIMING.hold_s
    assert group["b"].standing is Standing.SAVED


def test_a_power_cut_of_all_does_not_end_a_run() -> None:
    group = Group.of("a", "b", "c")
    plan = Attachment("plan", "h", b"1")
    group.command(A, Attach(RUN, plan))
    group.run(0.2)
    for name in "abc":
        group.close(NodeId(name), tell=False)
    group.run(10.0)
    for name in "abc":
        group.restart(name, 2)
        group.command(NodeId(name), ReportProgress(RUN, 4, has_state=True))
    group.run(3.0)
    assert group.running() == ["a", "b", "c"]
    assert set(group.parts("a").values()) == {"active"}, "nothing was committed without them: they go on as they are"
    assert {member.incarnation for member in group["a"].committed.members} == {2}
    assert group["a"].committed.attachments == (plan,)


def test_two_of_three_reboot_together() -> None:
    group = Group.of("a", "b", "c")
    for name in "bc":
        group.close(NodeId(name))
    group.run(0.05)
    for name in "bc":
        group.restart(name, 2)
    group.run(4.0)
    assert group.running() == ["a", "b", "c"]
    assert {member.node: member.incarnation for member in group["a"].committed.members} == {A: 1, B: 2, C: 2}


def test_two_of_three_lose_their_disks_and_the_third_does_not_go_on_alone() -> None:
    """What they promised is forgotten: only the owner can say that it is over."""
    group = Group.of("a", "b", "c")
    for name in "bc":
        group.close(NodeId(name))
    group.run(0.05)
    for name in "bc":
        group.restart(name, 2, keeps_disk=False)
    group.run(5.0)
    assert group.running() == []
    group.command(A, Recover(RUN))
    group.run(2.0)
    assert group.running() == ["a"]


def test_who_wants_in_asks_those_that_are_here_when_all_listed_are_gone() -> None:
    group = Group("a", "b", "c")
    group.create("a")
    group.tell(B, Received(A, Commit(group["a"]._scope(), group["a"].committed)))
    group.kill("a")
    group.sent.clear()
    group.command(B, JoinGroup(RUN))
    group.run(3.0)
    assert {peer for who, peer, message in group.sent if who == B and type(message) is AskJoin} == {C}


# ---- the owner's last resort


def test_recovery_outranks_all_epochs_before() -> None:
    group = Group.of("a", "b", "c")
    old = group["a"].committed
    group.kill("a")
    group.kill("b")
    group.run(3.0)
    assert group.running() == []
    group.command(C, Recover(RUN))
    group.run(2.0)
    assert group.running() == ["c"]
    assert group["c"].committed.generation > old.generation
    group.restart("a", 2)
    group.restart("b", 2)
    group.run(4.0)
    assert len({record_hash(group[name].committed) for name in "abc"}) == 1
    assert group["a"].committed.generation == group["c"].committed.generation
    assert group.parts("c").keys() == {"a", "b", "c"}


def test_two_that_lead_generations_of_their_own_find_together() -> None:
    """Each was alone with its record, so neither had anybody to ask."""
    group = Group.of("a", "b")
    group.split("a", "b")
    group.run(1.0)
    group.command(B, Recover(RUN))
    group.run(1.0)
    assert sorted(group.leaders()) == ["a", "b"]
    group.heal()
    group.run(4.0)
    assert len({record_hash(group[name].committed) for name in "ab"}) == 1
    assert group.parts("a").keys() == {"a", "b"}
    assert len(group.leaders()) == 1


def test_who_recovers_a_group_takes_back_that_it_wanted_to_leave() -> None:
    group = Group.of("a", "b")
    group.kill("a")
    group.command(B, LeaveGroup(RUN))
    group.run(1.0)
    group.command(B, Recover(RUN))
    group.run(3.0)
    assert group.running() == ["b"]


def test_what_is_of_an_older_generation_is_answered_so() -> None:
    committed = record("a", "b", generation=9)
    core = core_with("a", committed)
    old = Scope(RUN, 8, 99, 99)
    for message in (GroupHeartbeat(old, 1), VoteRequest(old, is_trial=False), Propose(old, child_of(committed, 99))):
        effects = core.step(Received(B, message), 0.0)
        assert [stale.record for stale in sent(effects, Stale)] == [committed]
        assert core.committed == committed


# ---- stale and early words


@pytest.mark.parametrize("back", [(1, 0), (0, 1)], ids=["epoch", "term"])
def test_a_stale_leader_is_told(back: tuple[int, int]) -> None:
    committed = record("a", "b", "c")
    core = core_with("b", committed)
    scope = Scope(RUN, 1, committed.epoch - back[0], committed.term - back[1])
    effects = core.step(Received(A, GroupHeartbeat(scope, 1)), 0.0)
    assert [stale.record for stale in sent(effects, Stale)] == [committed]
    assert sent(effects, GroupHeartbeatAck) == []
    assert core.leader is None


def test_of_a_later_epoch_the_record_is_asked_for() -> None:
    committed = record("a", "b", "c")
    core = core_with("b", committed)
    later = child_of(committed, 3)
    effects = core.step(Received(A, Propose(scope_of(later, 3), child_of(later, 3))), 0.0)
    assert len(sent(effects, AskRecord)) == 1
    assert not sent(effects, Acknowledge)
    core.step(Received(A, Commit(scope_of(later, 3), later)), 0.1)
    assert core.committed == later


def test_an_acknowledgement_of_another_record_or_term_does_not_count() -> None:
    group = Group.of("a", "b", "c")
    group.cuts |= {(B, A), (C, A)}
    group.command(A, Attach(RUN, Attachment("plan", "h", b"1")))
    group.run(0.01)
    core = group["a"]
    epoch, scope = core.committed.epoch, scope_of(core.committed, core.term)
    wrong = [
        Acknowledge(scope, "another record"),
        Acknowledge(msgspec.structs.replace(scope, term=scope.term - 1), core._proposal_hash),
        Acknowledge(msgspec.structs.replace(scope, epoch=scope.epoch - 1), core._proposal_hash),
    ]
    for message in wrong:
        group.tell(A, Received(B, message), Received(C, message))
        assert core.committed.epoch == epoch
    group.tell(A, Received(E, Acknowledge(scope, core._proposal_hash)))
    assert core.committed.epoch == epoch, "not by a voter"
    group.tell(A, Received(B, Acknowledge(scope, core._proposal_hash)))
    assert core.committed.epoch == epoch + 1


def test_a_timer_that_fires_too_early_or_twice_does_nothing() -> None:
    group = Group.of("a", "b", "c")
    group.facts.clear()
    before = [core.role for core in group.cores.values()]
    for name in "abc":
        for _ in range(3):
            group.tell(NodeId(name), TimerFired(KEY))
    assert [core.role for core in group.cores.values()] == before
    assert group.facts == []


def test_a_leader_has_presence_look_into_a_member_that_does_not_answer() -> None:
    group = Group.of("a", "b", "c")
    group.stopped.add(C)
    group.run(2 * TIMING.lease_s)
    assert {fact.node for fact in group.known(A, Doubted)} == {C}
    assert group.parts("a").keys() == {"a", "b", "c"}, "it is presence that decides"


def test_a_member_that_presence_lost_for_a_moment_is_not_thrown_out_if_it_answers() -> None:
    group = Group.of("a", "b", "c")
    epoch = group["a"].committed.epoch
    group.learn(B, MemberGone(C, 1))
    group.run(1.0)
    assert group["a"].committed.epoch == epoch, "only the leader's presence counts"


def test_nobody_speaks_for_the_leader() -> None:
    """A record is changed by commands and requests at the leader only."""
    group = Group.of("a", "b", "c")
    epoch = group["a"].committed.epoch
    group.command(B, Attach(RUN, Attachment("plan", "h", b"1")))
    group.tell(B, Learned(MemberGone(C, 1)))
    group.run(1.0)
    assert group.epochs() == [epoch] * 3


def test_equal_events_give_equal_effects() -> None:
    """No clock and no chance but what is passed in."""
    stories = []
    for _ in range(2):
        group = Group.of("a", "b", "c", "d")
        group.kill("a")
        group.run(2.0)
        group.split("b", "cd")
        group.run(2.0)
        stories.append((group.facts, group.sent))
    assert stories[0] == stories[1]


def test_a_decision_is_announced_once_by_its_leader() -> None:
    group = Group.of("a", "b", "c")
    group.kill("c")
    group.run(1.0)
    for name in "ab":
        adopted = group.known(NodeId(name), RecordAdopted)
        assert [fact.record.epoch for fact in adopted] == sorted({fact.record.epoch for fact in adopted})
    assert announced([], Decided) == []
    assert len(group.known(A, Decided)) == 1
    assert group.known(B, Decided) == []
