"""Decides how much memory a worker's weights may keep while others on the device come and go.

Weights that stay are page cache: when the owner's programs need the room, the system takes pages of them, and each comes
back with a read of its own, the slowest way there is. So what was lost is streamed from then on, and when it has been
quiet for a while and there is room, it is taken back. Whoever is wrong about that waits twice as long the next time.

A little too much in memory is as bad as a lot: pages are used in turn, so the system takes the very ones that are needed
next. Few are missing then at any time, and many are read again.

    as many as at first -- lost twice in a row --> fewer -- quiet for long, and room --> half of it more, at most as at first

Pure: told what is missing, answers with bytes.
"""

from __future__ import annotations

from shoal.units import MIB

CHECK_EVERY_S = 1.0
QUIET_S = 30.0
_QUIET_S_MAX = 960.0
_LOST_SHARE = 0.01
"""Of what should be there: fewer pages are noise."""
_MARGIN_BYTES = 32 * MIB
"""Given back beyond what was lost, so that the next page is not lost at once."""


class MemoryWatch:
    """The memory of one worker, `memory_bytes` at first and at most."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._memory_bytes_max = memory_bytes
        self._was_lost = False
        self._quiet_since_s: float | None = None
        self._quiet_s = QUIET_S
        self._grew_at_s: float | None = None

    def step(
        self, *, missing_bytes: int, resident_bytes: int, available_bytes: int, now_s: float, reread_bytes: int = 0
    ) -> int | None:
        """What the worker may take from now on, or None for no change.

        Args:
            missing_bytes: of `resident_bytes`, which should all be in memory, that are not.
            available_bytes: what is free on the device.
            reread_bytes: of them, that came back from the disk since the last step.
        """
        if max(missing_bytes, reread_bytes) > _LOST_SHARE * resident_bytes:
            self._quiet_since_s = None
            # Once may be a passing need, and the next token brings it back.
            was_lost, self._was_lost = self._was_lost, not self._was_lost
            if not was_lost:
                return None
            if self._grew_at_s is not None and now_s - self._grew_at_s < self._quiet_s:
                self._quiet_s = min(_QUIET_S_MAX, 2 * self._quiet_s)
            self.memory_bytes = max(0, self.memory_bytes - missing_bytes - _MARGIN_BYTES)
            return self.memory_bytes
        self._was_lost = False
        if self._quiet_since_s is None:
            self._quiet_since_s = now_s
        missing_room = self._memory_bytes_max - self.memory_bytes
        room = min(missing_room, available_bytes // 2)
        if now_s - self._quiet_since_s < self._quiet_s or not missing_room or room < min(missing_room, 2 * _MARGIN_BYTES):
            return None
        self._quiet_since_s = self._grew_at_s = now_s
        self.memory_bytes += room
        return self.memory_bytes
