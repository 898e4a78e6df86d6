"""Figures of a cluster as one device sees it, for Prometheus: devices, directed links, memory, refusals, decisions.

They are read when somebody looks; nothing is kept here. A figure that nobody measured is left out, never invented, and each
has its age beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.errors import AddressInUse, ShoalError
from shoal.runtime.node.owner import Aged, ClusterStatus, Decisions

_HERE = ("this device", "here", "here, link cut", "doubted")


class ClusterCollector(Collector):
    """Figures of whatever `ask` returns; none at all where it cannot say.

    Args:
        ask: called for each page; None where there is no cluster. It may raise a ShoalError.
    """

    def __init__(self, ask: Callable[[], ClusterStatus | None]) -> None:
        self._ask = ask

    def describe(self) -> list[Metric]:
        """Nothing: so that nobody is asked before somebody looks."""
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            status = self._ask()
        except ShoalError:
            status = None
        if status is None:
            return
        yield from _of_devices(status)
        yield from _of_links(status)
        yield from _of_this_device(status)


def _of_devices(status: ClusterStatus) -> list[Metric]:
    labels = ["device", "id"]
    here = GaugeMetricFamily("shoal_device_here", "1 where the device is here, 0 where it is not.", labels=labels)
    memory = GaugeMetricFamily("shoal_device_memory_free_bytes", "Memory that nobody uses, as it says.", labels=labels)
    age = GaugeMetricFamily("shoal_device_memory_free_age_seconds", "How old that figure is.", labels=labels)
    idle = GaugeMetricFamily("shoal_device_processor_idle", "Idle share of its processors, 0 to 1.", labels=labels)
    for member in status.members:
        values = [member.name, member.node[:8]]
        here.add_metric(values, float(member.presence in _HERE))
        _add_aged(memory, age, values, member.memory_free_bytes)
        if member.processor_idle is not None:
            idle.add_metric(values, member.processor_idle.value)
    return [here, memory, age, idle]


def _of_links(status: ClusterStatus) -> list[Metric]:
    labels = ["source", "target"]
    names = {member.node: member.name for member in status.members}
    up = GaugeMetricFamily("shoal_link_up", "1 where the directed link carries something.", labels=labels)
    rate = GaugeMetricFamily(
        "shoal_link_rate_bytes_per_second", "What it carries when full; `bound`: it may be more.", labels=[*labels, "bound"]
    )
    rate_age = GaugeMetricFamily("shoal_link_rate_age_seconds", "How old that figure is.", labels=[*labels, "bound"])
    trip = GaugeMetricFamily("shoal_link_round_trip_seconds", "Round trip, mean.", labels=labels)
    trip_age = GaugeMetricFamily("shoal_link_round_trip_age_seconds", "How old that figure is.", labels=labels)
    load = GaugeMetricFamily(
        "shoal_link_load_bytes_per_second", "What was sent over it lately, beside control.", labels=labels
    )
    load_age = GaugeMetricFamily("shoal_link_load_age_seconds", "How old that figure is.", labels=labels)
    for link in status.links:
        values = [names.get(link.source, link.source[:8]), names.get(link.target, link.target[:8])]
        up.add_metric(values, float(link.state != "down"))
        bound = "least" if link.rate_bytes_per_s is not None and link.rate_bytes_per_s.is_lower_bound else ""
        _add_aged(rate, rate_age, [*values, bound], link.rate_bytes_per_s)
        _add_aged(trip, trip_age, values, link.round_trip_s)
        _add_aged(load, load_age, values, link.load_bytes_per_s)
    return [up, rate, rate_age, trip, trip_age, load, load_age]


def _of_this_device(status: ClusterStatus) -> list[Metric]:
    refused = CounterMetricFamily("shoal_refusals", "Who was not let in or was hung up on here.", labels=["reason"])
    for reason, count in sorted(status.refusals.items()):
        refused.add_metric([reason], count)
    counted = CounterMetricFamily("shoal_link_events", "What happened on this device's links.", labels=["event"])
    for name, count in sorted(status.counters.items()):
        counted.add_metric([name.replace("num_", "")], count)
    return [refused, counted, *(_of_decisions(status.decisions) if status.decisions is not None else ())]


def _of_decisions(decisions: Decisions) -> list[Metric]:
    buckets = [(str(bound_s), float(count)) for bound_s, count in decisions.at_most.items()]
    buckets.append(("+Inf", float(decisions.num)))
    text = "From an event to the quorum's last acknowledgement, where this device leads."
    return [HistogramMetricFamily("shoal_decide_seconds", text, buckets=buckets, sum_value=decisions.seconds)]


def _add_aged(value: GaugeMetricFamily, age: GaugeMetricFamily, labels: list[str], figure: Aged | None) -> None:
    if figure is not None:
        value.add_metric(labels, figure.value)
        age.add_metric(labels, figure.age_s)


class MetricsPage:
    """A page at http://127.0.0.1:`port`/metrics, for this machine only; port 0 takes a free one.

    Raises:
        AddressInUse: another program has the port.
    """

    def __init__(self, port: int, ask: Callable[[], ClusterStatus | None]) -> None:
        registry = CollectorRegistry()
        registry.register(ClusterCollector(ask))
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise AddressInUse(
                f"127.0.0.1:{port} cannot be used for --metrics ({error.strerror or error}): name another port"
            ) from error
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
