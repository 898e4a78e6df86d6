"""One core of a group by itself, told what happens: what the others do is what the test says."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.effects import (
    Announce,
    Command,
    Commanded,
    Effect,
    Fact,
    Learned,
    Message,
    Received,
    Send,
    Store,
    Stored,
    TimerFired,
)
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import LinkChanged, MemberGone, MemberHere
from shoal.membership.group import (
    CreateGroup,
    GroupCore,
    JoinGroup,
    LeaveGroup,
    Resumed,
    Role,
    Standing,
    Suspended,
    record_hash,
)
from shoal.membership.group.ballot import is_quorum, quorum_since
from shoal.membership.messages import (
    Acknowledge,
    AskJoin,
    AskLeave,
    Commit,
    GroupHeartbeat,
    GroupHeartbeatAck,
    GroupMessage,
    LinkReport,
    Member,
    Part,
    Propose,
    Record,
    Scope,
    Stale,
    Vote,
    VoteRequest,
)
from shoal.membership.timing import Timing

GROUP = GroupId("run")
TIMING = Timing()
A, B, C, D, E = (NodeId(name) for name in "abcde")


class Seat:
    """A core, its disk, and what it said."""

    def __init__(self, me: NodeId, *, incarnation: int = 1, stored: bytes | None = None, now_s: float = 0.0) -> None:
        self.core = GroupCore(GROUP, me, incarnation=incarnation, timing=TIMING, now_s=now_s, stored=stored)
        self.now_s = now_s
        self.disk = stored
        self.unwritten: list[Store] = []
        self.sent: list[tuple[NodeId, Message]] = []
        self.facts: list[Fact] = []
        self.is_writing = True

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.sent += [(peer, effect.message) for peer in effect.peers]
            elif isinstance(effect, Announce):
                self.facts.append(effect.fact)
            elif isinstance(effect, Store):
                self.unwritten.append(effect)
        if self.is_writing:
            self.write()

    def write(self) -> None:
        """The disk catches up."""
        while self.unwritten:
            write = self.unwritten.pop(0)
            self.disk = write.value
            self.take(self.core.step(Stored(write.key, write.number), self.now_s))

    def hear(self, peer: NodeId, message: GroupMessage) -> list[tuple[NodeId, Message]]:
        self.sent.clear()
        self.take(self.core.step(Received(peer, message), self.now_s))
        return self.sent.copy()

    def asked(self, peer: NodeId, scope: Scope, *, is_trial: bool = False) -> Vote | Stale | None:
        """What it answers to a request for its vote."""
        answers = [
            message
            for to, message in self.hear(peer, VoteRequest(scope, is_trial))
            if to == peer and isinstance(message, Vote | Stale)
        ]
        return answers[0] if answers else None

    def is_granted(self, peer: NodeId, term: int, *, is_trial: bool = False) -> bool:
        answer = self.asked(peer, self.scope(term), is_trial=is_trial)
        return isinstance(answer, Vote) and answer.granted

    def role(self) -> Role:
        return self.core.role

    def learn(self, fact: Fact) -> None:
        self.take(self.core.step(Learned(fact), self.now_s))

    def command(self, command: Command) -> None:
        self.take(self.core.step(Commanded(command), self.now_s))

    def wait(self, seconds: float) -> list[tuple[NodeId, Message]]:
        self.sent.clear()
        self.now_s += seconds
        self.take(self.core.step(TimerFired(f"group/{GROUP}"), self.now_s))
        return self.sent.copy()

    def kinds(self) -> list[type[Message]]:
        return [type(message) for _, message in self.sent]

    def scope(self, term: int) -> Scope:
        record = self.core.committed
        return Scope(GROUP, record.generation, record.epoch, term)


def record_of(*nodes: NodeId, epoch: int = 5, term: int = 1, **changes: object) -> Record:
    members = tuple(Member(node, 1, "active") for node in nodes)
    return msgspec.structs.replace(Record(GROUP, 1, epoch, "p", term, nodes[0], members, nodes, 0), **changes)


def seat_in(record: Record, me: NodeId) -> Seat:
    """A member that knows `record` and has heard its leader."""
    seat = Seat(me)
    seat.command(JoinGroup(GROUP))
    for node in record.voters:
        if node != me:
            seat.learn(MemberHere(node, 1))
    seat.hear(record.leader, Commit(Scope(GROUP, 1, record.epoch, record.term), record))
    return seat


def elected(
    record: Record, me: NodeId, voters: tuple[NodeId, ...], accepted: Record | None = None, accepted_term: int = 0
) -> Seat:
    """A member that has lost its leader, stood, and won."""
    seat = seat_in(record, me)
    seat.wait(3.0)
    assert seat.role() is Role.ASKING
    term = seat.core._next_term()
    for voter in voters:
        seat.hear(voter, Vote(seat.scope(term), is_trial=True, granted=True))
    assert seat.role() is Role.STANDING
    for voter in voters:
        if seat.role() is Role.STANDING:
            seat.hear(voter, Vote(seat.scope(term), False, True, accepted_term, accepted))
    return seat


def test_no_vote_while_the_lease_holds() -> None:
    seat = seat_in(record_of(A, B, C), B)
    seat.hear(A, GroupHeartbeat(seat.scope(1), 1))
    for is_trial in (True, False):
        assert not seat.is_granted(C, 9, is_trial=is_trial)
    assert seat.core.ballot.promised == 1, "a trial or a refusal promises nothing"
    seat.now_s += TIMING.lease_s + 0.01
    assert seat.is_granted(C, 9, is_trial=True)


def test_knowing_a_record_is_a_vote_for_its_leader() -> None:
    seat = seat_in(record_of(A, B, C, term=7), B)
    seat.now_s += 2
    assert not seat.is_granted(C, 7)
    restarted = Seat(B, incarnation=2, stored=seat.disk, now_s=9.0)
    assert restarted.core.ballot.promised == 7


def test_only_voters_are_voted_for_and_vote() -> None:
    seat = seat_in(record_of(A, B), B)
    seat.now_s += 2
    assert isinstance(seat.asked(D, seat.scope(9)), Stale)
    witness = msgspec.structs.replace(record_of(A, B, C), voters=(A, C))
    outsider = seat_in(witness, B)
    outsider.now_s += 2
    assert outsider.asked(C, outsider.scope(9)) is None
    outsider.wait(5.0)
    assert VoteRequest not in outsider.kinds(), "who cannot vote does not stand"


def test_a_followers_belief_is_as_old_as_the_quorum_that_its_leader_reached() -> None:
    fresh, old = seat_in(record_of(A, B, C), B), seat_in(record_of(A, B, C), B)
    for seat, age_s in ((fresh, 0.0), (old, 0.9 * TIMING.lease_s)):
        seat.now_s += TIMING.suspend_s / 2
        seat.hear(A, GroupHeartbeat(seat.scope(1), 1, age_s))
        seat.now_s += TIMING.suspend_s - 0.1
    assert fresh.core.is_running(fresh.now_s)
    assert not old.core.is_running(old.now_s), "the leader does not believe it any more either"


def test_the_sign_of_life_of_a_later_epoch_is_no_reason_to_go_on_in_this_one() -> None:
    seat = seat_in(record_of(A, B, C), B)
    for _ in range(12):
        seat.wait(0.1)
        seat.hear(A, GroupHeartbeat(Scope(GROUP, 1, 6, 1), 1))
    assert seat.core.leader == A
    assert not seat.core.is_running(seat.now_s)


def test_a_leader_says_when_it_last_reached_a_quorum() -> None:
    seat = elected(record_of(A, B, C), B, (C,))
    seat.wait(0.1)
    (sequence,) = {each.sequence for _, each in seat.sent if isinstance(each, GroupHeartbeat)}
    seat.hear(C, GroupHeartbeatAck(seat.scope(seat.core.term), sequence, 1, 0, False))
    seat.wait(0.25)
    (age_s,) = {each.quorum_age_s for _, each in seat.sent if isinstance(each, GroupHeartbeat)}
    assert age_s == pytest.approx(0.25), "since what C answered was sent"


def test_a_restarted_member_has_reached_nobody() -> None:
    again = Seat(B, incarnation=2, stored=seat_in(record_of(A, B, C), B).disk, now_s=50.0)
    again.wait(0.01)
    assert again.core.standing is Standing.SUSPENDED
    assert again.facts == [], "nothing in memory to save"
    again.hear(A, GroupHeartbeat(again.scope(1), 1, 0.1))
    assert [type(fact) for fact in again.facts if isinstance(fact, Resumed | Suspended)] == [Resumed]


def test_a_link_is_used_again_when_its_source_was_gone_meanwhile() -> None:
    """Presence says that the device is here again; of a link that it does not doubt it says nothing."""
    seat = seat_in(record_of(A, B, C, cut_links=((C, B),)), B)
    seat.learn(LinkChanged(C, B, is_up=False))
    seat.learn(MemberGone(C, 1))
    seat.learn(MemberHere(C, 1))
    reports = []
    for _ in range(60):
        seat.hear(A, GroupHeartbeat(seat.scope(1), 1))
        reports += [message for _, message in seat.wait(0.1) if isinstance(message, LinkReport)]
    assert reports
    assert all(report.is_up for report in reports)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=7), st.lists(st.booleans(), min_size=7, max_size=7))
def test_a_quorum_was_heard_since_then_and_not_since_later(times_s: list[float], known: list[bool]) -> None:
    voters = [NodeId(str(index)) for index in range(len(times_s))]
    record = record_of(*voters)
    heard_s = {voter: at_s for voter, at_s, is_known in zip(voters, times_s, known, strict=False) if is_known}
    since_s = quorum_since(record, heard_s)
    assert not is_quorum(record, [voter for voter, at_s in heard_s.items() if at_s > since_s])
    if since_s >= 0:
        assert is_quorum(record, [voter for voter, at_s in heard_s.items() if at_s >= since_s])


def test_a_leader_without_a_quorum_steps_down_and_suspends() -> None:
    seat = elected(record_of(A, B, C), B, (C,))
    for _ in range(20):
        seat.wait(0.1)
    assert seat.core.role not in (Role.LEADING, Role.PROPOSING)
    assert seat.core.standing is Standing.SUSPENDED
    assert not seat.core.is_running(seat.now_s)


def leading(*nodes: NodeId) -> Seat:
    """B leads a group in which everyone acknowledges at once."""
    record = record_of(B, *nodes)
    seat = Seat(B)
    seat.command(JoinGroup(GROUP))
    for node in nodes:
        seat.learn(MemberHere(node, 1))
    seat.hear(B, Commit(Scope(GROUP, 1, record.epoch, 1), record))
    seat.wait(3.0)
    for is_trial in (True, False):
        term = seat.core._next_term() if is_trial else seat.core.term
        for node in nodes:
            seat.hear(node, Vote(seat.scope(term), is_trial, True))
    settle(seat)
    assert seat.role() is Role.LEADING
    return seat


def settle(seat: Seat) -> None:
    """All voters acknowledge until there is nothing to decide."""
    while (proposal := seat.core._proposal) is not None:
        for voter in seat.core.committed.voters:
            seat.hear(voter, Acknowledge(seat.scope(seat.core.term), record_hash(proposal)))


def ack(seat: Seat, node: NodeId, step: int = 0, *, ready: bool = False, incarnation: int = 1) -> None:
    seat.hear(node, GroupHeartbeatAck(seat.scope(seat.core.term), 1, incarnation, step, ready))
    settle(seat)


def report_of_a_cut(seat: Seat) -> set[NodeId]:
    """Has the leader propose something; returns whom it asks."""
    sent = seat.hear(A, LinkReport(seat.scope(seat.core.term), C, A, False))
    return {to for to, message in sent if isinstance(message, Propose)}


def test_those_who_answer_soonest_are_asked_first_and_the_others_if_that_is_not_enough() -> None:
    seat = leading(A, C, D, E)
    seat.wait(0.1)
    (sequence,) = {each.sequence for _, each in seat.sent if isinstance(each, GroupHeartbeat)}
    for node, after_s in ((E, 0.001), (A, 0.001), (D, 0.02), (C, 0.02)):
        seat.now_s += after_s
        seat.hear(node, GroupHeartbeatAck(seat.scope(seat.core.term), sequence, 1, 0, False))
    seat.wait(0.1)
    assert report_of_a_cut(seat) == {A, E}, "three of five voters, the leader among them"
    seat.hear(A, Acknowledge(seat.scope(seat.core.term), seat.core._proposal_hash))
    assert {to for to, message in seat.wait(TIMING.widen_s) if isinstance(message, Propose)} == {C, D, E}
    assert not any(isinstance(message, Propose) for _, message in seat.wait(TIMING.widen_s)), "the next heartbeat asks again"
    settle(seat)
    assert (C, A) in seat.core.committed.cut_links


def test_who_is_not_here_is_not_asked_first() -> None:
    seat = leading(A, C)
    seat.wait(0.1)
    seat.hear(A, GroupHeartbeatAck(seat.scope(seat.core.term), seat.core._sequence, 1, 0, False))
    seat.learn(MemberGone(A, 1))
    assert {to for to, message in seat.sent if isinstance(message, Propose)} == {C}


def test_a_heartbeat_waits_for_the_decision() -> None:
    seat = leading(A, C)
    seat.wait(0.1)
    seat.now_s += TIMING.lead_every_s - 0.001
    report_of_a_cut(seat)
    assert not any(isinstance(message, GroupHeartbeat) for _, message in seat.wait(0.002))
    sent = seat.hear(A, Acknowledge(seat.scope(seat.core.term), seat.core._proposal_hash))
    assert {type(message) for _, message in sent} == {Commit, GroupHeartbeat}
    report = LinkReport(seat.scope(seat.core.term), C, A, True)
    seat.now_s += TIMING.lead_every_s - 0.001
    seat.hear(A, report)
    assert any(isinstance(message, GroupHeartbeat) for _, message in seat.wait(TIMING.lead_every_s / 4)), "but not for long"


def part_of(seat: Seat, node: NodeId) -> Part | None:
    parts = {member.node: member.part for member in seat.core.committed.members}
    return parts.get(node)


def test_readiness_of_a_former_time_does_not_count() -> None:
    seat = leading(A)
    seat.hear(C, AskJoin(seat.scope(0), Member(C, 1, "active"), -1))
    settle(seat)
    late = GroupHeartbeatAck(seat.scope(seat.core.term), 1, 1, 3, True)
    seat.hear(C, AskLeave(seat.scope(0), 1))
    settle(seat)
    assert part_of(seat, C) is None
    seat.hear(C, AskJoin(seat.scope(0), Member(C, 1, "active"), -1))
    settle(seat)
    seat.hear(C, late)
    settle(seat)
    assert part_of(seat, C) == "shadow"


@pytest.mark.parametrize(("state_step", "expected"), [(9, "active"), (5, "shadow"), (-1, "shadow")])
def test_who_came_back_stays_active_if_nobody_is_ahead(state_step: int, expected: str) -> None:
    seat = leading(A, C)
    seat.hear(C, AskJoin(seat.scope(0), Member(C, 2, "active"), state_step))
    if state_step >= 0:
        assert seat.core._proposal is None, "a has not reported yet"
    ack(seat, A, step=8)
    settle(seat)
    assert part_of(seat, C) == expected
    assert Member(C, 2, part_of(seat, C) or "shadow") in seat.core.committed.members


def test_an_incarnation_that_is_outlived_and_silent_is_dropped() -> None:
    seat = leading(A, C)
    seat.learn(MemberHere(C, 2))
    for _ in range(60):
        seat.wait(0.1)
        seat.hear(A, GroupHeartbeatAck(seat.scope(seat.core.term), seat.core._sequence, 1, 0, False))
        settle(seat)
    assert part_of(seat, C) is None


def test_the_last_member_may_leave_and_the_group_be_made_again() -> None:
    seat = Seat(A)
    seat.command(CreateGroup(GROUP))
    for _ in range(5):
        seat.wait(0.1)
    assert seat.role() is Role.LEADING
    seat.command(LeaveGroup(GROUP))
    ended = seat.core.committed
    assert ended.members == ()
    assert seat.role() is Role.OUTSIDE
    seat.command(CreateGroup(GROUP))
    assert seat.core.committed.generation > ended.generation
    assert [member.node for member in seat.core.committed.members] == [A]


def test_a_leader_that_slept_decides_nothing() -> None:
    seat = elected(record_of(A, B, C, D), B, (C, D))
    seat.learn(MemberGone(A, 1))
    proposal = seat.core._proposal
    assert proposal is not None
    term = seat.core.term
    seat.hear(C, Acknowledge(seat.scope(term), record_hash(proposal)))
    seat.now_s += 60
    seat.hear(D, Acknowledge(seat.scope(term), record_hash(proposal)))
    assert seat.core.committed.epoch == 5


def test_a_voter_that_came_back_before_it_knew_that_it_is_one_votes() -> None:
    """Its file is of the time when it asked to be taken in: it promised nothing, and nobody else holds a lease of its."""
    asking = Seat(B)
    asking.command(JoinGroup(GROUP))
    again = Seat(B, incarnation=2, stored=asking.disk, now_s=50.0)
    again.hear(A, Commit(Scope(GROUP, 1, 5, 1), record_of(A, B, C)))
    assert again.role() is Role.JOINING
    assert again.is_granted(A, 9)


def test_a_candidate_waits_for_its_own_disk() -> None:
    seat = seat_in(record_of(B), B)
    seat.is_writing = False
    for _ in range(40):
        seat.wait(0.1)
    assert seat.role() is Role.STANDING
    assert seat.core.term == 2
    seat.is_writing = True
    seat.write()
    assert seat.role() is Role.LEADING
