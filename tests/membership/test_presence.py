"""Who is here: silence, witnesses, links cut one way, sleep, and the two sides of a cut."""

from __future__ import annotations

import pytest

from shoal.effects import Announce, Commanded, LinkClosed, Received, TimerFired
from shoal.ids import NodeId
from shoal.membership.failure import LinkChanged, MemberGone, MemberHere
from shoal.membership.messages import AskHeard, Goodbye, Heard, Heartbeat, Refused, Rumour, Rumours
from shoal.membership.presence import (
    RINGS,
    TIMER,
    Doubt,
    Outranked,
    PresenceCore,
    Rings,
    SayGoodbye,
    Woke,
)
from shoal.membership.roster import MemberRemoved
from shoal.membership.timing import Timing
from tests.membership.devices import sent
from tests.membership.world import World

TIMING = Timing()
A, B, C, D = (NodeId(name) for name in "abcd")


def world(*names: NodeId) -> World[PresenceCore]:
    """Devices that have met."""
    cores = {name: PresenceCore(name, incarnation=1, timing=TIMING, now_s=0.0, members=names) for name in names}
    made = World(cores)
    for name in names:
        made.tell(name, TimerFired(TIMER))
    made.run(2.1)
    made.facts.clear()
    made.sent.clear()
    return made


def here(in_world: World[PresenceCore], node: NodeId) -> set[NodeId]:
    return set(in_world.cores[node].here())


def test_members_that_hear_each_other_are_here() -> None:
    made = world(A, B, C)
    assert [here(made, node) for node in (A, B, C)] == [{B, C}, {A, C}, {A, B}]


def test_nothing_is_announced_while_nothing_happens() -> None:
    made = world(A, B, C)
    made.run(60.0)
    assert made.facts == []


def test_beats_cost_one_message_per_neighbour_and_interval() -> None:
    made = world(A, B, C)
    made.run(10.0)
    beats = [message for _, _, message in made.sent if type(message) is Heartbeat]
    assert len(beats) == len(made.sent)
    assert len(beats) == pytest.approx(6 * 10.0 / TIMING.heartbeat_s, abs=6)


def test_a_closed_connection_is_told_at_once() -> None:
    made = world(A, B, C)
    del made.cores[C]
    for node in (A, B):
        made.tell(node, LinkClosed(C))
    made.run(2 * TIMING.witness_s)
    assert made.known(A, MemberGone) == made.known(B, MemberGone) == [MemberGone(C, 1)]


def test_a_silent_member_is_gone_when_nobody_hears_it() -> None:
    made = world(A, B, C)
    made.stopped.add(C)
    made.run(TIMING.silence_s - TIMING.heartbeat_s - 0.1)
    assert made.facts == []
    made.run(2 * TIMING.heartbeat_s + TIMING.witness_s)
    assert made.known(A, MemberGone) == made.known(B, MemberGone) == [MemberGone(C, 1)]
    assert made.known(A, LinkChanged) == []


def test_a_frozen_member_that_goes_on_is_here_again() -> None:
    made = world(A, B, C)
    made.stopped.add(C)
    made.run(5.0)
    made.stopped.clear()
    made.run(5.0)
    assert made.known(A, MemberHere) == made.known(B, MemberHere) == [MemberHere(C, 1)]
    assert [here(made, node) for node in (A, B, C)] == [{B, C}, {A, C}, {A, B}]


def test_one_accuser_among_several_means_a_link() -> None:
    made = world(A, B, C)
    made.cut(A, C)
    made.run(5.0)
    assert not [fact for _, _, fact in made.facts if type(fact) is MemberGone]
    assert made.known(A, LinkChanged) == [LinkChanged(C, A, is_up=False)]
    assert made.known(C, LinkChanged) == [LinkChanged(A, C, is_up=False)]
    assert made.known(B, LinkChanged) == []
    made.cuts.clear()
    made.run(2.0)
    assert made.known(A, LinkChanged)[-1] == LinkChanged(C, A, is_up=True)
    assert made.known(C, LinkChanged)[-1] == LinkChanged(A, C, is_up=True)


def test_a_link_cut_one_way_is_lost_one_way() -> None:
    made = world(A, B, C)
    made.cut(A, C, one_way=True)
    made.run(6.0)
    assert made.known(C, LinkChanged) == [LinkChanged(A, C, is_up=False)]
    assert made.known(A, LinkChanged) == []
    assert not [fact for _, _, fact in made.facts if type(fact) is MemberGone]


def test_the_way_round_a_cut_link_is_known() -> None:
    made = world(A, B, C)
    assert made.cores[A].relay_for(C, made.now_s) is None
    made.cut(A, C)
    made.run(5.0)
    assert made.cores[A].relay_for(C, made.now_s) == B
    assert made.cores[C].relay_for(A, made.now_s) == B
    assert made.cores[A].relay_for(B, made.now_s) is None


