"""What planners see of the network: an immutable value in which every figure has its variance and its age.

Times are on the clock of the device that made the graph, and mean something only against `LinkGraph.at_s`: the age of a
figure is `graph.age_s(figure)`. So links that nobody measured since are the same objects in the next graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from math import sqrt

import msgspec

from shoal.ids import NodeId
from shoal.network.link_state import LinkState

ALONE_AGE_S_MAX = 600.0
"""How long a rate that a link reached alone is believed where its devices' caps hide what it could do now."""


class Link(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One direction between two devices. It is measured by its target, with one clock."""

    source: NodeId
    target: NodeId

    def __str__(self) -> str:
        return f"{self.source}->{self.target}"


class Figure(msgspec.Struct, frozen=True, array_like=True):
    """One measured quantity.

    `variance` (unit squared) is how much single measurements scatter, not how unsure the mean is: that is
    `standard_error`. `num_samples` is the effective number behind the mean, old ones counting less. `at_s` is when it was
    last measured. `is_lower_bound`: the link or device was never seen at its limit, it does at least this.
    """

    mean: float
    variance: float
    num_samples: float
    at_s: float
    is_lower_bound: bool = False

    @property
    def standard_error(self) -> float:
        return sqrt(self.variance / max(self.num_samples, 1.0))


class LinkFigures(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One directed link. None: never measured; nothing is invented.

    `rate` (bytes/s) is what it carries now, whatever else is going on; `rate_alone` what it carried while no other link into
    its target was busy. `round_trip` (seconds) includes queues, `round_trip_min_s` of the last minutes hardly does.
    `load` (bytes/s) is what was sent over it lately.
    """

    link: Link
    state: LinkState = LinkState.UNKNOWN
    rate: Figure | None = None
    rate_alone: Figure | None = None
    round_trip: Figure | None = None
    round_trip_min_s: float | None = None
    load: Figure | None = None

    @property
    def is_usable(self) -> bool:
        return self.state is not LinkState.DOWN


class Resources(msgspec.Struct, frozen=True, array_like=True):
    """What a device has free. `processor_idle` in 0..1; `on_mains` False for a device on its battery."""

    at_s: float
    memory_free_bytes: int | None = None
    processor_idle: float | None = None
    on_mains: bool | None = None


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One device: what all its links together carried out and in (bytes/s); a cap unless it is a lower bound."""

    device: NodeId
    egress: Figure | None = None
    ingress: Figure | None = None
    resources: Resources | None = None


class LinkGroup(msgspec.Struct, frozen=True, array_like=True):
    """Links that slow each other: together they carry `capacity` (bytes/s), less than each alone would add up to.

    `links` are in order, and all leave one device or all enter one.
    """

    links: tuple[Link, ...]
    capacity: Figure


class LinkGraph(msgspec.Struct, frozen=True, kw_only=True):
    """Devices, links and groups, each in the order of its ids. Equal graphs are equal values; `msgspec.json` logs them."""

    at_s: float
    version: int
    devices: tuple[DeviceFigures, ...]
    links: tuple[LinkFigures, ...]
    groups: tuple[LinkGroup, ...] = ()

    def age_s(self, figure: Figure | Resources) -> float:
        """How old the figure was when this graph was made, at least 0."""
        return max(0.0, self.at_s - figure.at_s)

    def link(self, link: Link) -> LinkFigures | None:
        """None: no such link was ever connected."""
        index = bisect_left(self.links, link, key=lambda figures: figures.link)
        return self.links[index] if index < len(self.links) and self.links[index].link == link else None

    def device(self, device: NodeId) -> DeviceFigures | None:
        index = bisect_left(self.devices, device, key=lambda figures: figures.device)
        return self.devices[index] if index < len(self.devices) and self.devices[index].device == device else None

    def usable_links(self) -> Iterable[LinkFigures]:
        """Links that are not down."""
        return (figures for figures in self.links if figures.is_usable)

    def capacity_bytes_per_s(self, link: Link) -> float | None:
        """What a planner may give the link if it also heeds the devices' caps and the groups. None: unknown, or down.

        Where a cap or a group holds the link back, its rate is a share of that; what it does alone is the better figure.
        """
        figures = self.link(link)
        if figures is None or not figures.is_usable or figures.rate is None:
            return None
        alone = figures.rate_alone
        if alone is None or self.age_s(alone) > ALONE_AGE_S_MAX or not self._is_held_back(link):
            return figures.rate.mean
        return max(figures.rate.mean, alone.mean)

    def _is_held_back(self, link: Link) -> bool:
        source, target = self.device(link.source), self.device(link.target)
        caps = (source and source.egress, target and target.ingress)
        return any(cap and not cap.is_lower_bound for cap in caps) or any(link in group.links for group in self.groups)
