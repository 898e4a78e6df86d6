"""Links do what the scenario says, measured with the kernel's own TCP and UDP."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shoal.lab.cluster import Lab
from shoal.lab.scenario import (
    Change,
    ChangeAddress,
    CloseInbound,
    Cut,
    Heal,
    OpenInbound,
    Redraw,
)
from shoal.lab.shaping import packet_bytes_max
from shoal.lab.traffic import PORT, Agents
from tests.lab.fixture import MakeLab, on_a_steady_host, traffic

pytestmark = pytest.mark.slow

HEADER_BYTES = 52
"""IPv4, and TCP with timestamps."""

_DATAGRAMS = """
import json, socket, sys, time
verb, address, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if verb == "send":
    for number in range(count):
        line.sendto(number.to_bytes(4, "big") + bytes(96), (address, 5300))
        if number % 20 == 19:
            time.sleep(0.002)
    time.sleep(0.2)
    for _ in range(5):
        line.sendto(b"", (address, 5300))
else:
    line.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
    line.bind((address, 5300))
    print("ready", flush=True)
    line.settimeout(float(sys.argv[4]))
    got = set()
    try:
        while data := line.recv(200):
            got.add(int.from_bytes(data[:4], "big"))
    except TimeoutError:
        pass
    print(json.dumps(len(got)))
