"""Estimates a quantity of a link or device from samples: mean, scatter, age.

A settled estimate listens to every sample, and to none too much. A sample outside the usual scatter counts only as far as
its edge, and as one voice for a change; when several in a row, over some time, all lie on one side, they become the
estimate. So an outlier hardly moves it, a changed link is followed within about a second of traffic, and nothing flips
back and forth: there is no threshold on which an estimate could rest.

A transfer that did not fill its link shows only that the link does at least this much. Such samples never lower an estimate.

Source: winsorised means and Huber's clipping (Huber, Robust Statistics, 1981); the challenger is a run test for a change of
level; "application-limited" samples as in BBR (Cardwell et al., 2016). The least round trip of some minutes is BBR's too.
"""

from __future__ import annotations

from math import exp, inf

from shoal.network.graph import Figure

MEMORY_S = 60.0
"""After this long, a sample counts 1/e."""
NUM_SAMPLES_KEPT = 32
"""A mean follows its samples with at least this many behind it, before older ones fade."""
SPREAD_FIRST = 0.25
"""Relative scatter that is assumed before there are samples to tell: a radio link's."""
SPREAD_MIN = 0.05
NUM_SPREADS = 3.0
"""Samples within so many scatters of the mean are as good as any."""
BOUND_CONFIRMED_SHARE = 0.9
"""A lower bound that is nearly reached again is as young as that."""
DRIFT_PER_S = 0.01
"""After an idle second, a link may have changed by this share without anybody calling it an outlier."""
NUM_SAMPLES_SETTLED = 4
NUM_CHALLENGERS = 5
"""So many outliers in a row on one side are a change. At one outlier in ten they come by chance once in 10^5 samples."""
CHALLENGE_S = 0.5
"""And they must span this time: a burst of other traffic on a fast link is five samples long, too."""
NUM_SPARSE_CHALLENGERS = 2
SPARSE_S = 8.0
"""On an idle link, which is measured now and then, so few that span so long are a change as well: no burst lasts from one
measurement to the next, and meanwhile the link may well have changed."""

SAMPLE_BYTES_MIN = 32 * 1024
SAMPLE_S_MIN = 1e-6
"""Shorter runs are about wake-ups and buffers, not about the link."""
SAMPLE_WEIGHT_S = 1.0
RATE_WEIGHT_S = 1.0

ROUND_TRIP_WINDOW_S = 120.0


class Estimator:
    """The mean of positive samples, with weights. Constant time and memory per sample."""

    __slots__ = (
        "_challenger_count", "_challenger_is_bound", "_challenger_side", "_challenger_since_s", "_challenger_sum",
        "_challenger_weight", "_num_added", "_spread_square", "_weight", "_weight_kept", "_weight_squares",
        "at_s", "is_lower_bound", "mean",
    )  # fmt: skip

    def __init__(self, *, weight_kept: float) -> None:
        """`weight_kept`: the weight of samples behind the mean once there are `NUM_SAMPLES_KEPT`; more fade."""
        self._weight_kept = weight_kept
        self.mean = 0.0
        self.at_s = -inf
        self.is_lower_bound = False
        self._num_added = 0
        self._weight = self._weight_squares = 0.0
        self._spread_square = SPREAD_FIRST**2
        self._challenger_count = self._challenger_side = 0
        self._challenger_weight = self._challenger_sum = self._challenger_since_s = 0.0
        self._challenger_is_bound = False

    def figure(self) -> Figure | None:
        """What is known; None before the first sample."""
        if not self._num_added:
            return None
        variance = self._spread_square * self.mean * self.mean
        return Figure(
            self.mean, variance, self._weight * self._weight / self._weight_squares, self.at_s, self.is_lower_bound
        )

    def add(self, value: float, *, weight: float, now_s: float, is_lower_bound: bool = False) -> None:
        """Takes a sample; `value` and `weight` are positive, `now_s` never falls.

        `is_lower_bound`: the quantity is at least `value`.
        """
        if not self._num_added:
            self._start(value, weight, now_s, is_lower_bound=is_lower_bound)
            return
        if is_lower_bound and value <= self.mean:
            if self.is_lower_bound and value > BOUND_CONFIRMED_SHARE * self.mean:
                self.at_s = now_s
            return
        if self.is_lower_bound and not is_lower_bound and (value > self.mean or self._num_added < NUM_CHALLENGERS):
            self._start(value, weight, now_s, is_lower_bound=False)  # bounds say nothing beyond themselves
            return
        gap_s = now_s - self.at_s
        deviation = value / self.mean - 1.0
        if self._num_added >= NUM_SAMPLES_SETTLED:
            limit = NUM_SPREADS * max(self._spread_square**0.5, SPREAD_MIN) + DRIFT_PER_S * gap_s
            if abs(deviation) > limit:
                if self._challenge(value, weight, now_s, side=1 if deviation > 0 else -1, is_lower_bound=is_lower_bound):
                    return
                if self._challenger_count >= NUM_CHALLENGERS:
                    return  # a change, or a burst: time will tell; it is no scatter
                deviation = limit if deviation > 0 else -limit
                # A slow transfer is a long one: an outlier must not make up in weight for what it was cut by.
                weight = min(weight, self._weight_squares / self._weight)
            elif not is_lower_bound:
                self._challenger_count = 0
        if is_lower_bound and not self.is_lower_bound:
            return  # within the scatter of what was measured, or one voice for a change: either way it moves nothing
        self.is_lower_bound = is_lower_bound
        self._average(deviation, weight, gap_s)
        self.at_s = now_s

    def _start(self, mean: float, weight: float, now_s: float, *, is_lower_bound: bool) -> None:
        self.mean, self.at_s, self.is_lower_bound = mean, now_s, is_lower_bound
        self._num_added, self._weight, self._weight_squares = 1, weight, weight * weight
        self._challenger_count = 0

    def _average(self, deviation: float, weight: float, gap_s: float) -> None:
        fading = 1.0 - gap_s / MEMORY_S if gap_s < 1.0 else exp(-gap_s / MEMORY_S)
        kept, squares = self._weight * fading, self._weight_squares * fading * fading
        if kept > self._weight_kept:
            # With equal weights and a constant fading to f = 1 - 1/N, the effective number of samples is 2 N - 1.
            fading = min(1.0, max(self._weight_kept / kept, 2 * NUM_SAMPLES_KEPT * squares / (kept * kept)))
            kept, squares = kept * fading, squares * fading * fading
        self._weight, self._weight_squares = kept + weight, squares + weight * weight
        self.mean *= 1.0 + weight / self._weight * deviation
        # Cut off at two deviations, a fifth of outliers does not let the scatter grow without end.
        scatter = min(deviation * deviation, 4.0 * max(self._spread_square, SPREAD_MIN**2))
        self._spread_square += max(1.0 / (self._num_added + 1), 1.0 / NUM_SAMPLES_KEPT) * (scatter - self._spread_square)
        self._num_added += 1

    def _challenge(self, value: float, weight: float, now_s: float, *, side: int, is_lower_bound: bool) -> bool:
        """Counts an outlier; True once it and those before it have become the estimate."""
        if not self._challenger_count or side != self._challenger_side:
            self._challenger_count, self._challenger_side, self._challenger_since_s = 0, side, now_s
            self._challenger_weight = self._challenger_sum = 0.0
            self._challenger_is_bound = False
        self._challenger_count += 1
        self._challenger_weight += weight
        self._challenger_sum += weight * value
        self._challenger_is_bound |= is_lower_bound
        count, span_s = self._challenger_count, now_s - self._challenger_since_s
        is_change = count >= NUM_CHALLENGERS and span_s >= CHALLENGE_S
        if not is_change and not (count >= NUM_SPARSE_CHALLENGERS and span_s >= SPARSE_S):
            return False
        total = self._challenger_weight
        self._start(self._challenger_sum / total, total, now_s, is_lower_bound=self._challenger_is_bound)
        self._num_added, self._weight_squares = count, total * total / count
        return True


