"""What a device tells the others of its links: the message, whether it can be true, and its times on another's clock."""

from __future__ import annotations

from math import inf, isfinite

from shoal.effects import Message
from shoal.ids import NodeId
from shoal.network.graph import Figure, Link, LinkFigures, LinkGroup, Resources

ENTRIES_MAX = 4096
"""Links and members of groups in one report."""

CARRIED_BYTES_MAX = 1 << 50


class Report(Message, frozen=True, kw_only=True, tag="nr"):
    """What `origin` measured: links into it, itself, and links that slow each other at it.

    Only what is news; `is_complete` says that all is there. Later ones of an origin have a larger (incarnation, sequence).
    Times are on the origin's clock and mean something only against `sent_s`.
    """

    origin: NodeId
    incarnation: int
    sequence: int
    sent_s: float
    is_complete: bool = False
    links: tuple[LinkFigures, ...] = ()
    egress: Figure | None = None
    ingress: Figure | None = None
    resources: Resources | None = None
    groups: tuple[LinkGroup, ...] = ()

    @property
    def version(self) -> tuple[int, int]:
        return self.incarnation, self.sequence


class Carried(Message, frozen=True, tag="nc"):
    """The sender's work came over the link from it to the receiver: `num_bytes` were acknowledged in `seconds`, by its
    clock. `is_full`: the link was the limit; otherwise it carries at least this. The receiver keeps the link's figures.
    """

    num_bytes: int
    seconds: float
    is_full: bool

    @property
    def is_sound(self) -> bool:
        return 0 < self.num_bytes <= CARRIED_BYTES_MAX and 0.0 < self.seconds < inf


def is_sound(report: Report) -> bool:
    """Whether a peer's report can be true; a device may speak only of links into itself, and of groups at itself."""
    num_entries = len(report.links) + sum(len(group.links) for group in report.groups)
    if not isfinite(report.sent_s) or num_entries > ENTRIES_MAX:
        return False
    figures = [report.egress, report.ingress, *(group.capacity for group in report.groups)]
    for entry in report.links:
        figures += (entry.rate, entry.rate_alone, entry.round_trip, entry.load)
        if entry.link.target != report.origin or entry.link.source == report.origin:
            return False
        if entry.round_trip_min_s is not None and not 0.0 < entry.round_trip_min_s < inf:
            return False
    if report.resources is not None and not _are_sound_resources(report.resources, report.sent_s):
        return False
    return all(_is_group_at(group.links, report.origin) for group in report.groups) and all(
        figure is None or _is_sound_figure(figure, report.sent_s) for figure in figures
    )


def _is_group_at(links: tuple[Link, ...], device: NodeId) -> bool:
    return len(links) >= 2 and (all(link.source == device for link in links) or all(link.target == device for link in links))


def _is_sound_figure(figure: Figure, sent_s: float) -> bool:
    return (
        0.0 < figure.mean < inf
        and 0.0 <= figure.variance < inf
        and 0.0 <= figure.num_samples < inf
        and -inf < figure.at_s <= sent_s
    )


def _are_sound_resources(resources: Resources, sent_s: float) -> bool:
    return (
        -inf < resources.at_s <= sent_s
        and (resources.memory_free_bytes or 0) >= 0
        and (resources.processor_idle is None or 0.0 <= resources.processor_idle <= 1.0)
    )


class PeerClock:
    """What to add to the times of a peer's clock.

    The least difference seen is the one with the least time on the way. It may grow again slowly, since clocks drift.
    """

    DRIFT_MAX = 2e-4

    def __init__(self) -> None:
        self.shift_s = inf
        self._at_s = 0.0

    def hear(self, sent_s: float, now_s: float) -> None:
        self.shift_s = min(self.shift_s + self.DRIFT_MAX * max(0.0, now_s - self._at_s), now_s - sent_s)
        self._at_s = now_s


def figure_here(
    reported: Figure | None, shift_s: float, *, old_reported: Figure | None, old: Figure | None
) -> Figure | None:
    """A peer's figure on our clock.

    The same measurement told again stays as it was, so that figures grow no younger by being talked about; a newer one is
    never older than the one before.
    """
    if reported is None or (reported == old_reported and old is not None):
        return None if reported is None else old
    at_s = reported.at_s + shift_s
    if old is not None and old_reported is not None:
        at_s = old.at_s if reported.at_s <= old_reported.at_s else max(at_s, old.at_s)
    return Figure(reported.mean, reported.variance, reported.num_samples, at_s, reported.is_lower_bound)


def link_here(
    reported: LinkFigures, shift_s: float, *, old_reported: LinkFigures | None, old: LinkFigures | None
) -> LinkFigures:
    """A peer's link on our clock; see `figure_here`."""

    def here(name: str) -> Figure | None:
        return figure_here(
            getattr(reported, name), shift_s, old_reported=getattr(old_reported, name, None), old=getattr(old, name, None)
        )

    return LinkFigures(
        link=reported.link,
        state=reported.state,
        rate=here("rate"),
        rate_alone=here("rate_alone"),
        round_trip=here("round_trip"),
        round_trip_min_s=reported.round_trip_min_s,
        load=here("load"),
    )
