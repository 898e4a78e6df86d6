"""A large cluster whose devices come and go: how presence bears it, and how fast the simulation is.

The cluster has long been up when it begins: every device has the roster and knows who is here. Then, at a steady
rate, devices crash, lose
power, start again, say goodbye, and new ones join by invitation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.effects import Fact
from shoal.ids import NodeId
from shoal.membership.failure import MemberGone
from shoal.membership.messages import Rumour, Statement
from shoal.membership.presence import PresenceCore, Rings
from shoal.membership.roster import Roster
from shoal.node.core import NodeCore
from shoal.simulation.actions import Action
from shoal.simulation.checkers import Checkers
from shoal.simulation.device import Device, Power
from shoal.simulation.plan import make_roster
from shoal.simulation.world import SINCE_1970_S, NetworkModel, Settings, World

DEVICES_MAX = 1000


class Churn(msgspec.Struct, frozen=True):
    """What to do: `changes_per_s` devices come or go every second, all kinds alike."""

    num_devices: int = 1000
    seconds: float = 60.0
    changes_per_s: float = 2.0
    seed: int = 0


class ChurnReport(msgspec.Struct, frozen=True):
    """What came of it."""

    num_devices: int
    seconds: float
    num_events: int
    num_messages: int
    changes: dict[str, int]
    most_watched: int
    """The largest number of peers that any device watched."""
    num_here: int
    """Devices that were running at the end."""
    beliefs_right: float
    """Share of (device, device) pairs in which the first is right about whether the second is here."""
    detect_s_p50: float
    detect_s_p99: float
    """From a crash, power cut or goodbye until a running device knew it, over all pairs that did."""


class _Detection(Checkers):
    """Notes when whom was found to be gone."""

    def __init__(self) -> None:
        super().__init__()
        self.lost_s: dict[NodeId, float] = {}
        self.delays_s: list[float] = []

    def announced(self, device: Device, fact: Fact) -> None:
        del device
        if isinstance(fact, MemberGone) and fact.node in self.lost_s:
            self.delays_s.append(self.world.now_s - self.lost_s[fact.node])


def run_churn(churn: Churn, *, network: NetworkModel | None = None) -> tuple[ChurnReport, World]:
    """Runs it to its end.

    Raises:
        ValueError: more devices than `DEVICES_MAX`, or fewer than 3.
    """
    if not 3 <= churn.num_devices <= DEVICES_MAX:
        raise ValueError(f"{churn.num_devices} devices: a churn takes 3 to {DEVICES_MAX}")
    names = tuple(f"d{index:03d}" for index in range(churn.num_devices))
    roster = make_roster(names)
    maker = _Maker(roster)
    checkers = _Detection()
    settings = Settings(seed=churn.seed, drift_max=1e-5, skew_s_max=0.5, trains=False)
    model = network or NetworkModel(delay=0.001, jitter=0.002, loss=0.001)
    world = World(settings, network=model, make_node=maker.make, watcher=checkers)
    checkers.world = world
    for name in names:
        world.add_device(name)
    maker.begin(world)
    changes = _schedule(world, churn, names, checkers)
    world.run_until(churn.seconds)
    return _report(churn, world, checkers, changes), world


class _Maker:
    """Makes cores that know the cluster from the start, as long as `is_ready`; afterwards ordinary ones."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._nodes = list(roster.members)
        self._rings = Rings(self._nodes)
        self._is_ready = True
        self._known: dict[int, Roster] = {}

    def make(self, me: NodeId, **arguments: Any) -> NodeCore:
        core = NodeCore(me, **arguments)
        if self._is_ready:
            beliefs = {node: Rumour(node, 1, 0, here=True) for node in self._nodes if node != me}
            core.presence = PresenceCore(
                me,
                incarnation=arguments["incarnation"],
                timing=arguments["timing"],
                now_s=arguments["now_s"],
                members=self._roster.members,
                beliefs=beliefs,
                rings=self._rings.copy(),
            )
            core.presence.roster_digest = self._roster.digest
        core.roster._joined = self._join  # type: ignore[method-assign]
        return core

    def _join(self, roster: Roster, new: Mapping[str, Statement]) -> Roster:
        """What a set of statements means is a function of the set: a thousand devices need not each work it out."""
        digest = roster.digest
        for key in new:
            if key not in roster.statements:
                digest ^= int(key, 16)
        found = self._known.get(digest)
        if found is None:
            found = self._known[digest] = roster.with_statements(new)
        return found

    def begin(self, world: World) -> None:
        """Starts everyone, spread over half a second, so that heartbeats are not all at once."""
        for device in world.devices.values():
            # Neighbours have met; all others would only make the files longer.
            near = self._rings.neighbours(device.node)
            device.disk["met"] = msgspec.msgpack.encode(dict.fromkeys(sorted(near), SINCE_1970_S))
            world.start(device, roster=self._roster)
            for key, statement in self._roster.statements.items():
                device.disk[f"roster/{key}"] = _encode(statement)
        self._is_ready = False


