"""NetStorm's nine sites, as the lab's scenario has them, in bytes per second; and small random graphs."""

from __future__ import annotations

import random

from shoal.ids import NodeId
from shoal.lab.scenario import load
from shoal.network.graph import Link

SITE_1 = NodeId("dc1")


def table() -> dict[Link, float]:
    """The published table of 100 and 500 Mbit/s."""
    shapes = load("netstorm9").shapes
    return {
        Link(NodeId(source), NodeId(target)): (shape.rate_bit_s or 0.0) / 8 for (source, target), shape in shapes.items()
    }


def uniform(rate_mbit_s: float) -> dict[Link, float]:
    return dict.fromkeys(table(), rate_mbit_s * 1e6 / 8)


def drawn(seed: int) -> dict[Link, float]:
    """Each direction from 20 to 155 Mbit/s."""
    rng = random.Random(seed)
    return {link: rng.uniform(20.0, 155.0) * 1e6 / 8 for link in table()}


def mbit_s(bytes_per_s: float) -> float:
    return bytes_per_s * 8e-6


def small(num_devices: int, seed: int, *, density: float = 0.5) -> dict[Link, float]:
    """A ring with some chords, each direction with its own capacity; everybody reaches everybody."""
    rng = random.Random(seed)
    members = [NodeId(f"m{index}") for index in range(num_devices)]
    pairs = {(index, (index + 1) % num_devices) for index in range(num_devices)}
    pairs |= {(i, j) for i in range(num_devices) for j in range(i + 1, num_devices) if rng.random() < density}
    links = {Link(members[i], members[j]) for i, j in pairs} | {Link(members[j], members[i]) for i, j in pairs}
    return {link: rng.uniform(1.0, 100.0) for link in sorted(links)}
