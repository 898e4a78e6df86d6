"""What one device knows of the network: its own links by measuring, the others' by their reports.

`Awareness.step(event, now_s)` takes an event and returns effects; `Awareness.graph(now_s)` is the whole as a value. It
composes what is estimated (`estimate.py`), which state a link is in (`link_state.py`), what is told (`monitor.py`) and
which idle link is probed (`probing.py`).

A directed link is measured by its target alone, so for each link one device's word counts and reports never contend. What
the source sees of its own work on the way, it tells the target (`Carried`). Where
links are sparse, a device passes a report on to neighbours that its origin does not reach directly, once.

Source: the network awareness of NetStorm (arXiv 2404.11352) and the cluster monitor of Chaos (arXiv 2505.12815).
Differs: one clock per sample, samples of full links only, variance and age, round trips, thresholds above the noise.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Set
from math import inf
from typing import Literal

import msgspec

from shoal.effects import (
    Announce,
    Effect,
    Event,
    Fact,
    Learned,
    LinkClosed,
    LinkOpened,
    Message,
    Observed,
    Received,
    Send,
    SetTimer,
    TimerFired,
)
from shoal.ids import NodeId
from shoal.membership.failure import LinkChanged, MemberGone, MemberHere
from shoal.network.estimate import Estimator, LoadEstimator, RateEstimator, RoundTripEstimator
from shoal.network.facts import DeliveryObserved, GraphChanged, JointlyObserved, ResourcesObserved, RoundTripObserved
from shoal.network.graph import DeviceFigures, Figure, Link, LinkFigures, LinkGraph, LinkGroup, Resources
from shoal.network.link_state import (
    CONNECTED,
    LINK,
    LOST,
    MEASURED,
    PROBE_EXPIRED,
    PROBE_SENT,
    RECOVERED,
    RECOVERED_SHARE,
    SLOWED,
    SLOWED_SHARE,
    LinkState,
    next_state,
)
from shoal.network.monitor import NEWS_SHARE, RateLimit, ReportPolicy, is_device_news, is_link_news, is_news
from shoal.network.netstorm import NetStormEstimator
from shoal.network.probing import ProbeCandidate, Prober, ProbingPolicy
from shoal.network.report import Carried, PeerClock, Report, figure_here, is_sound, link_here

TIMER = "network"
USUAL_S = 300.0
"""How long a link's slowness must last to become what is usual."""
ALONE_S = 0.25
"""A link is busy alone if no other into this device was full for so long before."""
CAPPED_SHARE = 0.85
"""Links that together carry less than this share of what they do alone slow each other."""
GROUP_SHARE = 0.9
"""A group that carries nearly what the device does is the device's cap, not a group."""
GROUP_AGE_S_MAX = 600.0
NUM_GROUPS_MAX = 64
REPORTS_BURST_MAX = 16
"""Of one origin: reports may be bunched on the way. Beyond that and its rate they are dropped."""
CARRIED_EVERY_S = 0.25
CARRIED_BURST = 8
"""Of one source, in the same way; its look at one socket after the other is a burst."""

Version = tuple[int, int]
_ESTIMATORS: dict[str, type[RateEstimator]] = {"clipped": RateEstimator, "netstorm": NetStormEstimator}


class AwarenessPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """`graph_interval_s`: how often planners are given a new graph, but at once (within `graph_urgent_s`) when a link or
    device comes, goes or changes its state.
    """

    estimator: Literal["clipped", "netstorm"] = "clipped"
    report: ReportPolicy = ReportPolicy()
    probing: ProbingPolicy = ProbingPolicy()
    graph_interval_s: float = 1.0
    graph_urgent_s: float = 0.05


DEFAULT_POLICY = AwarenessPolicy()


class Statistics(msgspec.Struct):
    """Counts since the start."""

    num_reports_sent: int = 0
    num_reports_forwarded: int = 0
    num_reports_malformed: int = 0
    num_reports_dropped: int = 0
    num_carried: int = 0
    """How often a source told what its own work showed of a link."""
    num_carried_refused: int = 0
    num_probes: int = 0
    num_probes_expired: int = 0


