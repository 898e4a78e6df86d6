"""What a device keeps in memory and what it streams, and how long a token then takes.

A cyclic scan over more bytes than memory holds leaves an ordinary cache no hits at all. So some tensors stay for good, the
others pass through a ring of bytes, and both kinds alternate, so that the disk works while resident layers are computed.

Pure. `compute/streaming.py` acts in the order that is assumed here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from shoal.errors import InfeasiblePlacement
from shoal.placement.stage_clock import Piece, StageClock, Visit
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
    clock = StageClock(ring_bytes=ring_bytes, read_bytes_per_s=read_bytes_per_s)
    visits = [_visit_of(window, frozenset(streamed)) for window in windows]
    now_s = turn_s = 0.0
    for _ in range(_TURNS):
        started_s = now_s
        for visit in visits:
            now_s = clock.visit(visit, now_s + idle_s / len(windows))
        turn_s = now_s - started_s
    return turn_s


def _visit_of(window: Sequence[TensorLoad], streamed: frozenset[str]) -> Visit:
    pieces: list[Piece] = []
    before_s = 0.0
    for tensor in window:
        if tensor.name in streamed:
            pieces.append(Piece(before_s, tensor.num_bytes, tensor.compute_s))
            before_s = 0.0
        else:
            before_s += tensor.compute_s
    return Visit(tuple(pieces), before_s)


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
