"""How fast others' bytes come to this member: from all that is exchanged and pulled, and a short probe as it joins.

A probe is what says something of the links away from a joiner, which nothing else uses before its first step. At most
`PROBE_BYTES` each way, no longer than `PROBE_S`: training beside it shall not notice.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from shoal.ids import NodeId
from shoal.network.estimate import RateEstimator
from shoal.runs.port import receive_message, send_message

PROBE_BYTES = 512 * 1024
PROBE_S = 0.5
PROBE_WAIT_S = 5.0
_PIECE_BYTES = 32 * 1024

Observed = Callable[[int, float], None]
"""Bytes, and the seconds in which they came."""


class Rates:
    """Estimates by peer; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._estimators: dict[NodeId, RateEstimator] = {}

    def observe(self, peer: NodeId, num_bytes: int, seconds: float, *, is_full: bool = True) -> None:
        """`is_full`: the link was the limit; otherwise it does at least this."""
        with self._lock:
            estimator = self._estimators.setdefault(peer, RateEstimator())
            estimator.observe(num_bytes, seconds, time.monotonic(), saturated=is_full)

    def forget(self, peer: NodeId) -> None:
        with self._lock:
            self._estimators.pop(peer, None)

    def bytes_per_s(self) -> dict[NodeId, float]:
        """Of each peer from which enough came to tell."""
        with self._lock:
            figures = {peer: estimator.figure() for peer, estimator in self._estimators.items()}
        return {peer: figure.mean for peer, figure in figures.items() if figure is not None}


def probe(sock: socket.socket, observed: Observed) -> None:
    """Sends and then takes a probe. Raises LinkClosed, RemoteProtocolError."""
    sock.settimeout(PROBE_WAIT_S)
    _give(sock)
    _take(sock, observed)


def answer(sock: socket.socket, observed: Observed) -> None:
    """The other end of `probe`. Raises LinkClosed, RemoteProtocolError."""
    sock.settimeout(PROBE_WAIT_S)
    _take(sock, observed)
    _give(sock)


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