def test_in_a_pair_the_peers_silence_is_all_there_is() -> None:
    made = world(A, B)
    made.cut(A, B)
    made.run(TIMING.silence_s + TIMING.heartbeat_s + 0.1)
    assert made.known(A, MemberGone) == [MemberGone(B, 1)]
    assert made.known(B, MemberGone) == [MemberGone(A, 1)]
    assert not [fact for _, _, fact in made.facts if type(fact) is LinkChanged]


def test_both_sides_of_a_cut_keep_their_presence() -> None:
    made = world(A, B, C, D)
    for one in (A, B):
        for other in (C, D):
            made.cut(one, other)
    made.run(8.0)
    assert [here(made, node) for node in (A, B, C, D)] == [{B}, {A}, {D}, {C}]
    made.cuts.clear()
    made.run(8.0)
    assert [len(here(made, node)) for node in (A, B, C, D)] == [3, 3, 3, 3]


def test_who_says_goodbye_is_gone_at_once() -> None:
    made = world(A, B, C)
    made.tell(C, Commanded(SayGoodbye()))
    del made.cores[C]
    made.run(0.01)
    assert made.known(A, MemberGone) == made.known(B, MemberGone) == [MemberGone(C, 1)]
    assert [type(message) for _, _, message in made.sent].count(Goodbye) == 2


def test_a_next_incarnation_replaces_the_one_before() -> None:
    made = world(A, B, C)
    del made.cores[C]
    for node in (A, B):
        made.tell(node, LinkClosed(C))
    made.cores[C] = PresenceCore(C, incarnation=2, timing=TIMING, now_s=made.now_s, members=(A, B, C))
    made.tell(C, TimerFired(TIMER))
    made.run(3.0)
    for node in (A, B):
        assert made.cores[node].incarnation_of(C) == 2
        assert MemberHere(C, 2) in made.known(node, MemberHere)
        gone, seen = made.known(node, MemberGone), made.known(node, MemberHere)
        assert [fact.incarnation for fact in gone] == [1]
        assert [fact.incarnation for fact in seen] == [2]


def test_the_second_of_two_living_incarnations_of_one_key_is_refused() -> None:
    made = world(A, B, C)
    refused = []
    for sequence in range(20):
        made.run(TIMING.heartbeat_s)
        clone = Heartbeat(2, 0, sequence, (), 0)
        refused += sent(made.tell(A, Received(C, clone)), Refused)
    assert made.cores[A].incarnation_of(C) == 1
    assert made.known(A, MemberGone) == []
    assert refused
    assert {(each.reason, each.incarnation) for each in refused} == {("clone", 2)}
    assert "cloned" in refused[0].text


def test_an_older_incarnation_is_told_that_it_is_outranked() -> None:
    made = world(A, B)
    made.tell(A, Received(B, Heartbeat(3, 0, 1, (), 0)))
    made.run(5.0)
    effects = made.tell(A, Received(B, Heartbeat(0, 0, 1, (), 0)))
    told = sent(effects, Rumours)
    assert [rumour.node for each in told for rumour in each.rumours] == [B]
    made.tell(B, Received(A, Rumours((Rumour(B, 9, 0, here=True),), is_answer=True)))
    assert Outranked(9) in made.known(B, Outranked)


def test_a_false_rumour_is_contradicted_by_its_subject_only() -> None:
    """Whoever hears C does not believe that it is gone; C's next version convinces the rest."""
    made = world(A, B, C)
    made.tell(A, Received(B, Rumours((Rumour(C, 1, 0, here=False),), is_answer=True)))
    assert made.known(A, MemberGone) == []
    made.run(0.01)
    assert made.cores[C].version == 1
    made.run(2.0)
    assert made.cores[A].beliefs[C] == Rumour(C, 1, 1, here=True)
    assert made.known(A, MemberGone) == []


def test_witnesses_say_what_they_hear_themselves() -> None:
    made = world(A, B, C)
    made.stopped.add(C)
    effects = made.tell(B, Received(A, AskHeard(C, 7)))
    assert sent(effects, Heard) == [], "first C is probed"
    made.stopped.clear()
    made.run(0.01)
    answers = [message for source, target, message in made.sent if (source, target) == (B, A) and type(message) is Heard]
    assert answers == [Heard(C, 7, hears=True, reaches=True)]
    assert sent(made.tell(B, Received(A, AskHeard(B, 8))), Heard) == [Heard(B, 8, hears=True, reaches=False)]


def test_a_doubt_by_a_group_is_looked_into() -> None:
    made = world(A, B, C)
    made.command(A, Doubt(C))
    made.run(1.0)
    assert made.facts == [], "it is here"
    made.stopped.add(C)
    made.command(A, Doubt(C))
    made.run(TIMING.witness_s + 0.05)
    assert made.known(A, MemberGone) == [MemberGone(C, 1)], "long before its heartbeats are missed"


# ---- sleep


def test_a_short_sleep_is_no_reason_to_doubt_the_others() -> None:
    made = world(A, B, C)
    made.stopped.add(A)
    made.run(20.0)
    made.stopped.clear()
    made.run(0.4)
    assert made.known(A, MemberGone) == []
    assert here(made, A) == {B, C}


