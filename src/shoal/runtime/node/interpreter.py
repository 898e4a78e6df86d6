"""Carries out what the cores of one device want, on one thread: links, timers, a disk, a clock.

The same cores run in the simulator. What is decided is in `node/core.py`; here is what blocks, fails and surprises. The
thread waits on one selector for all sockets. Between two waits it hands over what came, fires timers that are due, and
sends what that led to.

What is stored is written before the core hears that it is, and only then does a core acknowledge (`disk.py`). Everything
the core is told can be kept in a journal, which the simulator's cores replay (`node/journal.py`).

Besides, it does what the simulator's world does for its devices: it dials links that are watched, starts again with a higher
incarnation when outranked, and tells the core what it sees itself: round trips, free memory, new addresses.
"""

from __future__ import annotations

import gc
import heapq
import queue
import random
import secrets
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from shoal.effects import (
    Announce,
    Command,
    Commanded,
    Effect,
    Event,
    Fact,
    Hangup,
    Learned,
    LinkClosed,
    LinkOpened,
    MeasureLink,
    Observed,
    Received,
    Send,
    SetTimer,
    Store,
    Stored,
    TimerFired,
    Watch,
)
from shoal.errors import RemoteProtocolError, ShoalError
from shoal.ids import GroupId, NodeId
from shoal.membership.group.facts import LeaderChanged
from shoal.membership.messages import Refused
from shoal.membership.presence import Outranked, SayGoodbye
from shoal.membership.roster import MemberAdded, MemberRemoved, SetAddresses
from shoal.membership.timing import Timing
from shoal.network.awareness import Awareness
from shoal.network.facts import DeliveryObserved, GraphChanged, ResourcesObserved, RoundTripObserved
from shoal.network.graph import LinkGraph
from shoal.node import wire
from shoal.node.core import START, FileDamaged, NodeCore
from shoal.node.journal import Journal
from shoal.runtime.node import clock, priority
from shoal.runtime.node.addresses import advertised
from shoal.runtime.node.discovery import Discovery, Sighting, cluster_tag
from shoal.runtime.node.links import DEFAULT_PORT, Links, message_frame
from shoal.runtime.node.probes import Probes
from shoal.runtime.node.state import DeviceState
from shoal.runtime.power import is_on_mains
from shoal.transport.control import AS_PROBE, ControlLink, FrameKind
from shoal.transport.link import listen
from shoal.transport.probe import Probe
from shoal.transport.secure import TrustStore

TIMING = Timing(heartbeat_s=0.2, silence_s=0.5, witness_s=0.15)
"""On TCP no single heartbeat is lost, so silence means something sooner than on a network that loses messages: a frozen
device is known after silence_s + heartbeat_s + witness_s at the latest, 0.85 s."""
JOURNAL_BYTES_MAX = 256 << 20
_LOOK_EVERY_S = 2.0
"""How often this device looks at itself: memory, addresses."""
_PING_EVERY_S = 2.0
"""How often each link's round trip is measured."""
_FACTS_MAX = 256
_GOODBYE_S = 0.2
_BACKLOG = 256


@dataclass(frozen=True)
class NodeOptions:
    """What the owner of this device decides about its links.

    `listen` is (host, port), port 0 takes a free one; None has no door at all, not even for the owner's
    commands. `is_hidden`: others are told no address, since they could not reach it (behind a NAT); it dials them.
    `advertise` are addresses, HOST:PORT, that others are told instead of those of this machine's interfaces.
    `is_discoverable`: on this network, members find each other by multicast too.
    """

    name: str
    listen: tuple[str, int] | None = None
    advertise: tuple[str, ...] = ()
    is_hidden: bool = False
    journal: Path | None = None
    timing: Timing = TIMING
    is_realtime: bool = False
    is_discoverable: bool = False


def make_core(me: NodeId, **arguments: Any) -> NodeCore:
    """The cores of one device, as `NodeCore` wants them; also what replays its journal."""
    awareness = Awareness(me, incarnation=arguments["incarnation"], now_s=arguments["now_s"])
    return NodeCore(me, capabilities=(awareness,), **arguments)


