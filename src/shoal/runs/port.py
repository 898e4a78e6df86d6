"""The one port of a run's member: whoever connects says first what for.

With a `Trust`, connections are TLS 1.3 and each end proves its device. Without one, who is at the other end is believed: for
this machine alone.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

import msgspec

from shoal.errors import AddressInUse, DeviceUnreachable, LinkClosed, LinkError, RemoteProtocolError, ShoalError
from shoal.ids import NodeId
from shoal.runs.trust import Trust, check_member

HELLO_S = 5.0
DIAL_S = 5.0
MESSAGE_BYTES_MAX = 16 << 20
CONNECTIONS_MAX = 512
_LENGTH = struct.Struct("<I")

Kind = Literal["control", "chunks", "shelf", "probe", "ask"]


class Hello(msgspec.Struct, frozen=True):
    """The first message on a connection. `address` is where the sender listens; `epoch` is for chunks.

    On control links: `incarnation` counts the sender's lives, `founding` names the beginning of the run that it is in.
    """

    run: str
    kind: Kind
    node: NodeId
    address: str = ""
    epoch: int = 0
    incarnation: int = 1
    founding: str = ""


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


def dial(
    address: str, hello: Hello, *, trust: Trust | None = None, node: NodeId | None = None, timeout_s: float = DIAL_S
) -> socket.socket:
    """A connection on which the other end knows what it is for.

    Args:
        trust: this member's; None: a plain connection.
        node: the member that answers there, where it is known.

    Raises:
        DeviceUnreachable: nobody answers, or somebody who proves to be another device, or none that is trusted.
    """
    sock = _connect(address, timeout_s)
    try:
        if trust is not None:
            sock, _ = trust.dial(sock, node)
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_message(sock, msgspec.msgpack.encode(hello))
    except (OSError, LinkError) as error:
        sock.close()
        raise DeviceUnreachable(f"the member at {address} hung up ({error})") from error
    return sock


def dial_any(address: str, hello: Hello, trust: Trust | None) -> tuple[socket.socket, Hello]:
    """As `dial`, where nobody knows which member listens: it says so, and its device proves it. Raises ShoalError."""
    sock = _connect(address, DIAL_S)
    device = None
    if trust is not None:
        sock, device = trust.dial(sock, None)
    try:
        sock.settimeout(DIAL_S)
        send_message(sock, msgspec.msgpack.encode(hello))
        answer = _decoder.decode(receive_message(sock))
        check_member(answer.node, device)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
    except (OSError, ShoalError, msgspec.MsgspecError) as error:
        sock.close()
        raise DeviceUnreachable(f"no member of a run answers at {address} ({error})") from error
    return sock, answer


def _connect(address: str, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection(parse_address(address), timeout=timeout_s)
    except (OSError, ValueError) as error:
        raise DeviceUnreachable(f"no member of a run answers at {address} ({error})") from error


class Port:
    """Listens at `address`, HOST:PORT; port 0 takes a free one.

    Args:
        handle: called on a thread per connection, which it owns from then on.
        trust: whose connections are taken; None: anybody's.

    Raises:
        AddressInUse: another program listens there.
    """

    def __init__(self, address: str, handle: Callable[[socket.socket, Hello], None], *, trust: Trust | None = None) -> None:
        host, port = parse_address(address)
        try:
            self._socket = socket.create_server((host, port), backlog=64)
        except OSError as error:
            raise AddressInUse(f"cannot listen at {address}: {error}") from error
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._handle, self._trust = handle, trust
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
                device = None
                if self._trust is not None:
                    sock, device = self._trust.accept(sock)
                hello = _decoder.decode(receive_message(sock))
                check_member(hello.node, device)
            except (msgspec.MsgspecError, LinkError, RemoteProtocolError, UnicodeDecodeError):
                sock.close()
                return
            sock.settimeout(None)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._handle(sock, hello)
        finally:
            self._slots.release()