class _Incoming:
    """A link into this device: measured here."""

    __slots__ = ("alone", "link", "load", "rate", "round_trip", "state", "told", "told_s", "usual", "usual_at_s")

    def __init__(self, link: Link, rate: RateEstimator) -> None:
        self.link = link
        self.state = LINK.start
        self.rate, self.alone = rate, RateEstimator()
        self.round_trip = RoundTripEstimator()
        self.load = LoadEstimator()
        self.usual, self.usual_at_s = 0.0, 0.0
        self.told: LinkFigures | None = None
        self.told_s = -inf

    def figures(self, now_s: float) -> LinkFigures:
        load = self.load.bytes_per_s(now_s)
        return LinkFigures(
            link=self.link,
            state=self.state,
            rate=self.rate.figure(),
            rate_alone=self.alone.figure(),
            round_trip=self.round_trip.figure(),
            round_trip_min_s=self.round_trip.least_s,
            load=Figure(load, 0.0, 1.0, now_s) if load > 0.0 else None,
        )

    def judge(self, now_s: float) -> None:
        """Moves the state by the rate as it is now, against what is usual, of which a lower bound says nothing."""
        self.state = next_state(self.state, MEASURED)
        mean, is_bound = self.rate.mean, self.rate.is_lower_bound
        if not is_bound:
            if self.usual == 0.0:
                self.usual, self.usual_at_s = mean, now_s
            share = min(1.0, (now_s - self.usual_at_s) / USUAL_S)
            self.usual += share * (mean - self.usual)
            self.usual_at_s = now_s
        if mean < SLOWED_SHARE * self.usual and not is_bound:
            self.state = next_state(self.state, SLOWED)
        elif mean > RECOVERED_SHARE * self.usual:
            self.state = next_state(self.state, RECOVERED)


class _Outgoing(msgspec.Struct):
    """A link out of this device: its figures come from its target."""

    state: LinkState
    is_connected: bool
    connected_at_s: float


class _Remote(msgspec.Struct):
    """What a link's target reported last: as it came, and with its times on our clock."""

    version: Version
    reported: LinkFigures
    figures: LinkFigures


class _Device(msgspec.Struct):
    """Another member: what it reported of itself and of the links into it."""

    figures: DeviceFigures
    limit: RateLimit
    carried_limit: RateLimit
    clock: PeerClock
    version: Version = (-1, -1)
    complete: Version = (-1, -1)
    """Of the last report that had all."""
    reported: Report | None = None
    groups: tuple[LinkGroup, ...] = ()
    links: dict[NodeId, _Remote] = {}
    """By their sources."""


