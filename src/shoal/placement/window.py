"""What a device keeps in memory and what it streams, and how long a token then takes.

A cyclic scan over more bytes than memory holds leaves an ordinary cache no hits at all. So some tensors stay for good, the
others pass through a ring of bytes, and both kinds alternate, so that the disk works while resident layers are computed.

Pure. `compute/streaming.py` acts in the order that is assumed here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import msgspec

from shoal.errors import InfeasiblePlacement
from shoal.units import format_bytes

RING_UNITS = (1, 2, 2.5, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Sizes of ring that are compared, in units of the largest streamed tensor."""
_TURNS = 4
"""Turns after which the recurrence is steady: the ring is full or empty for good after two."""
_MARGIN = 0.01
"""A larger ring must be faster by as much: what it takes is lost to resident tensors of a later, longer context."""


class TensorLoad(msgspec.Struct, frozen=True):
    """One tensor in the order of use: its bytes, and the seconds of computing for a token that go with it."""

    name: str
    num_bytes: int
    compute_s: float


class Residency(msgspec.Struct, frozen=True):
    """Which tensors are streamed, through how large a ring, and the seconds per token that this is expected to take.

    `streamed` is empty, and `ring_bytes` 0, where everything fits.
    """

    streamed: tuple[str, ...]
    ring_bytes: int
    streamed_bytes: int
    token_s: float


