"""A run says when its times are not to be trusted. The lab is a stand-in: what is tested is what is made of its figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from shoal.lab.cgroups import Usage
from shoal.lab.cluster import Lab
from shoal.lab.facts import Observer
from shoal.lab.router_messages import LinkTraffic, Traffic
from shoal.lab.scenario import Scenario, parse
from shoal.lab.shaping import LinkShape

SCENARIO = {
    "devices": {"left": {"cores": 0.5}, "right": {"cores": 0.5}},
    "links": [{"between": ["left", "right"], "rate_mbit_s": 100}],
}


def traffic(at_s: float, cpu_s: float, *, num_late: int = 0) -> Traffic:
    """An account of a router after `at_s` seconds: a thousand packets of 1000 bytes in each, on one link."""
    num_packets = int(1000 * at_s)
    link = LinkTraffic(
        source="left",
        target="right",
        shape=LinkShape(rate_bit_s=1e8),
        num_bytes=1000 * num_packets,
        num_packets=num_packets,
        dropped_by_queue=0,
        dropped_by_chance=0,
        dropped_while_down=0,
        queue_s=0.0,
        queue_s_max=0.0,
    )
    return Traffic(
        links=[link],
        at_s=at_s,
        cpu_s=cpu_s,
        lateness_s_max=0.0,
        num_late=num_late,
        unroutable=0,
        refused_inbound=0,
        blocked=0,
    )


class StandIn:
    """What an `Observer` asks of a lab."""

    devices = ("left", "right")
    folder = Path("/")

    def __init__(self, accounts: list[Traffic], *, priority: str) -> None:
        self.scenario: Scenario = parse(SCENARIO, label="test", name="pair")
        self.router_priority = priority
        self.router = self
        self._accounts: Iterator[Traffic] = iter(accounts)

    def traffic(self) -> Traffic:
        return next(self._accounts)

    def usage(self, _device: str) -> Usage:
        return Usage()


def observe(accounts: list[Traffic], *, priority: str = "real-time") -> Observer:
    observer = Observer(cast(Lab, StandIn(accounts, priority=priority)))
    for _ in accounts[1:]:
        observer.sample()
    return observer


def test_a_quiet_run_has_no_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    observer = observe([traffic(0.0, 0.0), traffic(1.0, 0.69), traffic(2.0, 1.38)])
    assert observer.marks() == []
    assert observer.router().core_share_peak == pytest.approx(0.69)
    assert observer.links()[0].rate_mbit_s_peak == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        # A second in which the router was busy marks the run, though it was idle before and after.
        (
            {"accounts": [traffic(0, 0), traffic(1, 0.1), traffic(2, 0.82), traffic(3, 0.9)]},
            "the router used 0.72 of its core",
        ),
        (
            {"accounts": [traffic(0, 0), traffic(1, 0.1, num_late=11)]},
            "11 of 1000 packets were delivered more than a millisecond",
        ),
        ({"accounts": [traffic(0, 0), traffic(1, 0.1)], "priority": "normal"}, "the router ran at priority 'normal'"),
    ],
)
def test_what_went_wrong_is_marked(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], mark: str) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    (found,) = observe(**changes).marks()
    assert found.startswith(mark)