"""


def pair(**link: Any) -> dict[str, Any]:
    return {"devices": {"left": {}, "right": {}}, "links": [{"between": ["left", "right"], **link}]}


def datagrams(lab: Lab, source: str, target: str, *, count: int, wait_s: float = 5.0) -> int:
    """How many of `count` small datagrams arrive."""
    receive = [sys.executable, "-c", _DATAGRAMS, "receive", lab.address(target), str(count), str(wait_s)]
    receiver = lab.start(target, receive)
    give_up_s = time.monotonic() + 10
    while "ready" not in receiver.stdout.read_text():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    status, _, said = lab.run(source, [sys.executable, "-c", _DATAGRAMS, "send", lab.address(target), str(count)])
    assert status == 0, said
    assert receiver.wait(wait_s + 5) == 0
    return int(json.loads(receiver.stdout.read_text().splitlines()[-1]))


def connects(lab: Lab, source: str, target: str, *, by_name: bool = False) -> str:
    """'' if a new connection stands within half a second, or what the kernel said."""
    code = (
        "import socket, sys\n"
        "try: socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=0.5)\n"
        "except OSError as error: print(error.strerror or error)"
    )
    where = target if by_name else lab.address(target)
    status, out, said = lab.run(source, [sys.executable, "-S", "-c", code, where, str(PORT)])
    assert status == 0, said
    return out.strip()


def round_trips_ms(agents: Agents, source: str, target: str, *, count: int, pause_s: float = 0.0) -> list[float]:
    found = agents.echo(source, target, count=count, pause_s=pause_s)
    assert "problem" not in found, found
    return sorted(found["round_trips_ms"])


def rate_mbit_s(agents: Agents, source: str, target: str, *, seconds: float) -> float:
    found = agents.fill(source, target, seconds=seconds)
    assert "problem" not in found, found
    return float(found["rate_mbit_s"])


# ---- times


@pytest.mark.parametrize("percent", [90, pytest.param(99, marks=pytest.mark.full)])  # The last hundredth is the host's too.
def test_round_trips_on_an_idle_link_are_steady(lab: MakeLab, percent: int) -> None:
    agents = traffic(lab(pair(rate_mbit_s=90, delay_ms=5)))

    def attempt() -> None:
        times = round_trips_ms(agents, "left", "right", count=200, pause_s=0.002)
        p50, tail = statistics.median(times), times[len(times) * percent // 100]
        assert 10.0 <= p50 <= 11.0, f"p50 {p50:.3f} ms"
        assert times[0] >= 10.0, f"{times[0]:.3f} ms is less than the link's delay"
        assert tail - p50 <= 1.0, f"p50 {p50:.3f} ms, p{percent} {tail:.3f} ms"

    on_a_steady_host(attempt)


@pytest.mark.parametrize(("rate", "delay_ms"), [(50.0, 10.0), pytest.param(400.0, 3.0, marks=pytest.mark.full)])
def test_round_trips_at_half_load_take_the_links_time(lab: MakeLab, rate: float, delay_ms: float) -> None:
    agents = traffic(lab(pair(rate_mbit_s=rate, delay_ms=delay_ms)))

    def attempt() -> None:
        with ThreadPoolExecutor(1) as pool:
            filling = pool.submit(agents.fill, "left", "right", seconds=2.5, rate_mbit_s=rate / 2)
            time.sleep(0.7)
            times = round_trips_ms(agents, "left", "right", count=50)
            load = filling.result()["rate_mbit_s"]
        assert 0.4 * rate <= load <= 0.6 * rate, f"the load was {load:.1f} of {rate} Mbit/s"
        p50 = statistics.median(times)
        assert 2 * delay_ms <= p50 <= 2 * delay_ms * 1.1 + 1.0, f"p50 {p50:.3f} ms at {load:.1f} Mbit/s"

    on_a_steady_host(attempt)


@pytest.mark.full
def test_jitter_varies_as_much_as_it_says_and_never_overtakes(lab: MakeLab) -> None:
    agents = traffic(lab(pair(delay_ms=10, jitter_ms=4)))

    def attempt() -> None:
        times = round_trips_ms(agents, "left", "right", count=100)
        assert times[0] >= 12.0, "less than both delays with all the jitter"
        assert times[90] <= 28.0 + 1.0, f"p90 {times[90]:.3f} ms"
        # The sum of two even spreads of +-4 ms has a deviation of 3.3 ms.
        assert 2.2 <= statistics.stdev(times) <= 4.5, f"deviation {statistics.stdev(times):.2f} ms"

    on_a_steady_host(attempt)


# ---- rates


def test_each_direction_has_its_own_rate(lab: MakeLab) -> None:
    links = [
        {"from": "left", "to": "right", "rate_mbit_s": 120, "delay_ms": 1},
        {"from": "right", "to": "left", "rate_mbit_s": 20, "delay_ms": 1},
    ]
    agents = traffic(lab({"devices": {"left": {}, "right": {}}, "links": links}))

    def attempt() -> None:
        there, back = (rate_mbit_s(agents, *ends, seconds=1.0) for ends in (("left", "right"), ("right", "left")))
        assert abs(there / 120 - 1) <= 0.07, f"{there:.1f} of 120 Mbit/s"
        assert abs(back / 20 - 1) <= 0.07, f"{back:.1f} of 20 Mbit/s"

    on_a_steady_host(attempt)


@pytest.mark.full
@pytest.mark.parametrize("rate", [5.0, 50.0, 300.0, 600.0, 1000.0])
def test_rates_hold_over_two_orders_of_magnitude(lab: MakeLab, rate: float) -> None:
    agents = traffic(lab(pair(rate_mbit_s=rate, delay_ms=2)))

    def attempt() -> None:
        # A link's rate is that of whole packets, and on a slow one they are small: 52 of 625 bytes at 5 Mbit/s are headers.
        packet_bytes = packet_bytes_max(rate * 1e6)
        goodput = rate * (packet_bytes - HEADER_BYTES) / packet_bytes
        found = rate_mbit_s(agents, "left", "right", seconds=4.0)
        assert abs(found / goodput - 1) <= 0.07, f"{found:.1f} of {goodput:.1f} Mbit/s"

    on_a_steady_host(attempt)


def test_a_rate_changes_under_way(lab: MakeLab) -> None:
    network = lab(pair(rate_mbit_s=100, delay_ms=1))
    agents = traffic(network)

    def carried(seconds: float) -> float:
        before = network.router.traffic()
        time.sleep(seconds)
        after = network.router.traffic()
        return (after.links[0].num_bytes - before.links[0].num_bytes) * 8e-6 / (after.at_s - before.at_s)

    def attempt() -> None:
        network.apply(Change(source="left", target="right", rate_mbit_s=100))
        with ThreadPoolExecutor(1) as pool:
            filling = pool.submit(agents.fill, "left", "right", seconds=2.6)
            time.sleep(0.6)
            fast = carried(0.6)
            network.apply(Change(source="left", target="right", rate_mbit_s=25))
            time.sleep(0.5)
            slow = carried(0.8)
            filling.result()
        assert abs(fast / 100 - 1) <= 0.07, f"{fast:.1f} of 100 Mbit/s"
        assert abs(slow / 25 - 1) <= 0.07, f"{slow:.1f} of 25 Mbit/s"

    on_a_steady_host(attempt)
    assert network.shapes["right", "left"].rate_bit_s == 100e6, "the other direction is as it was"


def test_a_full_queue_waits_as_long_as_it_says_and_drops_the_rest(lab: MakeLab) -> None:
    network = lab(pair(rate_mbit_s=50, delay_ms=1, queue_kb=100))
    found = traffic(network).fill("left", "right", seconds=1.0)
    link = network.router.traffic().links[0]
    assert found["bytes"] > 3e6
    assert 0.012 <= link.queue_s_max <= 0.0165, "100 kB at 50 Mbit/s are 16 ms"
    assert link.dropped_by_queue > 0


# ---- losses and cuts


@pytest.mark.parametrize(("loss", "count"), [(0.05, 6000), pytest.param(0.002, 40_000, marks=pytest.mark.full)])
def test_losses_are_within_their_confidence_interval(lab: MakeLab, loss: float, count: int) -> None:
    network = lab(pair(loss=loss), seed=count)
    got = datagrams(network, "left", "right", count=count)
    lost = count - got
    # Five times the deviation of a binomial distribution: chance alone misses it once in two million times.
    assert abs(lost - count * loss) <= 5 * math.sqrt(count * loss * (1 - loss))
    there, back = network.router.traffic().links
    assert lost - 5 <= there.dropped_by_chance <= lost + 5, "nothing else loses packets; a few end the count"
    assert back.num_packets <= 5, "and what comes after the end of the count is answered by its device's kernel"


def test_the_same_seed_loses_the_same_packets(lab: MakeLab) -> None:
    found = [datagrams(lab(pair(loss=0.3), seed=seed), "left", "right", count=400) for seed in (7, 7, 8)]
    assert found[0] == found[1] != found[2]


def test_a_cut_one_way_cuts_one_way(lab: MakeLab) -> None:
    network = lab(pair(delay_ms=1))
    network.apply(Cut(source="left", target="right"))
    assert datagrams(network, "left", "right", count=100, wait_s=1.0) == 0
    assert datagrams(network, "right", "left", count=100) == 100
    assert network.router.traffic().links[0].dropped_while_down >= 100
    network.apply(Heal(source="left", target="right"))
    assert datagrams(network, "left", "right", count=100) == 100


def test_a_pair_without_a_link_is_cut_on_its_whole_path(lab: MakeLab) -> None:
    table = {"devices": {"a": {}, "b": {}, "c": {}}, "hubs": ["wifi"]}
    network = lab({**table, "links": [{"between": [name, "wifi"]} for name in table["devices"]]})
    traffic(network)
    network.apply(Cut(between=("a", "b")))
    assert connects(network, "a", "b") == "timed out"
    assert connects(network, "b", "a") == "timed out"
    assert connects(network, "a", "c") == connects(network, "c", "b") == ""
    network.apply(Heal(between=("a", "b")))
    assert connects(network, "a", "b") == ""


def test_sparse_graphs_refuse_or_relay(lab: MakeLab) -> None:
    line = {
        "devices": {"a": {}, "b": {}, "c": {}},
        "links": [{"between": ["a", "b"], "delay_ms": 2}, {"between": ["b", "c"], "delay_ms": 3}],
    }
    refusing, relaying = lab(line), lab(line, relay=True)
    traffic(refusing)
    assert connects(refusing, "a", "c") == "Network is unreachable"
    assert connects(refusing, "a", "b") == ""
    agents = traffic(relaying)

    def attempt() -> None:
        assert 10.0 <= statistics.median(round_trips_ms(agents, "a", "c", count=20)) <= 12.0

    on_a_steady_host(attempt)


# ---- doors, addresses, rates by chance


def test_closed_inbound_ports_let_answers_in_and_nobody_else(lab: MakeLab) -> None:
    network = lab({**pair(delay_ms=1), "devices": {"left": {}, "right": {"behind_nat": True}}})
    traffic(network)
    assert connects(network, "left", "right") == "timed out"
    assert connects(network, "right", "left") == ""
    network.apply(OpenInbound(device="right"))
    assert connects(network, "left", "right") == ""
    network.apply(CloseInbound(device="right"))
    assert connects(network, "left", "right") == "timed out"
    assert network.router.traffic().refused_inbound > 0


def test_a_changed_address_breaks_what_stood_and_is_found_by_name(lab: MakeLab) -> None:
    network = lab(pair(delay_ms=1))
    agents = traffic(network)
    with ThreadPoolExecutor(1) as pool:
        old = network.address("right")
        talking = pool.submit(agents.echo, "left", "right", count=100_000)
        time.sleep(0.5)
        assert network.apply(ChangeAddress(device="right")) == ""
        assert network.address("right") != old
        assert connects(network, "left", "right", by_name=True) == ""
        assert connects(network, "right", "left", by_name=True) == ""
        network.end_commands()  # the broken connection would wait for its timeout
        assert "problem" in talking.result()
    _, out, _ = network.run("right", ["ip", "-4", "-o", "addr", "show", "shoal0"])
    assert old not in out
    assert network.address("right") in out


def test_redrawn_rates_come_from_the_range_and_the_seed(lab: MakeLab) -> None:
    drawn = []
    for seed in (3, 3, 4):
        network = lab("netstorm9", seed=seed)
        network.apply(Redraw(rate_mbit_s=(20, 155)))
        by_router = {(link.source, link.target): link.shape for link in network.router.traffic().links}
        assert by_router == network.shapes
        drawn.append([shape.rate_bit_s or 0.0 for shape in network.shapes.values()])
        network.close()
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(20e6 <= rate <= 155e6 for rate in drawn[0])
    assert len(set(drawn[0])) == 26, "every direction has its own"


def test_a_changed_delay_is_felt_at_once(lab: MakeLab) -> None:
    network = lab(pair(delay_ms=2))
    agents = traffic(network)
    network.apply(Change(delay_ms=15))

    def attempt() -> None:
        assert 30.0 <= statistics.median(round_trips_ms(agents, "left", "right", count=20)) <= 32.0

    on_a_steady_host(attempt)


def test_nothing_leaves_the_lab(lab: MakeLab) -> None:
    network = lab(pair())
    status, out, _ = network.run("left", ["ip", "-o", "route"])
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == [network.address("right")]
    _, out, _ = network.run("left", ["ip", "-o", "link"])
    assert sorted(line.split()[1].rstrip(":") for line in out.splitlines()) == ["lo", "shoal0"]
