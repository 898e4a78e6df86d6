"""The control links of one device: who is dialled when, who is let in, which of two links to the same peer stays.

Nobody is presumed to reach anybody: both ends of a wanted link dial, and a device behind a NAT only dials out. Where both
succeed, the link that the device with the smaller id dialled stays; both ends see both links, and judge alike.

A member dials as such. Where it is refused, it comes as a stranger, and its core shows that it belongs
(`node/trust.py`). Strangers are few, slow and short: how many there are, how fast they come and how long they stay is
bounded, so that members do not feel them. All of it runs on one thread, which calls `on_ready` and `tick`.
"""

from __future__ import annotations

import ipaddress
import random
import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Protocol

import msgspec

from shoal.errors import LinkClosed, LinkError, PeerNotTrusted, RemoteProtocolError
from shoal.ids import NodeId
from shoal.membership.roster import Device
from shoal.runtime.channel import split_address
from shoal.transport.control import ControlLink, Frame, FrameKind, Stage, frame
from shoal.transport.identity import DeviceKeys, identify
from shoal.transport.secure import TrustStore, Unlisted

DEFAULT_PORT = 7434
GREETING_S = 5.0
"""From the connection to the welcome, whatever is said meanwhile."""
CONNECT_S = 3.0
HALF_OPEN_MAX = 128
STRANGERS_MAX = 32
STRANGERS_PER_S = 10.0
STRANGER_STAY_S = 20.0
"""A link that trust does not come to, nor an admission, is closed after that."""
OWNERS_MAX = 16
SILENT_S = 8.0
"""A wanted link that nothing comes through is closed; it is dialled anew."""
IDLE_S = 60.0
"""A link that nobody here wants is closed when nothing comes through for so long."""
RETIRING_S = 1.0
ALIVE_S = 1.0
"""Who was heard that lately has no need of a second link: whoever opens one has the same key, and is another."""
BACK_OFF_S_MIN, BACK_OFF_S_MAX = 0.1, 30.0
PENDING_MAX = 8
"""Frames that wait for a link under way."""
_ANCHORS_MAX = 256
_PING = struct.Struct(">d")
_CLONE = (
    "another device with the same key is connected: the key was cloned, with a disk image or a backup. "
    "Delete the state folder here and join by a new invitation"
)


class Listener(Protocol):
    """Who is told what happens on the links. Only `frame_received` may raise, a RemoteProtocolError: it ends the link."""

    def link_opened(self, peer: NodeId) -> None:
        """A link to `peer`, whose key is proven, stands; called again where a better one takes its place."""

    def link_closed(self, peer: NodeId) -> None:
        """It does not any more."""

    def frame_received(self, peer: NodeId, kind: int, payload: bytes) -> None:
        """A MESSAGE or PADDING came."""

    def round_trip_measured(self, peer: NodeId, seconds: float) -> None:
        """An echo came."""

    def owner_asked(self, link: ControlLink, payload: bytes) -> None:
        """This device's owner wants something; answer on that link."""

    def contact_failed(self, peer: NodeId, text: str) -> None:
        """The device that a token names cannot be reached; no more attempts are made."""

    def visitor_came(self, errand: bytes, sock: socket.socket, trust: TrustStore) -> None:
        """Somebody comes for `AS_PROBE` or `AS_AGENT`, and is still to prove who it is; the socket is the listener's now."""

    def post(self, act: Callable[[], None]) -> None:
        """Has `act` called on the links' thread."""


class LinkCounters(msgspec.Struct):
    """What happened on the links since the start."""

    num_accepted: int = 0
    num_opened: int = 0
    num_refused: int = 0
    """Keys that are not to be trusted, clones, too many strangers."""
    num_malformed: int = 0
    """Garbage, oversized frames, other protocols."""
    num_evicted: int = 0
    """Connections that had not greeted, closed for others or for their slowness."""
    num_dropped: int = 0
    """Messages that a full queue did not take."""


