"""What the lab's router carries, and what it adds.

* `rate_mbit_s`: TCP goodput of 26 directed links of 90 Mbit/s at once (ideal: 2340 less headers), over the second half of
  every transfer by the receiver's clock; the median of the rounds. `least_link_mbit_s` is the slowest link of any
  round, `router_core_share` the router's processor time per time while all links were busy, at worst.
* `jitter_ms`: p99 - p50 of round trips on an idle link of 5 ms each way; the median of the rounds.
* `added_latency_ms`: the median round trip there less its 10 ms; `bare_round_trip_us` is a round trip without any delay.
* `busy_jitter_ms`: the same on an idle link, between two more devices, beside the 26 full ones. Their processes wait
  for a core now and then, which is in it; `late_share` is how many of the router's packets were delivered over 1 ms late.

`stolen_share` is the processor time that the machine's host gave to others meanwhile: rounds with much of it say little.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import psutil

from benchmarks.record import finish, is_quick
from shoal.errors import LabUnavailable
from shoal.lab.cluster import Lab
from shoal.lab.run import start_traffic_agents
from shoal.lab.scenario import DeviceSpec, LinkSpec, Scenario, Workload, check, load
from shoal.lab.traffic import Agents

RATE_MBIT_S = 90.0
DELAY_MS = 5.0
PAIR = ("left", "right")
SECONDS_MAX = 600.0
PAUSE_S = 0.005
"""Between two round trips: long enough for every processor to fall asleep, as on an idle link."""


@contextlib.contextmanager
def running(scenario: Scenario) -> Iterator[tuple[Lab, Agents]]:
    """A lab with a traffic agent on every device."""
    check(scenario, label="benchmark")
    with Lab(scenario) as lab:
        agents = Agents(start_traffic_agents(lab), {name: lab.address(name) for name in lab.devices})
        agents.wait_ready()
        yield lab, agents


def nine_sites() -> Scenario:
    """NetStorm's nine sites and thirteen links, all with the same rate, without redraws; and an idle pair."""
    published, idle = load("netstorm9"), pair(delay_ms=DELAY_MS, rate_mbit_s=RATE_MBIT_S)
    links = [msgspec.structs.replace(link, rate_mbit_s=RATE_MBIT_S) for link in published.links]
    devices = {**published.devices, **idle.devices}
    return msgspec.structs.replace(
        published, devices=devices, links=[*links, *idle.links], timeline=[], workload=Workload(), seconds_max=SECONDS_MAX
    )


def pair(*, delay_ms: float, rate_mbit_s: float | None) -> Scenario:
    link = LinkSpec(between=PAIR, rate_mbit_s=rate_mbit_s, delay_ms=delay_ms)
    return Scenario(name="pair", devices=dict.fromkeys(PAIR, DeviceSpec()), links=[link], seconds_max=SECONDS_MAX)


def carried(lab: Lab, agents: Agents, pairs: Sequence[tuple[str, str]], *, seconds: float) -> dict[str, Any]:
    """One round over many links at once."""
    with ThreadPoolExecutor(len(pairs)) as pool:
        transfers = [pool.submit(agents.fill, *ends, seconds=seconds) for ends in pairs]
        time.sleep(seconds / 4)
        before, stolen_before = lab.router.traffic(), _stolen_s()
        time.sleep(seconds / 2)
        after, stolen_after = lab.router.traffic(), _stolen_s()
        filled = [transfer.result() for transfer in transfers]
    rates = [row["rate_mbit_s"] for row in filled]
    elapsed_s = after.at_s - before.at_s
    packets = sum(late.num_packets - early.num_packets for late, early in zip(after.links, before.links, strict=True))
    return {
        "rate_mbit_s": round(sum(rates), 1),
        "least_link_mbit_s": round(min(rates), 2),
        "router_core_share": round((after.cpu_s - before.cpu_s) / elapsed_s, 3),
        "packets_per_s": round(packets / elapsed_s),
        "late_share": round((after.num_late - before.num_late) / packets, 4),
        "stolen_share": round((stolen_after - stolen_before) / elapsed_s, 3),
    }


def round_trips(agents: Agents, source: str, target: str, *, count: int) -> dict[str, float]:
    """Milliseconds: p50, and p99 - p50."""
    stolen_before, began_s = _stolen_s(), time.monotonic()
    found = agents.echo(source, target, count=count, pause_s=PAUSE_S)
    if "problem" in found:
        raise RuntimeError(f"round trips from {source} to {target}: {found['problem']}")
    times = sorted(found["round_trips_ms"])
    p50, p99 = statistics.median(times), times[len(times) * 99 // 100]
    stolen = (_stolen_s() - stolen_before) / (time.monotonic() - began_s)
    return {"p50_ms": round(p50, 3), "jitter_ms": round(p99 - p50, 3), "stolen_share": round(stolen, 3)}


def beside_traffic(agents: Agents, pairs: Sequence[tuple[str, str]], *, count: int) -> dict[str, float]:
    """Round trips over an idle link while all others are full."""
    seconds = 2.0 + count * (2.5 * DELAY_MS * 1e-3 + PAUSE_S)
    with ThreadPoolExecutor(len(pairs)) as pool:
        transfers = [pool.submit(agents.fill, *ends, seconds=seconds) for ends in pairs]
        time.sleep(1.0)
        found = round_trips(agents, *PAIR, count=count)
        for transfer in transfers:
            transfer.result()
    return found


def _stolen_s() -> float:
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def main() -> None:
    rounds, seconds, count = (2, 5.0, 400) if is_quick() else (5, 8.0, 1000)
    try:
        with running(nine_sites()) as (lab, agents):
            priority = lab.router_priority
            pairs = [ends for ends in lab.paths if set(ends) != set(PAIR)]
            loads = [carried(lab, agents, pairs, seconds=seconds) for _ in range(rounds)]
            busy = beside_traffic(agents, pairs, count=count // 2)
        with running(pair(delay_ms=DELAY_MS, rate_mbit_s=RATE_MBIT_S)) as (_, agents):
            idle = [round_trips(agents, *PAIR, count=count) for _ in range(rounds)]
        with running(pair(delay_ms=0.0, rate_mbit_s=None)) as (_, agents):
            bare = round_trips(agents, *PAIR, count=count)
    except LabUnavailable as error:
        sys.exit(f"shoal: {error}")
    for row in (*loads, *idle, busy, bare):
        print(row, file=sys.stderr)
    figures = {
        "rate_mbit_s": statistics.median(row["rate_mbit_s"] for row in loads),
        "jitter_ms": statistics.median(row["jitter_ms"] for row in idle),
        "router_core_share": max(row["router_core_share"] for row in loads),
        "least_link_mbit_s": min(row["least_link_mbit_s"] for row in loads),
        "added_latency_ms": round(statistics.median(row["p50_ms"] for row in idle) - 2 * DELAY_MS, 3),
        "bare_round_trip_us": round(bare["p50_ms"] * 1e3, 1),
        "busy_jitter_ms": busy["jitter_ms"],
        "priority": priority,
        "loads": loads,
        "idle": idle,
    }
    finish(
        "lab",
        figures,
        {"rate_mbit_s": RATE_MBIT_S, "links": len(pairs), "delay_ms": DELAY_MS, "rounds": rounds, "seconds": seconds},
    )


if __name__ == "__main__":
    main()
