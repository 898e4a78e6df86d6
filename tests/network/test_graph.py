"""The graph: a value to look things up in, that says how old each figure is and what a planner may count on."""

from __future__ import annotations

import msgspec
import pytest

from shoal.ids import NodeId
from shoal.network.graph import ALONE_AGE_S_MAX, DeviceFigures, Figure, Link, LinkFigures, LinkGraph, LinkGroup
from shoal.network.link_state import LinkState

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
AB, AC, BA = Link(A, B), Link(A, C), Link(B, A)


def figure(mean: float, at_s: float = 95.0, *, is_lower_bound: bool = False) -> Figure:
    return Figure(mean, 4.0, 16.0, at_s, is_lower_bound)


def graph(*links: LinkFigures, egress: Figure | None = None, groups: tuple[LinkGroup, ...] = ()) -> LinkGraph:
    devices = (DeviceFigures(device=A, egress=egress), DeviceFigures(device=B), DeviceFigures(device=C))
    return LinkGraph(
        at_s=100.0, version=1, devices=devices, links=tuple(sorted(links, key=lambda each: each.link)), groups=groups
    )


def link(
    link: Link, rate: Figure | None = None, alone: Figure | None = None, state: LinkState = LinkState.UP
) -> LinkFigures:
    return LinkFigures(link=link, state=state, rate=rate, rate_alone=alone)


def test_links_and_devices_are_found() -> None:
    one = graph(link(BA, figure(3.0)), link(AB, figure(1.0)), link(AC, state=LinkState.DOWN))
    found = one.link(AB)
    assert found is not None
    assert found.rate == figure(1.0)
    assert one.link(Link(C, A)) is None
    assert one.link(Link(NodeId("zz"), A)) is None
    device = one.device(B)
    assert device is not None
    assert device.device == B
    assert one.device(NodeId("zz")) is None
    assert [each.link for each in one.usable_links()] == [AB, BA]


def test_figures_say_how_old_and_how_sure_they_are() -> None:
    one = graph()
    assert one.age_s(figure(1.0, 95.0)) == 5.0
    assert one.age_s(figure(1.0, 100.1)) == 0.0
    assert figure(1.0).standard_error == pytest.approx(0.5)
    assert Figure(1.0, 4.0, 0.0, 0.0).standard_error == 2.0


def test_a_graph_is_a_value() -> None:
    one, other = graph(link(AB, figure(1.0))), graph(link(AB, figure(1.0)))
    assert one == other
    assert hash(one) == hash(other)
    assert msgspec.json.decode(msgspec.json.encode(one), type=LinkGraph) == one
    with pytest.raises(AttributeError):
        one.version = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("figures", "cap", "is_grouped", "expected"),
    [
        (link(AB), None, False, None),  # never measured: nothing is invented
        (link(AB, figure(5.0), state=LinkState.DOWN), None, False, None),
        (link(AB, figure(5.0)), None, False, 5.0),
        (link(AB, figure(5.0), figure(9.0)), None, False, 5.0),  # nothing holds it back: it is that slow
        (link(AB, figure(5.0), figure(9.0)), figure(10.0), False, 9.0),
        (link(AB, figure(5.0), figure(9.0)), figure(10.0, is_lower_bound=True), False, 5.0),
        (link(AB, figure(5.0), figure(9.0)), None, True, 9.0),
        (link(AB, figure(5.0), figure(4.0)), figure(10.0), False, 5.0),
        (link(AB, figure(5.0), figure(9.0, 99.0 - ALONE_AGE_S_MAX)), figure(10.0), False, 5.0),  # too old to be believed
    ],
)
def test_what_a_planner_may_give_a_link(
    figures: LinkFigures, cap: Figure | None, is_grouped: bool, expected: float | None
) -> None:
    groups = (LinkGroup((AB, AC), figure(10.0)),) if is_grouped else ()
    assert graph(figures, egress=cap, groups=groups).capacity_bytes_per_s(AB) == expected
