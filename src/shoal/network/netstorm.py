"""Estimates a link's rate as NetStorm's released program does: a baseline, chosen by name.

The mean over the last four long messages, each from the sender's stamp to its arrival. It knows neither scatter nor lower
bounds: what the sender did not fill counts as the link's rate. Here a message is timed by its receiver alone, which is
kinder than the original: that compares the clocks of two hosts, and counts the time in queues.

Source: NetStorm (arXiv 2404.11352), constants of its demonstration script.
"""

from __future__ import annotations

from shoal.network.estimate import RateEstimator
from shoal.network.graph import Figure

NUM_MESSAGES = 4
MESSAGE_BYTES_MIN = 4_000_000


class NetStormEstimator(RateEstimator):
    """Bytes over seconds of `NUM_MESSAGES` messages, then anew."""

    __slots__ = ("_num_bytes", "_num_messages", "_seconds")

    def __init__(self) -> None:
        super().__init__()
        self._num_bytes, self._num_messages, self._seconds = 0, 0, 0.0

    def observe(self, num_bytes: int, seconds: float, now_s: float, *, saturated: bool) -> bool:  # noqa: ARG002
        """Takes a message. False: too short, or the fourth is still to come."""
        if num_bytes < MESSAGE_BYTES_MIN or seconds <= 0.0:
            return False
        self._num_bytes += num_bytes
        self._seconds += seconds
        self._num_messages += 1
        if self._num_messages < NUM_MESSAGES:
            return False
        self.mean, self.at_s = self._num_bytes / self._seconds, now_s
        self._num_bytes, self._num_messages, self._seconds = 0, 0, 0.0
        return True

    def figure(self) -> Figure | None:
        return Figure(self.mean, 0.0, float(NUM_MESSAGES), self.at_s) if self.mean else None
