"""Who goes first on this machine: the thread of the control links, where the owner asks for it and the system grants it.

That thread sleeps nearly always, and what it does takes a fraction of a millisecond. While this device leads a group it goes
before other devices' links on the same machine too: a leader that waits behind the voters' work hears of a quorum late.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

MEMBER, LEADER = 1, 2
"""Of the lowest real-time priorities: drivers and sound stay above."""
SWITCH_S = 0.0005
"""Another Python thread of this process that computes gives way after that; Python's own 5 ms are ten decisions."""


def give_way_soon() -> None:
    """Has the threads of this process take turns at Python's lock more often, unless somebody has set it lower still."""
    if sys.getswitchinterval() > SWITCH_S:
        sys.setswitchinterval(SWITCH_S)


def become_realtime(level: int) -> bool:
    """The calling thread runs before all ordinary ones, at `level` or the highest below that is granted.

    Threads that it starts later are ordinary. False where the system knows no such thing or does not allow it.
    """
    for priority in range(level, 0, -1):
        with suppress(AttributeError, OSError):
            policy = os.SCHED_RR | getattr(os, "SCHED_RESET_ON_FORK", 0)
            os.sched_setscheduler(0, policy, os.sched_param(priority))  # 0: of this thread
            return True
    return False


def why_not_realtime() -> str:
    """One line where `become_realtime` would come to nothing here, empty where it would not."""
    granted: list[bool] = []
    thread = threading.Thread(target=lambda: granted.append(become_realtime(MEMBER)))
    thread.start()
    thread.join()
    if granted[0]:
        return ""
    if not hasattr(os, "sched_setscheduler"):
        return "--realtime: this system has no real-time priorities for threads; links run at normal priority"
    return (
        "--realtime is not granted to this user; links run at normal priority. Allow it with `LimitRTPRIO=2` in the "
        "service, or a line `USER - rtprio 2` in /etc/security/limits.conf"
    )
