"""How fast gradients travel over uneven links: NetStorm's trees against a parameter server, on NetStorm's nine sites.

Both run in the same lab, in turn, as nine processes with plain sockets and without torch; the links are measured first, and
planned from as measured.

* `vs_star_1`: the star's time over that of NetStorm's trees, on the published table of 100 and 500 Mbit/s. The star is a
  parameter server at site 1, routed over the same links. All rates are times `TABLE_SCALE`, which leaves ratios alone: 16
  links of 500 Mbit/s are more than one machine's router and processors carry beside nine processes.
* `vs_star_1_uneven`: the same with each direction drawn from 20-155 Mbit/s, not scaled; the median of the draws.
* `bound_share`, `bound_share_uneven`: what NetStorm's trees reached of the least bound that no plan exceeds (cuts and
  partitions, with the scenario's rates); the median of the draws.
* `join_stall_s`, `transfer_ratio`, `resume_ms`, `overhead`: what joining, a loss and the run itself cost: `training_run.py`.
"""

from __future__ import annotations

import random
import statistics
import sys
from typing import Any

import msgspec

from benchmarks import training_run
from benchmarks.record import finish, is_quick
from shoal.errors import LabUnavailable
from shoal.exchange.runner import CHUNK_BYTES
from shoal.ids import NodeId
from shoal.lab import exchange_workload
from shoal.lab.cluster import Lab
from shoal.lab.run import start_traffic_agents
from shoal.lab.scenario import LinkSpec, Scenario, Workload, check, load
from shoal.lab.traffic import Agents, measure
from shoal.network.graph import Figure, Link, LinkFigures, LinkGraph
from shoal.network.link_state import LinkState
from shoal.topology.bound import bound_bytes_per_s
from shoal.topology.fapt import netstorm
from shoal.topology.paths import capacities_of
from shoal.topology.star import star

SITE_1 = NodeId("dc1")
TABLE_SCALE = 0.2
UNEVEN_MBIT_S = (20.0, 155.0)
MEASURE_S = 1.0
LINKS_AT_ONCE = 7
TURN_S_MAX = 120.0


def table() -> Scenario:
    published = load("netstorm9")
    return _with_rates({pair: (shape.rate_bit_s or 0.0) * 1e-6 * TABLE_SCALE for pair, shape in published.shapes.items()})


def uneven(draw: int) -> Scenario:
    rng = random.Random(f"netstorm9/{draw}")
    return _with_rates({pair: rng.uniform(*UNEVEN_MBIT_S) for pair in load("netstorm9").shapes})


def _with_rates(rates_mbit_s: dict[tuple[str, str], float]) -> Scenario:
    links = [LinkSpec(source=source, target=target, rate_mbit_s=rate) for (source, target), rate in rates_mbit_s.items()]
    scenario = msgspec.structs.replace(load("netstorm9"), links=links, timeline=[], workload=Workload())
    check(scenario, label="benchmark")
    return scenario


def measured_graph(lab: Lab) -> LinkGraph:
    """What plain TCP carried over every link, a few at once: more would measure the processors."""
    agents = Agents(start_traffic_agents(lab), {name: lab.address(name) for name in lab.devices})
    agents.wait_ready()
    pairs = sorted(lab.paths)
    rows = []
    for first in range(0, len(pairs), LINKS_AT_ONCE):
        some = pairs[first : first + LINKS_AT_ONCE]
        rows += measure(
            agents,
            some,
            seconds=MEASURE_S / 2 if is_quick() else MEASURE_S,
            num_round_trips=0,
            at_once=True,
            expected=lambda _source, _target: {},
        )
    links = [
        LinkFigures(
            link=Link(row["from"], row["to"]), state=LinkState.UP, rate=Figure(row["rate_mbit_s"] * 1e6 / 8, 0.0, 1.0, 0.0)
        )
        for row in rows
        if row.get("rate_mbit_s")
    ]
    return LinkGraph(at_s=0.0, version=1, devices=(), links=tuple(sorted(links, key=lambda figures: figures.link)))


def compare(scenario: Scenario, *, num_bytes: int, num_rounds: int) -> dict[str, Any]:
    """One lab: both policies in turn."""
    true = {
        Link(NodeId(source), NodeId(target)): (shape.rate_bit_s or 0.0) / 8
        for (source, target), shape in scenario.shapes.items()
    }
    with Lab(scenario) as lab:
        capacities = capacities_of(measured_graph(lab))
        plans = [star(SITE_1, capacities), netstorm(capacities)]
        turns = exchange_workload.run(lab, plans, num_bytes=num_bytes, num_rounds=num_rounds, seconds_max=TURN_S_MAX)
    seconds = {plan.policy: [turn.seconds for turn in turns if turn.policy == plan.policy] for plan in plans}
    star_s, netstorm_s = (statistics.median(seconds[plan.policy]) for plan in plans)
    row = {
        "vs_star_1": round(star_s / netstorm_s, 3),
        "model": round(plans[1].rate_bytes_per_s / plans[0].rate_bytes_per_s, 3),
        "bound_share": round(num_bytes / netstorm_s / bound_bytes_per_s(true), 3),
        "star_s": [round(each, 3) for each in seconds["star"]],
        "netstorm_s": [round(each, 3) for each in seconds["netstorm"]],
        "measured_share": [
            round(capacities[link] / rate, 2) if link in capacities else None for link, rate in sorted(true.items())
        ],
    }
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    megabytes, megabytes_uneven, rounds, draws = (6, 3, 1, 1) if is_quick() else (32, 16, 3, 5)
    try:
        on_table = compare(table(), num_bytes=megabytes * 10**6, num_rounds=rounds)
        on_draws = [compare(uneven(draw), num_bytes=megabytes_uneven * 10**6, num_rounds=rounds) for draw in range(draws)]
        run = training_run.measure(is_quick=is_quick())
    except LabUnavailable as error:
        sys.exit(f"shoal: {error}")
    figures = {
        **run,
        "vs_star_1": on_table["vs_star_1"],
        "vs_star_1_uneven": statistics.median(row["vs_star_1"] for row in on_draws),
        "bound_share": on_table["bound_share"],
        "bound_share_uneven": statistics.median(row["bound_share"] for row in on_draws),
        "table": on_table,
        "draws": on_draws,
    }
    finish(
        "train",
        figures,
        {
            "table_scale": TABLE_SCALE,
            "megabytes": megabytes,
            "megabytes_uneven": megabytes_uneven,
            "rounds": rounds,
            "draws": draws,
            "chunk_bytes": CHUNK_BYTES,
        },
    )


if __name__ == "__main__":
    main()
