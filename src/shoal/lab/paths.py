"""Which links a packet takes between two devices: decided once, over the links a scenario has.

Fewest links first, then least delay. Hubs (an access point, a provider's router) always pass packets on; devices only
where the scenario lets them relay. A pair without a path has no route, and connecting fails at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from shoal.lab.shaping import LinkShape, packet_bytes_max

Pair = tuple[str, str]
"""(from, to): names of devices or hubs."""


def find_paths(
    devices: Sequence[str], hubs: Sequence[str], links: Mapping[Pair, LinkShape], *, relay: bool
) -> dict[Pair, list[Pair]]:
    """For each pair of devices that can reach each other, the links in order."""
    neighbours: dict[str, list[tuple[str, float]]] = {name: [] for name in (*devices, *hubs)}
    for (source, target), shape in links.items():
        neighbours[source].append((target, shape.delay_s))
    passes_on = set(neighbours) if relay else set(hubs)
    found: dict[Pair, list[Pair]] = {}
    for source in devices:
        for target, path in _from(source, neighbours, passes_on).items():
            if target not in hubs:
                found[source, target] = path
    return found


def _from(source: str, neighbours: Mapping[str, list[tuple[str, float]]], passes_on: set[str]) -> dict[str, list[Pair]]:
    """Dijkstra over (number of links, delay)."""
    reached: dict[str, list[Pair]] = {}
    frontier: list[tuple[int, float, str, list[Pair]]] = [(0, 0.0, source, [])]
    seen = set()
    while frontier:
        num_links, delay_s, node, path = heapq.heappop(frontier)
        if node in seen:
            continue
        seen.add(node)
        if path:
            reached[node] = path
        if node == source or node in passes_on:
            for neighbour, link_delay_s in neighbours[node]:
                if neighbour not in seen:
                    step = (num_links + 1, delay_s + link_delay_s, neighbour, [*path, (node, neighbour)])
                    heapq.heappush(frontier, step)
    return reached


def path_packet_bytes(path: Sequence[Pair], links: Mapping[Pair, LinkShape], *, limit: int) -> int:
    """The largest packet that no link on the path serialises for more than a millisecond."""
    return min(packet_bytes_max(links[pair].rate_bit_s, limit=limit) for pair in path)


def path_rate_bit_s(path: Sequence[Pair], links: Mapping[Pair, LinkShape]) -> float | None:
    """The slowest link's rate; None where none has a limit."""
    rates = [rate for pair in path if (rate := links[pair].rate_bit_s) is not None]
    return min(rates) if rates else None


def path_delay_s(path: Sequence[Pair], links: Mapping[Pair, LinkShape]) -> float:
    return sum(links[pair].delay_s for pair in path)
