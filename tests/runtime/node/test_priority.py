from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from shoal.runtime.node import priority

_T = TypeVar("_T")
HAS_REALTIME = hasattr(os, "sched_setscheduler") and not priority.why_not_realtime()


def on_a_thread(act: Callable[[], _T]) -> _T:
    """What `act` returns on a thread of its own: priorities are a thread's."""
    found: list[_T] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(not HAS_REALTIME, reason="real-time priorities are not granted here")
def test_a_leader_goes_before_members_and_what_it_starts_is_ordinary() -> None:
    def lead() -> tuple[int, int]:
        assert priority.become_realtime(priority.LEADER)
        return os.sched_getparam(0).sched_priority, on_a_thread(lambda: os.sched_getscheduler(0))

    assert on_a_thread(lead) == (priority.LEADER, os.SCHED_OTHER)


def test_it_takes_the_highest_that_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse_above_one(_pid: int, _policy: int, priority: int) -> None:
        asked.append(priority)
        if priority > 1:
            raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse_above_one, raising=False)
    monkeypatch.setattr(os, "SCHED_RR", 2, raising=False)
    monkeypatch.setattr(os, "sched_param", lambda priority: priority, raising=False)
    assert priority.become_realtime(priority.LEADER)
    assert asked == [2, 1]


def test_where_it_is_refused_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse, raising=False)
    assert not priority.become_realtime(priority.MEMBER)
    assert "limits.conf" in priority.why_not_realtime()
    monkeypatch.delattr(os, "sched_setscheduler")
    assert "no real-time priorities" in priority.why_not_realtime()


def test_threads_take_turns_more_often_and_a_lower_interval_stays() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        priority.give_way_soon()
        assert sys.getswitchinterval() == pytest.approx(priority.SWITCH_S)
        sys.setswitchinterval(0.0001)
        priority.give_way_soon()
        assert sys.getswitchinterval() == pytest.approx(0.0001)
    finally:
        sys.setswitchinterval(before)
