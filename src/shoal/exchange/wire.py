"""Frames between two members: a fixed header, then a chunk's raw bytes.

    offset  size  field
    0       4     magic, b"SHOX"
    4       1     protocol version
    5       1     phase: 0 up, 1 down, 2 goodbye (nothing else counts then); 128 more: see below
    6       2     edge
    8       2     hop
    10      2     tree
    12      4     epoch
    16      4     step
    20      4     chunk
    24      4     payload bytes

little endian. A payload is float32. Its length is checked against a bound before memory is taken. 128 is added to the phase
of a frame that waited behind the one before it: between the two the sender kept the link busy, so the receiver, with its
clock alone, can tell how fast the link is.

`Wire` is all that the runner asks of a link; `SocketWire` is a plain socket, which proves nothing about who is at its other
end.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Protocol

from shoal.errors import LinkClosed, LocalProtocolError, RemoteProtocolError
from shoal.exchange.core import ChunkHeader, Phase

MAGIC = b"SHOX"
VERSION = 2
HEADER = struct.Struct("<4sBBHHHIIII")
GOODBYE = 2
BEHIND = 128
UNSENT_BYTES_MAX = 128 * 1024
"""What the kernel may hold that it could not send yet: more would undo the order in which chunks are due."""


class Wire(Protocol):
    """A link to one member, both ways. One thread sends, another receives."""

    def send(self, header: bytes, payload: memoryview) -> None:
        """Returns when both are handed over. Raises LinkClosed."""

    def receive_into(self, target: memoryview) -> None:
        """Fills `target`. Raises LinkClosed."""

    def shut(self) -> None:
        """Ends both threads' waiting, here and at the other end; may be called again."""

    def close(self) -> None:
        """Gives back what the link holds. Nobody may be using it any more."""


class SocketWire:
    """A connected stream socket, which belongs to the wire from now on."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.settimeout(None)
        with contextlib.suppress(OSError):  # local sockets have no such options
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)

    def send(self, header: bytes, payload: memoryview) -> None:
        try:
            self._socket.sendall(b"".join((header, payload)))  # a copy costs less than a second call
        except OSError as error:
            raise LinkClosed(f"a member of the exchange is gone ({error})") from error

    def receive_into(self, target: memoryview) -> None:
        received = 0
        while received < target.nbytes:
            try:
                count = self._socket.recv_into(target[received:], 0, socket.MSG_WAITALL)
            except OSError as error:
                raise LinkClosed(f"a member of the exchange is gone ({error})") from error
            if count == 0:
                raise LinkClosed("a member of the exchange is gone (connection closed)")
            received += count

    def shut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def pack_goodbye() -> bytes:
    """After it the sender sends nothing more, and all it owed has been sent."""
    return HEADER.pack(MAGIC, VERSION, GOODBYE, 0, 0, 0, 0, 0, 0, 0)


def pack(header: ChunkHeader, payload_bytes: int) -> bytes:
    """A frame's header. Raises LocalProtocolError: a field does not fit."""
    place = (header.phase, header.edge, header.hop, header.tree, header.epoch, header.step, header.chunk)
    try:
        return HEADER.pack(MAGIC, VERSION, *place, payload_bytes)
    except struct.error as error:
        raise LocalProtocolError(f"a frame's header does not fit its fields: {error}") from error


def behind(header: bytes) -> bytes:
    """The same frame, sent right after another one."""
    return header[:5] + bytes((header[5] | BEHIND,)) + header[6:]


def is_behind(data: bytes | bytearray) -> bool:
    """Whether the frame waited behind the one before it."""
    return bool(data[5] & BEHIND)


def unpack(data: bytes | bytearray, *, payload_bytes_max: int) -> tuple[ChunkHeader, int] | None:
    """The header and the payload's bytes; None for a goodbye.

    Raises:
        RemoteProtocolError: no frame of this protocol, or its payload is longer than allowed or no float32.
    """
    magic, version, phase, edge, hop, tree, epoch, step, chunk, payload_bytes = HEADER.unpack(data)
    phase &= ~BEHIND
    if magic != MAGIC or version != VERSION or phase > GOODBYE:
        raise RemoteProtocolError(f"a frame starts with {bytes(data[:6])!r}: the peer speaks another protocol")
    if phase == GOODBYE:
        return None
    if not 0 < payload_bytes <= payload_bytes_max or payload_bytes % 4:
        raise RemoteProtocolError(f"a chunk of {payload_bytes} bytes: at most {payload_bytes_max}, and a multiple of 4")
    return ChunkHeader(epoch, step, chunk, tree, Phase(phase), edge, hop), payload_bytes
