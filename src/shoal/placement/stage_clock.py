"""The recurrence behind all predictions: when a stage is done with a window of which some weights are streamed.

Its reader takes the streamed pieces in their order for ever, each as soon as the ring has room; a piece is computed when
what comes before it is done and it is there, and leaves the ring then. It needs no events: when a piece can be read depends
only on what was computed before.
"""

from __future__ import annotations

from collections import deque

import msgspec

from shoal.placement.byte_ring import ByteRing


class Piece(msgspec.Struct, frozen=True):
    """A streamed unit and the resident computing before it, in seconds of a token."""

    before_s: float
    num_bytes: int
    compute_s: float


class Visit(msgspec.Struct, frozen=True):
    """What is computed in one window: streamed pieces in their order, and resident computing after the last, in seconds of a
    token."""

    pieces: tuple[Piece, ...]
    rest_s: float


class StageClock:
    """One stage: how far its reader is, when it is free, and where its time went since `clear`.

    Args:
        read_bytes_per_s: above 0.
    """

    def __init__(self, *, ring_bytes: int, read_bytes_per_s: float) -> None:
        self._read_bytes_per_s = read_bytes_per_s
        self._ring = ByteRing(ring_bytes)
        self._leave_s: deque[float] = deque()
        """When each piece in the ring leaves it."""
        self._reader_s = 0.0
        self._free_s = 0.0
        self.compute_s = 0.0
        self.disk_wait_s = 0.0

    def clear(self) -> None:
        """Counts computing and waiting from here."""
        self.compute_s = self.disk_wait_s = 0.0

    def visit(
        self,
        visit: Visit,
        arrived_s: float,
        *,
        scale: float = 1.0,
        fixed_s: float = 0.0,
        reads: bool = True,
        leaves: bool = True,
    ) -> float:
        """When the window is computed, if its input is there at `arrived_s`. Windows come in their order, round and round.

        Args:
            scale: seconds of computing for one of a token.
            fixed_s: computed at the end, whatever the scale.
            reads: False where the pieces are in the ring already.
            leaves: False where they are needed again.
        """
        now_s = max(arrived_s, self._free_s)
        reader_s, ring, leave_s, rate = self._reader_s, self._ring, self._leave_s, self._read_bytes_per_s
        waited_s, computed_s = 0.0, 0.0
        for piece in visit.pieces:
            now_s += piece.before_s * scale
            if reads:
                while ring.take(piece.num_bytes) is None:
                    ring.free()
                    reader_s = max(reader_s, leave_s.popleft())
                reader_s += piece.num_bytes / rate
                if reader_s > now_s:
                    waited_s += reader_s - now_s
                    now_s = reader_s
            now_s += piece.compute_s * scale
            computed_s += (piece.before_s + piece.compute_s) * scale
            if leaves:
                leave_s.append(now_s)
        rest_s = visit.rest_s * scale + fixed_s
        self._reader_s, self._free_s = reader_s, now_s + rest_s
        self.compute_s += computed_s + rest_s
        self.disk_wait_s += waited_s
        return self._free_s
