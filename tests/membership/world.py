"""A few cores in one thread: messages take a millisecond, disks none, nothing is lost but what a test cuts."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import count
from typing import Generic, Protocol, TypeVar

from shoal.effects import (
    Announce,
    Command,
    Commanded,
    Effect,
    Event,
    Fact,
    Learned,
    LinkClosed,
    LinkOpened,
    Message,
    Received,
    Send,
    SetTimer,
    Store,
    Stored,
    TimerFired,
    Watch,
)
from shoal.ids import NodeId
from shoal.node import wire

DELAY_S = 0.001


class Steps(Protocol):
    """Any core."""

    def step(self, event: Event, now_s: float) -> list[Effect]: ...


Core = TypeVar("Core", bound=Steps)
_Fact = TypeVar("_Fact", bound=Fact)


class World(Generic[Core]):
    """Runs `cores`.

    `cuts` are directed pairs over which nothing comes; `stopped` devices take no events, and get their timers late once
    they go on.
    `facts` is all that was announced: who, when, what. `sent` is every message with its sender and receiver.
    """

    def __init__(self, cores: Mapping[NodeId, Core], *, now_s: float = 0.0) -> None:
        self.cores = dict(cores)
        self.now_s = now_s
        self.cuts: set[tuple[NodeId, NodeId]] = set()
        self.stopped: set[NodeId] = set()
        self.facts: list[tuple[NodeId, float, Fact]] = []
        self.sent: list[tuple[NodeId, NodeId, Message]] = []
        self.disks: dict[NodeId, dict[str, bytes]] = {node: {} for node in cores}
        self.slow_disks: set[NodeId] = set()
        """Devices whose writes are not answered."""
        self._links: set[frozenset[NodeId]] = set()
        self._timers: dict[tuple[NodeId, str], float] = {}
        self._queue: list[tuple[float, int, NodeId, Event]] = []
        self._order = count()

    def tell(self, node: NodeId, *events: Event) -> list[Effect]:
        """Gives a device events now; returns what it wanted done."""
        effects = []
        for event in events:
            effects += self._step(node, event)
        return effects

    def command(self, node: NodeId, command: Command) -> list[Effect]:
        return self.tell(node, Commanded(command))

    def learn(self, node: NodeId, *facts: Fact) -> None:
        for fact in facts:
            self.tell(node, Learned(fact))

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        until_s = self.now_s + seconds
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, node, event = heapq.heappop(self._queue)
            if node not in self.cores:
                continue
            if isinstance(event, TimerFired):
                if self._timers.get((node, event.key)) != self.now_s:
                    continue
                if node in self.stopped:
                    self._set_timer(node, event.key, self.now_s + 0.05)
                    continue
                del self._timers[node, event.key]
            if node not in self.stopped:
                self._step(node, event)
        self.now_s = until_s

    def cut(self, one: NodeId, other: NodeId, *, one_way: bool = False) -> None:
        self.cuts.add((one, other))
        if not one_way:
            self.cuts.add((other, one))

    def close(self, node: NodeId, *, tell: bool = True) -> Core:
        """The process of `node` ends; the others' connections to it are closed."""
        core = self.cores.pop(node)
        for link in [link for link in self._links if node in link]:
            self._links.discard(link)
            (other,) = link - {node}
            if tell:
                self._put(other, LinkClosed(node))
        return core

    def known(self, node: NodeId, kind: type[_Fact]) -> list[_Fact]:
        """What `node` announced of this kind, in order."""
        return [fact for who, _, fact in self.facts if who == node and type(fact) is kind]

    def _put(self, node: NodeId, event: Event, delay_s: float = DELAY_S) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._order), node, event))

    def _set_timer(self, node: NodeId, key: str, at_s: float) -> None:
        at_s = max(at_s, self.now_s)
        self._timers[node, key] = at_s
        heapq.heappush(self._queue, (at_s, next(self._order), node, TimerFired(key)))

    def _step(self, node: NodeId, event: Event) -> list[Effect]:
        effects = self.cores[node].step(event, self.now_s)
        for effect in effects:
            if isinstance(effect, Send):
                message = wire.decode(wire.encode(effect.message))
                assert message == effect.message
                for peer in effect.peers:
                    self.sent.append((node, peer, message))
                    if (node, peer) not in self.cuts:
                        self._put(peer, Received(node, message))
            elif isinstance(effect, SetTimer):
                self._set_timer(node, effect.key, effect.at_s)
            elif isinstance(effect, Store):
                if node not in self.slow_disks:
                    self.disks[node][effect.key] = effect.value
                    self._put(node, Stored(effect.key, effect.number), 0.0)
            elif isinstance(effect, Announce):
                self.facts.append((node, self.now_s, effect.fact))
            elif isinstance(effect, Watch):
                self._dial(node, effect.peers)
        return effects

    def _dial(self, node: NodeId, peers: frozenset[NodeId]) -> None:
        for peer in sorted(peers):
            link = frozenset((node, peer))
            if peer in self.cores and link not in self._links and not {(node, peer), (peer, node)} & self.cuts:
                self._links.add(link)
                self._put(node, LinkOpened(peer))
                self._put(peer, LinkOpened(node))
