"""Composes the cores of one device: who may be here, who is here, who acts as one.

One `step(event, now_s)` for all of them. The node hands an event to the cores it is for, hands every fact one of them
announces to the others, and returns what is left for the interpreter. Facts are returned as well, for the owner and the log.

The node itself decides only about **trust**: which peers' messages reach the cores. A link has proven its peer's key, no
more. A `Greeting` brings its stamps, and the roster judges; until then nothing counts but greetings, the roster, and
joining.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from shoal.effects import (
    Announce,
    Commanded,
    Effect,
    Event,
    Fact,
    Hangup,
    Learned,
    LinkClosed,
    LinkOpened,
    Message,
    Received,
    Send,
    SetTimer,
    Stored,
    TimerFired,
)
from shoal.errors import DamagedFile, RemoteProtocolError
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import LinkChanged, MemberGone, MemberHere
from shoal.membership.group import Doubted, GroupCommand, GroupCore, RecordAdopted
from shoal.membership.messages import (
    Goodbye,
    Greeting,
    GroupMessage,
    JoinChallenge,
    JoinHello,
    JoinProof,
    Refused,
    Relay,
    RosterKeys,
    RosterStatements,
    StampGiven,
)
from shoal.membership.presence import TIMER as PRESENCE_TIMER
from shoal.membership.presence import Doubt, PresenceCore, RostersDiffer, WatchFellows, Woke
from shoal.membership.roster import (
    EMPTY,
    STATEMENTS_PER_MESSAGE,
    Admitted,
    Keys,
    MemberAdded,
    MemberRemoved,
    Roster,
    RosterCore,
    RosterExchanged,
    RosterGrew,
)
from shoal.membership.roster import TIMER as ROSTER_TIMER
from shoal.membership.timing import Timing
from shoal.node import wire
from shoal.node.trust import ACCEPTED, ENDED, OPENED, REJECTED, SPOKE, TRUST, UNKNOWN, Trust, Trusted

TIMER = "node"
START = "start"
"""The timer to fire once after construction."""
_GREETINGS_MAX = 256
_GROUP_PREFIX = "group/"
_ROSTER_MESSAGES = frozenset((RosterKeys, RosterStatements, StampGiven, Refused, JoinHello, JoinChallenge, JoinProof))
_ROSTER_DAMAGED = (
    "the stored '{key}' is damaged and left out: another member will bring what is missing; "
    "if none is trusted here, join again by a new invitation"
)
_GROUP_DAMAGED = (
    "the stored '{key}' is damaged ({error}): this device has no vote in '{name}' until the others list it again; "
    "have it join again, and where too few can vote, recover the group"
)
_FOR_GROUPS = (MemberHere, MemberGone, MemberAdded, MemberRemoved, LinkChanged)


class FileDamaged(Fact, frozen=True):
    """What was stored as `key` cannot be read; `text` is for the owner."""

    key: str
    text: str


class Capability(Protocol):
    """What a further core must be to join the composition. It is told every fact, timers of its name, and its messages."""

    name: str
    messages: tuple[type[Message], ...]

    def step(self, event: Event, now_s: float) -> list[Effect]: ...


class NodeCore:
    """One device.

    Args:
        me, incarnation: who this is; an incarnation is higher than all before of the same device.
        keys: its key pair, and how to judge those of others.
        timing: how long to wait.
        now_s: the device's clock now: monotonic, running on while it sleeps.
        since_1970_s: what to add to it for the wall clock.
        stored: what is on its disk, by the keys of `Store` effects.
        roster: statements known from the start, beside those stored (a simulation that begins with a cluster).
        capabilities: further cores.
    """

    roster_core: type[RosterCore] = RosterCore
    presence_core: type[PresenceCore] = PresenceCore
    group_core: type[GroupCore] = GroupCore
    """What it is composed of; a subclass may plant a fault, to see that tests find it."""

    def __init__(
        self,
        me: NodeId,
        *,
        incarnation: int,
        keys: Keys,
        timing: Timing,
        now_s: float,
        since_1970_s: float,
        stored: Mapping[str, bytes] | None = None,
        roster: Roster = EMPTY,
        capabilities: tuple[Capability, ...] = (),
    ) -> None:
        stored = stored or {}
        self.me = me
        self.incarnation = incarnation
        self.timing = timing
        self.roster = self.roster_core(me, keys, timing=timing, since_1970_s=since_1970_s, roster=roster, stored=stored)
        self.presence = self.presence_core(
            me, incarnation=incarnation, timing=timing, now_s=now_s, members=self.roster.roster.members
        )
        self.presence.roster_digest = self.roster.roster.digest
        self.groups: dict[GroupId, GroupCore] = {}
        self.links: set[NodeId] = set()
        """Peers to whom a link stands."""
        self.trusted: dict[NodeId, int] = {}
        """Peers that are listened to, and as which incarnation they greeted."""
        self.capabilities = capabilities
        self._by_message = {kind: each for each in capabilities for kind in each.messages}
        self._by_name = {each.name: each for each in capabilities}
        self._greeted_s: dict[NodeId, float] = {}
        self._greetings: dict[NodeId, Greeting] = {}
        """Of peers that could not be trusted yet."""
        self._stamped_s: dict[tuple[NodeId, bool], float] = {}
        self._fellows: dict[GroupId, frozenset[NodeId]] = {}
        self._facts: deque[tuple[Fact, object]] = deque()
        self._effects: list[Effect] = []
        self._now_s = now_s
        self._source: NodeId | None = None
        """Who sent what is being handled, so that it is not sent back."""
        self._damaged = [FileDamaged(key, _ROSTER_DAMAGED.format(key=key)) for key in self.roster.damaged]
        for key, value in stored.items():
            if key.startswith(_GROUP_PREFIX):
                self._restore_group(key, value)

    # ---- the one way in

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Takes an event; returns what is to be done, in order.

        Give it `TimerFired(START)` once after construction, so that timers are set and links asked for.
        """
        self._now_s = now_s
        self._effects = []
        if isinstance(event, Received):
            self._receive(event.peer, event.message)
        elif isinstance(event, TimerFired):
            self._on_timer(event)
        elif isinstance(event, Stored):
            if event.key.startswith(_GROUP_PREFIX):
                self._step_group(event.key, event)
        elif isinstance(event, LinkOpened):
            self._on_link_opened(event)
        elif isinstance(event, LinkClosed):
            self._on_link_closed(event)
        elif isinstance(event, Commanded):
            self._obey(event)
        else:
            self._tell_capabilities(event)
        while self._facts:
            self._spread(*self._facts.popleft())
        self._source = None
        return self._effects

    # ---- composing

    def _step_group(self, key: str, event: Event) -> None:
        group = self.groups.get(GroupId(key.removeprefix(_GROUP_PREFIX)))
        if group is not None:
            self._take(group, group.step(event, self._now_s))

    def _tell_groups(self, event: Event) -> None:
        for group in self.groups.values():
            self._take(group, group.step(event, self._now_s))

    def _tell_capabilities(self, event: Event, origin: object = None) -> None:
        for capability in self.capabilities:
            if capability is not origin:
                self._take(capability, capability.step(event, self._now_s))

    def _take(self, core: object, effects: list[Effect]) -> None:
        """Takes over what a core wants done."""
        for effect in effects:
            if type(effect) is Announce:
                self._facts.append((effect.fact, core))
                self._effects.append(effect)
            elif type(effect) is Send and isinstance(effect.message, GroupMessage):
                self._send_in_group(effect)
            elif type(effect) is Hangup:
                self._forget(effect.peer)
                self._effects.append(effect)
            else:
                self._effects.append(effect)

    def _spread(self, fact: Fact, origin: object) -> None:
        """Tells the other cores."""
        event = Learned(fact)
        if isinstance(fact, MemberAdded | MemberRemoved):
            self._on_roster_change(fact)
        elif isinstance(fact, RosterGrew):
            self._pass_on(fact)
        elif isinstance(fact, RosterExchanged):
            if fact.peer in self.trusted:
                self.roster.note_complete()
        elif isinstance(fact, RostersDiffer):
            self._effects.append(self.roster.exchange(fact.peer))
        elif isinstance(fact, Doubted):
            self._take(self.presence, self.presence.step(Commanded(Doubt(fact.node)), self._now_s))
        elif isinstance(fact, RecordAdopted):
            self._on_record(fact)
        elif isinstance(fact, Admitted):
            self._greet_all()
        elif isinstance(fact, Woke):
            self._forget_all()
            self._greet_all()
        if isinstance(fact, _FOR_GROUPS):
            self._tell_groups(event)
        self._tell_capabilities(event, origin)

    def _pass_on(self, news: RosterGrew) -> None:
        """What is new here is new to others; what gets lost on the way is found by digests."""
        self.presence.roster_digest = self.roster.roster.digest
        peers = tuple(peer for peer in self.trusted if peer != self._source)
        for start in range(0, len(news.statements), STATEMENTS_PER_MESSAGE) if peers else ():
            batch = news.statements[start : start + STATEMENTS_PER_MESSAGE]
            self._effects.append(Send(peers, RosterStatements(batch)))

    def _on_roster_change(self, fact: MemberAdded | MemberRemoved) -> None:
        if isinstance(fact, MemberRemoved):
            self._forget(fact.node)
            if fact.node == self.me:
                self._forget_all()
        self._take(self.presence, self.presence.step(Learned(fact), self._now_s))
        if isinstance(fact, MemberAdded):
            greeting = self._greetings.pop(fact.node, None)
            if greeting is not None:
                self._judge(fact.node, greeting)

    def _on_record(self, fact: RecordAdopted) -> None:
        self._fellows[fact.group] = (
            frozenset(member.node for member in fact.record.members) if fact.is_member else frozenset()
        )
        fellows = frozenset().union(*self._fellows.values()) - {self.me}
        self._take(self.presence, self.presence.step(Commanded(WatchFellows(fellows)), self._now_s))

    def _restore_group(self, key: str, stored: bytes) -> None:
        name = GroupId(key.removeprefix(_GROUP_PREFIX))
        try:
            self._add_group(name, stored)
        except DamagedFile as error:
            # Without its promises it is no voter, until a record lists it as what it is now.
            self._add_group(name)
            self._damaged.append(FileDamaged(key, _GROUP_DAMAGED.format(key=key, error=error, name=name)))

    def _add_group(self, name: GroupId, stored: bytes | None = None) -> GroupCore:
        group = self.group_core(
            name, self.me, incarnation=self.incarnation, timing=self.timing, now_s=self._now_s, stored=stored
        )
        self.groups[name] = group
        for node, incarnation in self.presence.here().items():
            self._take(group, group.step(Learned(MemberHere(node, incarnation)), self._now_s))
        if stored is not None and group.own_member() is not None:
            self._fellows[name] = frozenset(member.node for member in group.committed.members)
        return group

    def _on_timer(self, event: TimerFired) -> None:
        key, now_s = event.key, self._now_s
        if key == PRESENCE_TIMER:
            self._take(self.presence, self.presence.step(event, now_s))
        elif key.startswith(_GROUP_PREFIX):
            self._step_group(key, event)
        elif key == ROSTER_TIMER:
            self._take(self.roster, self.roster.step(event, now_s))
        elif key == TIMER:
            self._renew_stamps()
        elif key == START:
            self._start()
        elif (capability := self._by_name.get(key.partition("/")[0])) is not None:
            self._take(capability, capability.step(event, now_s))

    def _start(self) -> None:
        event = TimerFired(START)
        self._effects += [Announce(fact) for fact in self._damaged]
        fellows = frozenset().union(*self._fellows.values()) - {self.me}
        self._take(self.presence, self.presence.step(Commanded(WatchFellows(fellows)), self._now_s))
        self._tell_groups(event)
        self._tell_capabilities(event)
        self._effects.append(SetTimer(TIMER, self._now_s + self.timing.stamp_every_s))

    def _obey(self, event: Commanded) -> None:
        command = event.command
        if isinstance(command, GroupCommand):
            group = self.groups.get(command.group) or self._add_group(command.group)
            self._take(group, group.step(event, self._now_s))
            return
        self._take(self.roster, self.roster.step(event, self._now_s))
        self._take(self.presence, self.presence.step(event, self._now_s))
        self._tell_capabilities(event)

    # ---- links and trust

    def trust(self, peer: NodeId) -> Trust:
        """What a peer is to this device now."""
        if peer in self.trusted:
            return Trust.TRUSTED
        return Trust.REFUSED if peer in self._greetings else Trust.STRANGER

    def _on_link_opened(self, event: LinkOpened) -> None:
        self.links.add(event.peer)
        if Greeting in TRUST[self.trust(event.peer), OPENED].sends:
            self._greet(event.peer, is_answer=False)
        self._tell_capabilities(event)

    def _on_link_closed(self, event: LinkClosed) -> None:
        self.links.discard(event.peer)
        was_trusted = event.peer in self.trusted
        self._forget(event.peer)
        self._greeted_s.pop(event.peer, None)
        if was_trusted:
            self._take(self.presence, self.presence.step(event, self._now_s))
            self._tell_groups(event)
        self._tell_capabilities(event)

    def _forget(self, peer: NodeId) -> None:
        if TRUST[self.trust(peer), ENDED].state is Trust.STRANGER:
            self.trusted.pop(peer, None)
            self._greetings.pop(peer, None)

    def _has_roster(self) -> bool:
        """Whether this device belongs to a cluster, or waits to be confirmed in one."""
        roster = self.roster.roster
        return bool(roster.cluster) and self.me not in roster.removed

    def _forget_all(self) -> None:
        for peer in [*self.trusted, *self._greetings]:
            self._forget(peer)

    def _greet_all(self) -> None:
        for peer in sorted(self.links):
            self._greet(peer, is_answer=False)

    def _greet(self, peer: NodeId, *, is_answer: bool) -> None:
        roster = self.roster.roster
        if not self._has_roster():
            return
        self._greeted_s[peer] = self._now_s
        stamps = self.roster.shown_stamps(self._now_s + self.roster.clock_s)
        greeting = Greeting(roster.cluster, self.incarnation, roster.digest, stamps, is_answer=is_answer)
        self._effects.append(Send((peer,), greeting))

    def _on_greeting(self, peer: NodeId, greeting: Greeting) -> None:
        roster = self.roster.roster
        if not self._has_roster():
            return
        if greeting.cluster != roster.cluster:
            text = "this device belongs to another cluster; a device is in one only"
            self._effects.append(Send((peer,), Refused("cluster", text)))
            return
        if not greeting.is_answer and peer not in roster.removed:
            self._greet(peer, is_answer=True)
        self._judge(peer, greeting)

    def _judge(self, peer: NodeId, greeting: Greeting) -> None:
        refused = self.roster.judge(peer, greeting.stamps, self._now_s + self.roster.clock_s)
        event = ACCEPTED if refused is None else UNKNOWN if refused.reason == "unknown" else REJECTED
        outcome = TRUST[self.trust(peer), event]
        if StampGiven in outcome.sends and peer in self.roster.roster.members:
            self._stamp(peer, is_sure=refused is None)
        # An unknown peer may have been added where the news has not come from yet: let it show that.
        if RosterKeys in outcome.sends and greeting.roster_digest != self.roster.roster.digest:
            self._effects.append(self.roster.exchange(peer))
        if refused is not None:
            self._forget(peer)
            self._remember(peer, greeting)
            self._effects.append(Send((peer,), refused))
            if RosterStatements in outcome.sends:
                self._show_removals(peer)
            return
        self._greetings.pop(peer, None)
        if self.trusted.get(peer) != greeting.incarnation:
            self.trusted[peer] = greeting.incarnation
            fact = Trusted(peer, greeting.incarnation)
            self._effects.append(Announce(fact))
            self._facts.append((fact, self))
        self._take(self.presence, self.presence.step(Received(peer, greeting), self._now_s))

    def _show_removals(self, peer: NodeId) -> None:
        """Why it is refused. A removed device that has not heard would go on admitting others, whom nobody else knows."""
        removals = self.roster.removals_for(peer)
        if removals:
            self._effects.append(Send((peer,), RosterStatements(removals)))

    def _remember(self, peer: NodeId, greeting: Greeting) -> None:
        while len(self._greetings) >= _GREETINGS_MAX:
            del self._greetings[next(iter(self._greetings))]
        self._greetings[peer] = greeting

    def _stamp(self, peer: NodeId, *, is_sure: bool) -> None:
        """Vouches for a member: that it is in this roster, by what is known here now."""
        stamped_s = self._stamped_s.get((peer, is_sure), float("-inf"))
        if self._now_s - stamped_s < self.timing.stamp_every_s / 2:
            return
        self._stamped_s[peer, is_sure] = self._now_s
        self._take(self.roster, self.roster.give_stamp(peer, self._now_s + self.roster.clock_s, is_sure=is_sure))

    def _renew_stamps(self) -> None:
        for peer in self.trusted:
            if peer in self.presence.watched:
                self._stamp(peer, is_sure=True)
        self._effects.append(SetTimer(TIMER, self._now_s + self.timing.stamp_every_s))

    # ---- messages

    def _receive(self, peer: NodeId, message: Any) -> None:
        kind = type(message)
        if kind is Greeting:
            self._on_greeting(peer, message)
        elif kind in _ROSTER_MESSAGES:
            self._on_roster_message(peer, message)
        elif peer not in self.trusted:
            is_due = self._now_s - self._greeted_s.get(peer, float("-inf")) >= self.timing.heartbeat_s
            if is_due and Greeting in TRUST[self.trust(peer), SPOKE].sends:
                self._greet(peer, is_answer=False)
        elif isinstance(message, GroupMessage):
            self._on_group_message(peer, message)
        elif kind is Relay:
            self._on_relay(peer, message)
        elif (capability := self._by_message.get(kind)) is not None:
            self._take(capability, capability.step(Received(peer, message), self._now_s))
        else:
            self._take(self.presence, self.presence.step(Received(peer, message), self._now_s))
            if kind is Goodbye:
                self._forget(peer)

    def _on_roster_message(self, peer: NodeId, message: Any) -> None:
        """Whose statements count: a trusted peer's, the admitting member's, those by which an unknown peer shows that it
        belongs, and the removals by which a member explains why it refuses this device."""
        self._source = peer
        is_offer = type(message) is RosterStatements and self._has_roster() and peer not in self.trusted
        if not is_offer or self.roster.is_asked_to_admit(peer):
            self._take(self.roster, self.roster.step(Received(peer, message), self._now_s))
            return
        greeting = self._greetings.get(peer)
        stamps = greeting.stamps if greeting is not None else ()
        wall_s = self._now_s + self.roster.clock_s
        if self.roster.is_member(peer):
            self._take(self.roster, self.roster.consider_removals(peer, message.statements, stamps, wall_s))
        elif greeting is not None and peer not in self.roster.roster.removed:
            self._take(self.roster, self.roster.consider_offer(peer, message.statements, stamps, wall_s))

    def _on_group_message(self, peer: NodeId, message: GroupMessage) -> None:
        group = self.groups.get(message.scope.group)
        if group is not None:
            self._take(group, group.step(Received(peer, message), self._now_s))

    def _send_in_group(self, effect: Send) -> None:
        """Where the direct link is cut, a third member passes messages of groups on."""
        if self.presence.relayed.isdisjoint(effect.peers):
            self._effects.append(effect)
            return
        direct = []
        for peer in effect.peers:
            relay = self.presence.relay_for(peer, self._now_s)
            if relay is None:
                direct.append(peer)
            else:
                passed = Relay(self.me, peer, wire.encode(effect.message))
                self._effects.append(Send((relay,), passed))
        if len(direct) == len(effect.peers):
            self._effects.append(effect)
        elif direct:
            self._effects.append(Send(tuple(direct), effect.message))

    def _on_relay(self, peer: NodeId, message: Relay) -> None:
        """One hop only; and only what groups say, in the name of a member."""
        if message.target == self.me:
            if message.source in self.roster.roster.members:
                try:
                    inner = wire.decode(message.message)
                except RemoteProtocolError:
                    return
                if isinstance(inner, GroupMessage):
                    self._on_group_message(message.source, inner)
        elif message.source == peer and message.target in self.trusted:
            self._effects.append(Send((message.target,), message))
