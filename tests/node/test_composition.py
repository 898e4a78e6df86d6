"""One device, composed: greetings and trust, joining, groups over cut links, restarts, capabilities."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal.effects import (
    Announce,
    Effect,
    Event,
    Fact,
    Hangup,
    Learned,
    LinkClosed,
    LinkOpened,
    Message,
    Observed,
    Received,
    Send,
    SetTimer,
    TimerFired,
)
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import LinkChanged, MemberGone, MemberHere
from shoal.membership.group.facts import CreateGroup, JoinGroup, RecordAdopted, ReportProgress
from shoal.membership.messages import (
    Goodbye,
    Greeting,
    GroupHeartbeat,
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
from shoal.membership.presence import SayGoodbye, Woke
from shoal.membership.roster import (
    EMPTY,
    Admitted,
    Invite,
    Keys,
    MemberAdded,
    MemberRemoved,
    Rejected,
    Remove,
    Roster,
    UseInvitation,
    invitation_of,
)
from shoal.membership.timing import Timing
from shoal.node import wire
from shoal.node.core import START, Capability, NodeCore
from shoal.node.trust import Trusted
from tests.membership.devices import SINCE_1970_S, announced, cluster, sent, stamp, statement
from tests.membership.keys import keys_of
from tests.membership.keys import node_of as node
from tests.membership.keys import roster_of as roster
from tests.membership.world import World

TIMING = Timing()
RUN = GroupId("run")
DAY_S = 86400.0
SECRET = b"sixteen bytes, s"


def device(
    name: str,
    known: Roster = EMPTY,
    *,
    incarnation: int = 1,
    now_s: float = 0.0,
    stored: dict[str, bytes] | None = None,
    capabilities: tuple[Capability, ...] = (),
) -> NodeCore:
    keys: Keys = keys_of(name)
    return NodeCore(
        node(name),
        incarnation=incarnation,
        keys=keys,
        timing=TIMING,
        now_s=now_s,
        since_1970_s=SINCE_1970_S,
        stored=stored,
        roster=known,
        capabilities=capabilities,
    )


def world(*names: str, statements: Iterable[Statement] | None = None) -> World[NodeCore]:
    """Members that know each other's roster entries and have met."""
    known = roster(*(cluster(*names) if statements is None else statements))
    made = World({node(name): device(name, known) for name in names})
    for name in names:
        made.tell(node(name), TimerFired(START))
    made.run(3.0)
    made.sent.clear()
    return made


def here(made: World[NodeCore], name: str) -> set[NodeId]:
    return set(made.cores[node(name)].presence.here())


def greeting(name: str, known: Roster, *stamps: str, incarnation: int = 1) -> Greeting:
    shown = tuple(stamp(by, name) for by in stamps)
    return Greeting(known.cluster, incarnation, known.digest, shown, is_answer=False)


# ---- greetings and trust


def test_members_that_meet_trust_each_other_and_are_here() -> None:
    made = world("a", "b", "c")
    for name in "abc":
        others = {node(other) for other in "abc" if other != name}
        assert here(made, name) == others
        assert {fact.peer for fact in made.known(node(name), Trusted)} == others
        assert set(made.cores[node(name)].trusted) == others


def test_a_link_alone_is_worth_nothing() -> None:
    """Nothing from an ungreeted peer reaches a core, though the link has proven its key; it is greeted instead."""
    core = device("a", roster(*cluster("a", "b")))
    core.step(TimerFired(START), 0.0)
    core.step(LinkOpened(node("b")), 0.0)
    for message in (
        Heartbeat(1, 0, 1, (), 0),
        Probe(1),
        GroupHeartbeat(Scope(RUN, 1, 1, 1), 1),
        Goodbye(1),
        Relay(node("b"), node("a"), wire.encode(Probe(1))),
    ):
        effects = core.step(Received(node("b"), message), 5.0)
        assert {type(each.message) for each in effects if isinstance(each, Send)} <= {Greeting}
        assert announced(effects, MemberHere) == []
    assert not core.presence.here()


def test_what_is_no_member_is_refused_and_told_nothing() -> None:
    known = roster(*cluster("a", "b"))
    core = device("a", known)
    core.step(LinkOpened(node("z")), 0.0)
    effects = core.step(Received(node("z"), greeting("z", known, "b")), 1.0)
    assert [refused.reason for refused in sent(effects, Refused)] == ["unknown"]
    assert not core.trusted
    effects = core.step(Received(node("z"), RosterKeys((), is_answer=False)), 2.0)
    assert sent(effects, RosterStatements) == []


