"""Memory that the owner takes is given up, and taken back when it is free again."""

from __future__ import annotations

from shoal.placement.memory_watch import QUIET_S, MemoryWatch
from shoal.units import GIB, MIB


def step(watch: MemoryWatch, now_s: float, *, missing: int = 0, reread: int = 0, available: int = 0) -> int | None:
    return watch.step(missing_bytes=missing, resident_bytes=GIB, available_bytes=available, now_s=now_s, reread_bytes=reread)


def test_a_passing_loss_changes_nothing() -> None:
    watch = MemoryWatch(2 * GIB)
    assert step(watch, 0.0, missing=100 * MIB) is None
    assert step(watch, 1.0) is None
    assert step(watch, 2.0, missing=100 * MIB) is None
    assert step(watch, 3.0, missing=MIB) is None  # noise


def test_what_stays_lost_is_given_up_and_taken_back_when_free() -> None:
    watch = MemoryWatch(2 * GIB)
    step(watch, 0.0, missing=100 * MIB)
    smaller = step(watch, 1.0, missing=100 * MIB)
    assert smaller is not None
    assert GIB < smaller <= 2 * GIB - 100 * MIB
    assert step(watch, 2.0, available=GIB) is None  # not yet quiet for long
    assert step(watch, 2.0 + QUIET_S, available=MIB) is None  # no room
    assert step(watch, 3.0 + QUIET_S, available=GIB) == 2 * GIB
    assert step(watch, 9 * QUIET_S, available=GIB) is None  # never more than at first


def test_pages_that_come_back_as_fast_as_they_are_lost_are_lost() -> None:
    watch = MemoryWatch(2 * GIB)
    assert step(watch, 0.0, reread=100 * MIB, missing=MIB) is None
    smaller = step(watch, 1.0, reread=100 * MIB, missing=MIB)
    assert smaller is not None
    # A little was too much: a little is given up.
    assert 2 * GIB - 40 * MIB < smaller < 2 * GIB - MIB


def test_who_was_wrong_about_the_room_waits_longer() -> None:
    watch = MemoryWatch(2 * GIB)
    now_s, waits = 0.0, []
    for _ in range(3):
        step(watch, now_s, missing=100 * MIB)
        step(watch, now_s + 1, missing=100 * MIB)
        quiet_s = now_s = now_s + 2
        while step(watch, now_s, available=GIB) is None:
            now_s += 1
        waits.append(now_s - quiet_s)
    assert waits == [QUIET_S, 2 * QUIET_S, 4 * QUIET_S]
