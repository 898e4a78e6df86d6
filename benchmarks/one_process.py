"""The same decisions as in `members.py`, by eight devices in one process and on one thread: cores, encoded messages, eight
files that are written. No sockets, no TLS, no other thread: what the decision itself costs.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from pathlib import Path

from benchmarks.core import roster_of
from shoal.effects import (
    Announce,
    Commanded,
    Effect,
    Event,
    Learned,
    LinkOpened,
    Received,
    Send,
    SetTimer,
    Store,
    Stored,
    TimerFired,
)
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import LinkChanged
from shoal.membership.group import CreateGroup, JoinGroup, LeaveGroup, ReportProgress
from shoal.membership.group.facts import Decided
from shoal.membership.messages import AskLeave, LinkReport
from shoal.membership.timing import Timing
from shoal.node import wire
from shoal.node.core import START, NodeCore
from shoal.runtime.node.disk import Disk
from shoal.simulation.keys import SimulatedKeys

GROUP = GroupId("bench")
_TICK_S = 0.01
_DECIDED_S_MAX = 2.0
_BETWEEN_S = 0.12
"""Simulated, from one event to the next: a heartbeat of the leader lies between."""


class OneProcess:
    """Eight cores with their disks; time is simulated, what a decision takes is not."""

    def __init__(self, folder: Path, num_devices: int, *, link_hold_s: float) -> None:
        self.nodes = [NodeId(f"device{number:02}") for number in range(num_devices)]
        self.now_s = 0.0
        self.queue: deque[tuple[NodeId, Event | tuple[NodeId, bytes]]] = deque()
        self.timers: dict[tuple[NodeId, str], float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.disks = {node: Disk(folder / node) for node in self.nodes}
        self.spent: dict[str, list[float]] = {"disconnect": [], "connect": [], "scale_in": []}
        """Seconds from the event at the leader to the quorum's last acknowledgement."""
        self._event = ""
        self._begun_s = 0.0
        roster = roster_of(self.nodes)
        self.cores = {
            node: NodeCore(
                node,
                incarnation=1,
                keys=SimulatedKeys(node),
                timing=Timing(link_hold_s=link_hold_s),
                now_s=0.0,
                since_1970_s=1.7e9,
                roster=roster,
            )
            for node in self.nodes
        }
        for node in self.nodes:
            self.queue.append((node, TimerFired(START)))
            self.queue += [(node, LinkOpened(peer)) for peer in self.nodes if peer != node]

    def close(self) -> None:
        for disk in self.disks.values():
            disk.close()

    def drain(self) -> None:
        """Delivers until nothing is on its way."""
        while self.queue:
            node, event = self.queue.popleft()
            if isinstance(event, tuple):
                event = Received(event[0], wire.decode(event[1]))
            self._step(node, event)

    def run(self, seconds: float) -> None:
        """Lets simulated time pass."""
        for _ in range(round(seconds / _TICK_S)):
            self.now_s += _TICK_S
            due = [timer for timer, at_s in self.timers.items() if at_s <= self.now_s]
            for node, key in due:
                del self.timers[node, key]
                self.queue.append((node, TimerFired(key)))
            self.drain()

    def decide(self, event: str, node: NodeId, wish: Event) -> None:
        """Lets a device learn or want something that the leader hears of, and waits for the decision."""
        self._event = event
        self.queue.append((node, wish))
        end_s = self.now_s + _DECIDED_S_MAX
        while self._event and self.now_s < end_s:
            self.run(_TICK_S)
        self.run(_BETWEEN_S)

    def _step(self, node: NodeId, event: Event) -> None:
        if node == self.nodes[0] and isinstance(event, Received) and isinstance(event.message, LinkReport | AskLeave):
            self._begun_s = time.perf_counter()
        pending = deque([event])
        while pending:
            event = pending.popleft()
            core = self.cores[node]
            # What presence finds of a link is told to the group alone: presence itself is not at fault here.
            of_group = core.groups[GROUP] if isinstance(event, Learned) else core
            for effect in of_group.step(event, self.now_s):
                self._carry_out(node, effect, pending)

    def _carry_out(self, node: NodeId, effect: Effect, pending: deque[Event]) -> None:
        if type(effect) is Send:
            data = wire.encode(effect.message)
            self.queue += [(peer, (node, data)) for peer in effect.peers]
        elif type(effect) is SetTimer:
            self.timers[node, effect.key] = effect.at_s
        elif type(effect) is Store:
            stored = Stored(effect.key, effect.number)
            self.disks[node].store(effect.key, effect.value, lambda: pending.append(stored))
        elif type(effect) is Announce and type(effect.fact) is Decided and self._event:
            self.spent[self._event].append(time.perf_counter() - self._begun_s)
            self._event = ""


def measure_one_process(folder: Path, num_devices: int, rounds: int, *, link_hold_s: float) -> dict[str, list[float]]:
    """Seconds per decision, by event."""
    cluster = OneProcess(folder, num_devices, link_hold_s=link_hold_s)
    leader, reporter, source, leaver = (*cluster.nodes[:3], cluster.nodes[-1])
    ready = Commanded(ReportProgress(GROUP, 0, has_state=True, ready=True))
    cluster.run(1.0)
    cluster.queue.append((leader, Commanded(CreateGroup(GROUP, steadiness=1))))
    cluster.run(1.0)
    for node in cluster.nodes[1:]:
        cluster.queue.append((node, Commanded(JoinGroup(GROUP))))
    cluster.run(2.0)
    cluster.queue += [(node, ready) for node in cluster.nodes]
    cluster.run(2.0)
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        cluster.decide("disconnect", reporter, Learned(LinkChanged(source, reporter, is_up=False)))
        cluster.decide("connect", reporter, Learned(LinkChanged(source, reporter, is_up=True)))
        cluster.decide("scale_in", leaver, Commanded(LeaveGroup(GROUP)))
        cluster.queue.append((leaver, Commanded(JoinGroup(GROUP))))
        cluster.run(_BETWEEN_S)
        cluster.queue.append((leaver, ready))
        cluster.run(_BETWEEN_S)
    gc.unfreeze()
    cluster.close()
    if {len(each) for each in cluster.spent.values()} != {rounds}:
        raise AssertionError(f"not all was decided: { {event: len(each) for event, each in cluster.spent.items()} }")
    return cluster.spent
