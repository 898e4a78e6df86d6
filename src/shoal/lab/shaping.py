"""What a link does to a packet: decides when it arrives, or that it never does.

A directed link sends one packet after another at its rate (a token bucket as deep as the packet under way), then carries
each for its delay, give or take its jitter. Packets never overtake each other on a link: TCP would take that for loss.
A packet that would wait behind more than the queue's limit is dropped, as is a share of them by chance.

Nothing here knows of sockets or clocks: the router asks, tests ask the same.
"""

from __future__ import annotations

import random

import msgspec

DROPPED = -1.0
"""What `offer` returns for a packet that does not arrive."""

SERIALISATION_S_MAX = 1e-3
"""No packet may occupy a link for longer: it would be a lump that delays everything behind it."""

PACKET_BYTES_MIN = 576
"""The least that every IPv4 link carries: at less than 4.6 Mbit/s a packet of it takes longer than a millisecond."""

PACKET_BYTES_MAX = 65_000
"""Just below the largest IPv4 packet."""

QUEUE_S_DEFAULT = 0.05
QUEUE_PACKETS_MIN = 16
"""Default queue: 50 ms at the link's rate, which is what home routers have at the better end, but some packets at least."""


class LinkShape(msgspec.Struct, frozen=True):
    """What one direction of a link is like.

    Attributes:
        rate_bit_s: bits of IP packets per second; None is as fast as the router goes.
        delay_s: from the last bit sent to arrival.
        jitter_s: arrival varies evenly by as much either way.
        loss: share of packets lost by chance, 0 to 1.
        queue_bytes: most that may wait; None is `QUEUE_S_DEFAULT` at the rate.
        is_up: a link that is down loses what is on it.
    """

    rate_bit_s: float | None = None
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    queue_bytes: int | None = None
    is_up: bool = True


def packet_bytes_max(rate_bit_s: float | None, *, limit: int = PACKET_BYTES_MAX) -> int:
    """The largest IP packet for a link: a millisecond of its rate, within [`PACKET_BYTES_MIN`, `limit`]."""
    if rate_bit_s is None:
        return limit
    return max(min(PACKET_BYTES_MIN, limit), min(limit, int(rate_bit_s * SERIALISATION_S_MAX / 8)))


class ShapedLink:
    """One direction of a link, with what waits on it and what has passed.

    Attributes:
        shape: as it is now; change it with `reshape` only.
        num_bytes, num_packets: accepted so far.
        dropped_by_queue, dropped_by_chance, dropped_while_down: packets.
        queue_s_max: longest wait for the link so far, seconds.
    """

    __slots__ = (
        "_delay_s", "_draw", "_free_s", "_jitter_s", "_last_due_s", "_loss", "_queue_s", "_seconds_per_byte",
        "dropped_by_chance", "dropped_by_queue", "dropped_while_down", "is_up", "name", "num_bytes", "num_packets",
        "queue_s_max", "shape",
    )  # fmt: skip

    def __init__(self, name: str, shape: LinkShape, *, rng: random.Random) -> None:
        self.name = name
        self._draw = rng.random
        self._free_s = self._last_due_s = 0.0
        self.num_bytes = self.num_packets = 0
        self.dropped_by_queue = self.dropped_by_chance = self.dropped_while_down = 0
        self.queue_s_max = 0.0
        self._take(shape)

    def _take(self, shape: LinkShape) -> None:
        self.shape = shape
        self.is_up = shape.is_up
        self._delay_s, self._jitter_s, self._loss = shape.delay_s, shape.jitter_s, shape.loss
        self._seconds_per_byte = 8 / shape.rate_bit_s if shape.rate_bit_s else 0.0
        self._queue_s = queue_bytes(shape) * self._seconds_per_byte

    def offer(self, now_s: float, num_bytes: int) -> float:
        """Takes a packet of `num_bytes` at `now_s`, never before an earlier one's.

        Returns:
            When it arrives at the other end, or `DROPPED`.
        """
        if not self.is_up:
            self.dropped_while_down += 1
            return DROPPED
        free_s = self._free_s
        if free_s <= now_s:
            free_s = now_s
        else:
            waiting_s = free_s - now_s
            if waiting_s > self._queue_s:
                self.dropped_by_queue += 1
                return DROPPED
            if waiting_s > self.queue_s_max:
                self.queue_s_max = waiting_s
        self._free_s = free_s = free_s + num_bytes * self._seconds_per_byte
        self.num_bytes += num_bytes
        self.num_packets += 1
        # A packet lost on the way has taken its time on the link all the same.
        if self._loss and self._draw() < self._loss:
            self.dropped_by_chance += 1
            return DROPPED
        due_s = free_s + self._delay_s
        if self._jitter_s:
            due_s += (2 * self._draw() - 1) * self._jitter_s
        if due_s < self._last_due_s:
            due_s = self._last_due_s
        self._last_due_s = due_s
        return due_s

    def queued_s(self, now_s: float) -> float:
        """How long a packet would wait now, seconds."""
        return max(0.0, self._free_s - now_s)

    def reshape(self, shape: LinkShape, now_s: float, due_s: list[float]) -> list[float]:
        """Changes the link under way.

        Args:
            due_s: when the packets on it would have arrived, ascending.

        Returns:
            When they arrive now. What waited for the link leaves at the new rate; what has left arrives as it would have.
        """
        old_delay_s, old_seconds_per_byte = self._delay_s, self._seconds_per_byte
        self._take(shape)
        stretch = self._seconds_per_byte / old_seconds_per_byte if old_seconds_per_byte else 1.0
        arrivals: list[float] = []
        last_s = 0.0
        for old_due_s in due_s:
            waits_s = old_due_s - old_delay_s - now_s
            due = old_due_s if waits_s <= 0 else now_s + waits_s * stretch + self._delay_s
            last_s = max(last_s, due)
            arrivals.append(last_s)
        self._free_s = now_s + max(0.0, self._free_s - now_s) * stretch
        self._last_due_s = last_s
        return arrivals


def queue_bytes(shape: LinkShape) -> int:
    """The queue's limit in bytes: as given, or the default for the rate; 0 where there is no rate and so no queue."""
    if shape.queue_bytes is not None:
        return shape.queue_bytes
    if shape.rate_bit_s is None:
        return 0
    return max(int(QUEUE_S_DEFAULT * shape.rate_bit_s / 8), QUEUE_PACKETS_MIN * packet_bytes_max(shape.rate_bit_s))
