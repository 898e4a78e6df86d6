"""One device's cores together: whose messages count, and what one core tells the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.msgpack import encode

from shoal.effects import (
    Announce,
    Commanded,
    Effect,
    Event,
    LinkClosed,
    LinkOpened,
    Message,
    Received,
    Send,
    SetTimer,
    Store,
    TimerFired,
    Watch,
)
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import LinkChanged
from shoal.membership.group import CreateGroup, Role
from shoal.membership.messages import (
    AskHeard,
    Goodbye,
    Greeting,
    GroupHeartbeat,
    Heard,
    Heartbeat,
    Probe,
    Refused,
    Relay,
    RosterKeys,
    RosterStatements,
    Rumour,
    Rumours,
    Scope,
    Statement,
)
from shoal.membership.roster import Invite, Remove, SetAddresses, UseInvitation, invitation_of, statement_key
from shoal.membership.timing import Timing
from shoal.node import wire
from shoal.node.core import START, FileDamaged, NodeCore
from shoal.node.trust import Trust
from tests.membership.keys import keys_of, node_of, roster_of, say

FOUND = say("found", "ann", "ann", 0.0)
MEMBERS = (FOUND, *(say("add", "ann", name, 0.0) for name in ("bob", "cem", "dua")))
ANN, BOB, CEM, DUA, EVE = (node_of(name) for name in ("ann", "bob", "cem", "dua", "eve"))
DAY_S = 86400.0


class Device:
    """A node core and what it did last."""

    def __init__(
        self, name: str, *statements: Statement, since_1970_s: float = 100.0, stored: dict[str, bytes] | None = None
    ) -> None:
        self.now_s = 0.0
        self.core = NodeCore(
            node_of(name),
            incarnation=1,
            keys=keys_of(name),
            timing=Timing(),
            now_s=0.0,
            since_1970_s=since_1970_s,
            stored=stored,
            roster=roster_of(*statements),
        )
        self.disk: dict[str, bytes] = dict(stored or {})
        self.effects: list[Effect] = []
        self.step(TimerFired(START))

    def step(self, event: Event) -> list[tuple[NodeId, Message]]:
        self.effects = self.core.step(event, self.now_s)
        self.disk.update({effect.key: effect.value for effect in self.effects if isinstance(effect, Store)})
        return [(peer, effect.message) for effect in self.effects if isinstance(effect, Send) for peer in effect.peers]

    def hear(self, peer: NodeId, message: Message) -> list[tuple[NodeId, Message]]:
        return self.step(Received(peer, message))

    def greet(self, peer: NodeId, incarnation: int = 1, digest: int | None = None) -> list[tuple[NodeId, Message]]:
        roster = self.core.roster.roster
        digest = roster.digest if digest is None else digest
        return self.hear(peer, Greeting(roster.cluster, incarnation, digest, (), is_answer=False))


def beat(*heard: NodeId, incarnation: int = 1, rumours: tuple[Rumour, ...] = ()) -> Heartbeat:
    return Heartbeat(incarnation, 0, 1, heard, 0, rumours)


def test_a_new_device_arms_its_timers_and_watches_its_members() -> None:
    device = Device("ann", *MEMBERS)
    timers = {effect.key for effect in device.effects if isinstance(effect, SetTimer)}
    assert {"presence", "node"} <= timers
    assert [effect.peers for effect in device.effects if isinstance(effect, Watch)] == [frozenset({BOB, CEM, DUA})]


def test_nothing_counts_before_a_greeting() -> None:
    device = Device("ann", *MEMBERS)
    assert [type(message) for _, message in device.hear(BOB, beat(ANN))] == [Greeting]
    assert device.hear(BOB, beat(ANN)) == [], "not for every message"
    assert not device.core.presence.is_here(BOB)
    device.greet(BOB)
    assert device.core.trust(BOB) is Trust.TRUSTED
    assert device.core.presence.is_here(BOB)
    device.step(LinkClosed(BOB))
    assert device.core.trust(BOB) is Trust.STRANGER


def test_a_link_is_greeted_with_the_roster_and_answered_once() -> None:
    device = Device("ann", *MEMBERS)
    ((peer, greeting),) = device.step(LinkOpened(BOB))
    assert peer == BOB
    assert isinstance(greeting, Greeting)
    answers = device.greet(BOB, digest=1)
    assert any(isinstance(message, Greeting) and message.is_answer for _, message in answers)
    assert any(isinstance(message, RosterKeys) for _, message in answers), "rosters that differ are exchanged first thing"
    again = device.hear(BOB, Greeting(device.core.roster.roster.cluster, 1, 1, (), is_answer=True))
    assert not any(isinstance(message, Greeting) for _, message in again)


@pytest.mark.parametrize(("name", "reason"), [("eve", "unknown"), ("bob", "removed")])
def test_who_is_refused_is_told_why(name: str, reason: str) -> None:
    device = Device("ann", *MEMBERS, say("remove", "ann", "bob", 1))
    answers = [message for _, message in device.greet(node_of(name)) if isinstance(message, Refused)]
    assert [answer.reason for answer in answers] == [reason]
    assert device.core.trust(node_of(name)) is Trust.REFUSED
    device.hear(node_of(name), beat(ANN))
    assert not device.core.presence.is_here(node_of(name))


def test_another_cluster_is_refused() -> None:
    device = Device("ann", *MEMBERS)
    ((_, refused),) = device.hear(BOB, Greeting("another", 1, 0, (), is_answer=False))
    assert isinstance(refused, Refused)
    assert refused.reason == "cluster"


def test_a_removed_device_is_never_listened_to_again() -> None:
    device = Device("ann", *MEMBERS)
    device.greet(BOB)
    device.step(Commanded(Remove(BOB)))
    assert device.core.trust(BOB) is not Trust.TRUSTED
    assert not device.core.presence.is_here(BOB)
    for message in (beat(ANN), RosterStatements((say("add", "bob", "eve", 9),)), Rumours((Rumour(EVE, 1, 0, True),), True)):
        device.hear(BOB, message)
    device.greet(BOB)
    assert device.core.trust(BOB) is not Trust.TRUSTED
    assert EVE not in device.core.roster.roster


def test_who_is_refused_is_shown_the_removals_that_say_so() -> None:
    removal = say("remove", "ann", "bob", 1)
    device = Device("ann", *MEMBERS, removal, say("remove", "ann", "cem", 2))
    shown = [message.statements for _, message in device.greet(BOB) if isinstance(message, RosterStatements)]
    assert shown == [(removal,)], "its own"
    shown = [message.statements for _, message in device.greet(EVE) if isinstance(message, RosterStatements)]
    assert [len(statements) for statements in shown] == [2], "all of them: who added it may be removed"


def test_a_removed_device_believes_a_member_that_refuses_it() -> None:
    """Otherwise it would go on admitting devices that nobody else knows."""
    removal = RosterStatements((say("remove", "bob", "ann", 1), say("add", "bob", "eve", 1)))
    device = Device("ann", *MEMBERS)
    device.greet(BOB)
    device.step(LinkClosed(BOB))
    device.hear(BOB, removal)
    assert ANN in device.core.roster.roster.removed, "bob was met lately"
    assert EVE not in device.core.roster.roster, "removals only"
    assert device.step(LinkOpened(CEM)) == [], "it knows that it does not belong"
    sleeper = Device("ann", *MEMBERS, since_1970_s=20 * DAY_S)
    sleeper.hear(BOB, removal)
    assert ANN in sleeper.core.roster.roster, "nobody has vouched for bob for weeks: it may be removed itself"
    sleeper.hear(EVE, removal)
    assert ANN in sleeper.core.roster.roster, "eve is no member"


def test_a_device_that_a_removed_one_admitted_is_admitted_again() -> None:
    """It has a roster by which it belongs, and nobody trusts it; its owner uses an invitation of another member."""
    secret = b"sixteen bytes, s"
    member = Device("ann", *MEMBERS, say("remove", "ann", "bob", 1))
    member.step(Commanded(Invite(invitation_of(secret), 3600.0)))
    joiner = Device("eve", *MEMBERS, say("add", "bob", "eve", 2), since_1970_s=20 * DAY_S)
    queue = [(ANN, EVE, each) for _, each in joiner.step(LinkOpened(ANN))]
    queue += [(ANN, EVE, each) for _, each in joiner.step(Commanded(UseInvitation(ANN, secret, b"nonce")))]
    for _ in range(50):
        if not queue:
            break
        target, source, message = queue.pop(0)
        device, other = (member, EVE) if target == ANN else (joiner, ANN)
        queue += [(peer, target, each) for peer, each in device.hear(source, message) if peer == other]
    assert EVE in member.core.roster.roster
    assert BOB in joiner.core.roster.roster.removed
    assert joiner.core.trust(ANN) is member.core.trust(EVE) is Trust.TRUSTED
    joiner.now_s = 10.0
    assert joiner.step(TimerFired("roster")) == [], "it asks no more"


def test_an_unknown_peer_shows_that_it_was_added() -> None:
    device = Device("ann", *MEMBERS)
    device.greet(BOB)
    answers = device.greet(EVE, digest=1)
    assert any(isinstance(message, RosterKeys) for _, message in answers)
    device.hear(EVE, RosterStatements((say("add", "bob", "eve", 50),)))
    assert device.core.trust(EVE) is Trust.TRUSTED, "by bob, who was met just now"
    sleeper = Device("ann", *MEMBERS, since_1970_s=20 * DAY_S)
    sleeper.greet(EVE, digest=1)
    sleeper.hear(EVE, RosterStatements((say("add", "bob", "eve", 20 * DAY_S),)))
    assert sleeper.core.trust(EVE) is Trust.REFUSED, "nobody was met for weeks: bob may have been removed"


def test_a_cluster_that_slept_for_weeks_finds_together() -> None:
    device = Device("ann", *MEMBERS, since_1970_s=20 * DAY_S)
    device.greet(CEM)
    assert device.core.trust(CEM) is Trust.REFUSED
    pair = Device("ann", *MEMBERS[:2], since_1970_s=20 * DAY_S)
    pair.greet(BOB)
    assert pair.core.trust(BOB) is Trust.TRUSTED


def test_news_of_the_roster_is_passed_on_but_not_back() -> None:
    device = Device("ann", *MEMBERS)
    for peer in (BOB, CEM):
        device.greet(peer)
    new = say("address", "bob", "bob", 60, addresses=("h:1",))
    assert device.hear(BOB, RosterStatements((new,))) == [(CEM, RosterStatements((new,)))]
    assert device.hear(CEM, RosterStatements((new,))) == []
    own = device.step(Commanded(SetAddresses(("h:2",))))
    assert {peer for peer, message in own if isinstance(message, RosterStatements)} == {BOB, CEM}


def test_a_device_is_made_again_from_its_disk() -> None:
    device = Device("ann", *MEMBERS)
    device.greet(BOB)
    device.step(Commanded(CreateGroup(GroupId("run"))))
    device.step(Commanded(Invite(invitation_of(b"s"), 1e9)))
    again = Device("ann", *MEMBERS, stored=device.disk)
    assert again.core.groups[GroupId("run")].committed == device.core.groups[GroupId("run")].committed
    assert again.core.groups[GroupId("run")].role is Role.FOLLOWING
    assert again.core.roster.roster.digest == device.core.roster.roster.digest


# ---- presence, as a node lives it


def three_together() -> Device:
    device = Device("ann", *MEMBERS[:3])
    for peer in (BOB, CEM):
        device.step(LinkOpened(peer))
        device.greet(peer)
        device.hear(peer, beat(ANN))
    return device


def pass_time(
    device: Device, seconds: float, *alive: NodeId, heard: tuple[NodeId, ...] = (ANN,)
) -> list[tuple[NodeId, Message]]:
    """Heartbeats of those that live."""
    sent = []
    for _ in range(round(seconds / 0.25)):
        device.now_s += 0.25
        for peer in alive:
            sent += device.hear(peer, beat(*heard))
        sent += device.step(TimerFired("presence"))
    return sent


def test_one_accuser_among_several_means_a_link() -> None:
    device = three_together()
    sent = pass_time(device, 2.0, CEM)
    asked = [message for peer, message in sent if isinstance(message, AskHeard) and peer == CEM]
    assert asked
    assert asked[-1].subject == BOB
    device.hear(CEM, Heard(BOB, asked[-1].question, hears=True, reaches=True))
    facts = [effect.fact for effect in device.effects if hasattr(effect, "fact")]
    assert LinkChanged(BOB, ANN, is_up=False) in facts
    assert device.core.presence.is_here(BOB)


def test_whom_nobody_hears_is_gone() -> None:
    device = three_together()
    device.now_s += 0.1
    sent = device.step(LinkClosed(BOB))
    (question,) = [message.question for _, message in sent if isinstance(message, AskHeard)]
    assert device.core.presence.is_here(BOB), "a doubt is not a verdict"
    device.hear(CEM, Heard(BOB, question, hears=False, reaches=False))
    assert not device.core.presence.is_here(BOB)


def test_in_a_pair_silence_is_all_there_is() -> None:
    device = Device("ann", *MEMBERS[:2])
    device.greet(BOB)
    device.step(LinkClosed(BOB))
    assert not device.core.presence.is_here(BOB)


def test_who_says_goodbye_is_gone_at_once() -> None:
    device = three_together()
    device.hear(BOB, Goodbye(1))
    assert not device.core.presence.is_here(BOB)


def test_a_witness_probes_before_it_answers() -> None:
    device = three_together()
    assert (BOB, Probe(1)) in device.hear(CEM, AskHeard(BOB, 7))
    assert (CEM, Heard(BOB, 7, hears=True, reaches=True)) in device.hear(BOB, beat(ANN))


def test_a_false_rumour_of_our_end_is_outdone() -> None:
    device = three_together()
    device.hear(BOB, beat(ANN, rumours=(Rumour(ANN, 1, 0, here=False),)))
    sent = pass_time(device, 0.75, BOB, CEM)
    rumours = [rumour for _, message in sent if isinstance(message, Heartbeat) for rumour in message.rumours]
    assert Rumour(ANN, 1, 1, here=True) in rumours


def test_two_lives_of_one_key_are_a_clone() -> None:
    device = three_together()
    refused = []
    for _ in range(8):
        device.now_s += 0.25
        device.hear(BOB, beat(ANN))
        refused += [message for peer, message in device.hear(BOB, beat(ANN, incarnation=2)) if isinstance(message, Refused)]
        device.hear(CEM, beat(ANN))
        device.step(TimerFired("presence"))
    assert refused
    assert refused[0].reason == "clone"
    assert "cloned" in refused[0].text
    assert device.core.presence.incarnation_of(BOB) == 1


def test_a_device_that_slept_for_long_is_a_stranger_until_it_has_caught_up() -> None:
    device = three_together()
    device.now_s += 3600.0
    sent = device.step(TimerFired("presence"))
    assert {peer for peer, message in sent if isinstance(message, Greeting)} == {BOB, CEM}
    assert device.core.trusted == {}
    assert not device.core.presence.is_here(BOB)
    device.greet(BOB)
    assert device.core.presence.is_here(BOB)


def test_a_short_freeze_blames_nobody() -> None:
    device = three_together()
    device.now_s += 20.0
    sent = device.step(TimerFired("presence"))
    assert not any(isinstance(message, AskHeard) for _, message in sent)
    assert device.core.presence.is_here(BOB)


def test_messages_of_groups_go_by_a_third_where_the_link_is_cut() -> None:
    device = three_together()
    device.step(Commanded(CreateGroup(GroupId("run"))))
    inner = GroupHeartbeat(Scope(GroupId("run"), 9 << 32, 1, 1), 1)
    relayed = Relay(BOB, ANN, wire.encode(inner))
    answers = device.hear(CEM, relayed)
    assert answers, "taken as bob's"
    assert device.hear(CEM, Relay(EVE, ANN, wire.encode(inner))) == [], "who is no member has no say"
    assert device.hear(CEM, Relay(BOB, ANN, b"\xc1")) == []
    assert device.hear(CEM, Relay(BOB, ANN, wire.encode(Goodbye(1)))) == [], "groups only"
    passed_on = Relay(BOB, CEM, wire.encode(inner))
    assert device.hear(BOB, passed_on) == [(CEM, passed_on)]
    assert device.hear(CEM, Relay(BOB, CEM, wire.encode(inner))) == [], "one hop only, and in the sender's name"


# ---- what is damaged on disk


def _flipped(value: bytes, at: int = 20) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def _stored_device() -> Device:
    """Ann, with everything on its disk; it leads a group and has a promise to keep."""
    device = Device("ann", since_1970_s=100.0, stored={f"roster/{statement_key(each)}": encode(each) for each in MEMBERS})
    device.greet(BOB)
    device.step(Commanded(CreateGroup(GroupId("run"))))
    assert {"met", "group/run"} <= device.disk.keys()
    return device


def _notices(device: Device) -> list[FileDamaged]:
    return [each.fact for each in device.effects if isinstance(each, Announce) and isinstance(each.fact, FileDamaged)]


@pytest.mark.parametrize(
    "damage", [_flipped, lambda value: value[:11], lambda value: value[:0]], ids=["a bit", "cut", "empty"]
)
@pytest.mark.parametrize("key", ["group/run", "met", f"roster/{statement_key(MEMBERS[1])}"])
def test_a_damaged_file_is_left_out_with_a_line_for_the_owner(key: str, damage: Callable[[bytes], bytes]) -> None:
    disk = _stored_device().disk
    again = Device("ann", stored={**disk, key: damage(disk[key])})
    if key == "met" and damage is _flipped:
        return  # times or ids with another bit are times or ids: no promise rests on them
    (notice,) = _notices(again)
    assert notice.key == key
    assert key in notice.text
    assert "join again" in notice.text


def test_whoever_cannot_read_its_votes_does_not_vote() -> None:
    """Wherever the damage is: a file with one bit changed might hold another promise."""
    disk = _stored_device().disk
    for at in range(len(disk["group/run"])):
        again = Device("ann", stored={**disk, "group/run": _flipped(disk["group/run"], at)})
        group = again.core.groups[GroupId("run")]
        assert group.committed.epoch == 0
        assert not group.can_vote()
        assert group.role is Role.OUTSIDE


def test_whoever_lost_a_statement_is_as_one_that_slept_through_it() -> None:
    """It may be a removal. Nobody is trusted for having been met, until a member that others vouch for showed its roster."""
    known = {f"roster/{statement_key(each)}": encode(each) for each in MEMBERS}
    removal = f"roster/{statement_key(say('remove', 'ann', 'bob', 50.0))}"
    met = {"met": encode({BOB: 19.5 * DAY_S})}
    whole = Device("ann", stored={**known, **met}, since_1970_s=20 * DAY_S)
    whole.greet(BOB)
    assert whole.core.trust(BOB) is Trust.TRUSTED
    damaged = Device("ann", stored={**known, **met, removal: b"?"}, since_1970_s=20 * DAY_S)
    damaged.greet(BOB)
    assert damaged.core.trust(BOB) is Trust.REFUSED
    pair = dict(list(known.items())[:2])
    alone = Device("ann", stored={**pair, removal: b"?"}, since_1970_s=20 * DAY_S)
    alone.greet(BOB)
    assert alone.core.trust(BOB) is Trust.REFUSED, "in a pair its own word counts, but not for one who may have removed it"
