"""A control link: one TCP connection between two devices, TLS inside, frames inside that. It never blocks.

Before TLS the one who dialled says in what capacity it comes:

    b"shoal" version(1) b"M"                    a member, as it thinks: it must be in the other's roster
    b"shoal" version(1) b"S" public key(32)     a stranger: a joiner, or a member that is not known there yet
    b"shoal" version(1) b"P"                    a member that measures the way here (`probe.py`): no control link at all
    b"shoal" version(1) b"A"                    a member's agent, for the agent here: neither

Either way both ends prove their keys (TLS 1.3); a stranger's is trusted for its own handshake only. Then frames:

    offset  size  field
    0       4     bytes that follow the kind, big endian
    4       1     kind
    5       ...   payload

The first frame is the acceptor's: WELCOME, or REFUSED with a line of text. Every length is checked before memory is taken;
what waits to be sent is bounded, and a message beyond it is lost, as messages may be.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from enum import IntEnum, StrEnum
from typing import NamedTuple

from shoal.errors import LinkClosed, LinkError, PeerNotTrusted, RemoteProtocolError
from shoal.ids import NodeId
from shoal.transport.identity import PUBLIC_KEY_BYTES
from shoal.transport.secure import NO_CALLS, TrustStore, Unlisted, direct_calls, explain

VERSION = 1
PREFACE_MAGIC = b"shoal" + bytes([VERSION])
_PREFACE_BYTES = len(PREFACE_MAGIC) + 1
AS_MEMBER, AS_STRANGER, AS_PROBE, AS_AGENT = b"M", b"S", b"P", b"A"
HEAD = struct.Struct(">IB")
FRAME_BYTES_MAX = 4 << 20
"""Of a member: the keys of the largest roster are 1.9 MB."""
STRANGER_FRAME_BYTES_MAX = 256 << 10
"""Room for 256 statements."""
QUEUE_BYTES_MAX = 8 << 20
_READ_BYTES = 16 << 10
"""Of one record of TLS; no call returns more."""


class FrameKind(IntEnum):
    """What a frame is for."""

    WELCOME = 1
    REFUSED = 2
    MESSAGE = 3
    OWNER = 4
    PADDING = 5
    PING = 6
    PONG = 7


_KINDS = frozenset(int(kind) for kind in FrameKind)


class Frame(NamedTuple):
    """One frame that came. `kind` is a `FrameKind`."""

    kind: int
    payload: bytes


class Stage(StrEnum):
    """How far a link is: in this order, but that one end needs no preface and the other no welcome."""

    CONNECTING = "connecting"
    PREFACE = "preface"
    HANDSHAKE = "handshake"
    WELCOME = "waits for a welcome"
    OPEN = "open"
    CLOSED = "closed"


def frame(kind: FrameKind, payload: bytes = b"") -> bytes:
    """The bytes of one frame."""
    return HEAD.pack(len(payload), kind) + payload


class ControlLink:
    """One connection, driven by `on_readable` and `on_writable` when the selector says so.

    Made by `dial` or `accept`. `peer` is who is at the other end, proven once the stage is past the handshake. Every method
    that talks to the socket may raise a LinkError; the link is closed then.
    """

    def __init__(self, sock: socket.socket, *, is_dialled: bool, address: str) -> None:
        self.socket: socket.socket | ssl.SSLSocket = sock
        self.is_dialled = is_dialled
        self.address = address
        self.peer: NodeId | None = None
        self.is_stranger = False
        self.errand = b""
        """What a member comes for that is no control link: `AS_PROBE` or `AS_AGENT`."""
        self.stage = Stage.CONNECTING if is_dialled else Stage.PREFACE
        self.wants_write = is_dialled
        self.num_dropped = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self.claimed_key = b""
        """Of a stranger that dialled us: still to be proven."""
        self._expected: NodeId | None = None
        self._trust: TrustStore | Unlisted | None = None
        self._preface = bytearray()
        self._in = bytearray()
        self._out = bytearray()
        self._calls = direct_calls(sock)

    # ---- making one

    @classmethod
    def dial(
        cls,
        family: int,
        address: tuple[str, int],
        expected: NodeId,
        trust: TrustStore | Unlisted,
        *,
        public_key: bytes = b"",
    ) -> ControlLink:
        """Begins to connect. With `public_key` it comes as a stranger, and shows that key.

        Raises:
            LinkClosed: the system refuses at once.
        """
        sock = socket.socket(family, socket.SOCK_STREAM)
        host, port = address
        link = cls(sock, is_dialled=True, address=f"{host}:{port}")
        link._expected, link._trust = expected, trust
        link.is_stranger = bool(public_key)
        link._preface += PREFACE_MAGIC + (AS_STRANGER + public_key if public_key else AS_MEMBER)
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(address)
        except BlockingIOError:
            pass
        except OSError as error:
            sock.close()
            raise LinkClosed(f"{link.address} cannot be reached ({error.strerror or error})") from error
        return link

    @classmethod
    def accept(cls, sock: socket.socket, address: str) -> ControlLink:
        """Takes a connection that has just been accepted."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock, is_dialled=False, address=address)

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def is_open(self) -> bool:
        return self.stage is Stage.OPEN

    def close(self) -> None:
        """Ends it at once. Safe to call again."""
        self.stage = Stage.CLOSED
        self.wants_write = False
        self._calls = NO_CALLS
        self.socket.close()

    # ---- the beginning

    def begin_handshake(self, trust: TrustStore) -> None:
        """For the acceptor, once `read_preface` returned True: goes on with those whom it trusts for this."""
        self._trust = trust
        self._wrap(server_side=True)
        self.shake_hands()

    def _wrap(self, *, server_side: bool) -> None:
        assert self._trust is not None
        self.stage = Stage.HANDSHAKE
        try:
            if isinstance(self._trust, TrustStore):
                self.socket = self._trust.wrap(self.socket, server_side=server_side)
            else:
                self.socket = self._trust.wrap(self.socket)
        except OSError as error:
            self.close()
            raise explain(error) from error

    def read_preface(self) -> bool:
        """Reads what comes before TLS, and no byte more; True when it is whole. `claimed_key` is there then, or empty."""
        wanted = _PREFACE_BYTES
        if len(self._preface) >= wanted:
            wanted += PUBLIC_KEY_BYTES
        try:
            data = self.socket.recv(wanted - len(self._preface))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.close()
            raise LinkClosed(f"{self.address} left before it said anything ({error.strerror or error})") from error
        if not data:
            self.close()
            raise LinkClosed(f"{self.address} left before it said anything")
        self._preface += data
        if not PREFACE_MAGIC.startswith(bytes(self._preface[: len(PREFACE_MAGIC)])):
            self.close()
            raise RemoteProtocolError(f"what came from {self.address} is no link of shoal's, or of another version")
        if len(self._preface) < _PREFACE_BYTES:
            return False
        capacity = bytes(self._preface[len(PREFACE_MAGIC) : _PREFACE_BYTES])
        if capacity == AS_STRANGER:
            self.is_stranger = True
            self.claimed_key = bytes(self._preface[_PREFACE_BYTES:])
            if len(self.claimed_key) < PUBLIC_KEY_BYTES:
                return self.read_preface() if len(self._preface) == _PREFACE_BYTES else False
        elif capacity in (AS_PROBE, AS_AGENT):
            self.errand = capacity
        elif capacity != AS_MEMBER:
            self.close()
            raise RemoteProtocolError(f"{self.address} comes neither as a member nor as a stranger")
        return True

    def on_connected(self) -> None:
        """For the one who dialled: the socket became writable."""
        error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self.close()
            raise LinkClosed(f"{self.address} cannot be reached ({os.strerror(error)})")
        try:
            self.socket.send(self._preface)  # a new connection's buffer takes so little whole
        except OSError as failure:
            self.close()
            raise LinkClosed(f"{self.address} cannot be reached ({failure.strerror or failure})") from failure
        self._wrap(server_side=False)
        self.shake_hands()

    def shake_hands(self) -> bool:
        """Goes on with the handshake as far as it gets; True when it is done."""
        assert isinstance(self.socket, ssl.SSLSocket)
        assert self._trust is not None
        self.wants_write = False
        try:
            self.socket.do_handshake()
            self.peer = self._trust.peer_of(self.socket)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self.wants_write = True
            return False
        except PeerNotTrusted:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise explain(error) from error
        if self._expected is not None and self.peer != self._expected:
            self.close()
            raise PeerNotTrusted(f"device {self.peer[:8]} answers where {self._expected[:8]} is expected")
        self._calls = direct_calls(self.socket)
        self.stage = Stage.WELCOME
        return True

    def welcome(self) -> None:
        """For the acceptor: the link is to be used."""
        self.stage = Stage.OPEN
        self.send(frame(FrameKind.WELCOME))
        self.flush()

    def refuse(self, text: str) -> None:
        """For the acceptor: it is not, and why."""
        self.stage = Stage.OPEN
        self.send(frame(FrameKind.REFUSED, text.encode()))
        try:
            self.flush()
        except LinkError:
            return
        self.close()

    # ---- frames

    def send(self, data: bytes) -> bool:
        """Puts frames into the queue; `flush` sends them. False, and nothing done, where the queue is full."""
        if len(self._out) + len(data) > QUEUE_BYTES_MAX:
            self.num_dropped += 1
            return False
        self._out += data
        return True

    @property
    def num_queued(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._out)

    def flush(self) -> None:
        """Sends what the socket takes. `wants_write` says whether something is left."""
        out = self._out
        try:
            while out:
                sent = self._calls.send(out)
                self.bytes_sent += sent
                if sent == len(out):
                    out.clear()
                else:
                    del out[:sent]
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError, BlockingIOError):
            pass
        except OSError as error:
            self.close()
            raise LinkClosed(f"the link to {self.address} broke ({error.strerror or error})") from error
        self.wants_write = bool(out)

    def receive(self) -> list[Frame]:
        """What has come, in order.

        Raises:
            LinkClosed: the peer is gone.
            RemoteProtocolError: what came is no frame.
            PeerNotTrusted: the peer refuses our certificate.
        """
        try:
            data = self._calls.read(_READ_BYTES)
        except ssl.SSLEOFError:
            data = b""
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return []
        except OSError as error:
            was_open = self.stage is Stage.OPEN
            self.close()
            if isinstance(error, ssl.SSLError) and not was_open:
                raise explain(error) from error
            raise LinkClosed(f"{self.address} is gone ({error.strerror or error})") from error
        if not data:
            self.close()
            raise LinkClosed(f"{self.address} is gone (connection closed)")
        self.bytes_received += len(data)
        if self._in:
            self._in += data
            return self._split(self._in)
        return self._split(data)

    def _split(self, data: bytes | bytearray) -> list[Frame]:
        frames = []
        limit = FRAME_BYTES_MAX if self.is_dialled or not self.is_stranger else STRANGER_FRAME_BYTES_MAX
        offset, end = 0, len(data)
        while end - offset >= HEAD.size:
            size, kind = HEAD.unpack_from(data, offset)
            if size > limit or kind not in _KINDS:
                self.close()
                raise RemoteProtocolError(
                    f"{self.address} sent a frame of kind {kind} and {size} bytes; at most {limit} are allowed"
                )
            stop = offset + HEAD.size + size
            if stop > end:
                break
            frames.append(Frame(kind, bytes(data[offset + HEAD.size : stop])))
            offset = stop
        if data is self._in:
            del self._in[:offset]
        elif offset < end:
            self._in += data[offset:]
        return frames