def test_a_device_of_another_cluster_is_told_so() -> None:
    core, other = device("a", roster(*cluster("a", "b"))), roster(*cluster("z", "y"))
    effects = core.step(Received(node("z"), greeting("z", other)), 1.0)
    assert [refused.reason for refused in sent(effects, Refused)] == ["cluster"]


def test_a_refusal_is_announced_to_the_owner() -> None:
    core = device("a", roster(*cluster("a", "b")))
    effects = core.step(Received(node("b"), Refused("removed", "why")), 1.0)
    assert announced(effects, Rejected) == [Rejected(node("b"), "removed", "why")]


def test_a_removed_device_is_hung_up_on_everywhere_and_stays_out() -> None:
    made = world("a", "b", "c", "d")
    made.command(node("a"), Remove(node("d")))
    made.run(1.0)
    for name in "abc":
        assert node("d") not in made.cores[node(name)].roster.roster.members
        assert node("d") not in here(made, name)
        assert made.known(node(name), MemberRemoved) == [MemberRemoved(node("d"))]
    made.run(20.0)
    for name in "abc":
        assert node("d") not in made.cores[node(name)].trusted
        assert MemberHere(node("d"), 1) not in [fact for who, at_s, fact in made.facts if who == node(name) and at_s > 4.0]


def test_a_removal_is_passed_on_at_once() -> None:
    made = world("a", "b", "c")
    effects = made.command(node("a"), Remove(node("c")))
    passed = [each for each in effects if isinstance(each, Send) and type(each.message) is RosterStatements]
    assert [each.peers for each in passed] == [(node("b"),)]
    assert any(isinstance(each, Hangup) and each.peer == node("c") for each in effects)


def test_a_removed_device_does_not_come_back_through_one_that_slept() -> None:
    """The sleeper's roster still lists it, and it may even show the sleeper's own new stamp to the sleeper."""
    known = roster(*cluster("a", "b", "c", "d", "e"))
    sleeper = device("a", known, now_s=30 * DAY_S)
    sleeper.step(TimerFired(START), 30 * DAY_S)
    sleeper.step(LinkOpened(node("b")), 30 * DAY_S)
    effects = sleeper.step(Received(node("b"), greeting("b", known, "c")), 30 * DAY_S)
    assert [refused.reason for refused in sent(effects, Refused)] == ["unstamped"]
    given = [each.message.stamp for each in effects if isinstance(each, Send) and hasattr(each.message, "stamp")]
    shown = Greeting(known.cluster, 1, known.digest, tuple(given), is_answer=False)
    for hours in range(1, 4):
        effects = sleeper.step(Received(node("b"), shown), 30 * DAY_S + 3600.0 * hours)
        assert [refused.reason for refused in sent(effects, Refused)] == ["unstamped"]
    assert node("b") not in sleeper.trusted


def test_a_third_members_stamp_brings_trust() -> None:
    known = roster(*cluster("a", "b", "c", "d"))
    core = device("a", known, now_s=30 * DAY_S)
    fresh = stamp("c", "b", SINCE_1970_S + 29 * DAY_S)
    core.step(Received(node("b"), Greeting(known.cluster, 1, known.digest, (fresh,), is_answer=False)), 30 * DAY_S)
    assert core.trusted[node("b")] == 1


def test_trust_ends_with_the_link() -> None:
    made = world("a", "b")
    made.tell(node("a"), LinkClosed(node("b")))
    assert node("b") not in made.cores[node("a")].trusted


def test_after_a_long_sleep_nobody_is_trusted_until_greeted_again() -> None:
    made = world("a", "b", "c")
    made.stopped.add(node("a"))
    made.run(TIMING.stranger_s + 60.0)
    made.stopped.clear()
    made.facts.clear()
    made.run(0.06)
    assert made.known(node("a"), Woke)
    made.run(5.0)
    assert set(made.cores[node("a")].trusted) == {node("b"), node("c")}
    assert here(made, "a") == {node("b"), node("c")}


def test_who_says_goodbye_is_gone_and_not_trusted() -> None:
    made = world("a", "b", "c")
    made.command(node("c"), SayGoodbye())
    made.stopped.add(node("c"))
    made.run(0.01)
    assert made.known(node("a"), MemberGone) == [MemberGone(node("c"), 1)]
    assert node("c") not in made.cores[node("a")].trusted


