"""Carries a transfer out over sockets: a shelf of what a device gives away, a puller that fetches from several shelves.

A connection is used by one puller. Control is MessagePack behind a length; a shard's raw bytes follow its header. Bytes are
received beside the state, checked, and copied in when they are the first sound copy; nothing of them is interpreted here.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from shoal.errors import LinkClosed, RemoteProtocolError, ShoalError
from shoal.exchange.wire import SocketWire
from shoal.ids import NodeId
from shoal.transfer.pull import (
    Complete,
    Event,
    Pull,
    Quarantine,
    Request,
    ShardCame,
    SourceFound,
    SourceLost,
    TimePassed,
)
from shoal.transfer.shards import Manifest, Source, manifest_of, shard_bytes_for, shard_hash

_LENGTH = struct.Struct("<I")
_CONTROL_BYTES_MAX = 64 << 20
"""Of one control frame: a ledger of a million steps has about so much."""
_CLOSE_S = 2.0
_LOOK_S = 0.1
_ASK_AGAIN_S = 0.05
"""How often a fetch that waits looks whether it is still wanted."""
_PIECE_BYTES = 64 * 1024
_BEGIN_BYTES_PER_S, _BEGIN_LATENCY_S = 10e6, 0.01
"""Believed of a source that nobody measured: the transfer learns by itself."""

ByteArray = np.ndarray[Any, np.dtype[np.uint8]]


class _AskManifest(msgspec.Struct, frozen=True, tag="m", array_like=True):
    name: str


class _AskShard(msgspec.Struct, frozen=True, tag="s", array_like=True):
    name: str
    version: int
    shard: int


class _Manifest(msgspec.Struct, frozen=True, tag="M", array_like=True):
    name: str
    manifest: Manifest
    about: bytes


class _Missing(msgspec.Struct, frozen=True, tag="N", array_like=True):
    name: str


class _Shard(msgspec.Struct, frozen=True, tag="S", array_like=True):
    name: str
    version: int
    shard: int
    num_bytes: int


_encoder = msgspec.msgpack.Encoder()
_asked = msgspec.msgpack.Decoder(_AskManifest | _AskShard)
_answered = msgspec.msgpack.Decoder(_Manifest | _Missing | _Shard)


def _frame(message: msgspec.Struct) -> bytes:
    data = _encoder.encode(message)
    return _LENGTH.pack(len(data)) + data


def _receive(wire: SocketWire) -> bytes:
    head = bytearray(_LENGTH.size)
    wire.receive_into(memoryview(head))
    (length,) = _LENGTH.unpack(head)
    if length > _CONTROL_BYTES_MAX:
        raise RemoteProtocolError(f"a message of {length} bytes: at most {_CONTROL_BYTES_MAX}")
    data = bytearray(length)
    wire.receive_into(memoryview(data))
    return bytes(data)


class Item(NamedTuple):
    """What is on a shelf: bytes that nobody changes any more, and what is told beside them."""

    manifest: Manifest
    about: bytes
    data: memoryview


class Offer(NamedTuple):
    """What could be on a shelf; see `Shelf.put`."""

    x: ByteArray
    version: int
    about: bytes
    num_sources: int


class Shelf:
    """What this device gives to others, by name.

    Attributes:
        share: of the time that a connection may be sending, above 0 and at most 1, so that training has the rest.

    Args:
        find: what is put on the shelf only when somebody asks for it.
    """

    def __init__(self, *, share: float = 0.5, find: Callable[[str], Offer | None] = lambda _: None) -> None:
        self.share = share
        self._find = find
        self.bytes_sent = 0
        self._items: dict[str, Item] = {}
        self._lock = threading.Lock()

    def put(self, name: str, x: ByteArray, *, version: int, about: bytes, num_sources: int) -> Manifest:
        """Shows `x`, which stays as it is until it is taken away again.

        Args:
            x: at least one byte, contiguous.
            num_sources: how many others have the same; all must say the same number, since shards follow from it.
        """
        data = memoryview(x)  # type: ignore[arg-type]  # numpy arrays export buffers
        size = shard_bytes_for(data.nbytes, num_sources)
        item = Item(manifest_of(data, version=version, shard_bytes=size, about=about), about, data)
        with self._lock:
            self._items[name] = item
        return item.manifest

    def take(self, name: str) -> None:
        """Takes it away; whoever is at it finds nothing more."""
        with self._lock:
            self._items.pop(name, None)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._items)

    def get(self, name: str) -> Item | None:
        with self._lock:
            return self._items.get(name)

    def _found(self, name: str) -> Item | None:
        offer = self._find(name)
        if offer is not None:
            self.put(name, offer.x, version=offer.version, about=offer.about, num_sources=offer.num_sources)
        return self.get(name)

    def serve(self, sock: socket.socket) -> None:
        """Answers one puller until it closes the connection."""
        wire = SocketWire(sock)
        try:
            while True:
                asked = _decode(_asked, _receive(wire))
                item = self.get(asked.name) or self._found(asked.name)
                if item is None or (isinstance(asked, _AskShard) and not _has(item, asked)):
                    wire.send(_frame(_Missing(asked.name)), memoryview(b""))
                elif isinstance(asked, _AskManifest):
                    wire.send(_frame(_Manifest(asked.name, item.manifest, item.about)), memoryview(b""))
                else:
                    self._send(wire, asked, item)
        except ShoalError:
            return
        finally:
            wire.shut()
            wire.close()

    def _send(self, wire: SocketWire, asked: _AskShard, item: Item) -> None:
        first, stop = item.manifest.span(asked.shard)
        header = _frame(_Shard(asked.name, asked.version, asked.shard, stop - first))
        for begin in range(first, stop, _PIECE_BYTES):
            piece = item.data[begin : min(begin + _PIECE_BYTES, stop)]
            began_s = time.monotonic()
            wire.send(header, piece)
            header = b""
            self.bytes_sent += piece.nbytes
            # As long as it took to get rid of the last piece, for the share that is not ours.
            time.sleep((time.monotonic() - began_s) * (1.0 / self.share - 1.0))


def _has(item: Item, asked: _AskShard) -> bool:
    return item.manifest.version == asked.version and 0 <= asked.shard < len(item.manifest.hashes)


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"no message of a transfer: {error}") from None


class Fetched(NamedTuple):
    """A state as it was given, checked shard by shard. `complete` says from whom."""

    manifest: Manifest
    about: bytes
    data: ByteArray
    complete: Complete


class _Peer:
    def __init__(self, wire: SocketWire) -> None:
        self.wire = wire
        self.answer: _Manifest | _Missing | None = None
        self.is_lost = False


class Puller:
    """Fetches from donors over connections that it keeps.

    Args:
        dial: a connected socket to a donor's shelf, which belongs to the puller from then on. Raises ShoalError or OSError.
        measured: bytes/s and latency of the link from a donor, where somebody knows.
        observed: told of each shard that came: from whom, its bytes, and the seconds they took. A donor may have paused.
    """

    def __init__(
        self,
        dial: Callable[[NodeId], socket.socket],
        *,
        measured: Callable[[NodeId], tuple[float, float] | None] = lambda _: None,
        observed: Callable[[NodeId, int, float], None] = lambda _node, _bytes, _seconds: None,
    ) -> None:
        self._dial, self._observed = dial, observed
        self._measured = measured
        self.quarantined: list[Quarantine] = []
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._peers: dict[NodeId, _Peer] = {}
        self._threads: list[threading.Thread] = []
        self._name = ""
        self._core: Pull | None = None
        self._manifest: Manifest | None = None
        self._data: ByteArray = np.empty(0, np.uint8)
        self._complete: Complete | None = None
        self._sources: set[NodeId] = set()
        """Donors that have what is being fetched."""

    def close(self) -> None:
        """Closes all connections; a `fetch` that is open ends."""
        with self._lock:
            for node in list(self._peers):
                self._lose(node)
        for thread in list(self._threads):
            thread.join(_CLOSE_S)

    def forget(self, node: NodeId) -> None:
        """The donor is gone; nothing is expected of it."""
        with self._lock:
            self._lose(node)

    def fetch(
        self,
        name: str,
        donors: Iterable[NodeId],
        *,
        answer_s: float = 5.0,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Fetched | None:
        """All of `name` from whoever of `donors` has it in the version that most have. Blocks; one at a time.

        Donors may die meanwhile, as long as one is left.

        Returns:
            None where nobody has it, or where `give_up` said so: the caller asks again, perhaps others.
        """
        with self._turn:
            return None if give_up() else self._fetch(name, sorted(donors), answer_s, give_up)

    def _fetch(self, name: str, wanted: list[NodeId], answer_s: float, give_up: Callable[[], bool]) -> Fetched | None:
        for node in wanted:
            self._connect(node)
        with self._lock:
            peers = {node: self._peers[node] for node in wanted if node in self._peers}
            self._name, self._core, self._complete = name, None, None
            for node, peer in peers.items():
                peer.answer = None
                self._ask(node, _AskManifest(name))
            give_up_s = time.monotonic() + answer_s
            while not all(peer.answer or peer.is_lost for peer in peers.values()):
                if time.monotonic() > give_up_s or give_up():
                    break
                self._changed.wait(_LOOK_S)
            answers = {node: peer.answer for node, peer in peers.items() if isinstance(peer.answer, _Manifest)}
            roots = Counter(answer.manifest.root for answer in answers.values())
            if not roots:
                return None
            best = max(roots, key=lambda root: (roots[root], root))
            agreed = {node: answer for node, answer in answers.items() if answer.manifest.root == best}
            first = next(iter(agreed.values()))
            if shard_hash(first.about) != first.manifest.about:
                raise RemoteProtocolError("what a donor tells of its state does not match its manifest")
            return self._pull(first, wanted, list(agreed), give_up)

    def _pull(
        self, first: _Manifest, wanted: list[NodeId], nodes: list[NodeId], give_up: Callable[[], bool]
    ) -> Fetched | None:
        """From `nodes`, which have it, and from others of `wanted` as soon as they do: they may learn a moment later that
        somebody joins."""
        manifest = self._manifest = first.manifest
        self._data = np.empty(manifest.num_bytes, np.uint8)
        self._core = Pull(len(manifest.hashes), manifest.shard_bytes, now_s=time.monotonic())
        self._sources = set()
        for node in nodes:
            self._take_source(node)
        ask_s = time.monotonic() + _ASK_AGAIN_S
        while self._complete is None:
            if give_up() or all(self._peers[node].is_lost for node in self._sources if node in self._peers):
                break
            if time.monotonic() >= ask_s:
                ask_s = time.monotonic() + _ASK_AGAIN_S
                for node in set(wanted) - self._sources:
                    self._ask(node, _AskManifest(self._name))
            due_s = self._core.due_s()
            if due_s is None and self._complete is None:
                break  # nothing is under way: all sources are quarantined
            wait_s = min(_ASK_AGAIN_S, max(0.0, due_s - time.monotonic()))
            if not self._changed.wait(wait_s):
                self._tell(TimePassed())
        complete, data = self._complete, self._data
        self._core, self._manifest, self._data = None, None, np.empty(0, np.uint8)
        return Fetched(manifest, first.about, data, complete) if complete is not None else None

    # ---- connections

    def _connect(self, node: NodeId) -> None:
        with self._lock:
            if node in self._peers:
                return
        try:
            peer = _Peer(SocketWire(self._dial(node)))
        except (OSError, ShoalError):
            return
        with self._lock:
            self._peers[node] = peer
        thread = threading.Thread(target=self._read, args=(node, peer), daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    # ---- under the lock

    def _lose(self, node: NodeId) -> None:
        peer = self._peers.pop(node, None)
        if peer is not None:
            peer.is_lost = True
            peer.wire.shut()
            self._tell(SourceLost(node))
        self._changed.notify_all()

    def _take_source(self, node: NodeId) -> None:
        self._sources.add(node)
        rate, latency_s = self._measured(node) or (_BEGIN_BYTES_PER_S, _BEGIN_LATENCY_S)
        self._tell(SourceFound(Source(node, rate, latency_s)))

    def _ask(self, node: NodeId, message: msgspec.Struct) -> None:
        peer = self._peers.get(node)
        if peer is not None:
            try:
                peer.wire.send(_frame(message), memoryview(b""))
            except LinkClosed:
                self._lose(node)

    def _tell(self, event: Event) -> None:
        if self._core is None:
            return
        for effect in self._core.step(event, time.monotonic()):
            if isinstance(effect, Request):
                assert self._manifest is not None
                self._ask(effect.node, _AskShard(self._name, self._manifest.version, effect.shard))
            elif isinstance(effect, Complete):
                self._complete = effect
            elif isinstance(effect, Quarantine):
                self.quarantined.append(effect)
        self._changed.notify_all()

    # ---- on a thread per donor

    def _read(self, node: NodeId, peer: _Peer) -> None:
        scratch = bytearray()
        try:
            while True:
                message = _decode(_answered, _receive(peer.wire))
                if not isinstance(message, _Shard):
                    with self._lock:
                        if not self._hears(node, peer, message):
                            break
                    continue
                if not 0 < message.num_bytes <= _CONTROL_BYTES_MAX:
                    raise RemoteProtocolError(f"a shard of {message.num_bytes} bytes")
                if len(scratch) < message.num_bytes:
                    scratch = bytearray(message.num_bytes)
                received = memoryview(scratch)[: message.num_bytes]
                began_s = time.monotonic()
                peer.wire.receive_into(received)
                self._observed(node, received.nbytes, time.monotonic() - began_s)
                digest = shard_hash(received)
                with self._lock:
                    self._came(node, message, received, digest)
        except ShoalError:
            pass
        with self._lock:
            if self._peers.get(node) is peer:
                self._lose(node)
        peer.wire.shut()
        peer.wire.close()

    def _hears(self, node: NodeId, peer: _Peer, message: _Manifest | _Missing) -> bool:
        """What a donor says that it has. False where it had what is being fetched, and took it away."""
        if message.name != self._name:
            return True
        if self._core is None:
            peer.answer = message
            self._changed.notify_all()
        elif isinstance(message, _Missing):
            return node not in self._sources
        elif self._manifest is not None and message.manifest.root == self._manifest.root and node not in self._sources:
            self._take_source(node)
        return True

    def _came(self, node: NodeId, message: _Shard, received: memoryview, digest: bytes) -> None:
        manifest = self._manifest
        if manifest is None or self._core is None or (message.name, message.version) != (self._name, manifest.version):
            return  # of a transfer that is over
        if not 0 <= message.shard < len(manifest.hashes):
            return
        first, stop = manifest.span(message.shard)
        is_sound = digest == manifest.hashes[message.shard] and stop - first == received.nbytes
        event = ShardCame(node, message.shard, is_sound)
        if is_sound and message.shard not in self._core.have:
            self._data[first:stop] = np.frombuffer(received, np.uint8)
        self._tell(event)