class Awareness:
    """One more core of a device: composed by `node/core.py` like presence and groups.

    Args:
        me: this device. `incarnation` is larger after every restart, or its reports would be taken for old ones.
    """

    name = TIMER
    messages: tuple[type[Message], ...] = (Report, Carried)

    def __init__(self, me: NodeId, *, incarnation: int, now_s: float, policy: AwarenessPolicy = DEFAULT_POLICY) -> None:
        self.me = me
        self.policy = policy
        self.statistics = Statistics()
        self._incarnation = incarnation
        self._sequence = 0
        self._open: set[NodeId] = set()
        """Peers to whom a link stands, members or not."""
        self._cuts: set[NodeId] = set()
        """From whom nothing comes here though they are here, as presence found."""
        self._incoming: dict[Link, _Incoming] = {}
        self._outgoing: dict[Link, _Outgoing] = {}
        self._devices: dict[NodeId, _Device] = {}
        self._egress, self._ingress = RateEstimator(), RateEstimator()
        self._groups: dict[tuple[Link, ...], RateEstimator] = {}
        self._resources: Resources | None = None
        # Which link into this device was full last, and when another one was.
        self._full_link: Link | None = None
        self._full_s = self._full_other_s = -inf
        self._prober = Prober(policy.probing, me=me, now_s=now_s)
        self._probe_at_s = inf
        self._reports = RateLimit(interval_s=policy.report.interval_s, burst=policy.report.burst, now_s=now_s)
        self._news: set[Link] = set()
        self._is_device_news = False
        self._told_device: DeviceFigures | None = None
        self._told_groups: list[tuple[Link, ...]] = []
        self._refresh_at_s = now_s + policy.report.refresh_s
        self._complete_at_s = now_s
        self._graph_version = 0
        self._announced_links: dict[Link, LinkFigures] = {}
        self._announced_devices: dict[NodeId, DeviceFigures] = {}
        self._announced_s = -inf
        self._graph_at_s = inf
        self._ids = [me]
        """Of all devices, in order."""
        self._order: list[Link] = []
        """All links, in order."""
        self._table: dict[Link, LinkFigures] = {}
        """As of the last graph."""
        self._stale: set[Link] = set()
        """Links of others that changed since. Those into this device always do."""
        self._wake_s = inf

    # Events

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Takes an event; `now_s` is a clock of this device that never falls and counts time asleep.

        Raises:
            ValueError: this device is said to have measured what it cannot have.
        """
        effects: list[Effect] = []
        if isinstance(event, Observed):
            self._observe(event, now_s)
        elif isinstance(event, Received):
            if isinstance(event.message, Report):
                effects = self._take_report(event.peer, event.message, now_s)
            elif isinstance(event.message, Carried):
                self._take_carried(event.peer, event.message, now_s)
        elif isinstance(event, TimerFired):
            # A timer may fire a rounding error too early, and is gone all the same.
            if now_s >= self._wake_s - 1e-6:
                self._wake_s = inf
        elif isinstance(event, Learned):
            if isinstance(event.fact, DeliveryObserved):
                effects = self._observe_delivery(event.fact, now_s)
            else:
                self._learn(event.fact, now_s)
        elif isinstance(event, LinkOpened):
            self._open.add(event.peer)
            self._connect(event.peer, now_s)
        elif isinstance(event, LinkClosed):
            self._open.discard(event.peer)
            self._disconnect(event.peer, now_s)
        else:
            return effects
        return effects + self._act(now_s)

    def _learn(self, fact: Fact, now_s: float) -> None:
        if isinstance(fact, RoundTripObserved):
            self._observe_round_trip(fact, now_s)
        elif isinstance(fact, JointlyObserved):
            self._observe_jointly(fact, now_s)
        elif isinstance(fact, ResourcesObserved):
            self._resources = Resources(now_s, fact.memory_free_bytes, fact.processor_idle, fact.on_mains)
            self._judge_device(now_s)
        elif isinstance(fact, MemberHere):
            self._join(fact.node, now_s)
        elif isinstance(fact, MemberGone):
            self._leave(fact.node, now_s)
        elif isinstance(fact, LinkChanged) and fact.target == self.me:
            self._cut(fact.source, now_s, is_up=fact.is_up)

    def _observe(self, event: Observed, now_s: float) -> None:
        link = Link(event.source, event.target)
        record = self._incoming.get(link)
        if not 0.0 <= event.seconds < inf or event.num_bytes < 0:
            raise ValueError(f"{event.num_bytes} bytes in {event.seconds} s is no transfer")
        if record is None:
            if event.target != self.me or event.source == self.me:
                raise ValueError(f"{link} is measured by {event.target}, not by {self.me}")
            return  # it ended after its sender was forgotten
        record.load.observe(event.num_bytes, now_s)
        if not record.rate.observe(event.num_bytes, event.seconds, now_s, saturated=event.saturated):
            return
        if event.saturated:
            if self._full_link != link:
                self._full_link, self._full_other_s = link, self._full_s
            self._full_s = now_s
            if self._full_other_s < now_s - event.seconds - ALONE_S:
                record.alone.observe(event.num_bytes, event.seconds, now_s, saturated=True)
        state = record.state
        record.judge(now_s)
        if state is not record.state:
            self._tell(link, now_s, is_urgent=True)
        elif self._moved(record.told.rate if record.told else None, record.rate):
            self._tell(link, now_s)
        elif now_s - record.told_s >= self.policy.report.refresh_s:
            self._news.add(link)  # the figure is the same, and young again

    @staticmethod
    def _moved(told: Figure | None, estimator: Estimator) -> bool:
        """`is_news`, without making a figure for every sample."""
        if told is None or told.is_lower_bound != estimator.is_lower_bound:
            return True
        return abs(estimator.mean - told.mean) > NEWS_SHARE * told.mean and is_news(told, estimator.figure())

    def _observe_delivery(self, fact: DeliveryObserved, now_s: float) -> list[Effect]:
        """Tells the link's target; the least round trip is this device's to keep."""
        if fact.num_bytes <= 0 or not 0.0 < fact.seconds < inf:
            raise ValueError(f"{fact.num_bytes} bytes in {fact.seconds} s is no transfer")
        outgoing = self._outgoing.get(Link(self.me, fact.peer))
        if outgoing is None or outgoing.state is LinkState.DOWN:
            return []  # it went away meanwhile
        if fact.round_trip_min_s is not None:
            self._incoming[Link(fact.peer, self.me)].round_trip.observe_least(fact.round_trip_min_s, now_s)
        return [Send((fact.peer,), Carried(fact.num_bytes, fact.seconds, fact.is_full))]

    def _take_carried(self, peer: NodeId, carried: Carried, now_s: float) -> None:
        device = self._devices.get(peer)
        if device is None:
            return
        if not carried.is_sound or not device.carried_limit.take(now_s):
            self.statistics.num_carried_refused += 1
            return
        self.statistics.num_carried += 1
        self._observe(Observed(peer, self.me, carried.num_bytes, carried.seconds, saturated=carried.is_full), now_s)

    def _observe_round_trip(self, fact: RoundTripObserved, now_s: float) -> None:
        if not 0.0 < fact.seconds < inf:
            raise ValueError(f"{fact.seconds} s is no round trip")
        link = Link(fact.peer, self.me)
        record = self._incoming.get(link)
        if record is None:
            return
        record.round_trip.observe(fact.seconds, now_s)
        if self._moved(record.told.round_trip if record.told else None, record.round_trip):
            self._tell(link, now_s)

    def _observe_jointly(self, fact: JointlyObserved, now_s: float) -> None:
        links = tuple(sorted(set(fact.links)))
        is_egress = all(link.source == self.me for link in links)
        if len(links) < 2 or not (is_egress or all(link.target == self.me for link in links)):
            raise ValueError(f"{', '.join(map(str, links))} are not several links out of or into {self.me}")
        if not 0.0 < fact.seconds < inf or fact.num_bytes < 0:
            raise ValueError(f"{fact.num_bytes} bytes in {fact.seconds} s is no transfer")
        total = fact.num_bytes / fact.seconds
        alone = [self._alone(link) for link in links]
        is_capped = None not in alone and total < CAPPED_SHARE * sum(figure.mean for figure in alone if figure)
        device = self._egress if is_egress else self._ingress
        if not is_capped or total >= GROUP_SHARE * device.mean:
            device.observe(fact.num_bytes, fact.seconds, now_s, saturated=is_capped)
        if not is_capped:
            self._groups.pop(links, None)
        else:
            self._groups.setdefault(links, RateEstimator()).observe(fact.num_bytes, fact.seconds, now_s, saturated=True)
            if len(self._groups) > NUM_GROUPS_MAX:
                del self._groups[min(self._groups, key=lambda group: self._groups[group].at_s)]
        self._judge_device(now_s)

    def _alone(self, link: Link) -> Figure | None:
        if (record := self._incoming.get(link)) is not None:
            return record.alone.figure()
        remote = self._reported(link)
        return remote.figures.rate_alone if remote else None

    def _judge_device(self, now_s: float) -> None:
        groups = [group.links for group in self._own_groups(now_s)]
        if groups != self._told_groups or is_device_news(self._told_device, self._own_device()):
            self._is_device_news = True
            self._change_graph(now_s)

    def _join(self, device: NodeId, now_s: float) -> None:
        if device == self.me or device in self._devices:
            return
        report = self.policy.report
        limit = RateLimit(interval_s=report.interval_s, burst=REPORTS_BURST_MAX, now_s=now_s)
        carried_limit = RateLimit(interval_s=CARRIED_EVERY_S, burst=CARRIED_BURST, now_s=now_s)
        self._devices[device] = _Device(DeviceFigures(device=device), limit, carried_limit, PeerClock())
        self._change_crowd(now_s)
        insort(self._ids, device)
        if device in self._open:
            self._connect(device, now_s)

    def _leave(self, device: NodeId, now_s: float) -> None:
        left = self._devices.pop(device, None)
        if left is None:
            return
        into, out = Link(device, self.me), Link(self.me, device)
        self._incoming.pop(into, None)
        self._news.discard(into)
        self._outgoing.pop(out, None)
        self._prober.finish(out)
        for other, theirs in self._devices.items():
            theirs.links.pop(device, None)
            self._unlist(Link(device, other))
        for link in (into, out, *(Link(source, device) for source in left.links)):
            self._unlist(link)
        self._ids.remove(device)
        for links_of_group in [group for group in self._groups if any(device in (e.source, e.target) for e in group)]:
            del self._groups[links_of_group]
        self._cuts.discard(device)
        self._probe_at_s = now_s
        self._change_crowd(now_s)

    def _change_crowd(self, now_s: float) -> None:
        """A device came or went: the more there are, the seldomer each of them reports."""
        self._reports.interval_s = self.policy.report.interval_for(1 + len(self._devices))
        self._change_graph(now_s, is_urgent=True)

    def _connect(self, peer: NodeId, now_s: float) -> None:
        """A link to a member stands: frames go both ways over it, unless presence found this direction cut."""
        if peer not in self._devices:
            return
        into, out = Link(peer, self.me), Link(self.me, peer)
        incoming = self._incoming.setdefault(into, _Incoming(into, _ESTIMATORS[self.policy.estimator]()))
        incoming.state = next_state(incoming.state, LOST if peer in self._cuts else CONNECTED)
        outgoing = self._outgoing.setdefault(out, _Outgoing(LINK.start, False, now_s))
        if not outgoing.is_connected:
            outgoing.state = next_state(outgoing.state, CONNECTED)
            outgoing.is_connected, outgoing.connected_at_s = True, now_s
        self._complete_at_s = self._probe_at_s = now_s  # the neighbour may know nothing of us
        self._list(into)
        self._list(out)
        self._tell(into, now_s, is_urgent=True)

    def _disconnect(self, peer: NodeId, now_s: float) -> None:
        outgoing = self._outgoing.get(Link(self.me, peer))
        if outgoing is None:
            return
        outgoing.state, outgoing.is_connected = next_state(outgoing.state, LOST), False
        self._prober.finish(Link(self.me, peer))
        self._stale.add(Link(self.me, peer))
        self._probe_at_s = now_s
        self._move_incoming(peer, LOST, now_s)

    def _cut(self, source: NodeId, now_s: float, *, is_up: bool) -> None:
        """Presence found that the direction from `source` to here carries nothing, or does again."""
        if not is_up:
            self._cuts.add(source)
        else:
            self._cuts.discard(source)
        if source in self._open or not is_up:
            self._move_incoming(source, CONNECTED if is_up else LOST, now_s)

    def _move_incoming(self, source: NodeId, event: str, now_s: float) -> None:
        incoming = self._incoming.get(Link(source, self.me))
        if incoming is not None:
            incoming.state = next_state(incoming.state, event)
            self._tell(incoming.link, now_s, is_urgent=True)

    # Reports

    def _take_report(self, peer: NodeId, report: Report, now_s: float) -> list[Effect]:
        device = self._devices.get(report.origin)
        if device is None or report.incarnation < device.version[0]:
            return []  # not a member (our own report come round is none either), or from before its restart
        if not is_sound(report):
            self.statistics.num_reports_malformed += 1
            return []
        if not device.limit.take(now_s):
            self.statistics.num_reports_dropped += 1
            return []
        if report.incarnation > device.version[0]:
            device.clock, device.reported = PeerClock(), None
            self._drop_links(device, frozenset(), report.version, now_s)
        device.clock.hear(report.sent_s, now_s)
        taken = [self._take_link(device, reported, report.version, now_s) for reported in report.links]
        is_new = any(taken)
        if report.version > device.version:
            is_new = True
            self._take_device(device, report, now_s)
        if report.is_complete:
            device.complete = max(device.complete, report.version)
            self._drop_links(device, {figures.link.source for figures in report.links}, report.version, now_s)
        return self._forward(peer, report) if is_new else []

    def _take_link(self, device: _Device, reported: LinkFigures, version: Version, now_s: float) -> bool:
        link, shift_s = reported.link, device.clock.shift_s
        if link.source not in self._devices and link.source != self.me:
            return False  # a member that we do not know yet: it is told again
        old = device.links.get(link.source)
        if version <= (old.version if old else device.complete):
            return False  # known, or gone since
        if old is None or old.version[0] != version[0]:
            figures = link_here(reported, shift_s, old_reported=None, old=None)
        else:
            figures = link_here(reported, shift_s, old_reported=old.reported, old=old.figures)
        device.links[link.source] = _Remote(version, reported, figures)
        self._list(link)
        is_urgent = old is None or old.figures.state is not figures.state
        outgoing = self._outgoing.get(link)
        if outgoing is not None and self._learn_outgoing(outgoing, figures, now_s):
            is_urgent = True
        if is_urgent or is_link_news(self._announced_links.get(link), figures):
            self._change_graph(now_s, is_urgent=is_urgent)
        return True

    def _learn_outgoing(self, outgoing: _Outgoing, figures: LinkFigures, now_s: float) -> bool:
        """Moves the state of a link out of this device by what its target says. True: it is another one now."""
        if not outgoing.is_connected:
            return False
        before = outgoing.state
        if figures.state is LinkState.DOWN:
            outgoing.state = next_state(before, LOST)  # a cut of one direction: we send, it hears nothing
        else:
            outgoing.state = next_state(before, CONNECTED)
            if figures.rate is not None and figures.state in (LinkState.UP, LinkState.DEGRADED):
                outgoing.state = next_state(outgoing.state, MEASURED)
                outgoing.state = next_state(outgoing.state, SLOWED if figures.state is LinkState.DEGRADED else RECOVERED)
        if figures.rate is not None and self._prober.is_answered(figures.link, measured_s=figures.rate.at_s):
            self._prober.finish(figures.link)
            self._probe_at_s = now_s
        return outgoing.state is not before

    def _take_device(self, device: _Device, report: Report, now_s: float) -> None:
        shift_s, before, old = device.clock.shift_s, device.reported, device.figures
        resources = report.resources
        figures = DeviceFigures(
            device=report.origin,
            egress=figure_here(report.egress, shift_s, old_reported=before.egress if before else None, old=old.egress),
            ingress=figure_here(report.ingress, shift_s, old_reported=before.ingress if before else None, old=old.ingress),
            resources=resources and msgspec.structs.replace(resources, at_s=resources.at_s + shift_s),
        )
        known = self._devices.keys() | {self.me}
        groups = tuple(
            LinkGroup(group.links, msgspec.structs.replace(group.capacity, at_s=group.capacity.at_s + shift_s))
            for group in report.groups
            if all(link.source in known and link.target in known for link in group.links)
        )
        are_groups_news = [group.links for group in groups] != [group.links for group in device.groups]
        device.version, device.reported, device.figures, device.groups = report.version, report, figures, groups
        if are_groups_news or is_device_news(self._announced_devices.get(report.origin), figures):
            self._change_graph(now_s)

    def _drop_links(self, device: _Device, listed: Set[NodeId], version: Version, now_s: float) -> None:
        """Forgets links into the device that it has no more."""
        for source in device.links.keys() - listed:
            if device.links[source].version < version:
                link = Link(source, device.figures.device)
                del device.links[source]
                if link in self._outgoing:
                    self._stale.add(link)
                else:
                    self._unlist(link)
                self._change_graph(now_s)

    def _forward(self, peer: NodeId, report: Report) -> list[Effect]:
        """Passes on what is new to neighbours that its origin does not reach itself."""
        to = tuple([each for each in self._neighbours() if each != peer and not self._reaches(report.origin, each)])
        if not to:
            return []
        self.statistics.num_reports_forwarded += 1
        return [Send(to, report)]

    def _reaches(self, origin: NodeId, target: NodeId) -> bool:
        remote = self._devices[target].links.get(origin)
        return origin == target or (remote is not None and remote.figures.state is not LinkState.DOWN)

    def _neighbours(self) -> Iterable[NodeId]:
        return (link.target for link, outgoing in self._outgoing.items() if outgoing.state is not LinkState.DOWN)

    # What follows from an event

    def _tell(self, link: Link, now_s: float, *, is_urgent: bool = False) -> None:
        self._news.add(link)
        self._change_graph(now_s, is_urgent=is_urgent)

    def _change_graph(self, now_s: float, *, is_urgent: bool = False) -> None:
        spacing_s = self.policy.graph_urgent_s if is_urgent else self.policy.graph_interval_s
        self._graph_at_s = min(self._graph_at_s, max(now_s, self._announced_s + spacing_s))

    def _act(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        report_at_s = self._report_at_s()
        if now_s >= report_at_s:
            effects += self._report(now_s)
            report_at_s = self._report_at_s()
        if now_s >= self._probe_at_s:
            effects += self._probe(now_s)
        if now_s >= self._graph_at_s:
            self._graph_at_s, self._announced_s = inf, now_s
            self._graph_version += 1
            graph = self.graph(now_s)
            self._announced_links = dict(self._table)
            self._announced_devices = {figures.device: figures for figures in graph.devices}
            effects.append(Announce(GraphChanged(graph)))
        wake_s = min(report_at_s, self._probe_at_s, self._graph_at_s)
        if wake_s < self._wake_s:
            # A later one is not asked for anew: the earlier fires for nothing and asks then.
            self._wake_s = wake_s
            effects.append(SetTimer(TIMER, wake_s))
        return effects

    def _report_at_s(self) -> float:
        wanted_s = min(self._refresh_at_s, self._complete_at_s)
        if self._news or self._is_device_news:
            wanted_s = -inf
        return max(wanted_s, self._reports.ready_s())

    def _report(self, now_s: float) -> list[Effect]:
        to = tuple(self._neighbours())
        policy = self.policy.report
        self._refresh_at_s = now_s + policy.refresh_s
        is_complete = now_s >= self._complete_at_s
        if is_complete:
            self._complete_at_s = now_s + policy.complete_s
        records = [record for record in self._incoming.values() if is_complete or self._is_due(record)]
        is_wanted = bool(records) or is_complete or self._is_device_news
        device, groups = self._own_device(), self._own_groups(now_s)
        for record in records:
            record.told, record.told_s = record.figures(now_s), now_s
        self._told_device, self._told_groups = device, [group.links for group in groups]
        self._news.clear()
        self._is_device_news = False
        if not to or not is_wanted:
            return []  # whoever connects next is told everything
        is_due = self._reports.take(now_s)
        assert is_due, "a report was due before its time"
        self._sequence += 1
        self.statistics.num_reports_sent += 1
        report = Report(
            origin=self.me,
            incarnation=self._incarnation,
            sequence=self._sequence,
            sent_s=now_s,
            is_complete=is_complete,
            links=tuple(record.told for record in records if record.told),
            egress=device.egress,
            ingress=device.ingress,
            resources=device.resources,
            groups=groups,
        )
        return [Send(to, report)]

    def _is_due(self, record: _Incoming) -> bool:
        return record.link in self._news or max(record.rate.at_s, record.round_trip.at_s) > record.told_s

    def _probe(self, now_s: float) -> list[Effect]:
        if (expired := self._prober.expire(now_s)) is not None:
            self.statistics.num_probes_expired += 1
            self._move_outgoing(expired, PROBE_EXPIRED, now_s)
        candidates = [
            self._candidate(link, outgoing)
            for link, outgoing in self._outgoing.items()
            if outgoing.state is not LinkState.DOWN
        ]
        probe, again_s = self._prober.choose(candidates, now_s=now_s)
        if probe is None:
            self._probe_at_s = inf if again_s is None else max(again_s, now_s + 1e-3)
            return []
        self.statistics.num_probes += 1
        self._move_outgoing(Link(self.me, probe.peer), PROBE_SENT, now_s)
        self._probe_at_s = self._prober.expires_s or inf
        return [probe]

    def _candidate(self, link: Link, outgoing: _Outgoing) -> ProbeCandidate:
        remote = self._reported(link)
        back = self._incoming.get(Link(link.target, link.source))
        return ProbeCandidate(
            link=link,
            rate=remote.figures.rate if remote else None,
            round_trip_s=back.round_trip.least_s if back else None,
            connected_at_s=outgoing.connected_at_s,
        )

    def _move_outgoing(self, link: Link, event: str, now_s: float) -> None:
        outgoing = self._outgoing.get(link)
        if outgoing is not None and outgoing.state is not (state := next_state(outgoing.state, event)):
            outgoing.state = state
            self._stale.add(link)
            self._change_graph(now_s)

    # The graph

    def graph(self, now_s: float) -> LinkGraph:
        """All that is known now. Its version is that of the last `GraphChanged`."""
        for links in (self._stale, self._incoming):
            for link in links:
                self._table[link] = self._figures(link, now_s)
        self._stale.clear()
        devices, own = self._devices, self._own_device()
        groups = [*self._own_groups(now_s), *(group for device in devices.values() for group in device.groups)]
        return LinkGraph(
            at_s=now_s,
            version=self._graph_version,
            devices=tuple([own if each == self.me else devices[each].figures for each in self._ids]),
            links=tuple([self._table[link] for link in self._order]),
            groups=tuple(sorted(groups, key=lambda group: group.links)),
        )

    def _list(self, link: Link) -> None:
        """The link is new to the graph, or other than it was."""
        self._stale.add(link)
        if link not in self._table:
            self._table[link] = LinkFigures(link=link)
            insort(self._order, link)

    def _unlist(self, link: Link) -> None:
        if self._table.pop(link, None):
            del self._order[bisect_left(self._order, link)]
            self._stale.discard(link)

    def _reported(self, link: Link) -> _Remote | None:
        """What its target last said of a link into another device."""
        device = self._devices.get(link.target)
        return device.links.get(link.source) if device else None

    def _figures(self, link: Link, now_s: float) -> LinkFigures:
        incoming = self._incoming.get(link)
        if incoming is not None:
            return incoming.figures(now_s)
        remote, outgoing = self._reported(link), self._outgoing.get(link)
        figures = remote.figures if remote else LinkFigures(link=link)
        if outgoing is None or figures.state is outgoing.state:
            return figures
        return msgspec.structs.replace(figures, state=outgoing.state)

    def _own_device(self) -> DeviceFigures:
        egress, ingress = self._egress.figure(), self._ingress.figure()
        return DeviceFigures(device=self.me, egress=egress, ingress=ingress, resources=self._resources)

    def _own_groups(self, now_s: float) -> tuple[LinkGroup, ...]:
        """Groups that were seen lately and are tighter than the device's own cap."""
        groups = []
        for links, estimator in self._groups.items():
            device = self._egress if links[0].source == self.me else self._ingress
            capacity = estimator.figure()
            is_tighter = device.is_lower_bound or estimator.mean < GROUP_SHARE * device.mean
            if capacity and is_tighter and now_s - capacity.at_s <= GROUP_AGE_S_MAX:
                groups.append(LinkGroup(links, capacity))
        return tuple(groups)
