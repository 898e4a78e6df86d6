"""Many devices that come and go: everyone knows, and nobody watches more than a few."""

from __future__ import annotations

import pytest

from shoal.simulation.churn import Churn, run_churn


@pytest.mark.slow
def test_in_a_churn_all_beliefs_come_right_and_few_are_watched() -> None:
    report, world = run_churn(Churn(num_devices=60, seconds=40.0, changes_per_s=0.5, seed=4))
    assert sum(report.changes.values()) >= 8
    assert report.beliefs_right == 1.0
    assert report.most_watched <= 8
    assert report.detect_s_p99 < 10
    assert world.num_messages == report.num_messages


def test_too_many_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="3 to 1000"):
        run_churn(Churn(num_devices=1001))
