"""Carries out `MeasureLink`, and measures what others send: on threads of their own, so that decisions do not wait."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import msgspec

from shoal.errors import LinkError
from shoal.ids import NodeId
from shoal.runtime.channel import split_address
from shoal.transport.probe import Probe, receive_probe, send_probe
from shoal.transport.secure import TrustStore

INCOMING_MAX = 4
"""Connections that measure, or say that they will, at a time: they would measure each other."""


_CLOSE_S = 2.0


class ProbeCounters(msgspec.Struct):
    """What came of probes since the start."""

    num_sent: int = 0
    num_failed: int = 0
    num_measured: int = 0
    num_refused: int = 0
    bytes_sent: int = 0


class Probes:
    """The probes of one device.

    Args:
        on_measured: told what came from whom, on a thread of this class.
    """

    def __init__(self, on_measured: Callable[[NodeId, Probe], None]) -> None:
        self.counters = ProbeCounters()
        self.problem = ""
        """Why the last one that was to be sent was not, in one line."""
        self._on_measured = on_measured
        self._lock = threading.Lock()
        self._num_incoming = 0
        self._measuring: set[NodeId] = set()
        self._threads: set[threading.Thread] = set()
        self._is_closed = False

    def send(
        self,
        peer: NodeId,
        addresses: tuple[str, ...],
        trust: TrustStore,
        *,
        default_port: int,
        num_bytes_max: int,
        seconds_max: float,
    ) -> None:
        """Measures the way to `peer`, at the first of `addresses` that answers. Returns at once."""

        if self._is_closed:
            return

        def run() -> None:
            self.problem = "no address is known: it dials this device"
            for address in addresses:
                try:
                    place = split_address(address, default_port=default_port)
                    num_bytes = send_probe(place, peer, trust, num_bytes_max=num_bytes_max, seconds_max=seconds_max)
                except (LinkError, OSError, ValueError) as error:
                    self.problem = str(error)
                    continue
                self.problem = ""
                self.counters.num_sent += 1
                self.counters.bytes_sent += num_bytes
                return
            self.counters.num_failed += 1

        self._start(run)

    def close(self) -> None:
        """No more of them; those under way have a moment to end."""
        self._is_closed = True
        give_up_s = time.monotonic() + _CLOSE_S
        while (threads := set(self._threads)) and (left_s := give_up_s - time.monotonic()) > 0:
            threads.pop().join(left_s)

    def _start(self, run: Callable[[], None]) -> None:
        def run_and_end() -> None:
            try:
                run()
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run_and_end, name="agent-probe", daemon=True)
        self._threads.add(thread)
        thread.start()

    def take(self, sock: socket.socket, trust: TrustStore) -> None:
        """Somebody comes to measure the way to this device, as it says. Returns at once; the socket is closed in the end."""
        with self._lock:
            if self._num_incoming >= INCOMING_MAX or self._is_closed:
                self.counters.num_refused += 1
                sock.close()
                return
            self._num_incoming += 1
        self._start(lambda: self._receive(sock, trust))

    def _receive(self, sock: socket.socket, trust: TrustStore) -> None:
        begun: list[NodeId] = []

        def may_measure(peer: NodeId) -> bool:
            """One at a time from each."""
            with self._lock:
                if peer in self._measuring:
                    return False
                self._measuring.add(peer)
            begun.append(peer)
            return True

        try:
            sock.setblocking(True)
            peer, probe = receive_probe(sock, trust, may_measure=may_measure)
            if probe is not None:
                self.counters.num_measured += 1
                self._on_measured(peer, probe)
        except (LinkError, OSError):
            self.counters.num_refused += 1
        finally:
            with self._lock:
                self._num_incoming -= 1
                self._measuring.difference_update(begun)
