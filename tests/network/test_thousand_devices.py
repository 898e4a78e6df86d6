"""One device among a thousand that have eight neighbours each: what an event costs it, what its links carry."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from itertools import chain

import pytest

from shoal.effects import Event, Learned, LinkOpened, Observed, Received, Send
from shoal.ids import NodeId
from shoal.membership.failure import MemberHere
from shoal.network.awareness import DEFAULT_POLICY, Awareness
from shoal.network.graph import Figure, Link, LinkFigures
from shoal.network.link_state import LinkState
from shoal.network.report import Report
from shoal.node import wire

ME = NodeId("m" * 26)
NUM_DEVICES, NUM_NEIGHBOURS = 1000, 8
UNTIL_S = 150.0


def report(origin: NodeId, sources: list[NodeId], sequence: int, now_s: float, rng: random.Random) -> Report:
    def figure(mean: float) -> Figure:
        return Figure(mean * rng.lognormvariate(0.0, 0.2), (0.1 * mean) ** 2, 20.0, now_s - 0.1)

    links = tuple(
        LinkFigures(
            link=Link(source, origin),
            state=LinkState.UP,
            rate=figure(1e7),
            rate_alone=figure(1e7),
            round_trip=figure(0.01),
            round_trip_min_s=0.008,
            load=figure(1e6),
        )
        for source in sources
    )
    return Report(origin=origin, incarnation=1, sequence=sequence, sent_s=now_s, is_complete=True, links=links)


@pytest.mark.slow
def test_a_thousand_devices_cost_a_device_little() -> None:
    rng = random.Random(0)
    others = [NodeId(f"{index:026}") for index in range(NUM_DEVICES - 1)]
    neighbours = others[:NUM_NEIGHBOURS]
    core = Awareness(ME, incarnation=1, now_s=0.0)
    taken_s: dict[str, list[float]] = defaultdict(list)
    sent_bytes = 0

    def step(event: Event, now_s: float) -> None:
        nonlocal sent_bytes
        started_s = time.perf_counter()
        effects = core.step(event, now_s)
        taken_s[type(event).__name__].append(time.perf_counter() - started_s)
        sent_bytes += sum(
            len(wire.encode(effect.message)) * len(effect.peers) for effect in effects if isinstance(effect, Send)
        )

    for other in others:
        step(Learned(MemberHere(other, 1)), 0.0)
    for neighbour in neighbours:
        step(LinkOpened(neighbour), 0.0)
    taken_s.clear()

    interval_s = DEFAULT_POLICY.report.interval_for(NUM_DEVICES)
    events: list[tuple[float, Event]] = []
    for other in others:
        sources = rng.sample(others, NUM_NEIGHBOURS) if other not in neighbours else [*rng.sample(others, 7), ME]
        at_s = rng.uniform(0.0, interval_s)
        sequence = 0
        while at_s < UNTIL_S:
            sequence += 1
            told = report(other, [source for source in sources if source != other], sequence, at_s, rng)
            events.append((at_s, Received(rng.choice(neighbours), told)))
            at_s += interval_s
    for neighbour in neighbours:
        events += [
            (0.25 * index, Observed(neighbour, ME, int(2e6 * rng.lognormvariate(0.0, 0.1)), 0.25))
            for index in range(1, int(4 * UNTIL_S))
        ]
    for at_s, event in sorted(events, key=lambda each: each[0]):
        step(event, at_s)

    graph = core.graph(UNTIL_S)
    assert len(graph.devices) == NUM_DEVICES
    assert len(graph.links) > 7900
    everything = sorted(chain.from_iterable(taken_s.values()))
    mean_s = sum(everything) / len(everything)
    assert mean_s < 1e-3, f"mean {mean_s * 1e6:.0f} us"  # 60 us on a quiet machine
    assert sum(everything) / UNTIL_S < 0.05  # of one core
    assert sent_bytes / UNTIL_S < 400_000.0  # bytes/s over eight links together, every report forwarded
