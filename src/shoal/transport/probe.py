"""Measures a directed link: padding from one member to another, back to back, on a connection of its own.

The control link stays free for decisions. The connection begins like a control link's (`control.py`), with the letter `P`,
and mutual TLS. Then comes what is to be sent:

    offset  size  field
    0       8     bytes of padding that follow, unless the time ends before, big endian

The receiver measures, with one clock: bytes after the first part, over the time from then to the last. In the first part
TCP finds its pace. What comes is bounded in bytes and time, whatever the sender says. All of it blocks: each side has a
thread for it (`runtime/node/probes.py`).
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from shoal.errors import LinkClosed, RemoteProtocolError
from shoal.ids import NodeId
from shoal.transport.control import AS_PROBE, PREFACE_MAGIC
from shoal.transport.secure import TrustStore

PROBE_BYTES_MAX = 8 << 20
PROBE_S_MAX = 5.0
"""For a receiver; a sender is told how long."""
DIAL_S = 3.0
_SKIPPED_SHARE = 0.25
_HEAD = struct.Struct(">Q")
_PIECE_BYTES = 64 << 10


class Probe(NamedTuple):
    """What a receiver measured: `num_bytes` came in `seconds`."""

    num_bytes: int
    seconds: float


def send_probe(address: tuple[str, int], peer: NodeId, trust: TrustStore, *, num_bytes_max: int, seconds_max: float) -> int:
    """Dials `peer` and sends until either bound is reached. Returns how many bytes of padding it was.

    Raises:
        LinkError: it cannot be reached, is another device, or does not take it.
    """
    num_bytes = min(num_bytes_max, PROBE_BYTES_MAX)
    try:
        sock = socket.create_connection(address, timeout=DIAL_S)
    except OSError as error:
        raise LinkClosed(f"{address[0]}:{address[1]} cannot be reached ({error.strerror or error})") from error
    try:
        sock.sendall(PREFACE_MAGIC + AS_PROBE)
    except OSError as error:
        sock.close()
        raise LinkClosed(f"the probe to {address[0]}:{address[1]} broke ({error.strerror or error})") from error
    with trust.dial(sock, peer) as secured:
        secured.settimeout(PROBE_S_MAX)
        piece = memoryview(bytes(_PIECE_BYTES))
        end_s = time.monotonic() + seconds_max
        sent = 0
        try:
            secured.sendall(_HEAD.pack(num_bytes))
            while sent < num_bytes and time.monotonic() < end_s:
                part = piece[: min(_PIECE_BYTES, num_bytes - sent)]
                secured.sendall(part)
                sent += len(part)
        except OSError as error:
            raise LinkClosed(f"the probe to {address[0]}:{address[1]} broke ({error.strerror or error})") from error
        return sent


def receive_probe(
    sock: socket.socket, trust: TrustStore, *, may_measure: Callable[[NodeId], bool] = lambda _peer: True
) -> tuple[NodeId, Probe | None]:
    """Takes a probe from a connection whose preface was read; the socket is closed then.

    Args:
        may_measure: asked once it is proven who comes.

    Returns:
        From whom, and what was measured; None where too little came to say.

    Raises:
        LinkError: it is no member, or no probe.
    """
    secured, peer = trust.accept(sock)
    with secured:
        if not may_measure(peer):
            raise LinkClosed(f"device {peer[:8]} measures too much at a time")
        secured.settimeout(PROBE_S_MAX)
        try:
            return peer, _measure(secured)
        except OSError as error:
            raise LinkClosed(f"the probe of device {peer[:8]} broke ({error.strerror or error})") from error


def _measure(secured: socket.socket) -> Probe | None:
    head = b""
    while len(head) < _HEAD.size:
        part = secured.recv(_HEAD.size - len(head))
        if not part:
            return None
        head += part
    announced = _HEAD.unpack(head)[0]
    if not 0 < announced <= PROBE_BYTES_MAX:
        raise RemoteProtocolError(f"a probe of {announced} bytes; at most {PROBE_BYTES_MAX} are allowed")
    buffer = memoryview(bytearray(_PIECE_BYTES))
    begun_s = end_s = time.monotonic()
    received = counted_from = 0
    first_s: float | None = None
    while received < announced and end_s - begun_s < PROBE_S_MAX:
        num_bytes = secured.recv_into(buffer)
        end_s = time.monotonic()
        if not num_bytes:
            break
        received += num_bytes
        if first_s is None and received >= _SKIPPED_SHARE * announced:
            first_s, counted_from = end_s, received
    if first_s is None or received == counted_from or end_s <= first_s:
        return None
    return Probe(received - counted_from, end_s - first_s)
