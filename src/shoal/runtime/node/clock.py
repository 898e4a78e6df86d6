"""The clock that cores are told: monotonic, and running on while the device sleeps.

A lease that was granted before a laptop's lid closed must have run out when it opens again. Python's own monotonic clock
stops meanwhile on Linux and macOS; on Windows it does not.
"""

from __future__ import annotations

import sys
import time


def _clock_id() -> int | None:
    """Linux calls the clock that counts sleep BOOTTIME; on macOS it is MONOTONIC, and Python uses another."""
    found: int | None = getattr(time, "CLOCK_MONOTONIC" if sys.platform == "darwin" else "CLOCK_BOOTTIME", None)
    return found


_CLOCK_ID = _clock_id()


def now_s() -> float:
    """Seconds since some moment before this process began, time asleep included."""
    return time.monotonic() if _CLOCK_ID is None else time.clock_gettime(_CLOCK_ID)


def since_1970_s() -> float:
    """What to add to `now_s()` for the date, as this device knows it."""
    return time.time() - now_s()
