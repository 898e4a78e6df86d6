"""Decides which idle link is measured next, and with how many bytes.

A link that carries work measures itself, if the work fills it; where it shows only a lower bound, the link's rate is
unknown as before. An idle one is probed when the age of its figure times what there may be to gain
is the largest, within a budget of bytes, one probe at a time so that probes do not measure each other. A link that was
never measured gets a start-up probe, larger, of a second at most, if the budget has it. No value is made up: a probe
that comes to nothing leaves the link unknown, and it is tried again like any idle link.

Source: passive measurement with useful chunks on idle links is NetStorm's (arXiv 2404.11352, section on auxiliary paths),
which starts from random values; the value of a probe is an upper-confidence-bound rule (Auer et al., 2002).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal.effects import MeasureLink
from shoal.ids import NodeId
from shoal.network.graph import Figure, Link
from shoal.units import KIB, MIB


class ProbingPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of what one device spends on probes.

    In any span of S seconds at most `saved_bytes_max + budget_bytes_per_s_max * S` bytes. The budget is `budget_share` of
    the fastest known link out of it, within its least and most; what is saved at the start pays for eight start-up
    probes. With nine devices, 26 links and 256 KiB per probe, 16 KiB/s each come to one probe per link in 47 s,
    0.15 MB/s in all; where links are fast, to one in `age_s_min`.
    """

    probe_s_max: float = 1.0
    start_up_bytes: int = 4 * MIB
    chunk_bytes: int = 256 * KIB
    age_s_min: float = 15.0
    patience_s: float = 5.0
    budget_share: float = 0.01
    saved_bytes_max: int = 32 * MIB
    budget_bytes_per_s_min: float = 16.0 * KIB
    budget_bytes_per_s_max: float = 1.0 * MIB
    drift_per_s: float = 0.01


class ProbeCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A connected link out of this device, as its target reported it."""

    link: Link
    rate: Figure | None
    round_trip_s: float | None
    connected_at_s: float

    @property
    def is_measured(self) -> bool:
        """Whether it was ever seen at its limit."""
        return self.rate is not None and not self.rate.is_lower_bound


def possible_gain(rate: Figure | None, *, age_s: float, best_bytes_per_s: float, drift_per_s: float) -> float:
    """What the link may turn out to be, as a share of the fastest link known, 0..1.

    The upper end of what its figure allows: two standard errors, and the drift since. A link never seen at its limit may be
    as fast as any.
    """
    if rate is None or rate.is_lower_bound or best_bytes_per_s <= 0.0:
        return 1.0
    upper = (rate.mean + 2.0 * rate.standard_error) * (1.0 + drift_per_s * age_s)
    return min(1.0, upper / best_bytes_per_s)


class _Outstanding(msgspec.Struct):
    link: Link
    sent_s: float
    expires_s: float


class Prober:
    """The probes of one device: at most one is under way, and their bytes stay within the budget."""

    def __init__(self, policy: ProbingPolicy, *, me: NodeId, now_s: float) -> None:
        self.policy = policy
        self._me = me
        self._outstanding: _Outstanding | None = None
        self._tried_s: dict[Link, float] = {}
        self._budget_bytes = float(policy.saved_bytes_max)
        self._budget_at_s = now_s
        self._budget_bytes_per_s = policy.budget_bytes_per_s_min

    @property
    def outstanding(self) -> Link | None:
        return self._outstanding.link if self._outstanding else None

    @property
    def expires_s(self) -> float | None:
        return self._outstanding.expires_s if self._outstanding else None

    def is_answered(self, link: Link, *, measured_s: float) -> bool:
        """Whether a figure measured at `measured_s` is the outcome of the probe that is under way."""
        probe = self._outstanding
        return probe is not None and probe.link == link and measured_s >= probe.sent_s

    def finish(self, link: Link) -> None:
        """The link was measured, or is gone: the next probe may start.

        When it was tried is kept: a device that comes and goes is not new every time.
        """
        if self._outstanding and self._outstanding.link == link:
            self._outstanding = None

    def expire(self, now_s: float) -> Link | None:
        """The link whose probe came to nothing, if its time is over."""
        if self._outstanding is None or now_s < self._outstanding.expires_s:
            return None
        link, self._outstanding = self._outstanding.link, None
        return link

    def choose(self, candidates: Iterable[ProbeCandidate], *, now_s: float) -> tuple[MeasureLink | None, float | None]:
        """The next probe, and if there is none yet, when to ask again (None: when something changes)."""
        if self._outstanding is not None:
            return None, self._outstanding.expires_s
        candidates = list(candidates)
        best_rate = max((candidate.rate.mean for candidate in candidates if candidate.rate), default=0.0)
        self._refill(best_rate, now_s)
        never = [each for each in candidates if not each.is_measured and each.link not in self._tried_s]
        if never:
            first = min(never, key=self._turn)
            is_rich = self._budget_bytes >= self.policy.start_up_bytes
            return self._send_within_budget(
                first.link, self.policy.start_up_bytes if is_rich else self.policy.chunk_bytes, now_s
            )
        ready = [candidate for candidate in candidates if self._idle_s(candidate, now_s) >= self.policy.age_s_min]
        if not ready:
            waits = [self.policy.age_s_min - self._idle_s(candidate, now_s) for candidate in candidates]
            return None, now_s + min(waits) if waits else None
        best = max(ready, key=lambda candidate: (self._value(candidate, best_rate, now_s), candidate.link))
        return self._send_within_budget(best.link, self._chunk_bytes(best), now_s)

    def _refill(self, best_rate: float, now_s: float) -> None:
        policy = self.policy
        rate = min(max(policy.budget_share * best_rate, policy.budget_bytes_per_s_min), policy.budget_bytes_per_s_max)
        self._budget_bytes_per_s = rate
        saved_bytes = self._budget_bytes + rate * (now_s - self._budget_at_s)
        self._budget_bytes = min(saved_bytes, float(policy.saved_bytes_max))
        self._budget_at_s = now_s

    def _turn(self, candidate: ProbeCandidate) -> tuple[bool, NodeId]:
        """Each device begins with the one after it, so that those that start together do not all probe the same."""
        return candidate.link.target < self._me, candidate.link.target

    def _idle_s(self, candidate: ProbeCandidate, now_s: float) -> float:
        """Since the link was measured or last tried: one that answers no probe does not use up the budget."""
        measured_s = candidate.rate.at_s if candidate.rate and candidate.is_measured else candidate.connected_at_s
        return now_s - max(measured_s, self._tried_s.get(candidate.link, measured_s))

    def _value(self, candidate: ProbeCandidate, best_rate: float, now_s: float) -> float:
        age_s = self._idle_s(candidate, now_s)
        drift_per_s = self.policy.drift_per_s
        return age_s * possible_gain(candidate.rate, age_s=age_s, best_bytes_per_s=best_rate, drift_per_s=drift_per_s)

    def _chunk_bytes(self, candidate: ProbeCandidate) -> int:
        """Several bandwidth-delay products, or the probe would measure how TCP starts."""
        in_flight = candidate.rate.mean * candidate.round_trip_s if candidate.rate and candidate.round_trip_s else 0.0
        return min(max(self.policy.chunk_bytes, int(4 * in_flight)), self.policy.start_up_bytes)

    def _send_within_budget(self, link: Link, num_bytes: int, now_s: float) -> tuple[MeasureLink | None, float | None]:
        missing_bytes = num_bytes - self._budget_bytes
        if missing_bytes > 0.0:
            return None, now_s + missing_bytes / self._budget_bytes_per_s
        self._budget_bytes -= num_bytes
        seconds_max = self.policy.probe_s_max
        self._tried_s[link] = now_s
        self._outstanding = _Outstanding(link, now_s, now_s + seconds_max + self.policy.patience_s)
        return MeasureLink(link.target, num_bytes, seconds_max), None
