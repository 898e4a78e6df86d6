"""Figures of a cluster, as Prometheus reads them."""

from __future__ import annotations

import socket
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shoal.errors import AddressInUse, DeviceUnreachable
from shoal.ids import GroupId, NodeId
from shoal.membership.group.facts import Decided
from shoal.runtime.node.metrics import ClusterCollector, MetricsPage
from shoal.runtime.node.owner import ClusterStatus, OwnerDesk
from tests.runtime.node.test_probes import wait_until
from tests.runtime.node.test_strangers import pair

Labels = frozenset[tuple[str, str]]


def read(text: str) -> dict[tuple[str, Labels], float]:
    """All samples, by name and labels, as Prometheus' own parser finds them."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_devices_links_refusals_and_decisions(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, lap):
        clerk = desk.desk
        assert isinstance(clerk, OwnerDesk)
        wait_until(lambda: all(link.rate_bytes_per_s for link in clerk.ask_status().links))
        with closing(socket.create_connection(("127.0.0.1", desk.port))) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            wait_until(lambda: desk.links.refusals["malformed"] == 1)
        for decide_s in (0.0004, 0.0006, 20.0):
            desk.post(lambda decide_s=decide_s: clerk.learn(Decided(GroupId("run"), 1, decide_s)))  # type: ignore[misc]
        page = MetricsPage(0, clerk.ask_status)
        with closing(page), urllib.request.urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=5.0) as answer:
            found = read(answer.read().decode())
        names = {desk.options.name: desk.me[:8], lap.options.name: lap.me[:8]}
        for name, node in names.items():
            labels = frozenset({("device", name), ("id", node)})
            assert found["shoal_device_here", labels] == 1.0
            assert found["shoal_device_memory_free_bytes", labels] > 1e6
            assert 0.0 <= found["shoal_device_memory_free_age_seconds", labels] < 10.0
        for source, target in (("desk", "lap"), ("lap", "desk")):
            labels = frozenset({("source", source), ("target", target)})
            assert found["shoal_link_up", labels] == 1.0
            assert found["shoal_link_rate_bytes_per_second", labels | {("bound", "")}] > 1e6
            assert found["shoal_link_rate_age_seconds", labels | {("bound", "")}] < 20.0
            assert found["shoal_link_load_bytes_per_second", labels] > 0.0, "its probe"
            assert found["shoal_link_load_age_seconds", labels] < 20.0
        assert found["shoal_refusals_total", frozenset({("reason", "malformed")})] == 1.0
        assert found["shoal_decide_seconds_bucket", frozenset({("le", "0.0005")})] == 1.0
        assert found["shoal_decide_seconds_bucket", frozenset({("le", "5.0")})] == 2.0
        assert found["shoal_decide_seconds_bucket", frozenset({("le", "+Inf")})] == 3.0
        assert found["shoal_decide_seconds_sum", frozenset()] == pytest.approx(20.001)
        with pytest.raises(AddressInUse, match="--metrics"):
            MetricsPage(desk.port, clerk.ask_status)


def test_what_nobody_measured_is_left_out_and_who_cannot_say_ends_no_page() -> None:
    status = ClusterStatus(NodeId("a"), "a", "", is_removed=False, incarnation=1, addresses=(), members=(), links=(),
                           waiting={}, groups={}, counters={})  # fmt: skip
    registry = CollectorRegistry()
    registry.register(ClusterCollector(lambda: status))
    assert read(generate_latest(registry).decode()) == {}

    def refuse() -> ClusterStatus:
        raise DeviceUnreachable("no agent")

    registry = CollectorRegistry()
    registry.register(ClusterCollector(refuse))
    assert generate_latest(registry) == b""


def test_links_that_have_ended_do_not_answer(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, _):
        clerk = desk.desk
    assert isinstance(clerk, OwnerDesk)
    with pytest.raises(DeviceUnreachable, match="do not answer"):
        clerk.ask_status(timeout_s=0.1)