class _Seeker:
    """Attempts to reach one peer."""

    __slots__ = ("addresses", "as_stranger", "attempts", "due_s", "failures", "held", "is_contact", "pending", "rounds_left")

    def __init__(self, now_s: float) -> None:
        self.due_s = now_s
        self.attempts = 0
        self.failures = ""
        self.as_stranger = False
        self.held: _Held | None = None
        self.pending: list[bytes] = []
        self.addresses: tuple[str, ...] = ()
        """Of a token's contact; a member's are in the roster."""
        self.is_contact = False
        self.rounds_left = 0


class _Held:
    """A link and what is known of it here."""

    __slots__ = ("deadline_s", "heard_s", "is_owner", "link", "mask", "opened_s", "seeks")

    def __init__(self, link: ControlLink, deadline_s: float, seeks: NodeId | None = None) -> None:
        self.link = link
        self.deadline_s = deadline_s
        self.seeks = seeks
        self.mask = 0
        self.opened_s = self.heard_s = float("-inf")
        self.is_owner = False


class Links:
    """All links of one device.

    Args:
        listener: is told.
        selector: where sockets are registered, with a callable of the ready mask as data.
        door: a listening socket, or None for a device that only dials out.
        chance: spreads the attempts of many devices.
    """

    def __init__(
        self,
        keys: DeviceKeys,
        listener: Listener,
        *,
        selector: selectors.BaseSelector,
        clock: Callable[[], float],
        door: socket.socket | None,
        chance: random.Random,
    ) -> None:
        self.me = keys.node
        self.counters = LinkCounters()
        self.refusals: Counter[str] = Counter()
        """Whom this device did not let in or hung up on, by reason."""
        self.problems: dict[NodeId, str] = {}
        """Why a wanted peer is not linked, in one line."""
        self._keys = keys
        self._listener = listener
        self._selector = selector
        self._clock = clock
        self._chance = chance
        self._door = door
        self._members: Mapping[NodeId, Device] = {}
        self._trust = TrustStore(keys, [keys.public_key])
        self._trusted: frozenset[bytes] = frozenset([keys.public_key])
        self._unlisted = Unlisted(keys)
        self._strangers = TrustStore(keys, [])
        self._stranger_tokens = STRANGERS_PER_S
        self._tokens_s = clock()
        self._held: dict[ControlLink, _Held] = {}
        self._half_open: dict[_Held, None] = {}
        """Connections that came in and are not greeted yet, oldest first."""
        self._open: dict[NodeId, _Held] = {}
        self._wanted: frozenset[NodeId] = frozenset()
        self._seekers: dict[NodeId, _Seeker] = {}
        self._nearby: dict[NodeId, tuple[str, ...]] = {}
        """Where devices were said to be on this network (`discovery.py`); at most all members, and whom a token names."""
        self._dirty: set[_Held] = set()
        self._pinged = NodeId("")
        self._is_closed = False
        self.due_s = 0.0
        """When `tick` is to be called."""
        if door is not None:
            door.setblocking(False)
            selector.register(door, selectors.EVENT_READ, self._on_door)

    # ---- what the interpreter asks

    def set_members(self, members: Mapping[NodeId, Device]) -> None:
        """Whom TLS trusts from now on, and where they are. Links to others go on as the core wants."""
        keys = frozenset([self._keys.public_key, *(device.public_key for device in members.values())])
        if self._trusted <= keys:
            for key in keys - self._trusted:
                self._trust.add(key)
        else:
            self._trust = TrustStore(self._keys, keys)
        self._trusted = keys
        for node, device in members.items():
            before = self._members.get(node)
            seeker = self._seekers.get(node)
            if seeker is not None and (before is None or before.addresses != device.addresses):
                seeker.attempts, seeker.due_s, seeker.as_stranger = 0, self._clock(), False
                self.due_s = 0.0
        self._members = dict(members)
        self._nearby = {peer: where for peer, where in self._nearby.items() if peer in members or peer in self._seekers}

    def watch(self, peers: frozenset[NodeId]) -> None:
        """Keeps links to exactly these."""
        self._wanted = peers
        for peer in list(self._seekers):
            if peer not in peers and not self._seekers[peer].is_contact:
                self._end_seeking(peer)
        for peer in sorted(peers - self._open.keys()):
            self._seek(peer)

    def contact(self, peer: NodeId, addresses: tuple[str, ...], *, rounds: int = 2) -> None:
        """Dials a device that a token names, as a stranger; `contact_failed` if it does not answer."""
        if peer in self._open:
            self._listener.link_opened(peer)
            return
        self._end_seeking(peer)
        seeker = self._seekers[peer] = _Seeker(self._clock())
        seeker.addresses, seeker.is_contact, seeker.rounds_left, seeker.as_stranger = addresses, True, rounds, True
        self.due_s = 0.0

    def seen_nearby(self, peer: NodeId, addresses: tuple[str, ...]) -> None:
        """Somebody says that a device is there now. Whoever is being dialled is dialled there first."""
        if peer == self.me or not (peer in self._members or peer in self._seekers):
            return
        is_new = self._nearby.get(peer) != addresses
        self._nearby[peer] = addresses
        seeker = self._seekers.get(peer)
        if seeker is not None and seeker.held is None and is_new:
            seeker.attempts, seeker.due_s = 0, self._clock()
            self.due_s = 0.0

    def send(self, peers: Iterable[NodeId], data: bytes) -> None:
        """Frames to each; they leave with `flush`. A peer without a link is dialled, and a few of them wait for it."""
        for peer in peers:
            held = self._open.get(peer)
            if held is not None:
                if held.link.send(data):
                    self._dirty.add(held)
                else:
                    self.counters.num_dropped += 1
            elif peer != self.me:
                seeker = self._seekers.get(peer) or self._seek(peer)
                if seeker is not None and len(seeker.pending) < PENDING_MAX:
                    seeker.pending.append(data)

    def answer(self, link: ControlLink, data: bytes) -> None:
        """To the owner."""
        held = self._held.get(link)
        if held is not None and held.is_owner:
            link.send(data)
            self._dirty.add(held)

    def flush(self) -> None:
        """Hands what was sent to the sockets."""
        while self._dirty:
            held = self._dirty.pop()
            if held.link.stage is Stage.CLOSED:
                continue
            try:
                held.link.flush()
            except LinkError as error:
                self._lose(held, error)
                continue
            self._register(held)

    def hang_up(self, peer: NodeId) -> None:
        """Closes the link to `peer`; `link_closed` follows."""
        held = self._open.get(peer)
        if held is not None:
            with suppress(LinkError):
                held.link.flush()  # its last words
            self._lose(held, LinkClosed("closed here"))

    def num_queued(self) -> int:
        """Bytes that wait for sockets, in all."""
        return sum(held.link.num_queued for held in self._held.values() if held.link.is_open)

    def peers(self) -> list[NodeId]:
        """To whom a link stands."""
        return list(self._open)

    def describe(self, peer: NodeId) -> str:
        """Where the link to `peer` goes, and who dialled; empty without one."""
        held = self._open.get(peer)
        if held is None:
            return ""
        return f"{'to' if held.link.is_dialled else 'from'} {held.link.address}"

    @property
    def trust(self) -> TrustStore:
        """Whom TLS trusts now."""
        return self._trust

    def ways_to(self, peer: NodeId) -> tuple[str, ...]:
        """Addresses at which `peer` may be dialled, the one that its link goes to first."""
        held = self._open.get(peer)
        device = self._members.get(peer)
        dialled = (held.link.address,) if held is not None and held.link.is_dialled else ()
        return tuple(dict.fromkeys((*dialled, *(device.addresses if device is not None else ()))))

    def ping(self) -> None:
        """Asks one open link for an echo, each in its turn; `round_trip_measured` follows.

        One at a time, or a device would measure how long all the others take to answer at once.
        """
        peers = sorted(self._open)
        if not peers:
            return
        self._pinged = next((peer for peer in peers if peer > self._pinged), peers[0])
        if not self._open[self._pinged].link.num_queued:
            self.send([self._pinged], frame(FrameKind.PING, _PING.pack(self._clock())))

    def release_owners(self) -> list[_Held]:
        """The owner's own links; they go on with the `Links` that come next."""
        owners = [held for held in self._held.values() if held.is_owner]
        for held in owners:
            self.flush()
            self._unregister(held)
            del self._held[held.link]
        return owners

    def adopt_owners(self, owners: list[_Held]) -> None:
        """Takes over what `release_owners` gave."""
        for held in owners:
            self._hold(held)

    def close(self) -> None:
        """Ends everything, without a word to the listener."""
        self._is_closed = True
        self._seekers.clear()
        for held in list(self._held.values()):
            self._drop(held)
        if self._door is not None:
            self._selector.unregister(self._door)

    # ---- sockets

    def _hold(self, held: _Held) -> None:
        self.due_s = min(self.due_s, self._clock() + 0.25)
        self._held[held.link] = held
        self._register(held)

    def _register(self, held: _Held) -> None:
        link = held.link
        mask = selectors.EVENT_READ if link.stage is not Stage.CONNECTING else 0
        if link.wants_write:
            mask |= selectors.EVENT_WRITE
        if mask == held.mask:
            return
        if held.mask:
            self._selector.modify(link.socket, mask, held)
        else:
            self._selector.register(link.socket, mask, held)
        held.mask = mask

    def _drop(self, held: _Held) -> None:
        """Closes the socket and forgets it."""
        self._unregister(held)
        held.link.close()
        self._held.pop(held.link, None)
        self._half_open.pop(held, None)
        self._dirty.discard(held)

    def _unregister(self, held: _Held) -> None:
        """Before another object or connection gets the descriptor."""
        if not held.mask:
            return
        held.mask = 0
        with suppress(KeyError, ValueError):
            self._selector.unregister(held.link.socket)

    def _lose(self, held: _Held, error: LinkError) -> None:
        """A link ended, or did not come about."""
        link = held.link
        if isinstance(error, RemoteProtocolError):
            self.counters.num_malformed += 1
            self.refusals["malformed"] += 1
        elif isinstance(error, PeerNotTrusted) and not link.is_dialled:
            self.counters.num_refused += 1
            self.refusals["too many strangers" if link.stage is Stage.PREFACE else "not trusted"] += 1
        self._drop(held)
        if held.seeks is not None:
            self._attempt_failed(held, error)
        if link.peer is not None and self._open.get(link.peer) is held:
            del self._open[link.peer]
            self.problems[link.peer] = str(error)
            self._listener.link_closed(link.peer)
            if link.peer in self._wanted and not self._is_closed:
                self._seek(link.peer)

    def on_ready(self, held: _Held, mask: int) -> None:
        """The selector says that something can be done; `held` is what was registered."""
        if held.link not in self._held:
            return  # closed since
        try:
            self._go_on(held, mask)
        except LinkError as error:
            self._lose(held, error)

    def _go_on(self, held: _Held, mask: int) -> None:
        link = held.link
        if link.stage is Stage.OPEN or (link.stage is Stage.WELCOME and link.is_dialled):
            if mask & selectors.EVENT_WRITE:
                link.flush()
            if mask & selectors.EVENT_READ:
                self._read(held)
        elif link.stage is Stage.CONNECTING:
            self._unregister(held)  # TLS takes over the descriptor under another object
            link.on_connected()
        elif link.stage is Stage.PREFACE:
            if link.read_preface():
                self._begin(held)
        elif link.stage is Stage.HANDSHAKE:
            link.shake_hands()
        if link.stage is Stage.WELCOME and not link.is_dialled:
            self._judge(held)
        if held.link in self._held:
            self._register(held)

    # ---- who comes in

    def _on_door(self) -> None:
        assert self._door is not None
        if self._is_closed:
            return
        for _ in range(64):
            try:
                sock, address = self._door.accept()
            except OSError:  # none left, or one that ended while it waited
                return
            self.counters.num_accepted += 1
            if len(self._half_open) >= HALF_OPEN_MAX:
                # Who greets at once is through within milliseconds; the oldest has had its chance.
                silent = next((each for each in self._half_open if each.link.stage is Stage.PREFACE), None)
                self.counters.num_evicted += 1
                self.refusals["too many that say nothing"] += 1
                self._drop(silent or next(iter(self._half_open)))
            try:
                link = ControlLink.accept(sock, f"{address[0]}:{address[1]}")
            except OSError:
                sock.close()
                continue
            held = _Held(link, self._clock() + GREETING_S)
            self._half_open[held] = None
            self._hold(held)

    def _begin(self, held: _Held) -> None:
        link = held.link
        trust = self._trust
        if link.errand:
            self._give_away(held)
            return
        if link.is_stranger:
            if not self._may_come_in():
                raise PeerNotTrusted(f"{link.address}: too many strangers at a time")
            if identify(link.claimed_key) in self._members:
                link.is_stranger = False  # a member after all
            else:
                if len(self._strangers) >= _ANCHORS_MAX:
                    self._strangers = TrustStore(self._keys, [])
                try:
                    self._strangers.add(link.claimed_key)
                except ValueError:
                    raise RemoteProtocolError(f"{link.address} shows a key that is none") from None
                trust = self._strangers
        self._unregister(held)
        link.begin_handshake(trust)

    def _give_away(self, held: _Held) -> None:
        """A connection that is no control link is no concern of this thread."""
        self._unregister(held)
        self._held.pop(held.link, None)
        self._half_open.pop(held, None)
        self._listener.visitor_came(held.link.errand, held.link.socket, self._trust)

    def _may_come_in(self) -> bool:
        now_s = self._clock()
        self._stranger_tokens = min(STRANGERS_MAX, self._stranger_tokens + (now_s - self._tokens_s) * STRANGERS_PER_S)
        self._tokens_s = now_s
        num_strangers = sum(held.link.is_stranger and not held.link.is_dialled for held in self._held.values())
        if self._stranger_tokens < 1.0 or num_strangers > STRANGERS_MAX:
            return False
        self._stranger_tokens -= 1.0
        return True

    def _judge(self, held: _Held) -> None:
        """An acceptor's handshake is done: is the link to be used?"""
        link, peer = held.link, held.link.peer
        assert peer is not None
        self._half_open.pop(held, None)
        if peer == self.me:
            self._let_owner_in(held)
            return
        before = self._open.get(peer)
        if before is not None:
            is_alive = self._clock() - before.heard_s < ALIVE_S
            if not before.link.is_dialled and is_alive:
                self._refuse(held, "cloned key", _CLONE)
                return
            if before.link.is_dialled and self.me < peer and is_alive:
                self._refuse(held, "another link stands", "another link stands")
                return
            if is_alive:
                self._retire(before)
            else:
                self._replace(before)
        link.welcome()
        self._use(held)

    def _let_owner_in(self, held: _Held) -> None:
        link = held.link
        if not _is_from_here(link.socket):
            self._refuse(held, "cloned key", _CLONE)
        elif sum(each.is_owner for each in self._held.values()) >= OWNERS_MAX:
            self._refuse(held, "too many commands", "too many commands are under way: try again")
        else:
            held.is_owner = True
            held.deadline_s = float("inf")
            link.welcome()

    def _refuse(self, held: _Held, reason: str, text: str) -> None:
        self.counters.num_refused += 1
        self.refusals[reason] += 1
        held.link.refuse(text)
        self._drop(held)

    def _retire(self, before: _Held) -> None:
        """A link that is not used any more stays until the other end knows of the one in its place, and is listened to."""
        before.deadline_s = self._clock() + RETIRING_S

    def _replace(self, before: _Held) -> None:
        """A link that is dead, though the system has not said so."""
        peer = before.link.peer
        assert peer is not None
        self._open.pop(peer, None)
        self._drop(before)
        self._listener.link_closed(peer)

    def _use(self, held: _Held) -> None:
        peer, now_s = held.link.peer, self._clock()
        assert peer is not None
        held.opened_s = held.heard_s = now_s
        held.deadline_s = float("inf")
        self._open[peer] = held
        self.counters.num_opened += 1
        self.problems.pop(peer, None)
        seeker = self._seekers.get(peer)
        pending = seeker.pending if seeker is not None else []
        # A dial of our own that is under way is not cut off: both ends must see both links to judge alike.
        if seeker is not None and (seeker.held is None or seeker.held is held):
            del self._seekers[peer]
        elif seeker is not None:
            seeker.pending = []
        held.seeks = None
        self._listener.link_opened(peer)
        for data in pending:
            held.link.send(data)
            self._dirty.add(held)

    # ---- what comes

    def _read(self, held: _Held) -> None:
        link = held.link
        frames = link.receive()
        held.heard_s = self._clock()
        for each in frames:
            self._take(held, each)
            if link.stage is Stage.CLOSED:
                return

    def _take(self, held: _Held, each: Frame) -> None:
        link = held.link
        if link.stage is Stage.WELCOME:
            self._on_answer(held, each)
        elif each.kind == FrameKind.MESSAGE or each.kind == FrameKind.PADDING:
            if held.is_owner or link.peer is None:
                raise RemoteProtocolError("an owner speaks like a member")
            self._listener.frame_received(link.peer, each.kind, each.payload)
        elif each.kind == FrameKind.PING and len(each.payload) == _PING.size:
            link.send(frame(FrameKind.PONG, each.payload))
            self._dirty.add(held)
        elif each.kind == FrameKind.PONG and len(each.payload) == _PING.size and link.peer is not None:
            seconds = self._clock() - _PING.unpack(each.payload)[0]
            if 0.0 <= seconds < SILENT_S:  # the echo is the peer's word
                self._listener.round_trip_measured(link.peer, seconds)
        elif each.kind == FrameKind.OWNER and held.is_owner:
            self._listener.owner_asked(link, each.payload)
        else:
            raise RemoteProtocolError(f"{link.address} sent a frame of kind {each.kind} out of turn")

    def _on_answer(self, held: _Held, each: Frame) -> None:
        """We dialled; the other end says whether the link is to be used."""
        link, peer = held.link, held.link.peer
        assert peer is not None
        if each.kind == FrameKind.REFUSED:
            raise LinkClosed(each.payload[:512].decode(errors="replace"))  # it trusts the key, not the link
        if each.kind != FrameKind.WELCOME:
            raise RemoteProtocolError(f"{link.address} does not begin with a welcome")
        before = self._open.get(peer)
        if before is not None and not before.link.is_dialled and self.me > peer:
            self._seekers.pop(peer, None)
            held.seeks = None
            self._drop(held)
            return
        if before is not None:
            self._retire(before)
        link.stage = Stage.OPEN
        self._use(held)

    # ---- who is dialled

    def _seek(self, peer: NodeId) -> _Seeker | None:
        if peer in self._seekers:
            return self._seekers[peer]
        if peer not in self._members or peer == self.me:
            return None
        seeker = self._seekers[peer] = _Seeker(self._clock())
        self.due_s = 0.0
        return seeker

    def _end_seeking(self, peer: NodeId) -> None:
        seeker = self._seekers.pop(peer, None)
        if seeker is not None and seeker.held is not None:
            seeker.held.seeks = None
            self._drop(seeker.held)

    def _addresses(self, peer: NodeId, seeker: _Seeker) -> tuple[str, ...]:
        device = self._members.get(peer)
        known = device.addresses if device is not None else ()
        return tuple(dict.fromkeys((*self._nearby.get(peer, ()), *seeker.addresses, *known)))

    def _dial(self, peer: NodeId, seeker: _Seeker) -> None:
        addresses = self._addresses(peer, seeker)
        if not addresses:
            self.problems[peer] = "no address is known: it must dial this device"
            seeker.due_s = self._clock() + BACK_OFF_S_MAX
            return
        address = addresses[seeker.attempts % len(addresses)]
        seeker.due_s = float("inf")
        try:
            host, port = split_address(address, default_port=DEFAULT_PORT)
            ipaddress.ip_address(host)
        except ValueError:
            self._resolve(peer, address)
            return
        self._dial_address(peer, seeker, host, port)

    def _resolve(self, peer: NodeId, address: str) -> None:
        """A name: asking for its address may take seconds, so another thread does."""

        def ask() -> None:
            host, found = address, ""
            port = DEFAULT_PORT
            with suppress(OSError, ValueError, UnicodeError):
                host, port = split_address(address, default_port=DEFAULT_PORT)
                found = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
            self._listener.post(lambda: self._resolved(peer, host, port, found))

        threading.Thread(target=ask, name="agent-resolve", daemon=True).start()

    def _resolved(self, peer: NodeId, host: str, port: int, found: str) -> None:
        seeker = self._seekers.get(peer)
        if seeker is None or seeker.held is not None:
            return
        if found:
            self._dial_address(peer, seeker, found, port)
        else:
            self._try_later(peer, seeker, f"{host}: no such name")

    def _dial_address(self, peer: NodeId, seeker: _Seeker, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            if seeker.as_stranger or peer not in self._members:
                trust: TrustStore | Unlisted = self._trust if peer in self._members else self._unlisted
                link = ControlLink.dial(family, (host, port), peer, trust, public_key=self._keys.public_key)
            else:
                link = ControlLink.dial(family, (host, port), peer, self._trust)
        except LinkError as error:
            self._try_later(peer, seeker, str(error))
            return
        held = _Held(link, self._clock() + CONNECT_S, peer)
        seeker.held = held
        self._hold(held)

    def _attempt_failed(self, held: _Held, error: LinkError) -> None:
        assert held.seeks is not None
        peer = held.seeks
        held.seeks = None
        seeker = self._seekers.get(peer)
        if seeker is None or seeker.held is not held:
            return
        if isinstance(error, PeerNotTrusted) and not seeker.is_contact:
            seeker.as_stranger = not seeker.as_stranger
        self._try_later(peer, seeker, str(error))

    def _try_later(self, peer: NodeId, seeker: _Seeker, problem: str) -> None:
        seeker.held = None
        seeker.attempts += 1
        self.problems[peer] = problem
        if peer in self._open or (peer not in self._wanted and not seeker.is_contact and seeker.attempts > 3):
            del self._seekers[peer]
            return
        num_addresses = max(1, len(self._addresses(peer, seeker)))
        rounds, rest = divmod(seeker.attempts, num_addresses)
        if rest == 0 and seeker.is_contact:
            seeker.rounds_left -= 1
            if seeker.rounds_left <= 0:
                del self._seekers[peer]
                self._listener.contact_failed(peer, problem)
                return
        delay_s = 0.0 if rest else min(BACK_OFF_S_MAX, BACK_OFF_S_MIN * 2.0 ** min(rounds - 1, 16))
        seeker.due_s = self._clock() + delay_s * (0.5 + self._chance.random())
        self.due_s = min(self.due_s, seeker.due_s)

    # ---- time

    def tick(self, is_trusted: Callable[[NodeId], bool]) -> None:
        """What is due: attempts, and links that took too long or went silent."""
        now_s = self._clock()
        if now_s < self.due_s:
            return
        self.due_s = now_s + 1.0
        for peer, seeker in list(self._seekers.items()):
            if self._seekers.get(peer) is seeker and seeker.held is None and now_s >= seeker.due_s:
                if peer in self._open:
                    del self._seekers[peer]
                else:
                    self._dial(peer, seeker)
        for held in list(self._held.values()):
            if now_s >= held.deadline_s:
                if held.link.is_open:
                    self._drop(held)
                    continue
                if not held.link.is_dialled:
                    self.counters.num_evicted += 1
                    self.refusals["too slow"] += 1
                elif held.link.stage is not Stage.CONNECTING and now_s < held.deadline_s + GREETING_S - CONNECT_S:
                    continue
                self._lose(held, LinkClosed(f"{held.link.address} did not answer in time"))
        for peer, held in list(self._open.items()):
            silent_s = now_s - held.heard_s
            if peer in self._wanted and silent_s > SILENT_S:
                self._lose(held, LinkClosed(f"nothing came for {SILENT_S:g} s"))
            elif peer not in self._wanted and silent_s > IDLE_S:
                self._lose(held, LinkClosed("nobody needs it"))
            elif now_s - held.opened_s > STRANGER_STAY_S and not is_trusted(peer) and peer not in self._wanted:
                self._lose(held, PeerNotTrusted("it is no member"))

        for seeker in self._seekers.values():
            if seeker.held is None:
                self.due_s = min(self.due_s, seeker.due_s)
        if len(self._held) > len(self._open):  # some are on their way
            self.due_s = min(self.due_s, now_s + 0.25)


def message_frame(payload: bytes) -> bytes:
    """The frame of a core's message."""
    return frame(FrameKind.MESSAGE, payload)


def _is_from_here(sock: socket.socket) -> bool:
    """Whether the other end is on this machine."""
    try:
        theirs, ours = sock.getpeername()[0], sock.getsockname()[0]
        return theirs == ours or ipaddress.ip_address(theirs.split("%")[0]).is_loopback
    except (OSError, ValueError):
        return False