class ByteRing:
    """Room for tensors in the order in which they come and go: each in one piece, the oldest freed first.

    Args:
        num_bytes: of the ring.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._taken: deque[tuple[int, int]] = deque()

    def take(self, num_bytes: int) -> int | None:
        """Where a piece of `num_bytes` goes, or None until something is freed."""
        if not self._taken:
            begin = 0
        else:
            first, last = self._taken[0][0], self._taken[-1][1]
            if last > first:
                begin = last if last + num_bytes <= self.num_bytes else 0
                if begin == 0 and num_bytes > first:
                    return None
            else:
                begin = last
                if begin + num_bytes > first:
                    return None
        if begin + num_bytes > self.num_bytes:
            return None
        self._taken.append((begin, begin + num_bytes))
        return begin

    def free(self) -> None:
        """The oldest piece is needed no more."""
        self._taken.popleft()


Windows = Sequence[Sequence[TensorLoad]]
"""What one device computes for a token: a window per round, each a list of tensors in the order of use."""


def choose_residency(
    windows: Windows, *, available_bytes: int, read_bytes_per_s: float, idle_s: float = 0.0, ring_bytes: int = 0
) -> Residency:
    """The fastest way to use the tensors with so much memory.

    Args:
        windows: of this device; at least one tensor in all.
        available_bytes: memory for weights and ring together.
        read_bytes_per_s: of this file past the page cache, above 0.
        idle_s: how long the device waits for others per token, the same before each window, while its reader goes on.
        ring_bytes: of the ring, where that was decided already; 0 compares sizes.

    Raises:
        InfeasiblePlacement: not even the largest tensor fits; names the missing bytes.
    """
    tensors = [tensor for window in windows for tensor in window]
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    if total_bytes <= available_bytes:
        return Residency((), 0, 0, sum(tensor.compute_s for tensor in tensors))
    best: Residency | None = None
    largest_bytes = max(tensor.num_bytes for tensor in tensors)
    sizes = [int(units * largest_bytes) for units in RING_UNITS]
    if 2 * largest_bytes <= ring_bytes <= available_bytes:
        sizes = [ring_bytes]
    for size in sizes:
        if size > available_bytes:
            break
        streamed = choose_streamed(tensors, available_bytes - size)
        token_s = token_time_s(windows, streamed, ring_bytes=size, read_bytes_per_s=read_bytes_per_s, idle_s=idle_s)
        if best is None or token_s < best.token_s * (1 - _MARGIN):
            in_order = [tensor for tensor in tensors if tensor.name in streamed]
            best = Residency(tuple(tensor.name for tensor in in_order), size, _bytes(in_order), token_s)
    if best is None:
        raise InfeasiblePlacement(
            f"{format_bytes(available_bytes)} are left for weights, and one tensor alone takes "
            f"{format_bytes(largest_bytes)}: raise --memory by {format_bytes(largest_bytes - available_bytes)}, or use a "
            "smaller quantisation or --context"
        )
    return best


def token_time_s(
    windows: Windows, streamed: Collection[str], *, ring_bytes: int, read_bytes_per_s: float, idle_s: float = 0.0
) -> float:
    """Steady seconds from one token to the next on a device, waiting for others (`idle_s`) included."""
    device = DeviceClock(windows, streamed, ring_bytes=ring_bytes, read_bytes_per_s=read_bytes_per_s)
    now_s = turn_s = 0.0
    for _ in range(_TURNS):
        started_s = now_s
        for index in range(len(windows)):
            now_s = device.visit(index, now_s + idle_s / len(windows))
        turn_s = now_s - started_s
    return turn_s


def ring_time_s(devices: Sequence[DeviceClock], *, hop_s: float) -> tuple[float, list[float]]:
    """Steady seconds per token of a ring, window after window from device to device; and those spent at each device."""
    now_s = turn_s = 0.0
    visits_s = [0.0] * len(devices)
    for _ in range(_TURNS):
        started_s = now_s
        visits_s = [0.0] * len(devices)
        for index in range(devices[0].num_windows):
            for number, device in enumerate(devices):
                left_s = device.visit(index, now_s)
                visits_s[number] += left_s - now_s
                now_s = left_s + hop_s
        turn_s = now_s - started_s
    return turn_s, visits_s


class DeviceClock:
    """The recurrence of one device: when its windows end, and how far its reader is by then.

    The reader takes streamed tensors in their order, each as soon as the ring has room; a tensor is computed when the
    one before it is done and it is there, and leaves the ring then.

    Args:
        streamed: names of the tensors that do not stay.
    """

    def __init__(self, windows: Windows, streamed: Collection[str], *, ring_bytes: int, read_bytes_per_s: float) -> None:
        self._windows = windows
        self._streamed = frozenset(streamed)
        self._read_bytes_per_s = read_bytes_per_s
        self._ring = ByteRing(ring_bytes)
        self._leave_s: deque[float] = deque()
        """When each tensor in the ring leaves it."""
        self._reader_s = 0.0

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    def visit(self, index: int, now_s: float) -> float:
        """When the window that is begun at `now_s` is done. Windows are visited in their order, round and round."""
        for tensor in self._windows[index]:
            if tensor.name not in self._streamed:
                now_s += tensor.compute_s
                continue
            while self._ring.take(tensor.num_bytes) is None:
                self._ring.free()
                self._reader_s = max(self._reader_s, self._leave_s.popleft())
            self._reader_s += tensor.num_bytes / self._read_bytes_per_s
            now_s = max(now_s, self._reader_s) + tensor.compute_s
            self._leave_s.append(now_s)
        return now_s


def choose_streamed(tensors: Sequence[TensorLoad], resident_bytes: int) -> frozenset[str]:
    """Names of tensors that are streamed so that the others take `resident_bytes` at most, as evenly among them as their
    sizes allow."""
    num_bytes = _bytes(tensors) - resident_bytes
    if num_bytes <= 0:
        return frozenset()
    share = min(1.0, num_bytes / _bytes(tensors))
    chosen: set[int] = set()
    owed = 0.0
    for index, tensor in enumerate(tensors):
        owed += share * tensor.num_bytes
        if owed >= tensor.num_bytes / 2:
            chosen.add(index)
            owed -= tensor.num_bytes
    missing = num_bytes - sum(tensors[index].num_bytes for index in chosen)
    if missing > 0:
        # The smallest that suffices; else the largest, and again.
        rest = sorted((index for index in range(len(tensors)) if index not in chosen), key=lambda i: tensors[i].num_bytes)
        while missing > 0 and rest:
            fitting = next((index for index in rest if tensors[index].num_bytes >= missing), rest[-1])
            rest.remove(fitting)
            chosen.add(fitting)
            missing -= tensors[fitting].num_bytes
    else:
        _drop_excess(tensors, chosen, -missing)
    return frozenset(tensors[index].name for index in chosen)


def _drop_excess(tensors: Sequence[TensorLoad], chosen: set[int], excess_bytes: int) -> None:
    """Keeps in memory what need not be streamed after all, largest first."""
    for index in sorted(chosen, key=lambda i: -tensors[i].num_bytes):
        if tensors[index].num_bytes <= excess_bytes:
            chosen.discard(index)
            excess_bytes -= tensors[index].num_bytes


def _bytes(tensors: Sequence[TensorLoad]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
