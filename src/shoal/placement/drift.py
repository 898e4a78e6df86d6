"""When a plan deserves to be made anew: a device computes faster or slower than it did when it was planned for.

Pure: told what answers took, it says by how much which devices have changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shoal.ids import DeviceId

CHANGE = 0.1
"""A device's speed must have changed by as much, and a new plan must save as much, before anything moves."""
TOKENS_MIN = 32
"""A change must last as long: a program that starts next to us for a moment is no reason to move gigabytes."""
PAUSE_S = 30.0
"""Between two plans."""


class Answered(msgspec.Struct, frozen=True):
    """An answer of `num_tokens`, at `token_compute_s` of computing per token and device."""

    num_tokens: int
    token_compute_s: Mapping[DeviceId, float]


class PlanAnew(msgspec.Struct, frozen=True):
    """By how much each device takes longer (below 1: less long) than it was planned with."""

    slower_by: Mapping[DeviceId, float]


class DriftWatch:
    """Compares what devices take with what they were planned to take.

    Args:
        planned_s: computing per token and device, above 0.
    """

    def __init__(self, planned_s: Mapping[DeviceId, float]) -> None:
        self._planned_s = {device: seconds for device, seconds in planned_s.items() if seconds > 0}
        self._known = dict.fromkeys(self._planned_s, 1.0)
        """Ratios of which a plan knows already."""
        self._sums: dict[DeviceId, float] = {}
        self._num_tokens = 0
        self._next_s = 0.0

    def step(self, event: Answered, now_s: float) -> PlanAnew | None:
        """What follows from an answer, if anything."""
        ratios = {
            device: event.token_compute_s[device] / planned_s
            for device, planned_s in self._planned_s.items()
            if event.token_compute_s.get(device)
        }
        if not self._has_changed(ratios):
            self._sums, self._num_tokens = {}, 0
            return None
        self._num_tokens += event.num_tokens
        for device, ratio in ratios.items():
            self._sums[device] = self._sums.get(device, 0.0) + ratio * event.num_tokens
        if self._num_tokens < TOKENS_MIN or now_s < self._next_s:
            return None
        means = {device: total / self._num_tokens for device, total in self._sums.items()}
        self._sums, self._num_tokens = {}, 0
        if not self._has_changed(means):
            return None
        self._known.update(means)
        self._next_s = now_s + PAUSE_S
        return PlanAnew(dict(self._known))

    def _has_changed(self, ratios: Mapping[DeviceId, float]) -> bool:
        return any(abs(ratio / self._known[device] - 1.0) > CHANGE for device, ratio in ratios.items())