@pytest.mark.parametrize("stall_s", [0.8, 1.5, 4.0])
def test_who_stalls_again_and_again_still_finds_out_who_is_gone(stall_s: float) -> None:
    made = world(A, B, C)
    made.stopped.add(C)
    for _ in range(20):
        made.stopped.add(A)
        made.run(stall_s)
        made.stopped.discard(A)
        made.run(0.06)
        made.tell(A, Received(B, Heartbeat(1, 0, 1, (A,), 0)))  # it waited behind the timer
        made.run(0.04)
    assert MemberGone(C, 1) in made.known(A, MemberGone)
    assert MemberGone(B, 1) not in made.known(A, MemberGone)


def test_a_device_that_slept_for_long_wakes_as_a_stranger() -> None:
    made = world(A, B, C)
    made.stopped.add(A)
    made.run(TIMING.stranger_s + 600.0)
    made.facts.clear()
    made.stopped.clear()
    made.run(0.06)
    assert [fact.slept_s > TIMING.stranger_s for fact in made.known(A, Woke)] == [True]
    made.run(5.0)
    assert here(made, A) == {B, C}
    assert {fact.node for fact in made.known(B, MemberHere)} == {A}


# ---- the roster


def test_a_removed_member_is_not_here_any_more() -> None:
    made = world(A, B, C)
    made.stopped.add(C)
    for node in (A, B):
        made.learn(node, MemberRemoved(C))
    made.run(5.0)
    for node in (A, B):
        assert made.known(node, MemberGone) == [MemberGone(C, 1)]
        assert C not in here(made, node)
        assert C not in made.cores[node].watched


# ---- many


def test_a_large_cluster_watches_few_links_and_agrees() -> None:
    names = [NodeId(f"device {number:02}") for number in range(40)]
    made = World({name: PresenceCore(name, incarnation=1, timing=TIMING, now_s=0.0, members=names) for name in names})
    for name in names:
        made.tell(name, TimerFired(TIMER))
    made.run(40.0)
    assert all(len(here(made, name)) == 39 for name in names)
    assert max(len(core.watched) for core in made.cores.values()) <= 2 * RINGS + 2 * RINGS
    lost = names[7]
    del made.cores[lost]
    made.facts.clear()
    made.run(20.0)
    for name in names:
        if name != lost:
            assert made.known(name, MemberGone) == [MemberGone(lost, 1)], name


def test_rings_change_in_few_places() -> None:
    names = [NodeId(f"device {number}") for number in range(100)]
    before = Rings(names)
    after = before.copy()
    after.remove(names[3])
    changed = [name for name in names if name != names[3] and before.neighbours(name) != after.neighbours(name)]
    assert len(changed) <= 2 * RINGS
    assert all(names[3] in before.neighbours(name) for name in changed)
    after.add(names[3])
    assert all(before.neighbours(name) == after.neighbours(name) for name in names)


def test_beats_between_devices_that_do_not_watch_each_other_do_not_go_on_for_ever() -> None:
    names = [NodeId(f"device {number:02}") for number in range(20)]
    made = World({name: PresenceCore(name, incarnation=1, timing=TIMING, now_s=0.0, members=names) for name in names})
    for name in names:
        made.tell(name, TimerFired(TIMER))
    made.run(20.0)
    made.sent.clear()
    made.run(10.0)
    links = sum(len(core.watched) for core in made.cores.values())
    assert len(made.sent) <= 1.1 * links * 10.0 / TIMING.heartbeat_s


def test_rumours_of_many_do_not_put_off_what_is_being_found_out() -> None:
    """Each of seven tells of the same loss with each of its beats; a doubt ends when its own time is over all the same."""
    names = tuple(NodeId(name) for name in "abcdefgh")
    made = world(*names)
    lost = names[-1]
    for node in (B, C, D):
        del made.cores[node]  # seen from one device, to which the others' rumours come
        made.stopped.add(node)
    core = made.cores[A]
    now_s = made.now_s
    core.step(LinkClosed(lost), now_s)
    due_s = now_s + TIMING.witness_s
    facts = []
    while now_s < due_s + 0.1:
        now_s += 0.02
        told = Heartbeat(1, 0, 1, (A,), 0, (Rumour(lost, 1, 0, here=False),))
        for node in names[4:7]:
            facts += [effect.fact for effect in core.step(Received(node, told), now_s) if isinstance(effect, Announce)]
    assert MemberGone(lost, 1) in facts


def test_a_witness_that_is_asked_before_it_sees_the_close_answers_with_it() -> None:
    """A killed process's connections close one after the other; who is asked in between must not let the asker wait."""
    made = world(A, B, C)
    witness, now_s = made.cores[B], made.now_s
    assert sent(witness.step(Received(A, AskHeard(C, 7)), now_s), Heard) == []
    answers = sent(witness.step(LinkClosed(C), now_s + 0.001), Heard)
    assert answers == [Heard(C, 7, hears=False, reaches=False)]
    assert sent(witness.step(LinkClosed(C), now_s + 0.002), Heard) == []
