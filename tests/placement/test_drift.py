"""A plan is asked for again only where a change is large, lasts, and is not known yet."""

from __future__ import annotations

import pytest

from shoal.ids import DeviceId
from shoal.placement.drift import PAUSE_S, TOKENS_MIN, Answered, DriftWatch, PlanAnew

FAST, SLOW = DeviceId("fast"), DeviceId("slow")


def answered(fast_s: float, slow_s: float, num_tokens: int = TOKENS_MIN) -> Answered:
    return Answered(num_tokens, {FAST: fast_s, SLOW: slow_s})


@pytest.fixture
def watch() -> DriftWatch:
    return DriftWatch({FAST: 0.1, SLOW: 0.4})


def test_what_was_planned_changes_nothing(watch: DriftWatch) -> None:
    assert watch.step(answered(0.108, 0.37), 0.0) is None


def test_a_device_that_became_slower_is_told(watch: DriftWatch) -> None:
    assert watch.step(answered(0.1, 0.8), 0.0) == PlanAnew({FAST: 1.0, SLOW: 2.0})


def test_a_change_must_last(watch: DriftWatch) -> None:
    assert watch.step(answered(0.2, 0.4, TOKENS_MIN - 1), 0.0) is None
    assert watch.step(answered(0.1, 0.4), 1.0) is None, "it was over"
    assert watch.step(answered(0.2, 0.4, TOKENS_MIN - 1), 2.0) is None
    anew = watch.step(answered(0.2, 0.4, TOKENS_MIN - 1), 3.0)
    assert anew is not None
    assert anew.slower_by == pytest.approx({FAST: 2.0, SLOW: 1.0})


def test_a_known_change_is_told_once_and_its_end_again(watch: DriftWatch) -> None:
    assert watch.step(answered(0.2, 0.4), 0.0) is not None
    assert watch.step(answered(0.205, 0.41), PAUSE_S + 1) is None
    assert watch.step(answered(0.1, 0.4), PAUSE_S - 1) is None, "too soon"
    assert watch.step(answered(0.1, 0.4), PAUSE_S + 1) == PlanAnew({FAST: 1.0, SLOW: 1.0})


def test_who_computes_nothing_is_not_watched() -> None:
    watch = DriftWatch({FAST: 0.1, SLOW: 0.0})
    assert watch.step(answered(0.1, 5.0), 0.0) is None
    assert watch.step(Answered(TOKENS_MIN, {}), 0.0) is None
