"""One simulated device: a clock, a disk, a process that runs or does not."""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from shoal.effects import Event
from shoal.ids import GroupId, NodeId
from shoal.node.core import NodeCore
from shoal.node.journal import Journal
from shoal.simulation.keys import SimulatedKeys


class Power(StrEnum):
    OFF = "off"
    RUNNING = "running"
    FROZEN = "frozen"
    ASLEEP = "asleep"


class Link:
    """A connection. `ends` are the devices that believe it stands; only what both believe is delivered."""

    __slots__ = ("ends", "first", "second")

    def __init__(self, first: NodeId, second: NodeId) -> None:
        self.first = first
        self.second = second
        self.ends = {first, second}

    def other(self, node: NodeId) -> NodeId:
        return self.second if node == self.first else self.first


class Trainer:
    """Stands in for a training run: which step's state the device holds, in memory and on disk."""

    __slots__ = ("checkpoint", "ready_as", "shadow_since_s", "step")

    def __init__(self) -> None:
        self.step = -1
        self.checkpoint = -1
        self.ready_as = 0
        """The incarnation that reported to have caught up."""
        self.shadow_since_s: float | None = None


class Device:
    """Everything about a device but what it decides.

    Args:
        offset_s, rate: its clock shows `offset_s + rate * t`.
        wall_skew_s: how far its idea of the date is off.
        disk_s: how long a write takes.
    """

    def __init__(self, name: str, *, offset_s: float, rate: float, wall_skew_s: float, disk_s: float) -> None:
        self.node = NodeId(name)
        self.keys = SimulatedKeys(name)
        self.offset_s = offset_s
        self.rate = rate
        self.wall_skew_s = wall_skew_s
        self.disk_s = disk_s
        self.core: NodeCore | None = None
        self.power = Power.OFF
        self.boots = 0
        self.incarnation = 0
        self.disk: dict[str, bytes] = {}
        self.unwritten: deque[tuple[str, int, bytes]] = deque()
        self.disk_free_s = 0.0
        self.links: dict[NodeId, Link] = {}
        self.watch: frozenset[NodeId] = frozenset()
        self.timers: dict[str, int] = {}
        self.held: deque[Event] = deque()
        """What waits for a thaw, or for the end of sleep."""
        self.slept_since_s = 0.0
        self.groups: dict[GroupId, str] = {}
        """What the owner wants it to be, and where."""
        self.trainers: dict[GroupId, Trainer] = {}
        self.journal: Journal | None = None
        self.is_kept_off = False
        """Its owner took it away."""
        self.now_s = offset_s

    def clock(self, at_s: float) -> float:
        """What its clock shows; it never goes back."""
        self.now_s = now_s = max(self.now_s, self.offset_s + self.rate * at_s)
        return now_s

    def at(self, clock_s: float) -> float:
        """When its clock will show that."""
        return (clock_s - self.offset_s) / self.rate

    def trainer(self, group: GroupId) -> Trainer:
        return self.trainers.setdefault(group, Trainer())
