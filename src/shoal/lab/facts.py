"""What a run has shown: measured on devices, links and the router, and whether it may be trusted.

`Observer` takes samples while the run goes on; `marks` are the reasons to doubt its times, in words.
"""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

import msgspec

from shoal.errors import LabError
from shoal.lab import block_device
from shoal.lab.cgroups import Usage
from shoal.lab.cluster import Lab
from shoal.lab.router_messages import LinkTraffic, Traffic
from shoal.lab.scenario import Scenario
from shoal.lab.shaping import PACKET_BYTES_MIN, SERIALISATION_S_MAX
from shoal.lab.timeline import Executed
from shoal.units import format_bytes, format_seconds

ROUTER_SHARE_MAX = 0.7
"""Of a core; a busier router delivers late."""
LATE_SHARE_MAX = 0.01
READ_AHEAD_S_MAX = 0.1
"""Of a device's disk, for one read-ahead."""
WINDOW_S = 1.0
"""Shares and rates at their peak are means over about that long."""


class DeviceFacts(msgspec.Struct, frozen=True):
    """One device. `memory_bytes_peak` includes page cache; `exit_statuses` are of its commands, in order, as a shell counts
    (128 and more is a signal), None for those that the run's end has ended."""

    name: str
    address: str
    memory_bytes_max: int | None
    memory_bytes_peak: int
    page_ins: int
    bytes_read: int
    disk_bytes_s_max: int | None
    cpu_s: float
    cores_max: float | None
    cores_peak: float
    throttled_s: float
    oom_kills: int
    exit_statuses: list[int | None]


class LinkFacts(msgspec.Struct, frozen=True, rename={"source": "from", "target": "to"}):
    """One direction of a link: its last shape, and what passed. `rate_mbit_s_peak` is the best second's."""

    source: str
    target: str
    rate_mbit_s_max: float | None
    delay_ms: float
    is_up: bool
    num_bytes: int
    num_packets: int
    rate_mbit_s_mean: float
    rate_mbit_s_peak: float
    queue_ms_max: float
    dropped_by_queue: int
    dropped_by_chance: int
    dropped_while_down: int


class RouterFacts(msgspec.Struct, frozen=True):
    """The router: its share of one core in all and at its peak, and how late packets were."""

    priority: str
    core_share_mean: float
    core_share_peak: float
    lateness_ms_max: float
    num_packets_late: int
    unroutable: int
    refused_inbound: int


class Facts(msgspec.Struct, frozen=True):
    """A whole run.

    Attributes:
        ended: "workload", "commands", "time limit" or "router lost".
        workload: what the workload printed, as JSON where it is JSON; `workload_status` is its exit status.
        failures: commands that ended with another status than 0, each with the last line that it wrote to standard error.
        marks: reasons to doubt the times, in words; empty if there is none.
        logs: the folder with every command's output.
    """

    scenario: str
    seed: int
    scale_bytes: float
    machine: dict[str, Any]
    seconds: float
    ended: str
    devices: list[DeviceFacts]
    links: list[LinkFacts]
    router: RouterFacts
    timeline: list[Executed]
    workload: Any
    workload_status: int | None
    failures: list[str]
    marks: list[str]
    logs: str


