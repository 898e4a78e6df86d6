"""Decides, for one group on one device, which record is agreed on, who leads, and whether the group may act.

The only replicated thing is the **record** of the present epoch. Each epoch's child is one decision, made by the voters
of the epoch, so a group is a chain of single decisions (Paxos), not a log:

* a voter puts (term, record) on disk, then acknowledges; it does so for the highest term it knows, and votes once per term;
* a record acknowledged by a quorum of its parent's voters is committed. A quorum is more than half, or exactly half with the
  first voter: two quorums of one epoch always share a voter;
* those voters are asked first who answer soonest, as many as make a quorum, and the others a moment later if that was not
  enough, so that a decision wakes fewer devices;
* a new leader asks a quorum what they acknowledged, and proposes the one of the highest term again, unchanged.

Two points are easy to get wrong. After proposing somebody else's record again, a leader asks for votes anew: others may
have known it to be committed and gone on from it. After a record of its own it need not, since nobody else can have
known it, and whoever adopts it thereby votes for that leader's term. And a voter is an incarnation: a restarted device
votes for its former self only if its file is there; without, it waits until a record lists its new incarnation, whose
vote is a fresh one.

The pictures of both tables below are in docs/protocols/group.md.

Source: Lamport, "The part-time parliament" (1998); Lamport, Malkhi, Zhou, "Vertical Paxos" (2009); Jajodia and Mutchler,
dynamic-linear voting (1990); pre-vote and leases as in Ongaro's thesis on Raft (2014). Differs: no log, voters change
with every record.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import msgspec

from shoal.effects import (
    Announce,
    Command,
    Commanded,
    Effect,
    Event,
    Fact,
    Learned,
    LinkClosed,
    Message,
    Received,
    Send,
    SetTimer,
    Store,
    Stored,
    TimerFired,
)
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import LinkChanged, MemberGone, MemberHere
from shoal.membership.group.ballot import Ballot, generation_of, is_quorum, quorum_since, record_hash
from shoal.membership.group.changes import Changes
from shoal.membership.group.facts import (
    Attach,
    CheckpointDue,
    CreateGroup,
    Decided,
    Doubted,
    JoinGroup,
    LeaderChanged,
    LeaveGroup,
    RecordAdopted,
    Recover,
    ReportProgress,
    Resumed,
    Suspended,
)
from shoal.membership.group.links import IncomingLinks
from shoal.membership.group.table import CAMPAIGN, LEADERS, NOT_IN, RECEPTIONS, ROLE, STANDING, Role, Standing
from shoal.membership.messages import (
    Acknowledge,
    AskJoin,
    AskLeave,
    AskRecord,
    Commit,
    GroupHeartbeat,
    GroupHeartbeatAck,
    GroupMessage,
    LinkReport,
    Member,
    Propose,
    Record,
    Scope,
    Stale,
    Vote,
    VoteRequest,
)
from shoal.membership.roster import MemberAdded, MemberRemoved
from shoal.membership.timing import Timing

_STORY_LENGTH = 32
_NEVER = float("inf")
_ASKED_DOUBLINGS_MAX = 4
_ASKED_PER_ROUND = 4
"""Of so many requests one goes to others than the leader."""
_BEATS_PER_NEWS = 10
"""One device outside the group is told of the record with every tenth heartbeat."""
_CHECKPOINT_AT = 0.9
"""Of the hold time: what is left is for writing the checkpoint."""


class GroupCore:
    """One group on one device.

    Args:
        group, me, incarnation: who this is; an incarnation is higher than all before of the same device.
        stored: the group's file, if there is one.
        timing: how long to wait.
    """

    def __init__(
        self, group: GroupId, me: NodeId, *, incarnation: int, timing: Timing, now_s: float, stored: bytes | None = None
    ) -> None:
        self.group = group
        self.me = me
        self.incarnation = incarnation
        self.timing = timing
        self.ballot = Ballot(group, me, incarnation)
        self.wants: Member | None = None
        """What this device wants to be in the group, until it has left."""
        self.role = ROLE.start
        self.standing = STANDING.start
        self.term = 0
        self.leader: NodeId | None = None
        self.story: deque[tuple[float, str, str, str]] = deque(maxlen=_STORY_LENGTH)
        """The last transitions: when, from, why, to."""

        self._key = f"group/{group}"
        self._writes = self._written = 0
        self._unwritten: deque[tuple[int, NodeId, GroupMessage]] = deque()
        """Promises that may be sent once write number ... is on disk."""
        self._lease_until_s = now_s
        self._stand_at_s = self._retry_at_s = _NEVER
        self._contact_s = now_s
        """When a leader last reached a quorum, as far as this device knows."""
        self._asked_votes_s = self._proposed_s = now_s
        self._patient_until_s = now_s
        """A leader has so long to reach the voters of a term or an epoch that has just begun."""
        self._checkpoint_at_s = _NEVER
        self._attempts = 0
        self._delay_rests_on: tuple[object, ...] = ()
        self._delay_s = 0.0
        self._votes: dict[NodeId, Vote] = {}
        self._acks: set[NodeId] = set()
        self._audience: list[NodeId] = []
        self._acked_s: dict[NodeId, float] = {}
        self._answer_s: dict[NodeId, float] = {}
        """How long each took to answer the last heartbeat that it answered."""
        self._widen_at_s = _NEVER
        """When the other voters are asked too."""
        self._missed_s: dict[NodeId, float] = {}
        self._voteless: set[NodeId] = set()
        """Who answers, but may not vote: it lost its file."""
        self._outlived_s: dict[NodeId, float] = {}
        self._sequence = 0
        self._sent_s: deque[tuple[int, float]] = deque(maxlen=64)
        self._lead_at_s = _NEVER
        self._next: Record | None = None
        self._proposal: Record | None = None
        self._proposal_hash = ""
        self._event_s = 0.0
        self._change_wanted = False
        self._leaving = False
        self.changes = Changes(me)
        self.links = IncomingLinks(me, timing.link_hold_s)
        self._here: dict[NodeId, int] = {}
        """Who is here, by presence."""
        self._asked = 0
        self.step_applied = -1
        self.has_state = False
        self.is_ready = False

        self._armed_s = _NEVER
        self._effects: list[Effect] = []
        self._now_s = now_s
        if stored is not None:
            self._restore(stored)

    def _restore(self, stored: bytes) -> None:
        wants = self.ballot.restore(stored)
        self.wants = msgspec.structs.replace(wants, incarnation=self.incarnation) if wants else None
        self.term = self.ballot.promised
        if self.ballot.member(self.me) is not None:
            self.role = Role.FOLLOWING
            # It has reached nobody yet; nothing is in memory that could be lost.
            self.standing, self._contact_s = Standing.SUSPENDED, -_NEVER
            self._lease_until_s = self._now_s
            self._stand_at_s = self._now_s + self._stand_delay_s()
        elif self.wants is not None:
            self.role = Role.JOINING
        if self.wants is not None:
            self._retry_at_s = self._now_s

    # ---- the one way in

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Takes an event of this group; returns what is to be done, in order."""
        self._now_s = now_s
        effects: list[Effect] = []
        self._effects = effects
        self._check_standing()
        if isinstance(event, Received):
            message = event.message
            if isinstance(message, GroupMessage):
                self._receive(event.peer, message)
        elif isinstance(event, TimerFired):
            self._armed_s = _NEVER
        elif isinstance(event, Stored):
            self._on_stored(event.number)
        elif isinstance(event, LinkClosed):
            self._on_link_closed(event.peer)
        elif isinstance(event, Learned):
            self._learn(event.fact)
        elif isinstance(event, Commanded):
            self._obey(event.command)
        self._pass_time()
        if self._change_wanted and self.role is Role.LEADING:
            self._propose_change()
        self._arm()
        return effects

    def is_running(self, now_s: float) -> bool:
        """Whether this device is in the record and may act on it now."""
        return (
            self.standing is Standing.RUNNING
            and now_s - self._contact_s <= self.timing.suspend_s
            and self.role not in NOT_IN
            and self.own_member() is not None
        )

    @property
    def committed(self) -> Record:
        """The present epoch's record, as far as this device knows."""
        return self.ballot.committed

    def own_member(self) -> Member | None:
        """This incarnation's entry in the record."""
        return self.ballot.own_member()

    def can_vote(self) -> bool:
        """Whether this device is a voter of the present epoch, by its file or by being listed as it is now."""
        return self.ballot.can_vote()

    # ---- small parts

    def _become(self, event: str) -> None:
        """Takes a transition of the table, and sends what it says is sent."""
        outcome = ROLE[self.role, event]
        if outcome.state is not self.role:
            self.story.append((self._now_s, self.role, event, outcome.state))
        self.role = outcome.state
        if self.role not in (Role.PROPOSING, Role.RECOVERING):
            self._proposal = None
        for kind in outcome.sends:
            say = self._SAY.get(kind)
            if say is not None:
                say(self)

    def _scope(self, term: int | None = None) -> Scope:
        record = self.committed
        return Scope(self.group, record.generation, record.epoch, self.term if term is None else term)

    def _send(self, peers: Iterable[NodeId], message: GroupMessage) -> None:
        others = tuple(peer for peer in peers if peer != self.me)
        if others:
            self._effects.append(Send(others, message))

    def _announce(self, fact: Fact) -> None:
        self._effects.append(Announce(fact))

    def _store(self) -> int:
        self._writes += 1
        self._effects.append(Store(self._key, self._writes, self.ballot.file(self.wants)))
        return self._writes

    def _send_when_stored(self, number: int, peer: NodeId, message: GroupMessage) -> None:
        self._unwritten.append((number, peer, message))

    def _on_stored(self, number: int) -> None:
        self._written = max(self._written, number)
        while self._unwritten and self._unwritten[0][0] <= self._written:
            _, peer, message = self._unwritten.popleft()
            if peer != self.me:
                self._effects.append(Send((peer,), message))
            elif isinstance(message, Vote):
                self._on_vote(self.me, message)
            elif isinstance(message, Acknowledge):
                self._on_acknowledge(self.me, message)

    def _set_leader(self, leader: NodeId | None, term: int) -> None:
        if (leader, term) != (self.leader, self.term):
            self.leader, self.term = leader, term
            self._announce(LeaderChanged(self.group, leader, term))

    # ---- time

    def _arm(self) -> None:
        """One timer for the earliest deadline. A deadline that moved back is found out when the timer fires early."""
        due_s = min(self._lead_at_s, self._stand_at_s, self._retry_at_s, self._checkpoint_at_s, self._widen_at_s)
        if self.standing is Standing.RUNNING and self.role not in NOT_IN:
            due_s = min(due_s, self._contact_s + self.timing.suspend_s + 0.001)
        if due_s < self._armed_s and due_s != _NEVER:
            self._armed_s = due_s
            self._effects.append(SetTimer(self._key, due_s))

    def _pass_time(self) -> None:
        now_s = self._now_s
        if now_s >= self._stand_at_s:
            if self.role not in (Role.FOLLOWING, *CAMPAIGN):
                self._stand_at_s = _NEVER
            elif self.role is Role.STANDING and self.can_vote() and self.me not in self._votes:
                self._stand_at_s = now_s + self.timing.lease_s  # its own disk is slow: another term would not be faster
            elif self._is_time_to_stand():
                self._stand()
            else:
                self._stand_at_s = self._lease_until_s + self._stand_delay_s()
        if now_s >= self._widen_at_s:
            self._ask_the_rest()
        if now_s >= self._lead_at_s:
            self._lead()
        if now_s >= self._retry_at_s:
            self._retry()
        if now_s >= self._checkpoint_at_s:
            self._change_standing("hold time nearly over")

    def _is_time_to_stand(self) -> bool:
        """The timer may have been set before the leader was heard again: only the lease itself counts."""
        return self._now_s >= self._lease_until_s

    def _check_standing(self) -> None:
        if self._now_s - self._contact_s > self.timing.suspend_s and self.role not in NOT_IN:
            if self.role in LEADERS:
                self._step_down("quorum lost")
            self._change_standing("no quorum")

    def _change_standing(self, event: str) -> None:
        outcome = STANDING[self.standing, event]
        if outcome.state is self.standing:
            return
        self.story.append((self._now_s, self.standing, event, outcome.state))
        self.standing = outcome.state
        self._checkpoint_at_s = _NEVER
        for kind in outcome.announces:
            if kind is Suspended:
                self._checkpoint_at_s = self._now_s + _CHECKPOINT_AT * self.timing.hold_s
                self._announce(Suspended(self.group, self._now_s + self.timing.hold_s))
            elif kind is CheckpointDue:
                self._announce(CheckpointDue(self.group))
            else:
                self._announce(Resumed(self.group))

    def _has_contact(self, at_s: float) -> None:
        """A quorum was reached then. Heard from others, it is as old as they say: all beliefs in it end together."""
        self._contact_s = max(self._contact_s, min(at_s, self._now_s))
        if self.standing is not Standing.RUNNING and self._now_s - self._contact_s <= self.timing.suspend_s:
            self._change_standing("quorum")

    def _quorum_age_s(self) -> float:
        return self._now_s - self._contact_s if self.role not in NOT_IN else _NEVER

    def _stand_delay_s(self) -> float:
        """Voters stand in turn; the part that differs from attempt to attempt keeps two from meeting again and again.

        Asked for with every message of the leader, so the answer is kept as long as nothing it rests on changes.
        """
        record = self.committed
        rests_on = (record.generation, record.epoch, self.leader, self.term, self._attempts)
        if rests_on != self._delay_rests_on:
            self._delay_rests_on, self._delay_s = rests_on, self._draw_delay_s(record)
        return self._delay_s

    def _draw_delay_s(self, record: Record) -> float:
        voters = [voter for voter in record.voters if voter != self.leader]
        rank = voters.index(self.me) if self.me in voters else len(voters)
        seed = f"{self.me}/{self.term}/{self._attempts}".encode()
        chance = int.from_bytes(hashlib.blake2b(seed, digest_size=2).digest()) / 65536
        spread = min(1 + self._attempts, 8)
        return self.timing.stagger_s * (rank + chance * spread)

    # ---- receiving

    def _receive(self, peer: NodeId, message: GroupMessage) -> None:
        scope, record = message.scope, self.committed
        if (scope.generation, scope.epoch) > (record.generation, record.epoch) and type(message) not in (Commit, Stale):
            # Not ours to judge yet. Only a leader's sign of life is worth something before we know more.
            self._send((peer,), AskRecord(self._scope()))
            if type(message) is not GroupHeartbeat or scope.generation != record.generation:
                return
        reception = RECEPTIONS[type(message)]
        if scope.generation < record.generation:
            self._tell_stale(peer)
        elif self.role in reception.roles:
            self._ACT[type(message)](self, peer, message)
        elif reception.otherwise == "stale":
            self._tell_stale(peer)

    def _on_ask_record(self, peer: NodeId, message: AskRecord) -> None:
        del message
        if self.committed.epoch > 0:
            self._send((peer,), self._news())
        if self.role is Role.STANDING and peer in self.committed.voters:
            self._send((peer,), VoteRequest(self._scope(), is_trial=False))

    def _tell_stale(self, peer: NodeId) -> None:
        if self.committed.epoch > 0:
            self._send((peer,), Stale(self._scope(), self.committed, self.leader))

    def _on_heartbeat(self, peer: NodeId, message: GroupHeartbeat) -> None:
        scope = message.scope
        if scope.term < self.term or scope.term < self.ballot.promised or (scope.epoch < self.committed.epoch):
            self._tell_stale(peer)
            return
        # What it reached may be a quorum of a later epoch than ours: no reason to go on in this one.
        is_ours = scope.epoch == self.committed.epoch
        self._follow(peer, scope.term, self._now_s - message.quorum_age_s if is_ours else -_NEVER)
        self._send(
            (peer,),
            GroupHeartbeatAck(scope, message.sequence, self.incarnation, self.step_applied, self.is_ready, self.can_vote()),
        )

    def _follow(self, leader: NodeId, term: int, contact_s: float) -> None:
        """A leader of this term spoke, and this device knows of none later. It reached a quorum at `contact_s`."""
        if self.role in LEADERS or self.role in CAMPAIGN:
            self._become("leader or epoch heard")
            self._lead_at_s = _NEVER
        self._set_leader(leader, term)
        self._attempts = 0
        if self.role is not Role.OUTSIDE:
            self._has_contact(contact_s)
        self._lease_until_s = self._now_s + self.timing.lease_s
        if self.role is Role.FOLLOWING and self.can_vote():
            self._stand_at_s = self._lease_until_s + self._stand_delay_s()

    def _on_link_closed(self, peer: NodeId) -> None:
        if peer == self.leader and self.role is Role.FOLLOWING:
            self._lose_leader()

    def _lose_leader(self) -> None:
        """It is known to be gone: no need to wait for its lease."""
        self._lease_until_s = self._now_s
        if self.can_vote():
            self._stand_at_s = self._now_s + self._stand_delay_s()

    # ---- elections

    def _stand(self) -> None:
        if self.role in CAMPAIGN:
            self._become("vote lost")
        self._set_leader(None, self.term)
        self._attempts += 1
        self._stand_at_s = self._now_s + self.timing.lease_s + self._stand_delay_s()
        if not self.can_vote():
            self._stand_at_s = _NEVER
            return
        self._become("lease ran out")

    def _next_term(self) -> int:
        return max(self.term, self.ballot.promised) + 1

    def _ask_for_votes(self) -> None:
        """A trial binds nobody. In earnest, the own vote counts when it is on disk."""
        self._votes = {}
        self._asked_votes_s = self._now_s
        if self.role is Role.ASKING:
            trial = VoteRequest(self._scope(self._next_term()), is_trial=True)
            self._send(self.committed.voters, trial)
            self._on_vote(self.me, Vote(trial.scope, is_trial=True, granted=True))
        else:
            self.ballot.promise(self.term, self.me)
            self._stand_at_s = self._now_s + self.timing.lease_s + self._stand_delay_s()
            request = VoteRequest(self._scope(), is_trial=False)
            self._send(self.committed.voters, request)
            self._vote_for(self.me, request)

    def _vote_for(self, candidate: NodeId, request: VoteRequest) -> None:
        ballot = self.ballot
        vote = Vote(
            request.scope, is_trial=False, granted=True, accepted_term=ballot.accepted_term, accepted=ballot.unfinished()
        )
        self._send_when_stored(self._store(), candidate, vote)

    def _on_vote_request(self, peer: NodeId, message: VoteRequest) -> None:
        scope = message.scope
        if scope.epoch < self.committed.epoch or peer not in self.committed.voters:
            self._tell_stale(peer)
            return
        if not self.can_vote():
            return
        # The same leader asks again after it has proposed somebody else's record anew: it holds the lease itself.
        is_leader = peer == self.leader and scope.term == self.term
        has_lease = self._now_s < self._lease_until_s or self.role in LEADERS
        is_newer = scope.term > self.ballot.promised or (scope.term == self.ballot.promised and self._may_vote_for(peer))
        if not is_newer or scope.term < self.term or (has_lease and not is_leader):
            self._send(
                (peer,), Vote(self._scope(max(self.term, self.ballot.promised)), is_trial=message.is_trial, granted=False)
            )
            return
        if message.is_trial:
            self._send((peer,), Vote(scope, is_trial=True, granted=True))
            return
        if self.role in CAMPAIGN:
            self._become("leader or epoch heard")
        if scope.term > self.term:
            self._set_leader(None, scope.term)
        self.ballot.promise(scope.term, peer)
        # Give the candidate the time of a lease before standing against it.
        self._stand_at_s = self._now_s + self.timing.lease_s + self._stand_delay_s()
        self._vote_for(peer, message)

    def _may_vote_for(self, candidate: NodeId) -> bool:
        """Whether a vote already given in the promised term is one for `candidate`."""
        return self.ballot.voted_for in (None, candidate)

    def _on_vote(self, peer: NodeId, vote: Vote) -> None:
        if not vote.granted:
            if self.role in CAMPAIGN and vote.scope.term > self.term:
                self.term = vote.scope.term
            return
        role = Role.ASKING if vote.is_trial else Role.STANDING
        wanted_term = self._next_term() if vote.is_trial else self.term
        if self.role is not role or vote.scope != self._scope(wanted_term):
            return
        self._votes[peer] = vote
        if not is_quorum(self.committed, self._votes):
            return
        if vote.is_trial:
            self.term = wanted_term
            self._become("trial won")
        else:
            self._win()

    def _win(self) -> None:
        unfinished = [vote for vote in self._votes.values() if vote.accepted is not None]
        # A vote says that the voter was reached since it was asked; a slow disk may have taken long to give the own one.
        reached_s = max(self._asked_votes_s, self._now_s - self.timing.lease_s)
        self._has_contact(reached_s)
        self._patient_until_s = self._now_s + self.timing.lease_s
        self._stand_at_s = _NEVER
        self._lead_at_s = self._now_s
        self._acked_s = dict.fromkeys(self._votes, reached_s)
        self._voteless.clear()
        self.changes.heard.clear()
        self.changes.steps[self.me] = self.step_applied
        if self.is_ready and self.own_member() is not None:
            self.changes.ready[self.me] = self.incarnation
        for node in self._votes:
            self.changes.gone.pop(node, None)
        if unfinished:
            self._next = max(unfinished, key=lambda vote: vote.accepted_term).accepted
            self._event_s = self._now_s
            self._become("elected, record unfinished")
        else:
            self._set_leader(self.me, self.term)
            self._become("elected")
            self._change_wanted = True

    # ---- leading

    def _lead(self) -> None:
        if self.role not in LEADERS:
            self._lead_at_s = _NEVER
            return
        timing, now_s = self.timing, self._now_s
        heard_s = {node: acked_s for node, acked_s in self._acked_s.items() if node not in self._voteless}
        if self.can_vote():
            heard_s[self.me] = now_s
        self._has_contact(quorum_since(self.committed, heard_s))
        if now_s - self._contact_s > timing.lease_s and now_s > self._patient_until_s:
            self._step_down("quorum lost")
            return
        self._lead_at_s = now_s + timing.lead_every_s
        self._sequence += 1
        self._sent_s.append((self._sequence, now_s))
        heartbeat = GroupHeartbeat(self._scope(), self._sequence, self._quorum_age_s())
        self._send([member.node for member in self.committed.members], heartbeat)
        if self._sequence % _BEATS_PER_NEWS == 0:
            self._tell_outsiders()
        self._ask_the_rest()
        for member in self.committed.members:
            silent_s = now_s - self._acked_s.setdefault(member.node, now_s)
            if silent_s <= timing.lease_s or member.node == self.me or member.node in self.changes.gone:
                continue
            if now_s - self._missed_s.get(member.node, -_NEVER) > timing.lease_s / 2:
                self._miss(member)
        self._change_wanted = True

    def _tell_outsiders(self) -> None:
        """One after the other hears of the record: an older generation may still act somewhere, and know of no other."""
        outsiders = sorted(node for node in self._here if self.ballot.member(node) is None)
        if outsiders:
            turn = self._sequence // _BEATS_PER_NEWS
            self._send((outsiders[turn % len(outsiders)],), self._news())

    def _miss(self, member: Member) -> None:
        """A member does not answer. If it is here as a later incarnation that does not ask to be taken in, it never will."""
        node, now_s = member.node, self._now_s
        self._missed_s[node] = now_s
        if self._here.get(node, -1) <= member.incarnation:
            self._outlived_s.pop(node, None)
            self._announce(Doubted(self.group, node))
        elif now_s - self._outlived_s.setdefault(node, now_s) > 2 * self.timing.suspend_s:
            self.changes.gone[node] = member.incarnation

    def _step_down(self, trigger: str) -> None:
        self._become(trigger)
        self._lead_at_s = _NEVER
        self._set_leader(None, self.term)
        self._lease_until_s = self._now_s
        self._stand_at_s = self._now_s + self.timing.lease_s + self._stand_delay_s()

    def _on_heartbeat_ack(self, peer: NodeId, message: GroupHeartbeatAck) -> None:
        if message.scope.term != self.term:
            return
        for sequence, sent_s in reversed(self._sent_s):
            if sequence == message.sequence:
                self._acked_s[peer] = max(sent_s, self._acked_s.get(peer, sent_s))
                self._answer_s[peer] = self._now_s - sent_s
                break
        (self._voteless.discard if message.is_voter else self._voteless.add)(peer)
        self.changes.gone.pop(peer, None)
        self._outlived_s.pop(peer, None)
        is_ready = self.changes.note_progress(peer, message, self.committed, self.ballot.member(peer))
        if is_ready or self.changes.joins:  # who came back may wait for this report
            self._want_change()

    def _want_change(self) -> None:
        if not self._change_wanted:
            self._event_s = self._now_s
        self._change_wanted = True

    def _propose_change(self) -> None:
        self._change_wanted = False
        self._next = self.changes.next_record(self.committed, self.term)
        if self._next is not None:
            self._become("change wanted")

    def _propose(self) -> None:
        record = self._next
        assert record is not None
        self._proposal, self._proposal_hash = record, record_hash(record)
        self._acks = set()
        self._proposed_s = self._now_s
        # The others may write while this device does: their word does not rest on its own.
        self._send(self._enough_voters(), Propose(self._scope(), record))
        self._widen_at_s = self._now_s + self.timing.widen_s
        if self.role is Role.PROPOSING:
            # A heartbeat that is due goes out with the commit: everyone's answers to it would come before the voters'.
            self._lead_at_s = max(self._lead_at_s, self._now_s + self.timing.lead_every_s / 4)
        if self.can_vote():
            self.ballot.accept(self.term, record, self.me)
            acknowledgement = Acknowledge(self._scope(), self._proposal_hash)
            self._send_when_stored(self._store(), self.me, acknowledgement)

    def _enough_voters(self) -> list[NodeId]:
        """Who is asked first: as many as it takes, of those who are here whoever answers soonest."""
        record, enough = self.committed, [self.me] if self.can_vote() else []
        others = [voter for voter in record.voters if voter != self.me]
        others.sort(key=lambda node: (node not in self._here, node in self._voteless, self._answer_s.get(node, _NEVER)))
        for voter in others:
            if is_quorum(record, enough):
                break
            enough.append(voter)
        return enough

    def _ask_the_rest(self) -> None:
        """Asks every voter that has not acknowledged; some may have lost the proposal, or never had it."""
        self._widen_at_s = _NEVER
        if self._proposal is not None:
            missing = [voter for voter in self.committed.voters if voter not in self._acks]
            self._send(missing, Propose(self._scope(), self._proposal))

    # ---- deciding

    def _on_propose(self, peer: NodeId, message: Propose) -> None:
        scope, record = message.scope, message.record
        if scope.epoch < self.committed.epoch or scope.term < self.ballot.promised or scope.term < self.term:
            self._tell_stale(peer)
            return
        self._follow(peer, scope.term, -_NEVER)
        if not self.can_vote() or not self.ballot.is_child(record):
            return
        acknowledgement = Acknowledge(scope, record_hash(record))
        if self.ballot.accepted_term == scope.term and self.ballot.accepted == record:
            self._send_when_stored(self._writes, peer, acknowledgement)
            self._on_stored(self._written)
            return
        self.ballot.accept(scope.term, record, peer)
        self._send_when_stored(self._store(), peer, acknowledgement)

    def _on_acknowledge(self, peer: NodeId, message: Acknowledge) -> None:
        if self._proposal is None or message.scope != self._scope() or message.record_hash != self._proposal_hash:
            return
        self._acks.add(peer)
        if not is_quorum(self.committed, self._acks):
            return
        record, before = self._proposal, self.committed
        self._announce(Decided(self.group, record.epoch, self._now_s - self._event_s))
        self._patient_until_s = self._now_s + self.timing.lease_s
        self._adopt(record, self.term, self._proposed_s)
        self._audience = sorted({*before.voters, *(member.node for member in record.members)})
        self._lead_at_s = self._now_s if self.role is Role.PROPOSING else _NEVER
        self._become("committed")
        if self.role in NOT_IN:
            self._set_leader(None, self.term)
        elif self.me not in record.voters:
            self._step_down("no voter any more")
        self._change_wanted = True

    def _say_commit(self) -> None:
        self._send(self._audience, self._news())

    def _news(self) -> Commit:
        return Commit(self._scope(), self.committed, self._quorum_age_s())

    def _on_commit(self, peer: NodeId, message: Commit) -> None:
        self._consider(message.record, message.scope.term, self._now_s - message.quorum_age_s)
        if message.scope.term >= self.term and peer == self.leader:
            self._lease_until_s = max(self._lease_until_s, self._now_s + self.timing.lease_s)

    def _on_stale(self, peer: NodeId, message: Stale) -> None:
        scope = message.scope
        self._consider(message.record, message.scope.term)
        if scope.generation != self.committed.generation:
            return
        if scope.term > self.term:
            self._step_out()
            self._set_leader(message.leader if message.leader != self.me else None, scope.term)
        elif scope.term == self.term and message.leader != self.me and self.leader in (None, peer):
            # Nobody led as far as we knew, or the one that we took for the leader says that it is not.
            self._set_leader(message.leader, scope.term)
        if self._retry_at_s != _NEVER and self.leader is not None:
            self._retry_at_s = min(self._retry_at_s, self._now_s + self.timing.lead_every_s)

    def _consider(self, record: Record, term: int, contact_s: float = -_NEVER) -> None:
        """Somebody knows `record` to be committed, and that a quorum was reached at `contact_s`."""
        if (record.generation, record.epoch) > (self.committed.generation, self.committed.epoch):
            self._step_out()
            self._adopt(record, term, contact_s)

    def _step_out(self) -> None:
        """Whatever was under way here is overtaken."""
        if self.role in LEADERS or self.role in CAMPAIGN:
            self._become("leader or epoch heard")
            self._lead_at_s = _NEVER
            self._set_leader(None, self.term)

    def _adopt(self, record: Record, term: int, contact_s: float) -> None:
        """Takes `record` for agreed on. Its own place in it, or none, decides what this device does next."""
        self.ballot.adopt(record, term)
        self.changes.settle(record)
        listed, now_s = self.ballot.member(self.me), self._now_s
        if self.own_member() is not None:
            self._has_contact(contact_s)
            if self.role in NOT_IN:
                self._lease_until_s = now_s + self.timing.lease_s
            self._become("in the record")
        elif listed is None:
            self._become("not in the record")
            self.is_ready = False
            self._stand_at_s = self._lead_at_s = _NEVER
            self._change_standing("quorum")
            if self._leaving:
                self.wants, self._leaving = None, False
                self._become("gives up")
        if listed is not None and self.wants is None:
            self._leaving = True
        if self.wants is not None and self.own_member() is None:
            self._become("wants in")
            self._ask_soon()
        elif self._leaving:
            self._retry_at_s = now_s
        if self.role is Role.FOLLOWING and self.can_vote() and self._stand_at_s == _NEVER:
            self._stand_at_s = self._lease_until_s + self._stand_delay_s()
        self._store()
        self._announce(RecordAdopted(self.group, record, self.own_member() is not None))
        self._check_links()

    # ---- joining, leaving, links

    def _retry(self) -> None:
        """Says again what the record does not show yet."""
        self._retry_at_s = _NEVER
        member = self.own_member()
        if self._leaving:
            self._say_to_leader(AskLeave(self._scope(), self.incarnation))
        elif self.wants is not None and member is None:
            step = self.step_applied if self.has_state else -1
            self._say_to_leader(AskJoin(self._scope(), self.wants, step))
        elif member is not None:
            for source, is_up in self.links.reports(self.committed, self._now_s):
                self._say_to_leader(LinkReport(self._scope(), source, self.me, is_up))
        self._check_links()
        if self._leaving or (self.wants is not None and self.own_member() is None):
            self._retry_at_s = self._now_s + self.timing.retry_s

    def _say_to_leader(self, message: GroupMessage) -> None:
        if self.leader == self.me:
            self._receive(self.me, message)
        elif self.leader in self._here and self._asked % _ASKED_PER_ROUND:
            # Now and then others are asked as well: it may have forgotten that it leads, with its disk.
            self._asked += 1
            self._send((self.leader,), message)
        else:
            # Nobody knows who leads: ask around, more of them each time.
            known = [member.node for member in self.committed.members if member.node in self._here] or sorted(self._here)
            num_asked = min(len(known), 1 << min(self._asked, _ASKED_DOUBLINGS_MAX))
            self._asked += 1
            first = self._asked * num_asked
            self._send([known[(first + index) % len(known)] for index in range(num_asked)], message)

    def _ask_soon(self) -> None:
        self._retry_at_s = min(self._retry_at_s, self._now_s)

    def _on_ask_join(self, peer: NodeId, message: AskJoin) -> None:
        member = message.member
        if member.node != peer:
            return  # everybody asks for itself
        listed = self.ballot.member(member.node)
        if listed is not None and listed.incarnation >= member.incarnation:
            self._tell_stale(peer)
            return
        before = self.changes.joins.get(member.node)
        if before is None or before[0].incarnation <= member.incarnation:
            self.changes.joins[member.node] = (member, message.state_step)
            self.changes.steps[member.node] = max(message.state_step, -1)
            self.changes.gone.pop(member.node, None)
            self._acked_s[member.node] = self._now_s
            self._want_change()

    def _on_ask_leave(self, peer: NodeId, message: AskLeave) -> None:
        listed = self.ballot.member(peer)
        if listed is None:
            self._tell_stale(peer)
            return
        self.changes.leaves[peer] = max(message.incarnation, self.changes.leaves.get(peer, -1))
        self.changes.joins.pop(peer, None)
        self._want_change()

    def _on_link_report(self, peer: NodeId, message: LinkReport) -> None:
        link = (message.source, message.target)
        if peer == message.target and ((link in self.committed.cut_links) == message.is_up):
            self.changes.links[link] = message.is_up
            self._want_change()

    def _check_links(self) -> None:
        """Sees to it that the leader is told of links, at once or when they have held."""
        if self.own_member() is not None:
            due_s = self.links.due_s(self.committed, self._now_s)
            if due_s is not None:
                self._retry_at_s = min(self._retry_at_s, max(due_s, self._now_s + self.timing.retry_s))

    # ---- what presence and the roster say

    def _learn(self, fact: Fact) -> None:
        if isinstance(fact, MemberHere):
            self._here[fact.node] = fact.incarnation
            self.changes.gone.pop(fact.node, None)
            self.links.change(fact.node, is_up=True, now_s=self._now_s)  # where it is not, presence says so next
            self._check_links()
        elif isinstance(fact, MemberGone):
            self._here.pop(fact.node, None)
            self.links.forget(fact.node)
            self.changes.gone[fact.node] = fact.incarnation
            if fact.node == self.leader and self.role is Role.FOLLOWING:
                self._lose_leader()
            self._want_change()
        elif isinstance(fact, LinkChanged):
            if fact.target == self.me:
                self.links.change(fact.source, is_up=fact.is_up, now_s=self._now_s)
                if not fact.is_up and self.links.reports(self.committed, self._now_s):
                    self._ask_soon()
                self._check_links()
        elif isinstance(fact, MemberRemoved):
            self.changes.removed.add(fact.node)
            self._want_change()
        elif isinstance(fact, MemberAdded):
            self.changes.removed.discard(fact.node)  # it had waited for a confirmation

    # ---- what the owner wants

    def _obey(self, command: Command) -> None:
        if isinstance(command, ReportProgress):
            self.step_applied, self.has_state, self.is_ready = command.step, command.has_state, command.ready
            self.changes.steps[self.me] = command.step
            if command.ready and self.role in LEADERS and self.changes.ready.get(self.me) != self.incarnation:
                self.changes.ready[self.me] = self.incarnation
                self._want_change()
        elif isinstance(command, JoinGroup):
            self._leaving = False
            self.wants = Member(self.me, self.incarnation, command.part, command.steadiness, command.address)
            self._store()
            self._become("wants in")
            self._ask_soon()
        elif isinstance(command, LeaveGroup):
            self._leave()
        elif isinstance(command, CreateGroup):
            self._create(command)
        elif isinstance(command, Attach):
            self.changes.attachments[command.attachment.capability] = command.attachment
            self._want_change()
        elif isinstance(command, Recover):
            self._recover()

    def _leave(self) -> None:
        if self.ballot.member(self.me) is None:
            # Should a join that is under way list it after all, it asks to be let go then.
            self.wants, self._retry_at_s = None, _NEVER
            self._become("gives up")
            self._store()
        else:
            self._leaving = True
            self._retry_at_s = self._now_s

    def _create(self, command: CreateGroup) -> None:
        old = self.committed
        if old.epoch > 0 and old.members:
            return
        self.wants = Member(self.me, self.incarnation, command.part, command.steadiness, command.address)
        generation = generation_of((old.generation >> 32) + 1, self.me, self.incarnation)
        parent = record_hash(old) if old.epoch else ""
        self._adopt(
            Record(
                self.group, generation, old.epoch + 1, parent, self.term, self.me, (self.wants,), (self.me,), old.first_step
            ),
            0,
            self._now_s,
        )
        self._lose_leader()

    def _recover(self) -> None:
        old = self.committed
        if old.epoch == 0:
            return
        self._leaving = False  # whoever recovers a group here wants to be in it
        if self.wants is None:
            self.wants = Member(self.me, self.incarnation, "active")
        members = []
        for member in old.members:
            if member.node == self.me:
                members.append(msgspec.structs.replace(member, incarnation=self.incarnation))
            elif self._here.get(member.node) == member.incarnation:
                members.append(member)
        if self.me not in {member.node for member in members}:
            members.append(self.wants)
        if not any(member.part == "active" for member in members):
            # Nobody who is left has the group's state: it goes on with what there is here.
            members = [
                msgspec.structs.replace(member, part="active") if member.node == self.me else member for member in members
            ]
        self._step_out()
        self._adopt(
            Record(
                self.group,
                generation_of((old.generation >> 32) + 1, self.me, self.incarnation),
                old.epoch + 1,
                record_hash(old),
                self.term,
                self.me,
                tuple(members),
                tuple(member.node for member in members),
                max(0, self.step_applied + 1),
                old.cut_links,
                old.attachments,
            ),
            0,
            self._now_s,
        )
        others = {member.node for member in old.members} | set(self._here)
        self._send(sorted(others), self._news())
        self._lose_leader()

    # ---- the tables' way into the code

    _SAY: ClassVar[dict[type[Message], Callable[[GroupCore], None]]] = {
        VoteRequest: _ask_for_votes,
        Propose: _propose,
        Commit: _say_commit,
    }
    """What a transition sends. A leader's heartbeat goes out by its timer, which a transition sets."""

    _ACT: ClassVar[dict[type[GroupMessage], Callable[[GroupCore, NodeId, Any], None]]] = {
        GroupHeartbeat: _on_heartbeat,
        GroupHeartbeatAck: _on_heartbeat_ack,
        VoteRequest: _on_vote_request,
        Vote: _on_vote,
        Propose: _on_propose,
        Acknowledge: _on_acknowledge,
        Commit: _on_commit,
        Stale: _on_stale,
        AskRecord: _on_ask_record,
        AskJoin: _on_ask_join,
        AskLeave: _on_ask_leave,
        LinkReport: _on_link_report,
    }
