"""Room for weights on their way: a ring of bytes, as plans count with it and as `compute/streaming.py` fills it."""

from __future__ import annotations

from collections import deque


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