class Observer:
    """Samples a lab while it runs."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._first = self._window = self._sample()
        self._last = self._first
        self._cores_peak = dict.fromkeys(lab.devices, 0.0)
        self._rates_peak = [0.0] * len(self._first[0].links)
        self._router_peak = self._all_peak = 0.0

    def _sample(self) -> tuple[Traffic, dict[str, Usage]]:
        return self._lab.router.traffic(), {name: self._lab.usage(name) for name in self._lab.devices}

    def sample(self) -> None:
        """Takes a sample; about once per `WINDOW_S` it is compared with the one before."""
        self._last = traffic, usage = self._sample()
        before, used_before = self._window
        seconds = traffic.at_s - before.at_s
        if seconds < WINDOW_S:
            return
        self._window = self._last
        for index, (link, earlier) in enumerate(zip(traffic.links, before.links, strict=True)):
            rate = (link.num_bytes - earlier.num_bytes) * 8e-6 / seconds
            self._rates_peak[index] = max(self._rates_peak[index], rate)
        router = (traffic.cpu_s - before.cpu_s) / seconds
        shares = {name: (usage[name].cpu_s - used_before[name].cpu_s) / seconds for name in usage}
        for name, share in shares.items():
            self._cores_peak[name] = max(self._cores_peak[name], share)
        self._router_peak = max(self._router_peak, router)
        self._all_peak = max(self._all_peak, router + sum(shares.values()))

    @property
    def seconds(self) -> float:
        return self._last[0].at_s - self._first[0].at_s

    def devices(self, exit_statuses: dict[str, list[int | None]]) -> list[DeviceFacts]:
        return [self._device(name, exit_statuses.get(name, [])) for name in self._lab.devices]

    def _device(self, name: str, exit_statuses: list[int | None]) -> DeviceFacts:
        usage, scenario = self._last[1][name], self._lab.scenario
        return DeviceFacts(
            name=name,
            address=self._lab.address(name),
            memory_bytes_max=scenario.memory_bytes(name),
            memory_bytes_peak=usage.memory_bytes_peak,
            page_ins=usage.page_ins,
            bytes_read=usage.bytes_read,
            disk_bytes_s_max=scenario.disk_bytes_s(name),
            cpu_s=round(usage.cpu_s, 3),
            cores_max=scenario.devices[name].cores,
            cores_peak=round(max(self._cores_peak[name], self._mean_cores(name)), 3),
            throttled_s=round(usage.throttled_s, 3),
            oom_kills=usage.oom_kills,
            exit_statuses=exit_statuses,
        )

    def _mean_cores(self, name: str) -> float:
        used = self._last[1][name].cpu_s - self._first[1][name].cpu_s
        return used / self.seconds if self.seconds > 0 else 0.0

    def links(self) -> list[LinkFacts]:
        return [
            self._link(link, before, peak)
            for link, before, peak in zip(self._last[0].links, self._first[0].links, self._rates_peak, strict=True)
        ]

    def _link(self, link: LinkTraffic, before: LinkTraffic, peak_mbit_s: float) -> LinkFacts:
        mean = (link.num_bytes - before.num_bytes) * 8e-6 / self.seconds if self.seconds > 0 else 0.0
        rate = link.shape.rate_bit_s
        return LinkFacts(
            source=link.source,
            target=link.target,
            rate_mbit_s_max=round(rate * 1e-6, 3) if rate is not None else None,
            delay_ms=round(link.shape.delay_s * 1e3, 3),
            is_up=link.shape.is_up,
            num_bytes=link.num_bytes,
            num_packets=link.num_packets,
            rate_mbit_s_mean=round(mean, 3),
            rate_mbit_s_peak=round(max(peak_mbit_s, mean), 3),
            queue_ms_max=round(link.queue_s_max * 1e3, 3),
            dropped_by_queue=link.dropped_by_queue,
            dropped_by_chance=link.dropped_by_chance,
            dropped_while_down=link.dropped_while_down,
        )

    def router(self) -> RouterFacts:
        last, first = self._last[0], self._first[0]
        mean = (last.cpu_s - first.cpu_s) / self.seconds if self.seconds > 0 else 0.0
        return RouterFacts(
            priority=self._lab.router_priority,
            core_share_mean=round(mean, 3),
            core_share_peak=round(max(self._router_peak, mean), 3),
            lateness_ms_max=round(last.lateness_s_max * 1e3, 3),
            num_packets_late=last.num_late,
            unroutable=last.unroutable,
            refused_inbound=last.refused_inbound,
        )

    def marks(self) -> list[str]:
        """Reasons to doubt the times of this run."""
        cores = os.cpu_count() or 1
        router, found = self.router(), static_marks(self._lab.scenario, cores)
        if router.core_share_peak > ROUTER_SHARE_MAX:
            found.append(
                f"the router used {router.core_share_peak:.2f} of its core at its peak, more than {ROUTER_SHARE_MAX}: "
                "links may have been slower than the scenario says"
            )
        if router.priority != "real-time":
            found.append(f"the router ran at priority '{router.priority}': delays may vary by milliseconds")
        num_packets = sum(link.num_packets for link in self._last[0].links)
        if router.num_packets_late > LATE_SHARE_MAX * num_packets:
            found.append(f"{router.num_packets_late} of {num_packets} packets were delivered more than a millisecond late")
        with contextlib.suppress(LabError, OSError):  # where no disk is limited, there may be none
            disk = block_device.disk_of(self._lab.folder)
            found += disk_marks(self._lab.scenario, read_ahead_bytes=block_device.read_ahead_bytes(disk))
        if self._all_peak > 0.95 * cores:
            found.append(f"all {cores} cores of this machine were busy: devices waited for each other")
        return found


def static_marks(scenario: Scenario, cores: int) -> list[str]:
    """What the scenario alone says."""
    found = []
    wanted = sum(_cores_wanted(device.cores) for device in scenario.devices.values())
    if wanted > cores:
        found.append(
            f"the devices may use {wanted:g} cores in all and this machine has {cores}: computing at the same time takes "
            "longer than on real devices"
        )
    for (source, target), shape in scenario.shapes.items():
        if shape.rate_bit_s is not None and (packet_s := PACKET_BYTES_MIN * 8 / shape.rate_bit_s) > SERIALISATION_S_MAX:
            found.append(f"a packet takes {packet_s * 1e3:.1f} ms on the slow link from {source} to {target}")
    return found


def disk_marks(scenario: Scenario, *, read_ahead_bytes: int) -> list[str]:
    """Slow disks on which the kernel's read-ahead is a lump: one mark, for the slowest."""
    rates = {name: rate for name in scenario.devices if (rate := scenario.disk_bytes_s(name)) is not None}
    slowest = min(rates, key=rates.__getitem__, default=None)
    if slowest is None or read_ahead_bytes <= READ_AHEAD_S_MAX * rates[slowest]:
        return []
    return [
        f"this machine reads ahead by {format_bytes(read_ahead_bytes)}, which take "
        f"{format_seconds(read_ahead_bytes / rates[slowest])} of {slowest}'s disk: a page that is missing may take as long; "
        "read_ahead_kb of the disk in /sys/block sets it"
    ]


def _cores_wanted(cores: float | None) -> float:
    """A device without a limit wants one core at least."""
    return 1.0 if cores is None else cores


def this_machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
