"""The published estimator does as published: four long messages, then a new figure."""

from __future__ import annotations

import pytest

from shoal.network.netstorm import MESSAGE_BYTES_MIN, NetStormEstimator


def test_four_messages_make_a_figure_and_short_ones_none() -> None:
    estimator = NetStormEstimator()
    assert not estimator.observe(MESSAGE_BYTES_MIN - 1, 1.0, 0.5, saturated=True)
    for index, seconds in enumerate((1.0, 1.0, 1.0, 5.0)):
        assert estimator.figure() is None
        is_last = estimator.observe(MESSAGE_BYTES_MIN, seconds, float(index), saturated=False)
        assert is_last == (index == 3)
    figure = estimator.figure()
    assert figure is not None
    assert figure.mean == pytest.approx(4 * MESSAGE_BYTES_MIN / 8.0)  # bytes over time, not a mean of rates
    assert (figure.at_s, figure.variance) == (3.0, 0.0)
    for _ in range(3):
        estimator.observe(MESSAGE_BYTES_MIN, 0.1, 9.0, saturated=True)
    assert estimator.figure() == figure
    estimator.observe(MESSAGE_BYTES_MIN, 0.1, 9.0, saturated=True)
    assert estimator.mean == pytest.approx(MESSAGE_BYTES_MIN / 0.1)  # the last four alone