_encoded: dict[int, bytes] = {}


def _encode(statement: msgspec.Struct) -> bytes:
    """Every disk holds the same bytes; one copy will do."""
    found = _encoded.get(id(statement))
    if found is None:
        found = _encoded[id(statement)] = msgspec.msgpack.encode(statement)
    return found


def _schedule(world: World, churn: Churn, names: tuple[str, ...], checkers: _Detection) -> dict[str, int]:
    chance = random.Random(f"churn {churn.seed}")
    counts: dict[str, int] = {}
    away: list[str] = []
    running = list(names)
    at_s, num_new = 3.0, 0
    while churn.changes_per_s > 0:
        at_s += chance.expovariate(churn.changes_per_s)
        # The last changes need time to be noticed.
        if at_s >= churn.seconds - min(15.0, churn.seconds / 4):
            break
        kind = chance.choice(("crash", "power-cut", "quit", "start", "start", "join"))
        if kind == "start":
            if not away:
                continue
            name = away.pop(chance.randrange(len(away)))
            running.append(name)
            world.schedule(Action(at_s, "start", (name,)))
        elif kind == "join":
            num_new += 1
            name, via = f"n{num_new:03d}", chance.choice(running[:20])
            world.schedule(Action(at_s, "new", (name,)))
            world.schedule(Action(at_s + 0.01, "invite", (f"t{num_new}", via)))
            world.schedule(Action(at_s + 0.05, "use", (f"t{num_new}", name, via)))
        else:
            name = running.pop(chance.randrange(20, len(running)) if len(running) > 21 else len(running) - 1)
            world.schedule(Action(at_s, kind, (name,)))
            if kind == "quit":
                world.call_at(at_s + 0.2, _come_back, world, name)
            away.append(name)
            world.call_at(at_s, checkers.lost_s.__setitem__, NodeId(name), at_s)
        counts[kind] = counts.get(kind, 0) + 1
        if len(running) < 3:
            break
    return counts


def _come_back(world: World, name: str) -> None:
    world.devices[NodeId(name)].is_kept_off = False


def _report(churn: Churn, world: World, checkers: _Detection, changes: dict[str, int]) -> ChurnReport:
    running = {node for node, device in world.devices.items() if device.power is Power.RUNNING}
    members = list(world.devices)
    right = total = 0
    for node in running:
        core = world.devices[node].core
        assert core is not None
        here = {other for other in core.presence.here() if core.presence.is_here(other)}
        total += len(members) - 1
        right += len(members) - 1 - len((here ^ running) - {node})
    delays_s = sorted(checkers.delays_s)
    return ChurnReport(
        churn.num_devices,
        churn.seconds,
        world.num_events,
        world.num_messages,
        changes,
        checkers.most_watched,
        len(running),
        right / max(1, total),
        _quantile(delays_s, 0.5),
        _quantile(delays_s, 0.99),
    )


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0
