"""How fast others' bytes come to this member: from all that is exchanged and pulled, and a short probe as it joins.

A probe is what says something of the links away from a joiner, which nothing else uses before its first step. At most
`PROBE_BYTES` each way, no longer than `PROBE_S`: training beside it shall not notice.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable

from shoal.errors import RemoteProtocolError
from shoal.ids import NodeId
from shoal.network.estimate import RateEstimator
from shoal.runs.port import receive_message, send_message
from shoal.units import format_bytes

PROBE_BYTES = 512 * 1024
PROBE_S = 0.5
PROBE_WAIT_S = 5.0
_PIECE_BYTES = 32 * 1024
_SECONDS = struct.Struct("<d")

Observed = Callable[[int, float], None]
"""Bytes, and the seconds in which they came."""


class Rates:
    """Estimates by peer; from any thread."""

    def __init__(self) -> None:
        self.on_observed: Callable[[NodeId, int, float, bool], None] | None = None
        """Told the same as `observe`, by the thread that calls it; must not block."""
        self._lock = threading.Lock()
        self._estimators: dict[NodeId, RateEstimator] = {}

    def observe(self, peer: NodeId, num_bytes: int, seconds: float, *, is_full: bool = True) -> None:
        """`is_full`: the link was the limit; otherwise it does at least this."""
        with self._lock:
            estimator = self._estimators.setdefault(peer, RateEstimator())
            estimator.observe(num_bytes, seconds, time.monotonic(), saturated=is_full)
        if self.on_observed is not None:
            self.on_observed(peer, num_bytes, seconds, is_full)

    def forget(self, peer: NodeId) -> None:
        with self._lock:
            self._estimators.pop(peer, None)

    def bytes_per_s(self) -> dict[NodeId, float]:
        """Of each peer from which enough came to tell."""
        with self._lock:
            figures = {peer: estimator.figure() for peer, estimator in self._estimators.items()}
        return {peer: figure.mean for peer, figure in figures.items() if figure is not None}


def probe(sock: socket.socket, observed: Observed) -> float:
    """Sends and then takes a probe.

    Returns:
        Seconds of a usual step at the other end; 0: it has had none.

    Raises:
        LinkClosed, RemoteProtocolError.
    """
    sock.settimeout(PROBE_WAIT_S)
    _give(sock)
    _take(sock, observed)
    said = receive_message(sock)
    if len(said) != _SECONDS.size:
        raise RemoteProtocolError(f"a probe that ends with {len(said)} bytes instead of {_SECONDS.size}")
    return float(_SECONDS.unpack(said)[0])


def answer(sock: socket.socket, observed: Observed, step_s: float) -> None:
    """The other end of `probe`. Raises LinkClosed, RemoteProtocolError."""
    sock.settimeout(PROBE_WAIT_S)
    _take(sock, observed)
    _give(sock)
    send_message(sock, _SECONDS.pack(step_s))


def shortage(gradient_bytes: int, step_s: float, link_bytes_per_s: float) -> str:
    """A line for the owner of a device that gradients would reach too slowly to catch up; empty where they do not.

    Args:
        step_s: of the others' steps, above 0.
        link_bytes_per_s: what the links to this device carry together.
    """
    needed_bytes_per_s = gradient_bytes / step_s
    if link_bytes_per_s >= needed_bytes_per_s:
        return ""
    return (
        f"the run makes {format_bytes(gradient_bytes)} of gradient every {step_s:.2g} s, "
        f"{format_bytes(needed_bytes_per_s)}/s, and the links to this device carry {format_bytes(link_bytes_per_s)}/s: it "
        "will not catch up; take a faster link, a smaller model, or a larger global batch"
    )


def _give(sock: socket.socket) -> None:
    piece, began_s = bytes(_PIECE_BYTES), time.monotonic()
    for _ in range(PROBE_BYTES // _PIECE_BYTES):
        if time.monotonic() - began_s > PROBE_S:
            break
        send_message(sock, piece)
    send_message(sock, b"")


def _take(sock: socket.socket, observed: Observed) -> None:
    num_bytes, began_s, last_s = 0, 0.0, 0.0
    while data := receive_message(sock):
        last_s = time.monotonic()
        if began_s:
            num_bytes += len(data)
        began_s = began_s or last_s
        if num_bytes > PROBE_BYTES:
            break
    if num_bytes:
        observed(num_bytes, last_s - began_s)
