"""What is news, and that news never comes faster than it may."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.network.graph import DeviceFigures, Figure, Link, LinkFigures, Resources
from shoal.network.link_state import LinkState
from shoal.network.monitor import RateLimit, ReportPolicy, is_device_news, is_link_news, is_news

LINK = Link(NodeId("a"), NodeId("b"))
GAPS = st.lists(st.floats(0.0, 30.0), min_size=1, max_size=100)


@given(gaps_s=GAPS, interval_s=st.floats(0.01, 10.0), burst=st.integers(1, 5))
def test_in_no_span_are_more_tokens_than_allowed(gaps_s: list[float], interval_s: float, burst: int) -> None:
    limit = RateLimit(interval_s=interval_s, burst=burst, now_s=0.0)
    now_s, taken_s = 0.0, []
    for gap_s in gaps_s:
        now_s += gap_s
        if limit.take(now_s):
            taken_s.append(now_s)
    for first, start_s in enumerate(taken_s):
        for last in range(first, len(taken_s)):
            assert last - first + 1 <= burst + (taken_s[last] - start_s) / interval_s + 1e-3


@given(gaps_s=GAPS)
def test_a_token_is_there_when_it_was_said_to_be(gaps_s: list[float]) -> None:
    limit = RateLimit(interval_s=1.0, burst=2, now_s=0.0)
    now_s = 0.0
    for gap_s in gaps_s:
        now_s += gap_s
        limit.take(now_s)
        now_s = max(now_s, limit.ready_s())
        assert limit.take(now_s)


def test_a_crowd_reports_no_more_together() -> None:
    policy = ReportPolicy(interval_s=1.0, crowd=16)
    assert policy.interval_for(2) == policy.interval_for(16) == 1.0
    for num_devices in (17, 100, 1000):
        assert num_devices / policy.interval_for(num_devices) == pytest.approx(16.0)


def figure(mean: float, *, scatter: float = 0.0, num_samples: float = 16.0, is_lower_bound: bool = False) -> Figure:
    return Figure(mean, (scatter * mean) ** 2, num_samples, 0.0, is_lower_bound)


@pytest.mark.parametrize(
    ("told", "now", "expected"),
    [
        (None, None, False),
        (None, figure(1.0), True),
        (figure(1.0), None, True),
        (figure(1.0), figure(1.09), False),
        (figure(1.0), figure(1.11), True),
        (figure(1.0), figure(0.89), True),
        (figure(1.0), figure(1.2, scatter=1.0), False),  # within its noise
        (figure(1.0), figure(1.0, is_lower_bound=True), True),
    ],
)
def test_news_is_more_than_a_tenth_and_more_than_noise(told: Figure | None, now: Figure | None, expected: bool) -> None:
    assert is_news(told, now) is expected


def test_what_is_news_of_a_link() -> None:
    told = LinkFigures(link=LINK, state=LinkState.UP, rate=figure(1.0), load=figure(1.0))
    assert is_link_news(None, told)
    assert not is_link_news(told, LinkFigures(link=LINK, state=LinkState.UP, rate=figure(1.0), load=figure(9.0)))
    assert is_link_news(told, LinkFigures(link=LINK, state=LinkState.DEGRADED, rate=figure(1.0)))
    assert is_link_news(told, LinkFigures(link=LINK, state=LinkState.UP, rate=figure(1.0), round_trip=figure(0.1)))


def test_what_is_news_of_a_device() -> None:
    def device(**resources: float | bool | None) -> DeviceFigures:
        return DeviceFigures(device=NodeId("a"), resources=Resources(0.0, **resources))  # type: ignore[arg-type]

    told = device(memory_free_bytes=1000, processor_idle=0.5, on_mains=True)
    assert is_device_news(None, told)
    assert not is_device_news(told, device(memory_free_bytes=1050, processor_idle=0.5, on_mains=True))
    assert is_device_news(told, device(memory_free_bytes=800, processor_idle=0.5, on_mains=True))
    assert is_device_news(told, device(memory_free_bytes=1000, processor_idle=None, on_mains=True))
    assert is_device_news(told, device(memory_free_bytes=1000, processor_idle=0.5, on_mains=False))
