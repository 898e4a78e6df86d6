"""Reports: what cannot be true is refused, times are understood on another clock, and a report is small."""

from __future__ import annotations

from math import inf, nan

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.network.graph import Figure, Link, LinkFigures, LinkGroup, Resources
from shoal.network.link_state import LinkState
from shoal.network.report import ENTRIES_MAX, PeerClock, Report, figure_here, is_sound, link_here
from shoal.node import wire

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
RATE = Figure(1e6, 1e10, 12.5, 99.0)
LINK_AB = LinkFigures(
    link=Link(A, B), state=LinkState.UP, rate=RATE, rate_alone=RATE, round_trip=RATE, round_trip_min_s=0.02, load=RATE
)
GROUP = LinkGroup((Link(B, A), Link(B, C)), RATE)
SOUND = Report(
    origin=B,
    incarnation=3,
    sequence=7,
    sent_s=100.0,
    links=(LINK_AB,),
    egress=RATE,
    ingress=RATE,
    resources=Resources(99.5, 1 << 30, 0.5, True),
    groups=(GROUP,),
)
GOLDEN = (
    "9ba26e72a1620102cb4020000000000000c2919792a161a162a2757095cb3ff0000000000000cb4000000000000000cb4008"
    "000000000000cb4010000000000000c2c0c0cb3fe0000000000000c0c0c094cb401000000000000005cb3fe0000000000000"
    "c390"
)
REPORT_BYTES = 400
LINK_BYTES = 240
"""Beside the two ids."""


def changed(**changes: object) -> Report:
    return msgspec.structs.replace(SOUND, **changes)


def of_link(**changes: object) -> Report:
    return changed(links=(msgspec.structs.replace(LINK_AB, **changes),))


def of_rate(**changes: object) -> Report:
    return of_link(rate=msgspec.structs.replace(RATE, **changes))


def test_a_sound_report_is_taken_and_survives_the_wire() -> None:
    assert is_sound(SOUND)
    assert wire.decode(wire.encode(SOUND)) == SOUND


def test_golden_bytes() -> None:
    """Fields are only ever appended."""
    one = Figure(1.0, 2.0, 3.0, 4.0)
    link = LinkFigures(link=Link(A, B), state=LinkState.UP, rate=one, round_trip_min_s=0.5)
    small = Report(origin=B, incarnation=1, sequence=2, sent_s=8.0, links=(link,), resources=Resources(4.0, 5, 0.5, True))
    assert wire.encode(small).hex() == GOLDEN


@pytest.mark.parametrize(
    "report",
    [
        changed(sent_s=nan),
        changed(sent_s=inf),
        of_rate(mean=nan),
        of_rate(mean=0.0),
        of_rate(mean=-1.0),
        of_rate(mean=inf),
        of_rate(variance=-1.0),
        of_rate(variance=nan),
        of_rate(num_samples=-1.0),
        of_rate(at_s=100.5),  # measured after it was sent
        of_rate(at_s=nan),
        of_link(round_trip_min_s=0.0),
        of_link(round_trip_min_s=nan),
        of_link(link=Link(B, A)),  # not the origin's to measure
        of_link(link=Link(A, C)),
        of_link(link=Link(B, B)),
        changed(resources=Resources(101.0)),
        changed(resources=Resources(99.0, -1)),
        changed(resources=Resources(99.0, None, 1.5)),
        changed(resources=Resources(99.0, None, nan)),
        changed(groups=(LinkGroup((Link(B, A),), RATE),)),
        changed(groups=(LinkGroup((Link(B, A), Link(C, B)), RATE),)),
        changed(groups=(LinkGroup((Link(A, C), Link(A, B)), RATE),)),
        changed(groups=(msgspec.structs.replace(GROUP, capacity=Figure(nan, 0.0, 1.0, 0.0)),)),
        changed(links=(LINK_AB,) * (ENTRIES_MAX + 1)),
    ],
)
def test_what_cannot_be_true_is_refused(report: Report) -> None:
    assert not is_sound(report)


@given(num_links=st.integers(0, 64), value=st.floats(1e-9, 1e12), id_length=st.integers(1, 64))
def test_a_report_is_small(num_links: int, value: float, id_length: int) -> None:
    me = NodeId("m" * id_length)
    figure = Figure(value, value, value, -1e9)
    links = tuple(
        msgspec.structs.replace(
            LINK_AB,
            link=Link(NodeId(f"{index:0{id_length}}"), me),
            rate=figure,
            rate_alone=figure,
            round_trip=figure,
            load=figure,
        )
        for index in range(num_links)
    )
    report = Report(
        origin=me, incarnation=1 << 63, sequence=1 << 63, sent_s=value, links=links, egress=figure, ingress=figure
    )
    ids_bytes = id_length + sum(len(entry.link.source) + id_length for entry in links)
    assert len(wire.encode(report)) <= REPORT_BYTES + num_links * LINK_BYTES + ids_bytes


@given(
    ahead_s=st.floats(-1e6, 1e6),
    reports=st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 5.0)), min_size=1, max_size=30),
)
def test_times_of_another_clock_are_off_by_the_least_time_on_the_way(
    ahead_s: float, reports: list[tuple[float, float]]
) -> None:
    clock, now_s, sent_s = PeerClock(), 0.0, 0.0
    for gap_s, way_s in reports:
        sent_s = max(sent_s + gap_s, now_s - way_s)
        now_s = sent_s + way_s
        clock.hear(sent_s + ahead_s, now_s)
    error_s = clock.shift_s + ahead_s
    least_s = min(way_s for _, way_s in reports)
    assert error_s >= -1e-6  # nothing is younger than it is by more than it travelled, nor from the future
    assert error_s <= reports[-1][1] + 1e-6
    assert error_s <= least_s + PeerClock.DRIFT_MAX * now_s + 1e-6


@given(
    shifts_s=st.lists(st.floats(-5.0, 5.0), min_size=2, max_size=20),
    news=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_a_figure_grows_no_younger_by_being_told_again(shifts_s: list[float], news: list[bool]) -> None:
    reported = RATE
    here: Figure | None = None
    old_reported: Figure | None = None
    for shift_s, is_new in zip(shifts_s, news, strict=False):
        if is_new:
            reported = msgspec.structs.replace(reported, at_s=reported.at_s + 0.1)
        before = here
        here = figure_here(reported, shift_s, old_reported=old_reported, old=here)
        assert here is not None
        if before is not None:
            assert here.at_s >= before.at_s
            assert is_new or here is before
        old_reported = reported


def test_a_link_told_again_unchanged_is_the_same() -> None:
    first = link_here(LINK_AB, 5.0, old_reported=None, old=None)
    assert first.rate is not None
    assert first.rate.at_s == RATE.at_s + 5.0
    again = link_here(LINK_AB, 3.0, old_reported=LINK_AB, old=first)
    assert again == first
    assert link_here(msgspec.structs.replace(LINK_AB, rate=None), 3.0, old_reported=LINK_AB, old=first).rate is None