# ---- joining


def test_a_new_device_joins_and_everybody_meets_it() -> None:
    made = world("a", "b", statements=cluster("a", "b"))
    made.command(node("a"), Invite(invitation_of(SECRET), SINCE_1970_S + 3600.0))
    made.cores[node("c")] = device("c", now_s=made.now_s)
    made.disks[node("c")] = {}
    made.tell(node("c"), TimerFired(START), LinkOpened(node("a")))
    made.tell(node("a"), LinkOpened(node("c")))
    made.command(node("c"), UseInvitation(node("a"), SECRET, b"chance", "phone"))
    made.run(3.0)
    assert len(made.known(node("c"), Admitted)) == 1
    for name in "ab":
        assert MemberAdded(node("c")) in made.known(node(name), MemberAdded)
        assert here(made, name) == {node(other) for other in "abc" if other != name}
    assert here(made, "c") == {node("a"), node("b")}


def test_a_device_starts_again_from_its_disk() -> None:
    made = world("a", "b", "c")
    made.command(node("c"), CreateGroup(RUN))
    made.run(1.0)
    stored = made.disks[node("c")]
    made.close(node("c"))
    made.run(1.0)
    assert made.known(node("a"), MemberGone) == [MemberGone(node("c"), 1)]
    known = made.cores[node("a")].roster.roster
    again = device("c", known, incarnation=2, now_s=made.now_s, stored=stored)
    assert again.groups[RUN].committed.epoch > 0
    made.cores[node("c")] = again
    made.tell(node("c"), TimerFired(START))
    made.run(3.0)
    assert made.cores[node("a")].presence.incarnation_of(node("c")) == 2
    assert again.groups[RUN].is_running(made.now_s)


# ---- groups


def train_together(made: World[NodeCore], names: str) -> None:
    made.command(node(names[0]), CreateGroup(RUN))
    made.run(1.0)
    for name in names[1:]:
        made.command(node(name), JoinGroup(RUN))
        made.run(2.0)
        made.command(node(name), ReportProgress(RUN, 0, has_state=True, ready=True))
        made.run(1.0)


def running(made: World[NodeCore]) -> set[NodeId]:
    cores = {name: core for name, core in made.cores.items() if name not in made.stopped}
    return {name for name, core in cores.items() if RUN in core.groups and core.groups[RUN].is_running(made.now_s)}


def test_members_form_a_group_and_outlive_its_leader() -> None:
    made = world("a", "b", "c")
    train_together(made, "abc")
    record = made.cores[node("a")].groups[RUN].committed
    assert {member.node: member.part for member in record.members} == dict.fromkeys(map(node, "abc"), "active")
    made.close(node("a"))
    made.run(3.0)
    assert running(made) == {node("b"), node("c")}
    adopted = made.known(node("b"), RecordAdopted)[-1].record
    assert {member.node for member in adopted.members} == {node("b"), node("c")}


def test_a_group_goes_on_over_a_cut_link_by_relay() -> None:
    made = world("a", "b", "c")
    train_together(made, "abc")
    leader = made.cores[node("a")].groups[RUN].leader
    assert leader == node("a")
    made.cut(node("a"), node("b"))
    made.run(10.0)
    assert running(made) == {node("a"), node("b"), node("c")}
    record = made.cores[node("b")].groups[RUN].committed
    assert set(record.cut_links) == {(node("a"), node("b")), (node("b"), node("a"))}
    assert made.known(node("b"), LinkChanged)[-1] == LinkChanged(node("a"), node("b"), is_up=False)
    made.sent.clear()
    made.run(2.0)
    relayed = {(who, peer) for who, peer, message in made.sent if type(message) is Relay}
    assert (node("a"), node("c")) in relayed
    made.cuts.clear()
    made.run(10.0)
    assert made.cores[node("b")].groups[RUN].committed.cut_links == ()


