"""The one port of a run's member: whoever connects says first what for.

Plain sockets: who is at the other end is believed, not proven. So a port listens on loopback unless an address is given.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

import msgspec

from shoal.errors import AddressInUse, DeviceUnreachable, LinkClosed, RemoteProtocolError
from shoal.ids import NodeId

HELLO_S = 5.0
DIAL_S = 5.0
MESSAGE_BYTES_MAX = 16 << 20
CONNECTIONS_MAX = 512
_LENGTH = struct.Struct("<I")

Kind = Literal["control", "chunks", "shelf", "probe", "ask"]


class Hello(msgspec.Struct, frozen=True):
    """The first message on a connection. `address` is where the sender listens; `epoch` is for chunks."""

    run: str
    kind: Kind
    node: NodeId
    address: str = ""
    epoch: int = 0


class Refused(msgspec.Struct, frozen=True):
    """Why a connection is closed again, for whoever reads it."""

    reason: str


_decoder = msgspec.msgpack.Decoder(Hello)


def send_message(sock: socket.socket, data: bytes) -> None:
    """Raises LinkClosed."""
    try:
        sock.sendall(_LENGTH.pack(len(data)) + data)
    except OSError as error:
        raise LinkClosed(f"a member of the run is gone ({error})") from error


def receive_message(sock: socket.socket) -> bytes:
    """Raises LinkClosed, RemoteProtocolError."""
    (length,) = _LENGTH.unpack(_receive(sock, _LENGTH.size))
    if length > MESSAGE_BYTES_MAX:
        raise RemoteProtocolError(f"a message of {length} bytes: at most {MESSAGE_BYTES_MAX}")
    return _receive(sock, length)


def _receive(sock: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, received = memoryview(data), 0
    while received < length:
        try:
            count = sock.recv_into(view[received:])
        except OSError as error:
            raise LinkClosed(f"a member of the run is gone ({error})") from error
        if count == 0:
            raise LinkClosed("a member of the run is gone (connection closed)")
        received += count
    return bytes(data)


def parse_address(text: str) -> tuple[str, int]:
    """'host:port'. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"'{text}' is no address: write HOST:PORT")
    return host.strip("[]"), int(port)


def dial(address: str, hello: Hello, *, timeout_s: float = DIAL_S) -> socket.socket:
    """A connection on which the other end knows what it is for. Raises DeviceUnreachable."""
    try:
        sock = socket.create_connection(parse_address(address), timeout=timeout_s)
    except (OSError, ValueError) as error:
        raise DeviceUnreachable(f"no member of a run answers at {address} ({error})") from error
    try:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_message(sock, msgspec.msgpack.encode(hello))
    except (OSError, LinkClosed) as error:
        sock.close()
        raise DeviceUnreachable(f"the member at {address} hung up ({error})") from error
    return sock


class Port:
    """Listens at `address`, HOST:PORT; port 0 takes a free one.

    Args:
        handle: called on a thread per connection, which it owns from then on.

    Raises:
        AddressInUse: another program listens there.
    """

    def __init__(self, address: str, handle: Callable[[socket.socket, Hello], None]) -> None:
        host, port = parse_address(address)
        try:
            self._socket = socket.create_server((host, port), backlog=64)
        except OSError as error:
            raise AddressInUse(f"cannot listen at {address}: {error}") from error
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._handle = handle
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(sock,), daemon=True).start()
            else:
                sock.close()

    def _greet(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(HELLO_S)
            try:
                hello = _decoder.decode(receive_message(sock))
            except (msgspec.MsgspecError, LinkClosed, RemoteProtocolError, UnicodeDecodeError):
                sock.close()
                return
            sock.settimeout(None)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._handle(sock, hello)
        finally:
            self._slots.release()
