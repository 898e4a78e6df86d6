"""What this capability is told beside the events all cores share, and what it tells: facts.

Transfers come as `Observed`, members and cuts as the facts of presence. What is measured rarely, by whoever can, is a fact
like those: a `Learned` event carries it.
"""

from __future__ import annotations

from shoal.effects import Fact
from shoal.ids import NodeId
from shoal.network.graph import Link, LinkGraph


class RoundTripObserved(Fact, frozen=True):
    """A message went to `peer` and an answer came back, `seconds` later."""

    peer: NodeId
    seconds: float


class DeliveryObserved(Fact, frozen=True):
    """Work of this device's went to `peer`: `num_bytes` were acknowledged in `seconds`, by this device's clock.

    `is_full`: the link was the limit all that time; otherwise it carries at least this. `round_trip_min_s` is the least of
    the last minutes; None: not known.
    """

    peer: NodeId
    num_bytes: int
    seconds: float
    is_full: bool
    round_trip_min_s: float | None = None


class JointlyObserved(Fact, frozen=True):
    """Several links, all out of this device or all into it, were full at once: what they carried together.

    `seconds` is half a second or more, so that buffers do not count.
    """

    links: tuple[Link, ...]
    num_bytes: int
    seconds: float


class ResourcesObserved(Fact, frozen=True):
    """What this device has free now; None: not known on this system. `processor_idle` is in 0..1."""

    memory_free_bytes: int | None = None
    processor_idle: float | None = None
    on_mains: bool | None = None


class GraphChanged(Fact, frozen=True):
    """What planners should know has changed: a link or device came or went, or a figure moved by more than its noise."""

    graph: LinkGraph
