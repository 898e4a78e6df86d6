"""Carries out what the group's core asks for, over control links to the other members of a run, on one thread.

A peer is here while a connection to it stands and something came over it lately; a frozen process is found by its silence.
One of each pair's connections is used, the newest. What the group's core stores goes to `votes.py` where the run has a
folder: who comes back then is the member that it was, in a later incarnation. Without one, a process that was restarted is
a new member.

Two runs may have one name: where a run was begun anew from its checkpoint while members of the old one are away or cut off.
Each beginning has a name of its own, told with every greeting, and no control link joins two. Who comes back from the old
one gives way.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from shoal.effects import (
    Announce,
    Command,
    Commanded,
    Effect,
    Event,
    Fact,
    Learned,
    Message,
    Received,
    Send,
    SetTimer,
    Store,
    Stored,
    TimerFired,
)
from shoal.errors import DeviceUnreachable, ShoalError
from shoal.ids import NodeId
from shoal.membership.failure import MemberGone, MemberHere
from shoal.membership.group.core import GroupCore
from shoal.membership.group.facts import RecordAdopted
from shoal.membership.messages import Commit, MembershipMessage, Propose, Record, Stale
from shoal.membership.timing import Timing
from shoal.runs.port import Hello, dial_any, receive_message, send_message
from shoal.runs.trust import Trust
from shoal.runs.votes import Life
from shoal.training.member import Status

TIMING = Timing(lead_every_s=0.2, lease_s=1.2, suspend_s=3.0, stagger_s=0.1, retry_s=0.3)
"""Calmer than on a LAN, since these threads share an interpreter with a training loop. Connections tell of a death."""
KEEPALIVE_S = 0.5
SILENCE_S = 4.0
DIAL_AGAIN_S = 1.0
CLOSE_S = 2.0


class StatusSaid(Message, frozen=True, tag="run-status"):
    """What a member has as an epoch begins."""

    status: Status


class AddressBook(Message, frozen=True, tag="run-addresses"):
    """Where members listen, as far as the sender knows."""

    addresses: dict[NodeId, str]


_decoder = msgspec.msgpack.Decoder(MembershipMessage | StatusSaid | AddressBook)
_encoder = msgspec.msgpack.Encoder()


class _Link:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.heard_s = time.monotonic()

    def shut(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Control:
    """One member's control links and group core.

    Args:
        life: who this member is, and what it stored before.
        founding: which beginning of the run it knows of; empty: none yet.
        store: writes what the core stores, before anything that rests on it is said; on a thread of its own. None: there
            is no disk.
        on_fact, on_status, on_gone, on_outdated: called on the control thread; they must not wait. The last: this member
            came back to a run that was begun anew.

    Raises:
        DamagedFile: what was stored is not that.
    """

    def __init__(
        self,
        life: Life,
        *,
        founding: str,
        store: Callable[[bytes], None] | None,
        on_fact: Callable[[Fact], None],
        on_status: Callable[[NodeId, Status], None],
        on_gone: Callable[[NodeId], None],
        on_outdated: Callable[[], None],
        trust: Trust | None = None,
        timing: Timing = TIMING,
    ) -> None:
        self.run, self.me, self._trust = life.run, life.node, trust
        self.incarnation, self.founding = life.incarnation, founding
        self.addresses: dict[NodeId, str] = {}
        self.other_runs: dict[str, str] = {}
        """Where another run was found than this one."""
        self._incarnations: dict[NodeId, int] = {}
        self._is_returning = bool(life.group)
        """It has not been in a record in this life."""
        self._seeds: list[str] = []
        self.core = GroupCore(
            life.run,
            life.node,
            incarnation=life.incarnation,
            timing=timing,
            now_s=time.monotonic(),
            stored=life.group or None,
        )
        self._learn_addresses(self.core.committed)
        self._store = store
        self._writer = ThreadPoolExecutor(1, "shoal-votes")
        self._on_fact, self._on_status, self._on_gone, self._on_outdated = on_fact, on_status, on_gone, on_outdated
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._links: dict[NodeId, list[_Link]] = {}
        self._timer_s = float("inf")
        self._timer_key = ""
        self._tick_s = time.monotonic()
        self._dialling: set[str] = set()
        self._dialled_s: dict[str, float] = {}
        self._is_closed = False
        self._sockets: set[socket.socket] = set()
        """Those that a thread reads from; it closes them."""
        self._thread = threading.Thread(target=self._loop, name="shoal-control", daemon=True)

    # ---- from any thread

    def start(self, address: str, seeds: Iterable[str] = ()) -> None:
        """`address` is where this member listens; `seeds` where others may."""
        self.addresses[self.me] = address
        self._seeds = [seed for seed in seeds if seed != address]
        self._thread.start()

    def close(self) -> None:
        """Closes all links."""
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        self._writer.shutdown()
        give_up_s = time.monotonic() + CLOSE_S
        while self._sockets and time.monotonic() < give_up_s:
            for sock in list(self._sockets):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            time.sleep(0.005)

    def command(self, command: Command) -> None:
        self._queue.put(lambda: self._tell(Commanded(command)))

    def say(self, peers: Iterable[NodeId], status: Status) -> None:
        chosen = tuple(peers)
        self._queue.put(lambda: self._send(chosen, StatusSaid(status)))

    def accept(self, sock: socket.socket, hello: Hello) -> None:
        """A connection that came in; used until it closes."""
        self._serve(sock, hello)

    def is_running(self) -> bool:
        """Whether this member may act on its record now."""
        return self.core.is_running(time.monotonic())

    def listed(self) -> tuple[list[NodeId], list[NodeId]]:
        """Who is in the record, and who of them is not here."""
        nodes = [member.node for member in self.core.committed.members]
        return nodes, [node for node in nodes if node != self.me and node not in self._links]

    def has_links(self) -> bool:
        """Whether any other member is connected."""
        return bool(self._links)

    # ---- on the control thread

    def _loop(self) -> None:
        while True:
            wait_s = max(0.0, min(self._timer_s, self._tick_s) - time.monotonic())
            try:
                call = self._queue.get(timeout=wait_s)
            except queue.Empty:
                call = None
                is_end = False
            else:
                is_end = call is None
            if is_end:
                break
            if call is not None:
                call()
            now_s = time.monotonic()
            if now_s >= self._timer_s:
                self._timer_s = float("inf")
                self._tell(TimerFired(self._timer_key))
            if now_s >= self._tick_s:
                self._tick_s = now_s + KEEPALIVE_S
                self._tick(now_s)
        self._is_closed = True
        for links in self._links.values():
            for link in links:
                link.shut()

    def _tick(self, now_s: float) -> None:
        for node, links in list(self._links.items()):
            for link in list(links):
                if now_s - link.heard_s > SILENCE_S:
                    link.shut()
                    self._lose(node, link)
                else:
                    self._send_to(node, link, b"")
        wanted = {self.addresses[member.node] for member in self.core.committed.members if member.node in self.addresses}
        wanted |= {address for node, address in self.addresses.items() if node not in self._links}
        known = {self.addresses[node] for node in self._links if node in self.addresses}
        for address in (wanted | (set(self._seeds) if not self._links else set())) - known - {self.addresses[self.me]}:
            self._dial(address, now_s)

    def _dial(self, address: str, now_s: float) -> None:
        if address in self._dialling or now_s - self._dialled_s.get(address, -1e9) < DIAL_AGAIN_S:
            return
        self._dialling.add(address)
        self._dialled_s[address] = now_s

        def connect() -> None:
            try:
                sock, answer = dial_any(address, self._hello(), self._trust)
            except (ShoalError, msgspec.MsgspecError):
                return
            finally:
                self._queue.put(lambda: self._dialling.discard(address))
            if answer.run != self.run:
                self.other_runs[address] = answer.run
            if answer.node == self.me or answer.run != self.run:
                sock.close()
                return
            self._read(sock, answer)

        threading.Thread(target=connect, daemon=True).start()

    def _hello(self) -> Hello:
        return Hello(
            self.run,
            "control",
            self.me,
            self.addresses.get(self.me, ""),
            incarnation=self.incarnation,
            founding=self.founding,
        )

    def _open(self, hello: Hello, link: _Link) -> None:
        node = hello.node
        is_other_run = bool(hello.founding and self.founding and hello.founding != self.founding)
        if self._is_closed or is_other_run or hello.incarnation < self._incarnations.get(node, 0):
            link.shut()
            if is_other_run and self._is_returning:
                self._is_returning = False
                self._on_outdated()
            return
        if hello.incarnation > self._incarnations.get(node, 0):
            for old in list(self._links.get(node, ())):
                old.shut()
                self._lose(node, old)
        self._incarnations[node] = hello.incarnation
        is_first = node not in self._links
        self._links.setdefault(node, []).append(link)
        if hello.address:
            self.addresses[node] = hello.address
        self._send((node,), AddressBook(dict(self.addresses)))
        if is_first:
            self._tell(Learned(MemberHere(node, hello.incarnation)))

    def _lose(self, node: NodeId, link: _Link) -> None:
        links = self._links.get(node, [])
        if link in links:
            links.remove(link)
            if not links:
                del self._links[node]
                if all(member.node != node for member in self.core.committed.members):
                    self.addresses.pop(node, None)
                self._on_gone(node)
                self._tell(Learned(MemberGone(node, self._incarnations[node])))

    def _send(self, peers: Iterable[NodeId], message: Message) -> None:
        data = _encoder.encode(message)
        for peer in peers:
            links = self._links.get(peer)
            if links:
                self._send_to(peer, links[-1], data)

    def _send_to(self, node: NodeId, link: _Link, data: bytes) -> None:
        try:
            send_message(link.sock, data)
        except ShoalError:
            link.shut()
            self._lose(node, link)

    def _tell(self, event: Event) -> None:
        for effect in self.core.step(event, time.monotonic()):
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            self._send(effect.peers, effect.message)
        elif isinstance(effect, SetTimer):
            self._timer_key, self._timer_s = effect.key, effect.at_s
        elif isinstance(effect, Store):
            stored = Stored(effect.key, effect.number)
            if self._store is None:
                # A member that ends with its process has nothing to remember.
                self._queue.put(lambda: self._tell(stored))
            else:
                self._writer.submit(self._write, self._store, effect.value, stored)
        elif isinstance(effect, Announce):
            if isinstance(effect.fact, RecordAdopted) and effect.fact.is_member:
                self._is_returning = False
            self._on_fact(effect.fact)

    def _write(self, store: Callable[[bytes], None], data: bytes, stored: Stored) -> None:
        """On the thread that writes. Where it fails, nothing is promised."""
        with contextlib.suppress(ShoalError):
            store(data)
            self._queue.put(lambda: self._tell(stored))

    def _arrived(self, node: NodeId, message: Message) -> None:
        if isinstance(message, StatusSaid):
            self._on_status(node, message.status)
        elif isinstance(message, AddressBook):
            for other, address in message.addresses.items():
                if other != self.me:
                    self.addresses.setdefault(other, address)
            self._tick_s = 0.0
        else:
            if isinstance(message, Commit | Stale | Propose):
                self._learn_addresses(message.record)
            self._tell(Received(node, message))

    def _learn_addresses(self, record: Record) -> None:
        for member in record.members:
            if member.address and member.node != self.me and member.node not in self.addresses:
                self.addresses[member.node] = member.address
                self._tick_s = 0.0

    # ---- on a thread per link

    def _serve(self, sock: socket.socket, hello: Hello) -> None:
        try:
            send_message(sock, msgspec.msgpack.encode(self._hello()))
        except ShoalError:
            sock.close()
            return
        self._read(sock, hello)

    def _read(self, sock: socket.socket, hello: Hello) -> None:
        link, node = _Link(sock), hello.node
        self._sockets.add(sock)
        self._queue.put(lambda: self._open(hello, link))
        try:
            while True:
                data = receive_message(sock)
                link.heard_s = time.monotonic()
                if data:
                    message = _decoder.decode(data)
                    self._queue.put(lambda message=message: self._arrived(node, message))  # type: ignore[misc]
        except (ShoalError, msgspec.MsgspecError, UnicodeDecodeError):
            pass
        self._queue.put(lambda: self._lose(node, link))
        link.shut()
        sock.close()
        self._sockets.discard(sock)


def unreachable(seeds: Iterable[str]) -> DeviceUnreachable:
    """Nobody answered at any of these."""
    return DeviceUnreachable(
        f"no member of the run answers at {', '.join(seeds)}: is it started there, and the address right?"
    )
