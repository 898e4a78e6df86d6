"""Decides what of this device's figures is news to the others, and when they are told: at a bounded rate.

News is a change larger than its own noise. What did not change is told again now and then, so that its age is known, and
everything once in a while, so that a lost report does no harm.
"""

from __future__ import annotations

import msgspec

from shoal.network.graph import DeviceFigures, Figure, LinkFigures

NEWS_SHARE = 0.1
"""Planners switch for gains of a tenth (trees) and lose about as much by an error of a tenth."""
NEWS_ERRORS = 2.0


class ReportPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """In any span of S seconds a device sends at most `burst + S / interval_s` reports of its own.

    Every report reaches every device, so in a cluster of more than `crowd` the interval grows with it: what a device hears
    from all others together stays at `crowd / interval_s` reports per second.
    """

    interval_s: float = 1.0
    burst: int = 2
    refresh_s: float = 10.0
    complete_s: float = 60.0
    crowd: int = 16

    def interval_for(self, num_devices: int) -> float:
        return self.interval_s * max(1.0, num_devices / self.crowd)


class RateLimit:
    """Tokens: one per `interval_s`, at most `burst` saved."""

    def __init__(self, *, interval_s: float, burst: int, now_s: float) -> None:
        self.interval_s = interval_s
        self._burst = float(burst)
        self._tokens = float(burst)
        self._at_s = now_s

    def take(self, now_s: float) -> bool:
        """Takes a token if there is one."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) / self.interval_s)
        self._at_s = now_s
        # A timer that fires a rounding error too early must not be told to wait for the rest.
        if self._tokens < 1.0 - 1e-6:
            return False
        self._tokens = max(0.0, self._tokens - 1.0)
        return True

    def ready_s(self) -> float:
        """When there will be a token."""
        return self._at_s + max(0.0, 1.0 - self._tokens) * self.interval_s


def is_news(told: Figure | None, now: Figure | None) -> bool:
    """Whether the figure moved by more than a tenth and more than its noise, or means something else."""
    if told is None or now is None:
        return told is not now
    if told.is_lower_bound != now.is_lower_bound:
        return True
    change = abs(now.mean - told.mean)
    return change > NEWS_SHARE * told.mean and change > NEWS_ERRORS * now.standard_error


def is_link_news(told: LinkFigures | None, now: LinkFigures) -> bool:
    """Whether anything but the load of the link is news; the load always changes, and is told with the rest."""
    return (
        told is None
        or told.state is not now.state
        or is_news(told.rate, now.rate)
        or is_news(told.rate_alone, now.rate_alone)
        or is_news(told.round_trip, now.round_trip)
    )


def is_device_news(told: DeviceFigures | None, now: DeviceFigures) -> bool:
    """Whether the device's caps or what it has free are news."""
    if told is None:
        return True
    old, new = told.resources, now.resources
    if is_news(told.egress, now.egress) or is_news(told.ingress, now.ingress) or (old is None) != (new is None):
        return True
    return (
        old is not None
        and new is not None
        and (
            old.on_mains != new.on_mains
            or _is_resource_news(old.memory_free_bytes, new.memory_free_bytes)
            or _is_resource_news(old.processor_idle, new.processor_idle)
        )
    )


def _is_resource_news(before: float | None, now: float | None) -> bool:
    if before is None or now is None:
        return before is not now
    return abs(now - before) > NEWS_SHARE * abs(before)
