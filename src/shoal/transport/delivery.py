"""What the kernel knows of a sending TCP socket: how fast its bytes are acknowledged, and whether the link was the limit.

Linux keeps, for each socket, the bytes that were acknowledged and the time in which any were on their way (`TCP_INFO`).
Their quotient is what the link carries, if all that time there was more to send, and neither the receiver nor the
socket's own buffer held it back; otherwise it carries at least what went in the time since the last look. Nothing is
sent for it.

The kernel's own delivery rate is that of one round trip: on a link of 5 MB/s it says 2 GB/s where packets leave in
bursts, so that only its word on who was the limit counts. On other systems nothing is known.

Source: include/uapi/linux/tcp.h; the delivery rate and its flag are BBR's (Cardwell et al., 2016).
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

HELD_BACK_SHARE_MAX = 0.2
BUSY_SHARE_MIN = 0.9
"""Of the time between two looks. Between short bursts there are round trips in which nothing is left to send."""
LOOK_EVERY_S = 0.25
"""How often a socket is looked at while much is sent over it: a link's estimate wants its pieces so long."""
_US = 1e-6
_INFO_BYTES = 192
"""Up to `tcpi_sndbuf_limited`: Linux 4.10."""
_FLAGS_AT, _IS_APP_LIMITED = 7, 1
_BYTES_ACKED = struct.Struct("=Q")
_BYTES_ACKED_AT = 120
_MIN_ROUND_TRIP = struct.Struct("=I")
_MIN_ROUND_TRIP_AT = 148
_TIMES = struct.Struct("=QQQ")
_TIMES_AT = 168
_NO_ROUND_TRIP = 2**32 - 1


class TcpInfo(NamedTuple):
    """A sending socket since it was connected: times (s) in which bytes were on their way, and of those, in which the
    receiver's window or the socket's buffer kept more from going. `is_app_limited`: there was nothing more to send."""

    bytes_acked: int
    busy_s: float
    held_back_s: float
    is_app_limited: bool
    round_trip_min_s: float | None


class Delivery(NamedTuple):
    """What went over a link since it was last looked at: `num_bytes` in `seconds`, the sender's clock, both positive.

    `is_full`: the link was the limit; otherwise it carries at least this. `round_trip_min_s`: the least of the last
    minutes, as the kernel sees it; None: not known.
    """

    num_bytes: int
    seconds: float
    is_full: bool
    round_trip_min_s: float | None


def tcp_info(sock: socket.socket) -> TcpInfo | None:
    """What the kernel knows; None: nothing, since it is no TCP socket, is closed, or the system is another one."""
    if sys.platform != "linux":
        return None
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return None
    if len(data) < _INFO_BYTES:
        return None
    busy_us, window_us, buffer_us = _TIMES.unpack_from(data, _TIMES_AT)
    (round_trip_us,) = _MIN_ROUND_TRIP.unpack_from(data, _MIN_ROUND_TRIP_AT)
    return TcpInfo(
        _BYTES_ACKED.unpack_from(data, _BYTES_ACKED_AT)[0],
        busy_us * _US,
        (window_us + buffer_us) * _US,
        bool(data[_FLAGS_AT] & _IS_APP_LIMITED),
        round_trip_us * _US if 0 < round_trip_us < _NO_ROUND_TRIP else None,
    )


def delivered(before: TcpInfo, now: TcpInfo, *, elapsed_s: float) -> Delivery | None:
    """What went between two looks at a socket, `elapsed_s` apart; None: nothing, or in no time."""
    num_bytes, busy_s = now.bytes_acked - before.bytes_acked, now.busy_s - before.busy_s
    if num_bytes <= 0 or elapsed_s <= 0.0:
        return None
    is_full = (
        not before.is_app_limited
        and not now.is_app_limited
        and busy_s >= BUSY_SHARE_MIN * elapsed_s
        and now.held_back_s - before.held_back_s <= HELD_BACK_SHARE_MAX * busy_s
    )
    # The kernel counts in steps of some milliseconds: of many short bursts it does not know how long they took.
    return Delivery(num_bytes, busy_s if is_full else elapsed_s, is_full, now.round_trip_min_s)


class DeliveryWatch:
    """Looks at one socket again and again; by one thread."""

    def __init__(self, sock: socket.socket, *, now_s: float) -> None:
        self._socket = sock
        self._info, self._at_s = tcp_info(sock), now_s

    def look(self, now_s: float) -> Delivery | None:
        """What went since the last look; None: nothing, or nothing is known."""
        before, since_s = self._info, self._at_s
        if before is None:
            return None
        self._info, self._at_s = tcp_info(self._socket), now_s
        return None if self._info is None else delivered(before, self._info, elapsed_s=now_s - since_s)


class BulkWatch:
    """Looks at a socket while much is sent over it, and until that has arrived. Used by the thread that sends.

    Args:
        tell: told what went, every `LOOK_EVERY_S`; nothing of what goes in between two bursts.
    """

    def __init__(self, sock: socket.socket, tell: Callable[[Delivery], None], *, now_s: float) -> None:
        self._watch = DeliveryWatch(sock, now_s=now_s)
        self._tell = tell
        self._look_at_s: float | None = None
        self._has_sent = False

    def sends(self, now_s: float) -> None:
        """Much is about to be sent."""
        if self._look_at_s is None:
            self._watch.look(now_s)
            self._look_at_s = now_s + LOOK_EVERY_S
        self._has_sent = True

    def wait_s(self, now_s: float) -> float | None:
        """How long to wait for more before the next look; None: for ever."""
        return None if self._look_at_s is None else max(0.0, self._look_at_s - now_s)

    def look(self, now_s: float) -> None:
        """Looks, if it is time."""
        if self._look_at_s is None or now_s < self._look_at_s:
            return
        delivery = self._watch.look(now_s)
        is_over = delivery is None or not (self._has_sent or delivery.is_full)
        self._look_at_s = None if is_over else now_s + LOOK_EVERY_S
        self._has_sent = False
        if delivery is not None:
            self._tell(delivery)