def test_a_relay_takes_one_hop_and_only_what_groups_say() -> None:
    made = world("a", "b", "c")
    train_together(made, "ab")
    core = made.cores[node("c")]
    beat = wire.encode(GroupHeartbeat(Scope(RUN, 1, 1, 1), 1))
    onward = core.step(Received(node("a"), Relay(node("a"), node("b"), beat)), made.now_s)
    assert sent(onward, Relay) == [Relay(node("a"), node("b"), beat)]
    forged = core.step(Received(node("a"), Relay(node("b"), node("a"), beat)), made.now_s)
    assert sent(forged, Relay) == [], "a peer passes on its own words only"
    for inner in (b"junk", wire.encode(Probe(1)), wire.encode(Relay(node("b"), node("c"), beat))):
        effects = made.cores[node("b")].step(Received(node("c"), Relay(node("a"), node("b"), inner)), made.now_s)
        assert [each for each in effects if isinstance(each, Send)] == []


def test_messages_of_groups_unknown_here_are_let_go() -> None:
    made = world("a", "b")
    beat = GroupHeartbeat(Scope(GroupId("another"), 1, 1, 1), 1)
    effects = made.tell(node("a"), Received(node("b"), beat))
    assert [each for each in effects if isinstance(each, Send) and type(each.message) is not Heartbeat] == []


# ---- capabilities


class Ping(Message, frozen=True, tag="test-ping"):
    number: int


class Seen(Fact, frozen=True):
    number: int


class Listener:
    """A further core: keeps what it is told, and announces each ping."""

    def __init__(self, name: str, *messages: type[Message]) -> None:
        self.name = name
        self.messages = messages
        self.events: list[Event] = []

    def step(self, event: Event, now_s: float) -> list[Effect]:
        self.events.append(event)
        if isinstance(event, Received) and isinstance(event.message, Ping):
            return [Announce(Seen(event.message.number)), SetTimer("listener/later", now_s + 1)]
        return []


def test_a_capability_is_told_facts_timers_and_its_messages_of_trusted_peers_only() -> None:
    known = roster(*cluster("a", "b"))
    listener, second = Listener("listener", Ping), Listener("second")
    core = device("a", known, capabilities=(listener, second))
    core.step(TimerFired(START), 0.0)
    core.step(Received(node("b"), Ping(1)), 0.1)
    assert not [event for event in listener.events if isinstance(event, Received)], "not trusted yet"
    core.step(LinkOpened(node("b")), 0.2)
    core.step(Received(node("b"), greeting("b", known)), 0.3)
    assert Learned(Trusted(node("b"), 1)) in listener.events
    effects = core.step(Received(node("b"), Ping(2)), 0.4)
    assert announced(effects, Seen) == [Seen(2)]
    assert Learned(Seen(2)) in second.events, "others are told"
    assert Learned(Seen(2)) not in listener.events, "itself is not"
    core.step(TimerFired("listener/later"), 1.4)
    assert listener.events[-1] == TimerFired("listener/later")
    assert second.events[-1] != TimerFired("listener/later")
    measured = Observed(node("b"), node("a"), 10, 1.0)
    core.step(measured, 1.5)
    assert listener.events[-1] == second.events[-1] == measured


def test_an_unknown_timer_is_nothing() -> None:
    core = device("a", roster(*cluster("a", "b")))
    assert core.step(TimerFired("nobody/x"), 0.0) == []
    assert core.step(TimerFired("group/unknown"), 0.0) == []


def test_equal_events_give_equal_effects() -> None:
    stories = []
    for _ in range(2):
        made = world("a", "b", "c")
        train_together(made, "abc")
        made.close(node("a"))
        made.run(3.0)
        stories.append(msgspec.msgpack.encode([(who, peer, wire.encode(message)) for who, peer, message in made.sent]))
    assert stories[0] == stories[1]


def test_statements_of_a_peer_that_is_not_trusted_are_not_taken() -> None:
    core = device("a", roster(*cluster("a", "b")))
    digest = core.roster.roster.digest
    core.step(Received(node("b"), RosterStatements((statement("add", "b", "c"),))), 0.2)
    assert core.roster.roster.digest == digest


def test_a_group_made_later_knows_whom_presence_announced_and_nobody_else() -> None:
    """Others may still believe in a device that is gone; a group that heard of it would never hear that it is gone."""
    made = world("a", "b", "c")
    core = made.cores[node("a")]
    made.close(node("c"))
    made.run(3.0)
    stale = Rumour(node("c"), 1, 1, here=True)
    made.tell(node("a"), Received(node("b"), Rumours((stale,), is_answer=True)))
    assert core.presence.beliefs[node("c")].here
    made.command(node("a"), CreateGroup(RUN))
    assert core.groups[RUN]._here.keys() == {node("b")}