class RateEstimator(Estimator):
    """Bytes per second from transfers, each weighted by its duration: the mean is bytes over time, not a mean of rates."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(weight_kept=RATE_WEIGHT_S)

    def observe(self, num_bytes: int, seconds: float, now_s: float, *, saturated: bool) -> bool:
        """Takes a transfer. False: it was too short to say anything.

        Runs far longer than a second say no more than one of a second, or a device that slept in the middle of one would be
        believed: whoever measures cuts a long run into pieces of about `CHALLENGE_S / 2`.
        """
        if num_bytes < SAMPLE_BYTES_MIN or seconds < SAMPLE_S_MIN:
            return False
        self.add(num_bytes / seconds, weight=min(seconds, SAMPLE_WEIGHT_S), now_s=now_s, is_lower_bound=not saturated)
        return True


class RoundTripEstimator(Estimator):
    """Seconds there and back; beside the mean, the least of the last one to two `ROUND_TRIP_WINDOW_S`."""

    __slots__ = ("_least_before_s", "_least_s", "_window_since_s")

    def __init__(self) -> None:
        super().__init__(weight_kept=float(NUM_SAMPLES_KEPT))
        self._least_s = self._least_before_s = inf
        self._window_since_s = -inf

    def observe(self, seconds: float, now_s: float) -> None:
        self.add(seconds, weight=1.0, now_s=now_s)
        self.observe_least(seconds, now_s)

    def observe_least(self, seconds: float, now_s: float) -> None:
        """Takes what is known to be the least of some round trips; it says nothing of their mean."""
        if now_s - self._window_since_s > ROUND_TRIP_WINDOW_S:
            is_fresh = now_s - self._window_since_s <= 2 * ROUND_TRIP_WINDOW_S
            self._least_before_s = self._least_s if is_fresh else inf
            self._least_s, self._window_since_s = seconds, now_s
        elif seconds < self._least_s:
            self._least_s = seconds

    @property
    def least_s(self) -> float | None:
        least_s = min(self._least_s, self._least_before_s)
        return None if least_s == inf else least_s


class LoadEstimator:
    """Bytes per second over the last seconds, fading: what a link carries, not what it could."""

    __slots__ = ("_bytes_per_s", "at_s")

    FADING_S = 5.0

    def __init__(self) -> None:
        self._bytes_per_s = 0.0
        self.at_s = -inf

    def observe(self, num_bytes: int, now_s: float) -> None:
        self._bytes_per_s = self.bytes_per_s(now_s) + num_bytes / self.FADING_S
        self.at_s = now_s

    def bytes_per_s(self, now_s: float) -> float:
        gap_s = now_s - self.at_s
        return self._bytes_per_s * exp(-gap_s / self.FADING_S) if gap_s < 20 * self.FADING_S else 0.0
