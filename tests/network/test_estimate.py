"""Estimators: near the truth on links that are noisy, bursty or changing, deaf to outliers, quiet when nothing changes."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.network.estimate import (
    CHALLENGE_S,
    SAMPLE_BYTES_MIN,
    Estimator,
    LoadEstimator,
    RateEstimator,
    RoundTripEstimator,
)

CHUNK_BYTES = 256 * 1024
RATES = st.floats(1e5, 1e9)  # 0.8 Mbit/s to 8 Gbit/s


class SyntheticLink:
    """Chunks over a link, one after the other, with a clock."""

    def __init__(self, seed: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.rng = random.Random(seed)
        self.chunk_bytes = chunk_bytes
        self.now_s = 0.0
        self.estimator = RateEstimator()

    def send(self, rate: float, *, saturated: bool = True, num_bytes: int = 0) -> None:
        num_bytes = num_bytes or self.chunk_bytes
        seconds = num_bytes / rate
        self.now_s += seconds
        self.estimator.observe(num_bytes, seconds, self.now_s, saturated=saturated)

    def error(self, truth: float) -> float:
        return abs(self.estimator.mean / truth - 1.0)


@given(rate=RATES, seed=st.integers(0, 2**32), scatter=st.sampled_from([0.0, 0.05, 0.1, 0.2]))
@settings(max_examples=60, deadline=None)
def test_converges_on_a_noisy_link(rate: float, seed: int, scatter: float) -> None:
    link = SyntheticLink(seed)
    for _ in range(100):
        link.send(rate * link.rng.lognormvariate(0.0, scatter))
    assert link.error(rate) < 0.02 + 0.75 * scatter  # five deviations of a mean of 64, and the log-normal's own bias
    figure = link.estimator.figure()
    assert figure is not None
    assert figure.variance**0.5 / figure.mean == pytest.approx(scatter, abs=0.04 + 0.5 * scatter)


def test_the_mean_is_bytes_over_time() -> None:
    """A token bucket: after a pause the first 64 KiB pass at line speed, the rest at the rate."""
    link = SyntheticLink(0)
    for _ in range(40):
        link.send(125e6, num_bytes=64 * 1024)
        link.send(2.5e6, num_bytes=448 * 1024)
    assert 2.4e6 < link.estimator.mean < 2.9e6  # with the bursts, 2.8e6


@pytest.mark.parametrize("seed", range(5))
def test_bursts_of_other_traffic_are_averaged(seed: int) -> None:
    """Every now and then the link gives half for a quarter of a second: the mean is what a transfer gets on the whole."""
    link = SyntheticLink(seed)
    num_bytes, started_s = 0, 0.0
    errors = []
    for index in range(600):
        rate = 12.5e6 * (0.5 if int(link.now_s / 0.25) % 4 == 0 else 1.0)
        link.send(rate * link.rng.lognormvariate(0.0, 0.05))
        num_bytes += CHUNK_BYTES
        if index > 100:
            errors.append(link.error(num_bytes / (link.now_s - started_s)))
    assert sum(errors) / len(errors) < 0.15
    assert max(errors) < 0.35


@pytest.mark.parametrize("seed", range(10))
def test_a_redrawn_link_is_followed_within_two_seconds_of_traffic(seed: int) -> None:
    link = SyntheticLink(seed)
    for _ in range(12):
        rate = link.rng.uniform(20e6, 155e6) / 8
        changed_s = link.now_s
        while link.now_s < changed_s + 2.0:
            link.send(rate * link.rng.lognormvariate(0.0, 0.05))
        assert link.error(rate) < 0.1, f"seed {seed}, at {link.now_s:.1f} s"
        while link.now_s < changed_s + 20.0:
            link.send(rate * link.rng.lognormvariate(0.0, 0.05))
            assert link.error(rate) < 0.1, f"seed {seed}, at {link.now_s:.1f} s"


@pytest.mark.parametrize("seed", range(10))
def test_outliers_hardly_move_it(seed: int) -> None:
    link = SyntheticLink(seed)
    for index in range(2000):
        rate = 12.5e6 * link.rng.lognormvariate(0.0, 0.05)
        if index > 50 and link.rng.random() < 0.05:
            rate *= link.rng.choice([0.01, 0.1, 10.0, 1000.0])
        link.send(rate)
        assert index < 50 or link.error(12.5e6) < 0.15, f"seed {seed}, sample {index}"


def test_one_sample_of_a_device_that_slept_changes_nothing() -> None:
    link = SyntheticLink(0)
    for _ in range(100):
        link.send(12.5e6)
    link.send(12.5e6 / 3000)  # a minute instead of 20 ms
    assert link.error(12.5e6) < 0.4  # the minute counts as one second of doubt ...
    for _ in range(20):
        link.send(12.5e6)
    assert link.error(12.5e6) < 0.1  # ... and is forgotten in half of one


@given(
    seed=st.integers(0, 2**32),
    bounds=st.lists(st.tuples(st.floats(0.001, 1.0), st.booleans()), min_size=1, max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_unsaturated_samples_never_lower_it(seed: int, bounds: list[tuple[float, bool]]) -> None:
    link = SyntheticLink(seed)
    if seed % 2:
        for _ in range(20):
            link.send(12.5e6 * link.rng.lognormvariate(0.0, 0.1))
    for share, is_long in bounds:
        before = link.estimator.mean
        link.send(12.5e6 * share, saturated=False, num_bytes=CHUNK_BYTES * (20 if is_long else 1))
        assert link.estimator.mean >= before


def test_unsaturated_samples_raise_what_is_too_low() -> None:
    link = SyntheticLink(0)
    for _ in range(50):
        link.send(5e6)
    for _ in range(40):
        link.send(12e6, saturated=False)
    figure = link.estimator.figure()
    assert figure is not None
    assert figure.is_lower_bound
    assert figure.mean == pytest.approx(12e6)
    link.send(20e6)
    for _ in range(40):
        link.send(20e6)
    figure = link.estimator.figure()
    assert figure is not None
    assert not figure.is_lower_bound
    assert figure.mean == pytest.approx(20e6, rel=0.05)


def test_a_first_measurement_outweighs_bounds() -> None:
    link = SyntheticLink(0)
    link.send(3e6, saturated=False)
    link.send(1e6)
    figure = link.estimator.figure()
    assert figure is not None
    assert figure.mean == pytest.approx(1e6)
    assert not figure.is_lower_bound


def test_samples_that_say_nothing_are_left_out() -> None:
    estimator = RateEstimator()
    assert not estimator.observe(SAMPLE_BYTES_MIN - 1, 0.001, 1.0, saturated=True)
    for seconds in (0.0, 1e-200):
        assert not estimator.observe(10 * SAMPLE_BYTES_MIN, seconds, 1.0, saturated=True)
    assert estimator.figure() is None


def test_two_measurements_of_an_idle_link_that_agree_are_a_change() -> None:
    link = SyntheticLink(0)
    for _ in range(4):
        link.now_s += 20.0
        link.send(12.5e6)
    link.now_s += 20.0
    link.send(3e6)
    assert link.estimator.mean > 6e6  # one is heard, not believed
    link.now_s += 20.0
    link.send(3e6)
    assert link.error(3e6) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_variance_is_honest(seed: int) -> None:
    """How far the mean is from the truth is what its standard error says: mostly within two of them, and not far within."""
    rng = random.Random(seed)
    errors = []
    for _ in range(200):
        link = SyntheticLink(rng.getrandbits(32))
        for _ in range(rng.randint(10, 200)):
            link.send(12.5e6 * max(0.1, link.rng.gauss(1.0, 0.15)))
        figure = link.estimator.figure()
        assert figure is not None
        # Bytes over time of rates that scatter by a share s is lower than their mean by s squared.
        errors.append((figure.mean - 12.5e6 * (1.0 - 0.15**2)) / figure.standard_error)
    within = sum(abs(error) < 2.0 for error in errors) / len(errors)
    assert 0.85 < within <= 1.0
    assert 0.6 < (sum(error * error for error in errors) / len(errors)) ** 0.5 < 1.4


@pytest.mark.parametrize("seed", range(5))
def test_a_link_between_two_rates_does_not_flap(seed: int) -> None:
    """Rates that alternate at random are scatter, not a sequence of changes."""
    link = SyntheticLink(seed)
    for _ in range(100):
        link.send(12.5e6 * link.rng.choice([0.7, 1.3]))
    turns, told = 0, link.estimator.mean
    for _ in range(3000):
        link.send(12.5e6 * link.rng.choice([0.7, 1.3]))
        if abs(link.estimator.mean / told - 1.0) > 0.15:
            turns, told = turns + 1, link.estimator.mean
    assert turns <= 2


@given(rate=RATES, gap_s=st.floats(0.0, 1e6), change=st.floats(0.05, 20.0))
@settings(max_examples=60, deadline=None)
def test_an_idle_link_is_believed_less(rate: float, gap_s: float, change: float) -> None:
    """After a long pause the samples that come count more than those of before."""
    link = SyntheticLink(0)
    for _ in range(50):
        link.send(rate)
    link.now_s += gap_s
    started_s, sent = link.now_s, 0
    while sent < 10 or link.now_s < started_s + 2 * CHALLENGE_S:
        link.send(rate * change)
        sent += 1
    # A change that the usual scatter hides is averaged in; any other is followed.
    assert link.error(rate * change) < (0.2 if gap_s < 600 else 0.1)


@given(st.lists(st.tuples(st.floats(1e-9, 1e12), st.floats(1e-6, 100.0), st.booleans()), min_size=1, max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_samples_leave_finite_figures(samples: list[tuple[float, float, bool]]) -> None:
    estimator = Estimator(weight_kept=1.0)
    now_s = 0.0
    values = [value for value, _, _ in samples]
    for value, weight, is_bound in samples:
        now_s += weight
        estimator.add(value, weight=weight, now_s=now_s, is_lower_bound=is_bound)
        figure = estimator.figure()
        assert figure is not None
        assert min(values) * 0.999 <= figure.mean <= max(values) * 1.001
        assert 0.0 <= figure.variance < float("inf")
        assert 0.99 <= figure.num_samples <= len(samples) + 0.01
        assert figure.at_s <= now_s


def test_round_trips_keep_the_least_apart_from_the_mean() -> None:
    rng = random.Random(0)
    estimator = RoundTripEstimator()
    for index in range(200):
        estimator.observe(0.020 + rng.expovariate(1 / 0.004), index * 0.1)
    assert estimator.least_s == pytest.approx(0.020, abs=0.0005)
    assert estimator.mean == pytest.approx(0.024, rel=0.1)
    for index in range(4000):  # another path: the old least is forgotten after some minutes
        estimator.observe(0.050 + rng.expovariate(1 / 0.004), 20 + index * 0.1)
    assert estimator.least_s == pytest.approx(0.050, abs=0.0005)


def test_load_fades() -> None:
    load = LoadEstimator()
    for index in range(1000):
        load.observe(10_000, index * 0.01)
    assert load.bytes_per_s(10.0) == pytest.approx(1e6, rel=0.15)
    assert load.bytes_per_s(15.0) == pytest.approx(1e6 / 2.718, rel=0.15)
    assert load.bytes_per_s(1e9) == 0.0


def test_a_sample_takes_microseconds() -> None:
    rng = random.Random(0)
    rates = [12.5e6 * rng.lognormvariate(0.0, 0.1) for _ in range(10_000)]
    estimator = RateEstimator()
    started_s = time.perf_counter()
    for index, rate in enumerate(rates):
        estimator.observe(CHUNK_BYTES, CHUNK_BYTES / rate, index * 0.02, saturated=True)
    assert (time.perf_counter() - started_s) / len(rates) < 20e-6  # 1.5 us on a quiet machine
