"""Decides who is here, without a quorum: each device for itself, so both sides of a cut keep their own presence.

Up to `EVERYONE_MAX` members watch each other, all of them. In a larger cluster each device watches its neighbours on
four rings, on which the devices that are here are ordered by hashes: eight links per device, a graph of small diameter
that no small cut takes apart, and one that a join or a leave changes in eight places only. What a watcher finds travels
as rumours on the heartbeats that are sent anyway; digests find what rumours missed. Fellows of a group watch each other
as well.

A rumour about a device is outdone only by itself, with a higher version. A device that watches and hears a peer does not
believe that it is gone; it tells the peer, which contradicts. See `failure.py` for what silence means, and
docs/protocols/presence.md for the picture.

Source: rumours and refutation are SWIM's (Das, Gupta, Motivala, 2002); rings by hashes: Law and Siu, "Distributed
construction of random expander networks" (2003). Differs: fixed watchers instead of random probes, so that a closed
connection is news at once.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

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
    Received,
    Send,
    SetTimer,
    TimerFired,
    Watch,
)
from shoal.ids import NodeId
from shoal.membership.failure import PEER, LinkChanged, MemberGone, MemberHere, Peer, Watched
from shoal.membership.messages import AskHeard, Goodbye, Greeting, Heard, Heartbeat, Probe, Refused, Rumour, Rumours
from shoal.membership.roster import MemberAdded, MemberRemoved
from shoal.membership.timing import Timing

EVERYONE_MAX = 9
"""In clusters up to this size everybody watches everybody."""
RINGS = 4
WITNESSES_MAX = 8
RUMOURS_PER_BEAT = 8
_CLONE_BEATS = 2
_CLONE_PATIENCE_S = 1.0
TIMER = "presence"


class Outranked(Fact, frozen=True):
    """Others know a later `incarnation` of this device: it must start again with a higher one, or its key was cloned."""

    incarnation: int


class RostersDiffer(Fact, frozen=True):
    """`peer` has another roster, and has had for a while."""

    peer: NodeId


class Woke(Fact, frozen=True):
    """This device slept; what it knew of the others is void."""

    slept_s: float


class Doubt(Command, frozen=True):
    """Somebody misses `node`: find out what it is."""

    node: NodeId


class WatchFellows(Command, frozen=True):
    """Watch these as well, wherever they are on the rings."""

    nodes: frozenset[NodeId]


class SayGoodbye(Command, frozen=True):
    """This device leaves on purpose."""


@lru_cache(maxsize=1 << 16)
def _position(ring: int, node: NodeId) -> int:
    return int.from_bytes(hashlib.blake2b(f"{ring}/{node}".encode(), digest_size=8).digest())


@lru_cache(maxsize=1 << 16)
def _rumour_digest(node: NodeId, incarnation: int, version: int, here: bool) -> int:
    text = f"{node}/{incarnation}/{version}/{here}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())


def _rank(rumour: Rumour) -> tuple[int, int, bool]:
    return (rumour.incarnation, rumour.version, not rumour.here)


class Rings:
    """The devices that are here, in four cyclic orders."""

    def __init__(self, nodes: Iterable[NodeId]) -> None:
        everyone = list(nodes)
        self._rings = [sorted((_position(ring, node), node) for node in everyone) for ring in range(RINGS)]

    def copy(self) -> Rings:
        rings = Rings(())
        rings._rings = [ring.copy() for ring in self._rings]
        return rings

    def add(self, node: NodeId) -> None:
        for index, ring in enumerate(self._rings):
            insort(ring, (_position(index, node), node))

    def remove(self, node: NodeId) -> None:
        for index, ring in enumerate(self._rings):
            at = bisect_left(ring, (_position(index, node), node))
            del ring[at]

    def neighbours(self, node: NodeId) -> set[NodeId]:
        """Before and after `node` on each ring, whether it is on them or not."""
        found = set()
        for index, ring in enumerate(self._rings):
            if ring:
                at = bisect_left(ring, (_position(index, node), node))
                found.add(ring[at - 1][1])
                after = at + 1 if at < len(ring) and ring[at][1] == node else at
                found.add(ring[after % len(ring)][1])
        found.discard(node)
        return found


class PresenceCore:
    """Presence as one device sees it.

    Args:
        members: the roster's, this device among them or not.
        beliefs: what is known at the start (a simulated cluster that has long been up); normally nothing.
    """

    def __init__(
        self,
        me: NodeId,
        *,
        incarnation: int,
        timing: Timing,
        now_s: float,
        members: Iterable[NodeId],
        beliefs: dict[NodeId, Rumour] | None = None,
        rings: Rings | None = None,
    ) -> None:
        self.me = me
        self.incarnation = incarnation
        self.version = 0
        self.timing = timing
        self.members = set(members)
        self.beliefs = beliefs if beliefs is not None else {}
        self.beliefs.pop(me, None)
        self.watched: dict[NodeId, Watched] = {}
        self.roster_digest = 0
        """Set by the node; part of the heartbeat's digest."""
        self._digest = 0
        for rumour in self.beliefs.values():
            self._digest ^= _rumour_digest(rumour.node, rumour.incarnation, rumour.version, rumour.here)
        self._rings = rings
        self._fellows: frozenset[NodeId] = frozenset()
        self._fresh: dict[NodeId, int] = {}
        self._shown: dict[NodeId, int] = {node: each.incarnation for node, each in self.beliefs.items() if each.here}
        """Who was announced to be here, as which incarnation."""
        self._touched: set[NodeId] = set()
        self._sequence = 0
        self._beat_at_s = now_s
        self._differs_since_s: dict[NodeId, float] = {}
        self._exchanged_s = float("-inf")
        self.relayed: set[NodeId] = set()
        """To whom messages may have to go by others; empty nearly always."""
        self._question = 0
        self._questions: dict[NodeId, float] = {}
        """Subjects asked about, until when witnesses may answer."""
        self._asked_anew: set[NodeId] = set()
        """Doubted peers that were asked about again after a stall of this device."""
        self._asks: dict[NodeId, list[tuple[NodeId, int, float]]] = {}
        self._newer: dict[NodeId, tuple[int, float, int]] = {}
        self._search = 0
        self._absent_order: list[NodeId] = []
        self._is_dirty = True
        self._now_s = now_s
        self._armed_s = float("inf")
        self._effects: list[Effect] = []

    # ---- what others ask

    def is_here(self, node: NodeId) -> bool:
        watched = self.watched.get(node)
        if watched is not None:
            return watched.is_here
        belief = self.beliefs.get(node)
        return belief is not None and belief.here

    def here(self) -> dict[NodeId, int]:
        """Everyone who was announced to be here, as which incarnation; this device left out."""
        return dict(self._shown)

    def _believed_here(self) -> list[NodeId]:
        """By what others say, too: some of these may not have been heard over our own link yet."""
        return [node for node, belief in self.beliefs.items() if belief.here]

    def incarnation_of(self, node: NodeId) -> int | None:
        belief = self.beliefs.get(node)
        return None if belief is None else belief.incarnation

    def relay_for(self, node: NodeId, now_s: float) -> NodeId | None:
        """Who can pass a message on to `node`; None where the direct link works, or nothing better is known."""
        watched = self.watched.get(node)
        if watched is None:
            return None
        silence_s = self.timing.silence_s
        if watched.state is Peer.HERE and now_s - watched.hears_us_s <= silence_s:
            return None
        for relay, said_s in watched.relays.items():
            if now_s - said_s <= 2 * silence_s and self._is_sound(relay, now_s):
                return relay
        return None

    def _is_sound(self, node: NodeId, now_s: float) -> bool:
        watched = self.watched.get(node)
        return watched is not None and watched.state is Peer.HERE and now_s - watched.hears_us_s <= self.timing.silence_s

    # ---- the one way in

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Takes an event; messages are from trusted members, over their direct links."""
        self._now_s = now_s
        effects: list[Effect] = []
        self._effects = effects
        if now_s - self._beat_at_s > self.timing.heartbeat_s:
            self._was_asleep(now_s - self._beat_at_s)
        if isinstance(event, Received):
            self._receive(event.peer, event.message)
        elif isinstance(event, TimerFired):
            self._armed_s = float("inf")
        elif isinstance(event, LinkClosed):
            self._on_closed(event.peer)
        elif isinstance(event, Learned):
            self._learn(event.fact)
        elif isinstance(event, Commanded):
            self._obey(event.command)
        if self._questions:
            self._end_questions()
        if now_s >= self._beat_at_s:
            self._beat()
        if self._touched:
            self._show()
        due_s = self._beat_at_s
        if self._questions:
            due_s = min(due_s, min(self._questions.values()))
        if due_s < self._armed_s:
            self._armed_s = due_s
            effects.append(SetTimer(TIMER, due_s))
        return effects

    def _was_asleep(self, late_s: float) -> None:
        """Silence that this device slept through says nothing about the others; what it heard awake of theirs still counts.

        So a device that stalls again and again misses a dead peer later, not never.
        """
        self._beat_at_s = self._now_s
        if late_s > self.timing.stranger_s:
            self._effects.append(Announce(Woke(late_s)))
            for watched in self.watched.values():
                self._move(watched, "slept ourselves")
            for node in sorted(self._believed_here()):
                belief = self.beliefs[node]
                self._set_belief(Rumour(node, belief.incarnation, belief.version, here=False), spread=False)
        for watched in self.watched.values():
            watched.heard_s = min(self._now_s, watched.heard_s + late_s)
            watched.hears_us_s = min(self._now_s, watched.hears_us_s + late_s)
        # The answers may wait behind this event, so a doubt is asked about anew; but once only, however often we stall.
        doubted = {node for node, watched in self.watched.items() if watched.state is Peer.DOUBTED}
        asked_anew = self._asked_anew & doubted
        self._questions = {node: due_s for node, due_s in self._questions.items() if node in asked_anew}
        self._asked_anew = doubted
        for node in sorted(doubted - asked_anew):
            self._ask(self.watched[node])

    def _announce(self, fact: Fact) -> None:
        self._effects.append(Announce(fact))

    def _move(self, watched: Watched, event: str, rumour: Rumour | None = None) -> None:
        """Takes a transition of the table, and does what it says."""
        outcome = PEER[watched.state, event]
        watched.state = outcome.state
        self._touched.add(watched.node)
        if AskHeard in outcome.sends:
            self._ask(watched)
        elif Rumours in outcome.sends and rumour is not None:
            self._effects.append(Send((watched.node,), Rumours((rumour,), is_answer=True)))
        if LinkChanged in outcome.announces:
            self._announce(LinkChanged(watched.node, self.me, is_up=outcome.state is Peer.HERE))

    def _show(self) -> None:
        """Announces who is here now and was not, and the other way round, each once."""
        for node in sorted(self._touched):
            belief, watched, shown = self.beliefs.get(node), self.watched.get(node), self._shown.get(node)
            is_here = belief is not None and belief.here and (watched is None or watched.is_here)
            if shown is not None and not (is_here and belief is not None and belief.incarnation == shown):
                del self._shown[node]
                self._announce(MemberGone(node, shown))
            if is_here and belief is not None and belief.incarnation != shown:
                self._shown[node] = belief.incarnation
                self._announce(MemberHere(node, belief.incarnation))
        self._touched.clear()

    # ---- beating

    def _beat(self) -> None:
        now_s, timing = self._now_s, self.timing
        if self._is_dirty:
            self._choose_watched()
        heard = []
        for watched in self.watched.values():
            silent_s = now_s - watched.heard_s
            if watched.state is Peer.HERE:
                if self._is_silent(silent_s):
                    self._move(watched, "silent")
                else:
                    heard.append(watched.node)
                    if now_s - watched.hears_us_s > timing.silence_s and now_s - watched.asked_s > timing.silence_s:
                        self._ask(watched)
            elif watched.state in (Peer.CUT, Peer.SOUGHT) and min(silent_s, now_s - watched.asked_s) > timing.silence_s:
                self._move(watched, "silent")
        self._sequence += 1
        targets = list(self.watched)
        if (stranger := self._next_absent()) is not None:
            targets.append(stranger)
        if targets:
            self._effects.append(Send(tuple(targets), self._heartbeat(tuple(heard), self._next_rumours())))
        self._beat_at_s = now_s + timing.heartbeat_s

    def _is_silent(self, silent_s: float) -> bool:
        return silent_s > self.timing.silence_s

    def _heartbeat(self, heard: tuple[NodeId, ...], rumours: tuple[Rumour, ...], *, is_answer: bool = False) -> Heartbeat:
        return Heartbeat(self.incarnation, self.version, self._sequence, heard, self._whole_digest(), rumours, is_answer)

    def _whole_digest(self) -> int:
        """Of the roster and of every belief, the one about this device included: the same for all who agree."""
        own = _rumour_digest(self.me, self.incarnation, self.version, True)
        return (self.roster_digest ^ self._digest ^ own) & 0xFFFFFFFFFFFFFF

    def _next_rumours(self) -> tuple[Rumour, ...]:
        if not self._fresh:
            return ()
        chosen = []
        for node in sorted(self._fresh, key=lambda each: -self._fresh[each])[:RUMOURS_PER_BEAT]:
            chosen.append(self._own_rumour() if node == self.me else self.beliefs[node])
            self._fresh[node] -= 1
            if self._fresh[node] <= 0:
                del self._fresh[node]
        return tuple(chosen)

    def _own_rumour(self) -> Rumour:
        return Rumour(self.me, self.incarnation, self.version, here=True)

    def _next_absent(self) -> NodeId | None:
        """One member after the other of those that are neither here nor watched: somebody must meet them again."""
        if len(self.members) <= len(self.watched) + 1:
            return None
        if len(self._absent_order) != len(self.members):
            self._absent_order = sorted(self.members)
        for _ in range(8):
            self._search = (self._search + 1) % len(self._absent_order)
            node = self._absent_order[self._search]
            belief = self.beliefs.get(node)
            if node != self.me and node not in self.watched and (belief is None or not belief.here):
                return node
        return None

    def _choose_watched(self) -> None:
        self._is_dirty = False
        if len(self.members) <= EVERYONE_MAX:
            wanted = set(self.members)
        else:
            wanted = self._here_rings().neighbours(self.me)
        wanted |= self._fellows & self.members
        wanted.discard(self.me)
        if wanted == self.watched.keys():
            return
        for node in self.watched.keys() - wanted:
            del self.watched[node]
            self._touched.add(node)
            self._questions.pop(node, None)
        for node in sorted(wanted - self.watched.keys()):
            watched = self.watched[node] = Watched(node, self._now_s)
            if node in self._shown:
                self._move(watched, "heard")  # by those that watched it until now
        self._effects.append(Watch(frozenset(wanted)))

    def _here_rings(self) -> Rings:
        if self._rings is None:
            self._rings = Rings([self.me, *self._believed_here()])
        return self._rings

    # ---- hearing

    def _receive(self, peer: NodeId, message: Any) -> None:
        kind = type(message)
        if kind is Heartbeat or kind is Greeting:
            if not self._is_this_incarnation(peer, message):
                return
            if peer not in self.watched and self._wants_to_watch(peer):
                self._is_dirty = True
                self._choose_watched()
        watched = self.watched.get(peer)
        if watched is not None:
            watched.heard_s = self._now_s
            if watched.state is not Peer.HERE and peer in self.beliefs:
                self._hear_again(watched)
        if kind is Heartbeat:
            self._on_heartbeat(peer, message, watched)
        elif kind is Greeting and watched is not None:
            watched.hears_us_s = self._now_s
        elif kind is AskHeard:
            self._on_ask_heard(peer, message)
        elif kind is Heard:
            self._on_heard(peer, message)
        elif kind is Probe:
            self._answer_beat(peer)
        elif kind is Rumours:
            self._on_rumours(peer, message)
        elif kind is Goodbye:
            self._on_goodbye(peer, message)
        if peer in self._asks:
            self._answer_asks(peer, watched)

    def _wants_to_watch(self, peer: NodeId) -> bool:
        return peer in self.members and (len(self.members) <= EVERYONE_MAX or peer in self._fellows)

    def _is_this_incarnation(self, peer: NodeId, message: Heartbeat | Greeting) -> bool:
        """Accepts a later incarnation, unless the one before goes on: then the key is used twice."""
        belief = self.beliefs.get(peer)
        version = message.version if type(message) is Heartbeat else 0
        if belief is None or message.incarnation > belief.incarnation:
            watched = self.watched.get(peer)
            if belief is not None and belief.here and watched is not None and watched.state is Peer.HERE:
                incarnation, since_s, beats = self._newer.get(peer, (0, 0.0, 0))
                if incarnation != message.incarnation:
                    self._newer[peer] = (message.incarnation, self._now_s, 0)
                    return False
                if beats >= _CLONE_BEATS:
                    self._refuse_clone(peer, message.incarnation)
                    return False
                if self._now_s - since_s < _CLONE_PATIENCE_S:
                    return False
            self._newer.pop(peer, None)
            if watched is not None:
                self._move(watched, "outlived")
                self._questions.pop(peer, None)
            self._set_belief(Rumour(peer, message.incarnation, version, here=True))
            return True
        if message.incarnation < belief.incarnation:
            self._effects.append(Send((peer,), Rumours((belief,), is_answer=True)))
            return False
        if peer in self._newer and type(message) is Heartbeat:
            incarnation, since_s, beats = self._newer[peer]
            self._newer[peer] = (incarnation, since_s, beats + 1)
        if version > belief.version:
            self._set_belief(Rumour(peer, message.incarnation, version, here=True))
        elif not belief.here and (version == belief.version):
            # It is here after all. Only its own next version convinces the others, so it is told.
            self._effects.append(Send((peer,), Rumours((belief,), is_answer=True)))
            self._set_belief(Rumour(peer, belief.incarnation, belief.version + 1, here=True), spread=False)
        return True

    def _refuse_clone(self, peer: NodeId, incarnation: int) -> None:
        text = (
            "another device with the same key is in the cluster: the key was cloned, with a disk image or a backup. "
            "Delete the key here and join by a new invitation"
        )
        self._effects.append(Send((peer,), Refused("clone", text, incarnation)))

    def _hear_again(self, watched: Watched) -> None:
        watched.is_closed = False
        watched.hears_us_s = max(watched.hears_us_s, self._now_s - self.timing.silence_s / 2)
        self._questions.pop(watched.node, None)
        self._move(watched, "heard")

    def _on_heartbeat(self, peer: NodeId, message: Heartbeat, watched: Watched | None) -> None:
        if watched is None:
            if not message.is_answer:
                self._answer_beat(peer)
        else:
            watched.is_closed = False
            if self.me in message.heard:
                watched.hears_us_s = self._now_s
        for rumour in message.rumours:
            self._believe(rumour)
        if message.digest == self._whole_digest():
            self._differs_since_s.pop(peer, None)
        else:
            since_s = self._differs_since_s.setdefault(peer, self._now_s)
            patience_s = self.timing.digest_patience_s
            if self._now_s - since_s > patience_s and self._now_s - self._exchanged_s > patience_s:
                self._exchanged_s = self._now_s
                del self._differs_since_s[peer]
                self._effects.append(Send((peer,), self._all_rumours(is_answer=False)))

    def _answer_beat(self, peer: NodeId) -> None:
        self._effects.append(Send((peer,), self._heartbeat((peer,), (), is_answer=True)))

    def _all_rumours(self, *, is_answer: bool) -> Rumours:
        return Rumours((*self.beliefs.values(), self._own_rumour()), is_answer, self.roster_digest)

    def _on_rumours(self, peer: NodeId, message: Rumours) -> None:
        for rumour in message.rumours:
            self._believe(rumour)
        if message.roster_digest not in (0, self.roster_digest):
            self._announce(RostersDiffer(peer))
        if not message.is_answer:
            self._effects.append(Send((peer,), self._all_rumours(is_answer=True)))

    def _on_goodbye(self, peer: NodeId, message: Goodbye) -> None:
        belief = self.beliefs.get(peer)
        if belief is None or belief.incarnation != message.incarnation:
            return
        watched = self.watched.get(peer)
        if watched is not None:
            self._move(watched, "left")
            self._questions.pop(peer, None)
        self._set_belief(Rumour(peer, belief.incarnation, belief.version, here=False))

    # ---- believing

    def _believe(self, rumour: Rumour) -> None:
        node = rumour.node
        if node == self.me:
            self._answer_rumour(rumour)
            return
        if node not in self.members:
            return
        before = self.beliefs.get(node)
        if before is not None and _rank(rumour) <= _rank(before):
            return
        watched = self.watched.get(node)
        if watched is not None and before is not None and rumour.incarnation == before.incarnation:
            if not rumour.here:
                if watched.state in (Peer.DOUBTED, Peer.CUT) and node in self._questions:
                    return  # it is being found out; the same rumour from many must not put the answer off again and again
                is_here = watched.is_here
                self._move(watched, "rumoured gone", rumour)
                if is_here:
                    return  # what we hear ourselves counts more
        elif watched is not None and watched.state is Peer.HERE and before is not None:
            return  # a later incarnation than the one we hear: it shows itself, or it is a clone
        elif watched is not None:
            self._move(watched, "outlived")
            self._questions.pop(node, None)
        self._set_belief(rumour)
        if rumour.here and watched is not None:
            if watched.state in (Peer.ABSENT, Peer.GONE):
                watched.heard_s = self._now_s  # the link is given the time to come up
            self._move(watched, "rumoured here")

    def _answer_rumour(self, rumour: Rumour) -> None:
        if rumour.incarnation > self.incarnation:
            self._announce(Outranked(rumour.incarnation))
        elif rumour.incarnation == self.incarnation and not rumour.here and rumour.version >= self.version:
            self.version = rumour.version + 1
            self._fresh[self.me] = self.timing.rumour_sends

    def _set_belief(self, rumour: Rumour, *, spread: bool = True) -> None:
        node, before = rumour.node, self.beliefs.get(rumour.node)
        if before is not None:
            self._digest ^= _rumour_digest(node, before.incarnation, before.version, before.here)
        self._digest ^= _rumour_digest(node, rumour.incarnation, rumour.version, rumour.here)
        self.beliefs[node] = rumour
        if spread:
            self._fresh[node] = self.timing.rumour_sends
        was_here = before is not None and before.here
        if rumour.here != was_here:
            self._is_dirty = self._is_dirty or len(self.members) > EVERYONE_MAX
            if self._rings is not None:
                (self._rings.add if rumour.here else self._rings.remove)(node)
        self._touched.add(node)

    # ---- doubting

    def _on_closed(self, peer: NodeId) -> None:
        watched = self.watched.get(peer)
        if watched is None:
            return
        watched.is_closed = True
        self._move(watched, "link closed")
        # Who saw the close first has asked already, and would wait for an answer that cannot come any more.
        for asker, question, until_s in self._asks.pop(peer, ()):
            if self._now_s <= until_s:
                self._effects.append(Send((asker,), Heard(peer, question, hears=False, reaches=False)))

    def _ask(self, watched: Watched) -> None:
        """Asks witnesses whether they hear the peer. With nobody to ask, our own word is all there is."""
        node, now_s = watched.node, self._now_s
        witnesses = self._witnesses(node)
        watched.asked_s = now_s
        watched.denials = set()
        watched.witnesses = frozenset(witnesses)
        self._question += 1
        watched.question = self._question
        if witnesses:
            self._effects.append(Send(tuple(witnesses), AskHeard(node, self._question)))
        self._effects.append(Send((node,), Probe(self.incarnation)))
        self._questions[node] = now_s + (self.timing.witness_s if witnesses else 0.0)
        if not witnesses and watched.state is Peer.CUT:
            self._questions[node] = now_s + self.timing.witness_s

    def _witnesses(self, subject: NodeId) -> list[NodeId]:
        sound = [node for node, each in self.watched.items() if each.state is Peer.HERE and node != subject]
        if len(self.members) <= EVERYONE_MAX:
            return sound[:WITNESSES_MAX]
        near = [node for node in self._here_rings().neighbours(subject) if node != self.me and self.is_here(node)]
        fellows = [node for node in sound if node in self._fellows and subject in self._fellows]
        return sorted({*near[:WITNESSES_MAX], *fellows[:WITNESSES_MAX]})

    def _on_ask_heard(self, peer: NodeId, message: AskHeard) -> None:
        subject = message.subject
        watched = self.watched.get(subject)
        knows_better = watched is not None and (
            watched.state is Peer.GONE or (watched.is_closed and not self._hears(watched))
        )
        if subject == self.me or knows_better:
            self._effects.append(Send((peer,), Heard(subject, message.question, hears=subject == self.me, reaches=False)))
            return
        asks = self._asks.setdefault(subject, [])
        if len(asks) < 4 * WITNESSES_MAX:
            asks.append((peer, message.question, self._now_s + 2 * self.timing.witness_s))
        self._effects.append(Send((subject,), Probe(self.incarnation)))

    def _hears(self, watched: Watched) -> bool:
        return watched.state is Peer.HERE

    def _answer_asks(self, subject: NodeId, watched: Watched | None) -> None:
        reaches = watched is not None and self._now_s - watched.hears_us_s <= self.timing.silence_s
        for asker, question, until_s in self._asks.pop(subject):
            if self._now_s <= until_s:
                self._effects.append(Send((asker,), Heard(subject, question, hears=True, reaches=reaches)))

    def _on_heard(self, peer: NodeId, message: Heard) -> None:
        watched = self.watched.get(message.subject)
        if watched is None or watched.question != message.question:
            return
        if message.hears:
            if message.reaches:
                watched.relays[peer] = self._now_s
                self.relayed.add(message.subject)
                if len(watched.relays) > WITNESSES_MAX:
                    del watched.relays[next(iter(watched.relays))]
            self._questions.pop(message.subject, None)
            self._move(watched, "a witness hears it")
            return
        watched.denials.add(peer)
        if watched.denials >= watched.witnesses and message.subject in self._questions:
            self._questions[message.subject] = self._now_s

    def _end_questions(self) -> None:
        due = [node for node, due_s in self._questions.items() if self._now_s >= due_s]
        for node in due:
            del self._questions[node]
            watched = self.watched.get(node)
            if watched is not None and self._is_unheard(watched):
                self._lose(watched)

    def _is_unheard(self, watched: Watched) -> bool:
        """The question may be about a doubt that is long settled."""
        return watched.state in (Peer.SOUGHT, Peer.DOUBTED, Peer.CUT)

    def _lose(self, watched: Watched) -> None:
        self._move(watched, "nobody hears it")
        watched.relays.clear()
        self.relayed.discard(watched.node)
        belief = self.beliefs.get(watched.node)
        if belief is not None and belief.here:
            self._set_belief(Rumour(watched.node, belief.incarnation, belief.version, here=False))

    # ---- what other cores say

    def _learn(self, fact: Fact) -> None:
        if isinstance(fact, MemberAdded | MemberRemoved):
            self._absent_order = []
        if isinstance(fact, MemberAdded):
            self.members.add(fact.node)
            self._is_dirty = True
        elif isinstance(fact, MemberRemoved):
            self.members.discard(fact.node)
            self._is_dirty = True
            self.watched.pop(fact.node, None)
            self._questions.pop(fact.node, None)
            belief = self.beliefs.get(fact.node)
            if belief is not None:
                self._set_belief(msgspec.structs.replace(belief, here=False), spread=False)
                belief = self.beliefs.pop(fact.node)
                self._digest ^= _rumour_digest(fact.node, belief.incarnation, belief.version, belief.here)
                self._fresh.pop(fact.node, None)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Doubt):
            watched = self.watched.get(command.node)
            if watched is not None:
                self._move(watched, "missed by a group")
            if not self.is_here(command.node):
                self._announce(MemberGone(command.node, self.incarnation_of(command.node) or 0))
        elif isinstance(command, WatchFellows):
            if command.nodes != self._fellows:
                self._fellows = command.nodes
                self._choose_watched()
        elif isinstance(command, SayGoodbye) and self.watched:
            self._effects.append(Send(tuple(self.watched), Goodbye(self.incarnation)))
