"""Decides what happens to everyone: a heap of what is due, one seed, no other chance and no other clock.

The cores are those of the real runtime; what differs is who carries their effects out. Messages cross links that
lose, double, delay and
reorder, with each direction of a link on its own; writes complete later and in order, and of those under way at a
crash some first part
survives; clocks are skewed and drift; processes end, freeze and sleep.

What a real agent does beside its core is done here as well: dial the links that are watched, enter the groups its
owner wants
again after a start, start again with a higher incarnation when outranked, and train - as a stand-in that applies a
step where all active members of one record can act, and holds or loses state.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Any

import msgspec

from shoal.effects import (
    Announce,
    Command,
    Commanded,
    Effect,
    Event,
    Fact,
    Hangup,
    LinkClosed,
    LinkOpened,
    Received,
    Send,
    SetTimer,
    Store,
    Stored,
    TimerFired,
    Watch,
)
from shoal.ids import GroupId, NodeId
from shoal.membership.group import (
    CheckpointDue,
    CreateGroup,
    JoinGroup,
    LeaveGroup,
    RecordAdopted,
    Recover,
    ReportProgress,
    Role,
    Suspended,
)
from shoal.membership.messages import Record
from shoal.membership.presence import Outranked, SayGoodbye
from shoal.membership.roster import EMPTY, Confirm, Found, Invite, Remove, Roster, UseInvitation, invitation_of
from shoal.membership.timing import Timing
from shoal.node import wire
from shoal.node.core import NodeCore
from shoal.node.journal import Journal
from shoal.simulation.actions import Action
from shoal.simulation.device import Device, Link, Power
from shoal.simulation.story import Story, describe

_PENDING_MAX = 8
"""Messages that wait for a link under way."""
_HELD_MAX = 20_000
SINCE_1970_S = 1_790_000_000.0
STEP_S = 0.25
"""How often the stand-in for training tries a step."""
CATCH_UP_S = 0.6
"""How long a shadow needs for its state."""


class NetworkModel(msgspec.Struct, frozen=True):
    """Of every link, in each direction by itself: shares of messages, and seconds. Jitter reorders."""

    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.001
    jitter: float = 0.0


class Settings(msgspec.Struct, frozen=True):
    """What does not change while the world runs."""

    seed: int = 0
    timing: Timing = Timing()
    drift_max: float = 0.0
    """Clocks are off by up to this share."""
    skew_s_max: float = 0.0
    late_s_max: float = 0.0
    """Timers fire up to this much late."""
    disk_s: float = 0.002
    broken_s: float = 8.0
    """A connection that nothing comes through is closed after so long."""
    encodes: bool = False
    """Every message goes through its bytes."""
    journals: bool = False
    trains: bool = True
    redial_s: float = 0.5


NodeFactory = Callable[..., NodeCore]


class Failure(Exception):
    """A checker was violated: which, and how."""

    def __init__(self, checker: str, text: str) -> None:
        super().__init__(f"{checker}: {text}")
        self.checker = checker
        self.text = text


class Watcher:
    """Told of everything that happens; the checkers are one."""

    def stepped(self, device: Device, event: Event, effects: list[Effect]) -> None:
        """`device` took `event`."""

    def announced(self, device: Device, fact: Fact) -> None:
        """`device` said so."""

    def written(self, device: Device, key: str, value: bytes) -> None:
        """This is on the disk of `device`."""

    def trained(self, record: Record, step: int, devices: list[Device]) -> None:
        """The active members of `record` applied `step`."""

    def disrupted(self, fault: str, devices: list[Device]) -> None:
        """A fault met these devices, as they are now."""


class World:
    """A cluster and its network.

    Args:
        settings: seed and habits of this world.
        network: how links behave; a `network` action changes it.
        make_node: builds a device's core; tests pass mutants.
        watcher: is told everything, after it happened.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        network: NetworkModel | None = None,
        make_node: NodeFactory = NodeCore,
        watcher: Watcher | None = None,
    ) -> None:
        self.settings = settings
        self.network = network or NetworkModel()
        self.now_s = 0.0
        self.devices: dict[NodeId, Device] = {}
        self.blocked: dict[tuple[NodeId, NodeId], float] = {}
        """Directions that nothing comes through, and since when."""
        self.story = Story()
        self.ambushes: list[tuple[str, str, str]] = []
        """(machine, state, fault) that wait for a device to get there."""
        self.is_quiet = False
        """Faults have stopped: what plans and ambushes still had in mind is dropped."""
        self.slow: frozenset[NodeId] = frozenset()
        """Devices that never catch up as shadows."""
        self.num_events = 0
        self.num_messages = 0
        self._make_node = make_node
        self._watcher = watcher or Watcher()
        self._chance = random.Random(settings.seed)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._dialling: dict[tuple[NodeId, NodeId], list[tuple[NodeId, Received]]] = {}
        self._secrets: dict[str, bytes] = {}
        self._groups: list[GroupId] = []

    # ---- time

    def run_until(self, end_s: float) -> None:
        """Lets everything happen that is due by then."""
        heap = self._heap
        while heap and heap[0][0] <= end_s:
            self.now_s, _, act, arguments = heapq.heappop(heap)
            act(*arguments)
        self.now_s = end_s

    def call_at(self, at_s: float, act: Callable[..., None], *arguments: Any) -> None:
        """Does it then."""
        self._sequence += 1
        heapq.heappush(self._heap, (at_s, self._sequence, act, arguments))

    def _later(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> None:
        self.call_at(self.now_s + delay_s, act, *arguments)

    def schedule(self, action: Action) -> None:
        """Takes an action of a plan; once faults have stopped, it does not happen any more."""
        self.call_at(action.at_s, self._act_if_due, action)

    def _act_if_due(self, action: Action) -> None:
        if not self.is_quiet:
            self.act(action)

    # ---- devices

    def add_device(self, name: str) -> Device:
        """A device that is off, with an empty disk."""
        settings, chance = self.settings, self._chance
        device = Device(
            name,
            offset_s=chance.uniform(0.0, 1000.0),
            rate=1.0 + chance.uniform(-settings.drift_max, settings.drift_max),
            wall_skew_s=chance.uniform(-settings.skew_s_max, settings.skew_s_max),
            disk_s=settings.disk_s,
        )
        self.devices[device.node] = device
        return device

    def start(self, device: Device, *, roster: Roster = EMPTY, incarnation: int | None = None) -> None:
        """Starts its process, from what its disk holds."""
        if device.power is not Power.OFF:
            return
        device.boots += 1
        device.incarnation = incarnation or max(device.incarnation, device.boots - 1) + 1
        if device.boots > 1:
            # A clock that counts from the system's start knows nothing of the time before.
            device.offset_s = self._chance.uniform(0.0, 1000.0) - device.rate * self.now_s
            device.now_s = device.offset_s + device.rate * self.now_s
        device.power = Power.RUNNING
        now_s = device.clock(self.now_s)
        arguments: dict[str, Any] = {
            "incarnation": device.incarnation,
            "timing": self.settings.timing,
            "now_s": now_s,
            "since_1970_s": SINCE_1970_S + self.now_s + device.wall_skew_s - now_s,
            "stored": dict(device.disk),
        }
        if self.settings.journals:
            device.journal = Journal.begin(device.node, statements=tuple(roster.statements.values()), **arguments)
        device.core = self._make_node(device.node, keys=device.keys, roster=roster, **arguments)
        self.step(device, TimerFired("start"))
        for group in list(device.core.groups) if device.core else ():
            self._resume_group(device, group)
            if group not in device.groups:
                self.command(device, LeaveGroup(group))
        for group, part in device.groups.items():
            core = device.core.groups.get(group) if device.core else None
            if core is None or core.wants is None:
                self.command(device, JoinGroup(group, part=part))  # type: ignore[arg-type]
                self._resume_group(device, group)

    def _resume_group(self, device: Device, group: GroupId) -> None:
        trainer = device.trainer(group)
        trainer.step, trainer.shadow_since_s = trainer.checkpoint, None
        if trainer.step >= 0:
            self.command(device, ReportProgress(group, step=trainer.step, has_state=True))

    def stop(self, device: Device, *, is_power_cut: bool = False) -> None:
        """Ends its process; a power cut leaves its peers without a word."""
        if device.power is Power.OFF:
            return
        device.power = Power.OFF
        device.core = None
        device.held.clear()
        device.timers.clear()
        device.watch = frozenset()
        survives = self._chance.randint(0, len(device.unwritten))
        for key, _, value in [*device.unwritten][:survives]:
            device.disk[key] = value
            self._watcher.written(device, key, value)
        device.unwritten.clear()
        for peer, link in list(device.links.items()):
            link.ends.discard(device.node)
            if is_power_cut:
                self._later(self.settings.broken_s, self._lose_end, link, peer)
            else:
                self._reset(link, peer, source=device.node)
        device.links.clear()

    def step(self, device: Device, event: Event) -> None:
        """Hands an event to a device's core, and carries out what it wants."""
        core = device.core
        if core is None:
            return
        self.num_events += 1
        now_s = device.clock(self.now_s)
        try:
            effects = core.step(event, now_s)
        except Exception as error:
            raise Failure(
                "core raised", f"{device.node} on {describe_event(event)}: {type(error).__name__}: {error}"
            ) from error
        if device.journal is not None:
            device.journal.record(event, now_s, effects)
        for effect in effects:
            if isinstance(effect, Send):
                self._send(device, effect)
            elif isinstance(effect, SetTimer):
                self._set_timer(device, effect)
            elif isinstance(effect, Store):
                self._store(device, effect)
            elif isinstance(effect, Announce):
                self._announce(device, effect.fact)
            elif isinstance(effect, Watch):
                self._watch(device, effect.peers)
            elif isinstance(effect, Hangup):
                self._hang_up(device, effect.peer)
        self._watcher.stepped(device, event, effects)
        if self.ambushes:
            self.check_ambushes(device)

    def command(self, device: Device, command: Command) -> None:
        """The owner wants something of a device."""
        self._give(device, Commanded(command))

    def _give(self, device: Device, event: Event) -> None:
        """An event for a device that may not be able to take it now."""
        if device.power is Power.RUNNING:
            self.step(device, event)
            return
        is_kept = device.power is Power.FROZEN or (device.power is Power.ASLEEP and type(event) is not Received)
        if is_kept and len(device.held) < _HELD_MAX:
            device.held.append(event)

    def _announce(self, device: Device, fact: Fact) -> None:
        text = describe(fact)
        if text:
            self.story.add(self.now_s, device.node, text)
        if isinstance(fact, Outranked):
            self._later(0.05, self._restart, device, device.boots, fact.incarnation + 1)
        elif isinstance(fact, RecordAdopted):
            if not fact.is_member and all(member.node != device.node for member in fact.record.members):
                self._later(0.0, self._forget_state, device, fact.group)
        elif isinstance(fact, (Suspended, CheckpointDue)):
            trainer = device.trainer(fact.group)
            trainer.checkpoint = max(trainer.checkpoint, trainer.step)
        self._watcher.announced(device, fact)

    def _forget_state(self, device: Device, group: GroupId) -> None:
        """What a device holds of a group that it is not in is of no use any more."""
        trainer = device.trainer(group)
        if trainer.step >= 0:
            trainer.step = trainer.checkpoint = -1
            self.command(device, ReportProgress(group, step=-1, has_state=False))

    def _restart(self, device: Device, boots: int, incarnation: int) -> None:
        if device.boots == boots and device.power is Power.RUNNING:
            self.stop(device)
            self.start(device, incarnation=incarnation)

    # ---- timers and disks

    def _set_timer(self, device: Device, effect: SetTimer) -> None:
        version = device.timers.get(effect.key, 0) + 1
        device.timers[effect.key] = version
        at_s = max(device.at(effect.at_s), self.now_s)
        if self.settings.late_s_max:
            at_s += self.settings.late_s_max * self._chance.random() ** 4
        self.call_at(at_s, self._fire, device, device.boots, effect.key, version, effect.at_s)

    def _fire(self, device: Device, boots: int, key: str, version: int, clock_s: float) -> None:
        if device.boots == boots and device.timers.get(key) == version:
            device.now_s = max(device.now_s, clock_s)  # what rounding took
            self._give(device, TimerFired(key))

    def _store(self, device: Device, effect: Store) -> None:
        device.unwritten.append((effect.key, effect.number, effect.value))
        device.disk_free_s = max(device.disk_free_s, self.now_s) + device.disk_s
        self.call_at(device.disk_free_s, self._written, device, device.boots)

    def _written(self, device: Device, boots: int) -> None:
        if device.boots != boots or not device.unwritten:
            return
        key, number, value = device.unwritten.popleft()
        device.disk[key] = value
        self._watcher.written(device, key, value)
        self._give(device, Stored(key, number))

    # ---- links

    def _send(self, device: Device, effect: Send) -> None:
        message = effect.message
        received = Received(device.node, wire.decode(wire.encode(message)) if self.settings.encodes else message)
        links, me = device.links, device.node
        for peer in effect.peers:
            link = links.get(peer)
            if link is None:
                self._dial(device, peer, received)
            else:
                self._transmit(link, me, peer, received)

    def _transmit(self, link: Link, source: NodeId, target: NodeId, received: Received) -> None:
        if (source, target) in self.blocked:
            return
        network, chance = self.network, self._chance
        copies = 1
        if network.loss and chance.random() < network.loss:
            copies = 0
        elif network.duplicate and chance.random() < network.duplicate:
            copies = 2
        for _ in range(copies):
            delay_s = network.delay + network.jitter * chance.random()
            self._sequence += 1
            heapq.heappush(self._heap, (self.now_s + delay_s, self._sequence, self._deliver, (link, target, received)))

    def _deliver(self, link: Link, target: NodeId, received: Received) -> None:
        device = self.devices[target]
        if target not in link.ends:
            if device.power is not Power.OFF or device.boots == 0:
                self._reset(link, received.peer, source=target)
            return
        self.num_messages += 1
        if device.power is Power.RUNNING:
            self.step(device, received)
        else:
            self._give(device, received)

    def _dial(self, device: Device, peer: NodeId, received: Received | None = None) -> None:
        if peer not in self.devices or peer == device.node:
            return
        pair = (device.node, peer) if device.node < peer else (peer, device.node)
        waiting = self._dialling.get(pair)
        if waiting is None:
            waiting = self._dialling[pair] = []
            self._later(3 * (self.network.delay + self.network.jitter * self._chance.random()), self._dialled, pair)
        if received is not None and len(waiting) < _PENDING_MAX:
            waiting.append((peer, received))

    def _dialled(self, pair: tuple[NodeId, NodeId]) -> None:
        waiting = self._dialling.pop(pair)
        first, second = self.devices[pair[0]], self.devices[pair[1]]
        is_open = (
            first.power is Power.RUNNING
            and second.power is Power.RUNNING
            and pair not in self.blocked
            and (pair[1], pair[0]) not in self.blocked
        )
        if not is_open:
            self._redial(first, pair[1])
            self._redial(second, pair[0])
            return
        for device, peer in ((first, pair[1]), (second, pair[0])):
            if peer in device.links:
                old = device.links[peer]
                if len(old.ends) == 2:
                    return  # both dialled
                self._lose_end(old, device.node)
        link = Link(*pair)
        first.links[pair[1]] = second.links[pair[0]] = link
        for device, peer in ((first, pair[1]), (second, pair[0])):
            self.step(device, LinkOpened(peer))
        for target, received in waiting:
            self._transmit(link, received.peer, target, received)

    def _redial(self, device: Device, peer: NodeId) -> None:
        self._later(self.settings.redial_s * (0.5 + self._chance.random()), self._dial_again, device, device.boots, peer)

    def _dial_again(self, device: Device, boots: int, peer: NodeId) -> None:
        if device.boots != boots or peer not in device.watch or peer in device.links or device.power is Power.OFF:
            return
        if device.power is Power.RUNNING:
            self._dial(device, peer)
        else:
            self._redial(device, peer)

    def _watch(self, device: Device, peers: frozenset[NodeId]) -> None:
        gone = device.watch - peers
        device.watch = peers
        for peer in sorted(peers):
            if peer not in device.links:
                self._dial(device, peer)
        for peer in sorted(gone):
            self._later(10.0, self._close_idle, device, peer)

    def _close_idle(self, device: Device, peer: NodeId) -> None:
        link = device.links.get(peer)
        if link is not None and peer not in device.watch and device.node not in self.devices[peer].watch:
            self._lose_end(link, device.node)
            self._reset(link, peer, source=device.node)

    def _hang_up(self, device: Device, peer: NodeId) -> None:
        link = device.links.pop(peer, None)
        if link is not None:
            link.ends.discard(device.node)
            self._reset(link, peer, source=device.node)
            self._later(0.0, self._give, device, LinkClosed(peer))

    def _reset(self, link: Link, target: NodeId, *, source: NodeId) -> None:
        """`source` tells `target` that there is no such connection, if that comes through."""
        if (source, target) not in self.blocked:
            delay_s = self.network.delay + self.network.jitter * self._chance.random()
            self._later(delay_s, self._lose_end, link, target)
        else:
            self._later(self.settings.broken_s, self._lose_end, link, target)

    def _lose_end(self, link: Link, node: NodeId) -> None:
        """`node` learns that the connection is no more."""
        if node not in link.ends:
            return
        link.ends.discard(node)
        device, peer = self.devices[node], link.other(node)
        if device.links.get(peer) is link:
            del device.links[peer]
            self._give(device, LinkClosed(peer))
            self._redial(device, peer)

    def block(self, source: NodeId, target: NodeId) -> None:
        """Nothing comes from `source` to `target` any more."""
        if (source, target) not in self.blocked:
            self.blocked[source, target] = self.now_s
            self._later(self.settings.broken_s, self._break, source, target, self.now_s)

    def unblock(self, source: NodeId, target: NodeId) -> None:
        self.blocked.pop((source, target), None)

    def _break(self, source: NodeId, target: NodeId, since_s: float) -> None:
        if self.blocked.get((source, target)) != since_s:
            return
        link = self.devices[source].links.get(target) or self.devices[target].links.get(source)
        if link is not None:
            self._lose_end(link, source)
            self._lose_end(link, target)

    def can_pass(self, source: NodeId, target: NodeId) -> bool:
        return (source, target) not in self.blocked

    # ---- actions

    def act(self, action: Action) -> None:
        """Does what an action says; to a device that is not in the state for it, nothing."""
        verb, words = action.verb, action.arguments
        getattr(self, "_do_" + verb.replace("-", "_"))(*words)

    def _tell(self, text: str) -> None:
        self.story.add(self.now_s, "", text)

    def _device(self, name: str) -> Device:
        try:
            return self.devices[NodeId(name)]
        except KeyError:
            raise ValueError(f"there is no device '{name}': the devices are {', '.join(self.devices)}") from None

    def _do_say(self, *words: str) -> None:
        self._tell(" ".join(words))

    def _do_new(self, name: str) -> None:
        if NodeId(name) not in self.devices:
            self._tell(f"{name} is new")
            self.start(self.add_device(name))

    def _do_found(self, name: str) -> None:
        self._tell(f"{name} founds a cluster")
        self.command(self._device(name), Found(name=name))

    def _do_invite(self, token: str, name: str, uses: str = "1") -> None:
        device = self._device(name)
        self._tell(f"{name} makes invitation {token} for {uses}")
        secret = self._secrets.setdefault(token, hashlib.sha256(f"{self.settings.seed}/{token}".encode()).digest())
        expires_s = SINCE_1970_S + self.now_s + device.wall_skew_s + 3600.0
        self.command(device, Invite(invitation_of(secret), expires_s, int(uses)))

    def _do_use(self, token: str, name: str, via: str) -> None:
        self._tell(f"{name} joins by {token}, asking {via}")
        secret = self._secrets.get(token, b"a wrong secret")
        nonce = self._chance.randbytes(16)
        self.command(self._device(name), UseInvitation(NodeId(via), secret, nonce, name=name))

    def _do_confirm(self, name: str, by: str) -> None:
        self._tell(f"{by} confirms {name}")
        self.command(self._device(by), Confirm(NodeId(name)))

    def _do_remove(self, name: str, by: str) -> None:
        self._tell(f"{by} removes {name}")
        self._watcher.disrupted("remove", [self._device(name)])
        self.command(self._device(by), Remove(NodeId(name)))

    def _do_quit(self, name: str) -> None:
        device = self._device(name)
        self._tell(f"{name} says goodbye")
        self._watcher.disrupted("quit", [device])
        self.command(device, SayGoodbye())
        device.is_kept_off = True
        self._later(0.05, self.stop, device)

    def _do_create(self, group: str, name: str) -> None:
        device = self._device(name)
        self._know_group(GroupId(group))
        self._tell(f"{name} creates {group}")
        device.groups[GroupId(group)] = "active"
        self.command(device, CreateGroup(GroupId(group)))
        # Step 0 is the state that a run begins with.
        trainer = device.trainer(GroupId(group))
        trainer.step = trainer.checkpoint = 0
        self.command(device, ReportProgress(GroupId(group), step=0, has_state=True))

    def _do_enter(self, group: str, name: str, part: str = "active") -> None:
        device = self._device(name)
        self._know_group(GroupId(group))
        self._tell(f"{name} enters {group}" + (f" as {part}" if part != "active" else ""))
        device.groups[GroupId(group)] = part
        self.command(device, JoinGroup(GroupId(group), part=part))  # type: ignore[arg-type]

    def _do_exit(self, group: str, name: str) -> None:
        device = self._device(name)
        self._tell(f"{name} leaves {group}")
        self._watcher.disrupted("exit", [device])
        if device.power is Power.RUNNING and device.groups.pop(GroupId(group), ""):
            self.command(device, LeaveGroup(GroupId(group)))

    def _do_recover(self, group: str, name: str) -> None:
        device = self._device(name)
        self._tell(f"the owner recovers {group} at {name}")
        core = device.core.groups.get(GroupId(group)) if device.core is not None else None
        if device.power is Power.RUNNING and core is not None and core.committed.members:
            device.groups.setdefault(GroupId(group), "active")
            self.command(device, Recover(GroupId(group)))

    def _do_crash(self, *names: str) -> None:
        self._tell(f"{' '.join(names)}: process killed")
        devices = [self._device(name) for name in names]
        self._watcher.disrupted("crash", devices)
        for device in devices:
            self.stop(device)

    def _do_power_cut(self, *names: str) -> None:
        self._tell(f"{' '.join(names)}: power cut")
        devices = [self._device(name) for name in names]
        self._watcher.disrupted("power-cut", devices)
        for device in devices:
            self.stop(device, is_power_cut=True)

    def _do_start(self, name: str, *how: str) -> None:
        device = self._device(name)
        if device.power is not Power.OFF or device.is_kept_off:
            return
        if how:
            self._watcher.disrupted("start " + " ".join(how), [device])
            keeps = {key: value for key, value in device.disk.items() if how[1] == "votes" and not key.startswith("group/")}
            device.disk = keeps
            for trainer in device.trainers.values():
                trainer.checkpoint = trainer.step = -1
        else:
            self._watcher.disrupted("start", [device])
        self._tell(f"{name} starts" + (f", {' '.join(how)}" if how else ""))
        self.start(device)

    def _do_freeze(self, name: str) -> None:
        device = self._device(name)
        if device.power is Power.RUNNING:
            self._tell(f"{name} freezes")
            self._watcher.disrupted("freeze", [device])
            device.power = Power.FROZEN

    def _do_suspend(self, name: str) -> None:
        device = self._device(name)
        if device.power is Power.RUNNING:
            self._tell(f"{name} falls asleep")
            self._watcher.disrupted("suspend", [device])
            device.power = Power.ASLEEP
            for peer, link in device.links.items():
                self._later(self.settings.broken_s, self._sleep_breaks, device, device.boots, link, peer)

    def _sleep_breaks(self, device: Device, boots: int, link: Link, peer: NodeId) -> None:
        if device.power is Power.ASLEEP and device.boots == boots:
            self._lose_end(link, peer)

    def _do_thaw(self, name: str) -> None:
        self._go_on(name, Power.FROZEN, "thaws")

    def _do_wake(self, name: str) -> None:
        self._go_on(name, Power.ASLEEP, "wakes")

    def _go_on(self, name: str, power: Power, text: str) -> None:
        device = self._device(name)
        if device.power is not power:
            return
        self._tell(f"{name} {text}")
        device.power = Power.RUNNING
        held = list(device.held)
        device.held.clear()
        for event in held:
            if type(event) is Received and event.peer not in device.links:
                continue
            self.step(device, event)
            if device.power is not Power.RUNNING:
                break

    def _pairs(self, words: tuple[str, ...]) -> list[tuple[NodeId, NodeId]]:
        first, direction, second = words
        pair = (self._device(first).node, self._device(second).node)
        return [pair] if direction == ">" else [pair, (pair[1], pair[0])]

    def _do_cut(self, *words: str) -> None:
        self._tell(f"cut {' '.join(words)}")
        pairs = self._pairs(words)
        fault = "cut" if words[1] == "-" else "one-way-cut"
        self._watcher.disrupted(fault, [self.devices[node] for node in pairs[0]])
        for source, target in pairs:
            self.block(source, target)

    def _do_mend(self, *words: str) -> None:
        self._tell(f"mend {' '.join(words)}")
        for source, target in list(self.blocked) if words == ("all",) else self._pairs(words):
            self.unblock(source, target)

    def _do_split(self, *words: str) -> None:
        self._tell(f"split {' '.join(words)}")
        sides: list[list[NodeId]] = [[]]
        for word in words:
            if word == "|":
                sides.append([])
            else:
                sides[-1].append(self._device(word).node)
        self._watcher.disrupted("split", [self.devices[node] for side in sides for node in side])
        for side in sides:
            for other in sides:
                if side is not other:
                    for source in side:
                        for target in other:
                            self.block(source, target)

    def _do_network(self, *words: str) -> None:
        changes: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in NetworkModel.__struct_fields__:
                raise ValueError(
                    f"'{word}' is not understood: write {', '.join(NetworkModel.__struct_fields__)}, as loss=0.1"
                )
            changes[name] = float(value)
        self._tell(f"network {' '.join(words)}")
        self._watcher.disrupted("network", list(self.devices.values()))
        self.network = msgspec.structs.replace(self.network, **changes)

    def _do_disk(self, name: str, seconds: str) -> None:
        self._tell(f"writes at {name} take {seconds} s")
        device = self._device(name)
        self._watcher.disrupted("disk", [device])
        device.disk_s = float(seconds)

    def _do_lose(self, name: str) -> None:
        device = self._device(name)
        self._tell(f"{name} is lost for good")
        device.is_kept_off = True
        self.stop(device, is_power_cut=True)

    def _do_ambush(self, machine: str, state: str, fault: str) -> None:
        self.ambushes.append((machine, state, fault))

    def check_ambushes(self, device: Device) -> None:
        """Springs those that wait for a state that `device` has got into."""
        core = device.core
        assert core is not None
        for ambush in self.ambushes:
            machine, state, fault = ambush
            victims = []
            if machine == "peer":
                for node, watched in core.presence.watched.items():
                    if watched.state.value == state:
                        victims = [device, self.devices[node]]
                        break
            else:
                for group in core.groups.values():
                    if (group.role if machine == "role" else group.standing).value == state:
                        victims = [device]
            victims = [each for each in victims if each.core is not None]
            if victims:
                self.ambushes.remove(ambush)
                self.call_at(self.now_s, self._spring, self._chance.choice(victims), fault, f"{machine} {state}")
                return

    def _spring(self, device: Device, fault: str, state: str) -> None:
        name, others = str(device.node), [node for node in self.devices if node != device.node]
        if device.power is not Power.RUNNING or device.is_kept_off:
            return
        self._tell(f"ambush on {name}, {state}: {fault}")
        after_s, back_s = self.now_s, self.now_s + 0.3 + 1.7 * self._chance.random()

        def then(at_s: float, verb: str, *words: str) -> None:
            self.schedule(Action(at_s, verb, words))

        if fault.startswith("losing-"):
            self._watcher.disrupted(fault, [device])
            then(after_s, "power-cut", name)
            then(back_s, "start", name, *fault.split("-"))
        elif fault in ("crash", "power-cut"):
            then(after_s, fault, name)
            then(back_s, "start", name)
        elif fault in ("freeze", "suspend"):
            then(after_s, fault, name)
            then(back_s, {"freeze": "thaw", "suspend": "wake"}[fault], name)
        elif fault == "disk":
            then(after_s, "disk", name, "0.2")
            then(back_s, "disk", name, str(self.settings.disk_s))
        elif fault == "network":
            then(after_s, "network", "loss=0.3", "duplicate=0.1", "jitter=0.02")
            then(back_s, "network", *(f"{key}={getattr(self.network, key)}" for key in ("loss", "duplicate", "jitter")))
        elif fault == "quit":
            then(after_s, "quit", name)
        elif fault == "exit":
            for group in device.groups:
                then(after_s, "exit", group, name)
        elif others and fault == "remove":
            then(after_s, "remove", name, self._chance.choice(others))
        elif others and fault == "split":
            then(after_s, "split", name, "|", *others)
            then(back_s, "mend", "all")
        elif others:
            other = self._chance.choice(others)
            first, second = (name, str(other)) if self._chance.random() < 0.5 else (str(other), name)
            words = (first, "-" if fault == "cut" else ">", second)
            then(after_s, "cut", *words)
            then(back_s, "mend", *words)

    # ---- the stand-in for training

    def _know_group(self, group: GroupId) -> None:
        if group not in self._groups:
            self._groups.append(group)
            if self.settings.trains:
                self._later(STEP_S, self._train, group)

    def _train(self, group: GroupId) -> None:
        self._later(STEP_S, self._train, group)
        able: dict[tuple[int, int], tuple[Record, dict[NodeId, Device]]] = {}
        for device in self.devices.values():
            core = device.core.groups.get(group) if device.core and device.power is Power.RUNNING else None
            if core is None or not core.is_running(device.clock(self.now_s)):
                continue
            record = core.committed
            able.setdefault((record.generation, record.epoch), (record, {}))[1][device.node] = device
        for record, devices in able.values():
            self._train_together(group, record, devices)

    def _train_together(self, group: GroupId, record: Record, devices: dict[NodeId, Device]) -> None:
        active = [member.node for member in record.members if member.part == "active"]
        can_step = active and all(
            node in devices and all(other == node or self._is_reached(node, other) for other in active) for node in active
        )
        if can_step:
            # Members that start from an older state fetch it from those that have the newest.
            step = max(record.first_step, 1 + max(devices[node].trainer(group).step for node in active))
            chosen = [devices[node] for node in active]
            self._watcher.trained(record, step, chosen)
            for device in chosen:
                trainer = device.trainer(group)
                trainer.step = step
                if step % 4 == 0:
                    trainer.checkpoint = step
                self.command(device, ReportProgress(group, step=step, has_state=True))
        for member in record.members:
            shadow = devices.get(member.node)
            if member.part == "shadow" and shadow is not None:
                self._catch_up(group, shadow, [devices[node] for node in active if node in devices])

    def _catch_up(self, group: GroupId, device: Device, donors: list[Device]) -> None:
        trainer = device.trainer(group)
        if device.node in self.slow or not donors:
            return
        if trainer.shadow_since_s is None:
            trainer.shadow_since_s = self.now_s
        if self.now_s - trainer.shadow_since_s >= CATCH_UP_S:
            trainer.step = max(donor.trainer(group).step for donor in donors)
            trainer.ready_as = device.incarnation
            trainer.shadow_since_s = None
            self.command(device, ReportProgress(group, step=trainer.step, has_state=True, ready=True))

    def _is_reached(self, source: NodeId, target: NodeId) -> bool:
        return (source, target) not in self.blocked


def describe_event(event: Event) -> str:
    """One short line."""
    if isinstance(event, Received):
        return f"{type(event.message).__name__} from {event.peer}"
    if isinstance(event, Commanded):
        return type(event.command).__name__
    if isinstance(event, TimerFired):
        return f"timer {event.key}"
    return type(event).__name__


def is_leading(role: Role) -> bool:
    return role in (Role.RECOVERING, Role.LEADING, Role.PROPOSING)
