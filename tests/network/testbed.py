"""Devices with an `Awareness` each, over links whose true rates are known: one thread, one seed, no real time."""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

from shoal.effects import (
    Announce,
    Effect,
    Event,
    Learned,
    LinkOpened,
    MeasureLink,
    Observed,
    Received,
    Send,
    SetTimer,
    TimerFired,
)
from shoal.ids import NodeId
from shoal.membership.failure import MemberHere
from shoal.network.awareness import DEFAULT_POLICY, TIMER, Awareness, AwarenessPolicy
from shoal.network.facts import GraphChanged
from shoal.network.graph import Link, LinkGraph
from shoal.node import wire

DELAY_S = 0.02
SCATTER = 0.05
PIECE_S = 0.25
"""How long a transfer goes on before its receiver tells of it."""


class Testbed:
    """A cluster on links that do not contend; `rates` (bytes/s) may be changed while it runs."""

    __test__ = False

    def __init__(
        self,
        rates: dict[Link, float],
        *,
        seed: int,
        policy: AwarenessPolicy = DEFAULT_POLICY,
        piece_s: float = PIECE_S,
        piece_bytes: int = 1 << 30,
    ) -> None:
        self.rates = rates
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.piece_s, self.piece_bytes = piece_s, piece_bytes
        self.nodes = sorted({link.source for link in rates})
        self.cores = {node: Awareness(node, incarnation=1, now_s=0.0, policy=policy) for node in self.nodes}
        self.graphs: dict[NodeId, LinkGraph] = {}
        self.bytes_sent = dict.fromkeys(self.nodes, 0)
        self.report_bytes: list[int] = []
        self.probes: list[tuple[float, Link, int]] = []
        """When, over which link, and how many bytes went."""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._timers: dict[NodeId, float] = {}
        self._busy_until_s = dict.fromkeys(rates, 0.0)
        for node in self.nodes:
            for other in self.nodes:
                if other != node:
                    self.step(node, Learned(MemberHere(other, 1)))
        for link in sorted(rates):
            self.step(link.source, LinkOpened(link.target))

    def later(self, delay_s: float, act: Callable[[], None]) -> None:
        heappush(self._queue, (self.now_s + delay_s, next(self._order), act))

    def run(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, act = heappop(self._queue)
            act()
        self.now_s = until_s

    def step(self, node: NodeId, event: Event) -> None:
        for effect in self.cores[node].step(event, self.now_s):
            self._carry_out(node, effect)

    def _carry_out(self, node: NodeId, effect: Effect) -> None:
        if isinstance(effect, Send):
            data = wire.encode(effect.message)
            self.report_bytes.append(len(data))
            for peer in effect.peers:
                assert Link(node, peer) in self.rates
                self.bytes_sent[node] += len(data)
                received = Received(node, wire.decode(data))
                self.later(DELAY_S, lambda peer=peer, received=received: self.step(peer, received))  # type: ignore[misc]
        elif isinstance(effect, SetTimer):
            assert effect.key == TIMER
            self._timers[node] = effect.at_s
            self.later(max(0.0, effect.at_s - self.now_s), lambda: self._fire(node, effect.at_s))
        elif isinstance(effect, Announce):
            assert isinstance(effect.fact, GraphChanged)
            self.graphs[node] = effect.fact.graph
        else:
            assert isinstance(effect, MeasureLink)
            link = Link(node, effect.peer)
            num_bytes = min(effect.num_bytes_max, int(self.rates[link] * effect.seconds_max))
            self.probes.append((self.now_s, link, num_bytes))
            self.transfer(link, num_bytes)

    def _fire(self, node: NodeId, at_s: float) -> None:
        if self._timers.get(node) == at_s:
            self.step(node, TimerFired(TIMER))

    def transfer(self, link: Link, num_bytes: int) -> None:
        """Sends as fast as the link allows, after what it carries already; a piece may be faster or slower than the next."""
        started_s = max(self.now_s, self._busy_until_s[link])
        while num_bytes > 0:
            rate = self.rates[link] * self.rng.lognormvariate(0.0, SCATTER)
            piece_bytes = min(num_bytes, self.piece_bytes, int(rate * self.piece_s))
            seconds = piece_bytes / rate
            started_s += seconds
            num_bytes -= piece_bytes
            observed = Observed(link.source, link.target, piece_bytes, seconds)
            self.later(started_s - self.now_s, lambda observed=observed: self.step(link.target, observed))  # type: ignore[misc]
        self._busy_until_s[link] = started_s


NINE_NODES_PAIRS = ((1, 2), (1, 3), (2, 3), (2, 5), (3, 4), (4, 5), (4, 6), (5, 7), (6, 7), (6, 8), (6, 9), (7, 8), (8, 9))
"""NetStorm's testbed (arXiv 2404.11352): nine sites, 26 directed links, 20-155 Mbit/s, drawn anew every 180 s."""


def nine_nodes_links() -> list[Link]:
    pairs = [(NodeId(f"n{a}"), NodeId(f"n{b}")) for a, b in NINE_NODES_PAIRS]
    return sorted(Link(*ends) for a, b in pairs for ends in ((a, b), (b, a)))


def draw_rate(rng: random.Random) -> float:
    return rng.uniform(20e6, 155e6) / 8