class Desk(Protocol):
    """Who hears the owner (`owner.py`). Called on the interpreter's thread."""

    def owner_asked(self, link: ControlLink, payload: bytes) -> None:
        """A request came over a link of the owner's."""

    def learn(self, fact: Fact) -> None:
        """The cores announced it."""

    def link_opened(self, peer: NodeId) -> None:
        """A link stands."""

    def contact_failed(self, peer: NodeId, text: str) -> None:
        """The device that a token names does not answer."""


class Interpreter:
    """One device. Made, started and stopped by any thread; everything else happens on its own.

    Args:
        state: who this device is; closed by `stop`.
        on_end: called on that thread when it has ended, whatever ended it; `failure` says what.
        on_fact: told every fact the cores announce, on the interpreter's thread; must not block or raise.

    Raises:
        AddressInUse, DeviceUnreachable: it cannot listen there.
    """

    def __init__(
        self,
        state: DeviceState,
        options: NodeOptions,
        *,
        on_fact: Callable[[Fact], None] | None = None,
        on_end: Callable[[], object] | None = None,
    ) -> None:
        self.state = state
        self.options = options
        self.desk: Desk | None = None
        """Where the owner's wishes are heard; set before the start."""
        self.on_agent: Callable[[socket.socket, TrustStore], None] | None = None
        """Takes connections of members' agents, whose TLS is still to come; must not block. Set before the start."""
        self.on_fact = on_fact
        self._on_end = on_end
        self.failure: BaseException | None = None
        """What ended it, where that was no order."""
        self.facts: list[tuple[float, Fact]] = []
        """The latest, with when."""
        self.started_s = clock.now_s()
        self.num_events = self.num_malformed = 0
        self._door = listen(*options.listen) if options.listen is not None else None
        if self._door is not None:
            self._door.listen(_BACKLOG)
        self.port = self._door.getsockname()[1] if self._door is not None else 0
        self._selector = selectors.DefaultSelector()
        self._awake, self._waker = socket.socketpair()
        self._awake.setblocking(False)
        self._waker.setblocking(False)
        self.probes = Probes(self._probe_measured)
        self.discovery = Discovery(self._sighted) if options.is_discoverable else None
        self._announced: tuple[str, tuple[str, ...]] = ("", ())
        self._selector.register(self._awake, selectors.EVENT_READ, self._on_awake)
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, str]] = []
        self._armed: dict[str, int] = {}
        self._timer_number = 0
        self._look_at_s = self._ping_at_s = 0.0
        self._told_addresses: tuple[str, ...] | None = None
        self._pending: deque[Event] = deque()
        self._is_stepping = False
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._stopping = False
        self._led: set[GroupId] = set()
        """Groups that this device leads."""
        self._restart_as = 0
        self._journal: Journal | None = None
        self._journal_file: Any = None
        self._journal_bytes = 0
        self._now_s = clock.now_s()
        self._begin()
        self._thread = threading.Thread(target=self._run, name="agent-links", daemon=True)

    # ---- for other threads

    def start(self) -> None:
        """Begins."""
        self._thread.start()
        if self.discovery is not None:
            self.discovery.start()

    def stop(self, *, says_goodbye: bool = True) -> None:
        """Ends it and waits until it has; members are told first."""

        def end() -> None:
            if says_goodbye:
                self.command(SayGoodbye())
            self._stopping = True

        if self._thread.is_alive():
            self.post(end)
            self._thread.join()
        elif self._thread.ident is None:
            self._close()

    def post(self, act: Callable[[], None]) -> None:
        """Has `act` called on the interpreter's thread, soon. Safe from every thread."""
        self._posted.put(act)
        with suppress(OSError):  # full: it wakes anyway; closed: nobody is there any more
            self._waker.send(b"\0")

    # ---- on its own thread

    def command(self, command: Command) -> None:
        """The owner wants something of the cores."""
        self.step(Commanded(command))

    def learn(self, fact: DeliveryObserved) -> None:
        """Tells the cores what the work of this device showed of a link."""
        if fact.peer in self.core.trusted:
            self.step(Learned(fact))

    def step(self, event: Event) -> None:
        """Hands the cores an event, and carries out what they want.

        What comes of that is an event of its own, and waits until all effects of this one are carried out: a timer that is
        set later is meant later.
        """
        self._pending.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._pending:
                event = self._pending.popleft()
                self._now_s = now_s = max(self._now_s, clock.now_s())
                effects = self.core.step(event, now_s)
                self.num_events += 1
                if self._journal is not None:
                    self._journal.record(event, now_s, effects)
                self.carry_out(effects)
        finally:
            self._is_stepping = False
        self.links.flush()

    def carry_out(self, effects: list[Effect]) -> None:
        """Does it."""
        for effect in effects:
            if type(effect) is Send:
                if type(effect.message) is Refused:
                    self.links.refusals[f"as a member: {effect.message.reason}"] += len(effect.peers)
                self.links.send(effect.peers, message_frame(wire.encode(effect.message)))
            elif type(effect) is SetTimer:
                self._set_timer(effect)
            elif type(effect) is Store:
                self._store(effect)
            elif type(effect) is Announce:
                self._announce(effect.fact)
            elif type(effect) is Watch:
                self.links.watch(effect.peers)
            elif type(effect) is Hangup:
                self.links.hang_up(effect.peer)
            else:
                assert type(effect) is MeasureLink
                self._measure(effect)

    def call_later(self, delay_s: float, act: Callable[[], None]) -> None:
        """Has `act` called on this thread in `delay_s` seconds."""
        self._timer_number += 1
        heapq.heappush(self._later, (clock.now_s() + delay_s, self._timer_number, act))

    def reset(self, *, keep_key: bool = False) -> None:
        """Belongs nowhere any more, as a new device. The owner's own links go on."""
        owners = self.links.release_owners()
        self._end_core()
        self.state.forget_cluster(keep_key=keep_key)
        self._begin()
        self.links.adopt_owners(owners)
        self._start_core()

    def addresses(self) -> tuple[str, ...]:
        """Where others reach this device."""
        if self.options.listen is None or self.options.is_hidden:
            return ()
        return self.options.advertise or advertised(self.options.listen[0], self.port)

    @property
    def awareness(self) -> Awareness:
        """The core that knows the network."""
        return next(each for each in self.core.capabilities if isinstance(each, Awareness))

    def graph(self) -> LinkGraph:
        """What is known of the network now."""
        return self.awareness.graph(clock.now_s())

    def since_1970_s(self) -> float:
        """The date now, as the cores know it."""
        return self._now_s + self.core.roster.clock_s

    # ---- what Links tells

    def link_opened(self, peer: NodeId) -> None:
        self.step(LinkOpened(peer))
        if self.desk is not None:
            self.desk.link_opened(peer)

    def link_closed(self, peer: NodeId) -> None:
        self.step(LinkClosed(peer))

    def frame_received(self, peer: NodeId, kind: int, payload: bytes) -> None:
        if kind != FrameKind.MESSAGE:
            return
        try:
            message = wire.decode(payload)
        except RemoteProtocolError:
            self.num_malformed += 1
            raise
        self.step(Received(peer, message))

    def round_trip_measured(self, peer: NodeId, seconds: float) -> None:
        if peer in self.core.trusted:
            self.step(Learned(RoundTripObserved(peer, seconds)))

    def owner_asked(self, link: ControlLink, payload: bytes) -> None:
        if self.desk is not None:
            self.desk.owner_asked(link, payload)

    def contact_failed(self, peer: NodeId, text: str) -> None:
        if self.desk is not None:
            self.desk.contact_failed(peer, text)

    def visitor_came(self, errand: bytes, sock: socket.socket, trust: TrustStore) -> None:
        if errand == AS_PROBE:
            self.probes.take(sock, trust)
        elif self.on_agent is not None:
            self.on_agent(sock, trust)
        else:
            sock.close()

    # ---- a life of the core

    def _begin(self, *, least: int = 1) -> None:
        state, options = self.state, self.options
        self.me = state.keys.node
        incarnation = state.next_incarnation(least=least)
        self._now_s = max(self._now_s, clock.now_s())
        arguments: dict[str, Any] = {
            "incarnation": incarnation,
            "timing": options.timing,
            "now_s": self._now_s,
            "since_1970_s": clock.since_1970_s(),
            "stored": dict(state.disk.values),
        }
        self.links = Links(
            state.keys,
            self,
            selector=self._selector,
            clock=clock.now_s,
            door=self._door,
            chance=random.Random(secrets.randbits(64)),
        )
        if options.journal is not None:
            self._open_journal(options.journal, arguments)
        self.core = make_core(self.me, keys=state.keys, **arguments)
        self.links.set_members(self.core.roster.roster.members)
        self._told_addresses = None
        self._look_at_s = 0.0

    def _start_core(self) -> None:
        self.step(TimerFired(START))
        if self.state.disk.problem:
            self._announce(FileDamaged("log", self.state.disk.problem))

    def _end_core(self) -> None:
        self.links.close()
        self._timers.clear()
        self._armed.clear()
        self._led.clear()
        self._pending.clear()
        if self._journal_file is not None:
            self._journal_file.close()
            self._journal = self._journal_file = None

    def _open_journal(self, path: Path, arguments: dict[str, Any]) -> None:
        path = path.with_name(f"{path.name}-{self.me[:8]}-{arguments['incarnation']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal_file = file = path.open("wb", buffering=1 << 16)
        self._journal_bytes = 0

        def write(line: bytes) -> None:
            self._journal_bytes += len(line)
            if self._journal_bytes <= JOURNAL_BYTES_MAX:
                file.write(line)

        self._journal = Journal.begin(self.me, write=write, **arguments)

    # ---- effects

    def _set_timer(self, effect: SetTimer) -> None:
        self._timer_number += 1
        self._armed[effect.key] = self._timer_number
        heapq.heappush(self._timers, (effect.at_s, self._timer_number, effect.key))

    def _store(self, effect: Store) -> None:
        self.links.flush()  # what others wait for leaves before this device waits for its disk
        stored = Stored(effect.key, effect.number)
        if self.state.disk.is_durable:
            core = self.core
            self.state.disk.store(effect.key, effect.value, lambda: self.post(lambda: self._stored(core, stored)))
        else:
            self.state.disk.store(effect.key, effect.value, lambda: self.step(stored))

    def _measure(self, effect: MeasureLink) -> None:
        self.probes.send(
            effect.peer,
            self.links.ways_to(effect.peer),
            self.links.trust,
            default_port=DEFAULT_PORT,
            num_bytes_max=effect.num_bytes_max,
            seconds_max=effect.seconds_max,
        )

    def _probe_measured(self, peer: NodeId, probe: Probe) -> None:
        """Called by a thread of the probes'."""

        def tell() -> None:
            if peer in self.core.trusted:
                self.step(Observed(peer, self.me, probe.num_bytes, probe.seconds))

        self.post(tell)

    def _stored(self, core: NodeCore, stored: Stored) -> None:
        if self.core is core:
            self.step(stored)

    def _announce(self, fact: Fact) -> None:
        if isinstance(fact, MemberAdded | MemberRemoved):
            self.links.set_members(self.core.roster.roster.members)
        elif isinstance(fact, Outranked):
            self._restart_as = fact.incarnation + 1
        elif isinstance(fact, LeaderChanged):
            self._note_leader(fact)
        if not isinstance(fact, GraphChanged):
            self.facts.append((self._now_s, fact))
            del self.facts[:-_FACTS_MAX]
        if self.desk is not None:
            self.desk.learn(fact)
        if self.on_fact is not None:
            self.on_fact(fact)

    def _note_leader(self, fact: LeaderChanged) -> None:
        before = bool(self._led)
        (self._led.add if fact.leader == self.me else self._led.discard)(fact.group)
        if self.options.is_realtime and bool(self._led) != before:
            priority.become_realtime(priority.LEADER if self._led else priority.MEMBER)

    # ---- the loop

    def _run(self) -> None:
        try:
            priority.give_way_soon()
            if self.options.is_realtime:
                priority.become_realtime(priority.MEMBER)
            self._start_core()
            gc.collect()
            gc.freeze()  # what is there now stays; a collection need not look at it while a decision waits
            while not self._stopping:
                self._turn()
            self._say_last_words()
        except BaseException as error:
            self.failure = error
            if not isinstance(error, ShoalError):
                raise
        finally:
            self._close()
            if self._on_end is not None:
                with suppress(RuntimeError):  # whoever waited has ended meanwhile
                    self._on_end()

    def _turn(self) -> None:
        due_s = min(self._look_at_s, self._ping_at_s, self.links.due_s)
        for timers in (self._timers, self._later):
            if timers:
                due_s = min(due_s, timers[0][0])
        for key, mask in self._selector.select(max(0.0, due_s - clock.now_s())):
            if callable(key.data):
                key.data()
            else:
                self.links.on_ready(key.data, mask)
        self._fire_timers()
        self.links.tick(lambda peer: peer in self.core.trusted)
        self.links.flush()
        now_s = clock.now_s()
        if now_s >= self._look_at_s:
            self._look()
        if now_s >= self._ping_at_s:
            self._ping_at_s = now_s + _PING_EVERY_S / max(1, len(self.links.peers()))
            self.links.ping()
            self.links.flush()
        if self._restart_as:
            least, self._restart_as = self._restart_as, 0
            owners = self.links.release_owners()
            self._end_core()
            self._begin(least=least)
            self.links.adopt_owners(owners)
            self._start_core()

    def _fire_timers(self) -> None:
        now_s = clock.now_s()
        while self._timers and self._timers[0][0] <= now_s:
            _, number, key = heapq.heappop(self._timers)
            if self._armed.get(key) == number:
                del self._armed[key]
                self.step(TimerFired(key))
        while self._later and self._later[0][0] <= now_s:
            heapq.heappop(self._later)[2]()

    def _on_awake(self) -> None:
        with suppress(BlockingIOError):
            self._awake.recv(4096)
        while True:
            try:
                act = self._posted.get_nowait()
            except queue.Empty:
                return
            act()
            self.links.flush()

    def _look(self) -> None:
        """Tells the cores what only this device can see."""
        self._look_at_s = clock.now_s() + _LOOK_EVERY_S
        battery = is_on_mains()
        free_bytes = psutil.virtual_memory().available
        self.step(Learned(ResourcesObserved(free_bytes, 1.0 - psutil.cpu_percent() / 100.0, battery)))
        self.tell_addresses()
        self._tell_network()

    def tell_addresses(self) -> None:
        """Tells the others where this device is, if they do not know."""
        addresses = self.addresses()
        if self.me in self.core.roster.roster.members and addresses != self._told_addresses:
            device = self.core.roster.roster.members[self.me]
            self._told_addresses = addresses
            if device.addresses != addresses:
                self.command(SetAddresses(addresses))

    def _tell_network(self) -> None:
        """Says on this network which cluster this device is in and where, if that changed."""
        cluster = self.core.roster.roster.cluster if self.me in self.core.roster.roster.members else ""
        wanted = (cluster, self.addresses())
        if self.discovery is not None and wanted != self._announced:
            self._announced = wanted
            self.discovery.announce(self.me, *wanted)

    def _sighted(self, sighting: Sighting) -> None:
        """On a thread of `Discovery`."""
        own_tag = cluster_tag(self._announced[0])
        if not own_tag or sighting.tag == own_tag:  # whoever is joining looks for members of another's
            self.post(lambda: self.links.seen_nearby(sighting.node, sighting.addresses))

    def _say_last_words(self) -> None:
        """A goodbye is in the sockets' buffers within a moment, or will not be."""
        end_s = clock.now_s() + _GOODBYE_S
        self.links.flush()
        while self.links.num_queued() and clock.now_s() < end_s:
            for key, mask in self._selector.select(0.02):
                if not callable(key.data):
                    self.links.on_ready(key.data, mask)
            self.links.flush()

    def _close(self) -> None:
        self._end_core()
        self.probes.close()
        if self.discovery is not None:
            self.discovery.close()
        if self._door is not None:
            self._door.close()
        self._selector.close()
        self._awake.close()
        self._waker.close()
        self.state.close()
