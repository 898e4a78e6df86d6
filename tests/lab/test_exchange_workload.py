"""An all-reduce between processes on devices of a lab: the same bits everywhere, and no faster than the links."""

from __future__ import annotations

import pytest

from shoal.ids import NodeId
from shoal.lab import exchange_workload
from shoal.network.graph import Link
from shoal.topology.fapt import netstorm
from shoal.topology.star import star
from tests.lab.fixture import MakeLab

pytestmark = pytest.mark.slow

RATE_MBIT_S = 40.0
NUM_BYTES = 400_000


def test_three_processes_sum_the_same_bits_by_either_plan(lab: MakeLab) -> None:
    links = [("a", "b"), ("b", "c")]
    line = lab(
        {
            "devices": {"a": {}, "b": {}, "c": {}},
            "links": [{"between": list(ends), "rate_mbit_s": RATE_MBIT_S} for ends in links],
        }
    )
    both = [*links, *(ends[::-1] for ends in links)]
    capacities = {Link(NodeId(source), NodeId(target)): RATE_MBIT_S * 1e6 / 8 for source, target in both}
    # On a line the star at one end sends everything of the other end over both links.
    plans = [star(NodeId("a"), capacities), netstorm(capacities)]
    assert plans[0].rate_bytes_per_s == plans[1].rate_bytes_per_s / 2
    measured = exchange_workload.run(line, plans, num_bytes=NUM_BYTES, num_rounds=2, seconds_max=20.0)
    assert [turn.policy for turn in measured] == ["star", "netstorm"] * 2
    for turn, plan in zip(measured, plans * 2, strict=True):
        # What a link's queue and first burst let through at once is less than a tenth of this.
        assert turn.seconds > 0.9 * NUM_BYTES / plan.rate_bytes_per_s
