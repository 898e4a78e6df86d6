"""Deals layers to very many devices: good plans, and what no plan costs less than, by dynamic programs over devices.

What a device costs depends on its own layers alone, but for two things: that a token takes at least as long as the slowest
disk, and hops. With a disk time theta that nobody exceeds, a weight on the sum of visits against theta (Lagrange), and
potentials for hops, costs are sums over devices, and the cheapest way to deal L layers is found exactly, device by device:

    least(j) = min over c of least'(j - c) + cost_m(c)        cost_m: the best split between processor and accelerator

For theta in [low, high], no plan of k rounds costs less than

    min of sum (first P_m + weight V_m) + weight hops + (token - weight) low + slowest low       S_m <= high D_m

so intervals of theta are halved, those of the least bound first, over all numbers of rounds together, until what is found
is within the gap of what is left. A ring is as small as hides what can be hidden, and as large as theta allows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from shoal.placement.program import Objective, Terms

Floats = npt.NDArray[np.float64]
_WEIGHTS_TRIED = 3
_INTERVALS_MAX = 400
_MIXED_MAX = 8
"""Potentials that an interval tries."""
_SMALL = 1e-4
"""Of a bound: less is not worth halving for."""
_NARROW = 1e-3
"""Of theta: an interval is not divided further."""


class Dealt(NamedTuple):
    """One device's part; bytes as in `Terms`."""

    device: int
    num_layers: int
    num_accelerator_layers: int
    ring: float
    streamed: float


class Potentials(NamedTuple):
    """Bounds of hops, by device: of a token's and of a prompt's, per round."""

    token: Floats
    prompt: Floats

    def towards(self, other: Potentials, share: float) -> Potentials:
        """A mean of both, which bounds as well."""
        return Potentials(*(mine + share * (its - mine) for mine, its in zip(self, other, strict=True)))


class Scored(NamedTuple):
    """What a deal costs in truth, who holds layers in it, and its hops: of a token and of a prompt."""

    cost_s: float
    members: frozenset[int]
    hops_s: float
    prompt_hops_s: float


class _Deal(NamedTuple):
    """The cheapest by weighted costs: their sum, visits and hops in seconds, what the hops cost, the slowest disk, and who
    has what."""

    cost_s: float
    visits_s: float
    hops_cost_s: float
    disk_s: float
    parts: tuple[Dealt, ...]


class _Interval(NamedTuple):
    bound_s: float
    k: int
    low_s: float
    high_s: float
    weight: float
    deal: _Deal
    scored: Scored
    potentials: Potentials
    """What the bound is from."""
    num_mixed: int

    def __lt__(self, other: object) -> bool:
        assert isinstance(other, _Interval)
        return self.bound_s < other.bound_s


class Dealing:
    """All numbers of rounds of one program."""

    def __init__(self, terms: Sequence[Terms], *, layer: float, cache: float, num_layers: int, objective: Objective) -> None:
        self._terms = terms
        self._layer, self._cache, self._num_layers = layer, cache, num_layers
        self._objective = objective
        with_accelerator = [m for m, term in enumerate(terms) if term.num_accelerator_layers_max]
        without = [m for m, term in enumerate(terms) if not term.num_accelerator_layers_max]
        self._groups = [_Group(self, members) for members in (without, with_accelerator) if members]
        counts = np.arange(num_layers + 1)
        left = counts[:, None] - counts[None, :]
        self._left = np.where(left >= 0, left, num_layers + 1)
        """[layers dealt, this device's]: how many the devices before have; one too many where that is none."""

    def search(
        self,
        rounds: Iterable[int],
        *,
        gap: float,
        cutoff_s: float,
        potentials: Potentials,
        score: Callable[[int, tuple[Dealt, ...]], Scored | None],
        fit: Callable[[frozenset[int]], Potentials],
    ) -> dict[int, float]:
        """By k: what no plan of so many rounds costs less than, or the best cost that is known, where that is less.

        Args:
            cutoff_s: what is known already.
            potentials: for all devices.
            score: told what is found; None where it is no plan.
            fit: potentials that bound the hops of a set of devices best. They hold for every set.
        """
        best_s = cutoff_s
        heap: list[_Interval] = []
        fitted: dict[frozenset[int], Potentials] = {}

        def look(
            k: int, low_s: float, high_s: float, weight: float, known: Potentials, bound_s: float, num_mixed: int
        ) -> None:
            nonlocal best_s
            if (found := self._bound(k, low_s, high_s, weight, known)) is None:
                return
            found_s, weight, deal = found
            scored = score(k, deal.parts) or Scored(math.inf, frozenset(), 0.0, 0.0)
            best_s = min(best_s, scored.cost_s)
            heapq.heappush(heap, _Interval(max(bound_s, found_s), k, low_s, high_s, weight, deal, scored, known, num_mixed))

        proved = dict.fromkeys(rounds, math.inf)
        for k in proved:
            look(k, 0.0, self._theta_max_s(best_s), self._objective.token, potentials, 0.0, 0)
        for _ in range(_INTERVALS_MAX):
            if not heap or heap[0].bound_s >= best_s * (1 - gap):
                break
            interval = heapq.heappop(heap)
            _, k, low_s, high_s, weight, deal, scored, known, num_mixed = interval
            high_s = min(high_s, self._theta_max_s(best_s))
            hops_gap_s = weight * scored.hops_s + self._objective.first_token * scored.prompt_hops_s - deal.hops_cost_s
            disk_gap_s = self._objective.token * max(0.0, deal.disk_s - max(low_s, deal.visits_s))
            members, bound_s = scored.members, interval.bound_s
            if hops_gap_s > disk_gap_s and len(members) > 1 and num_mixed < _MIXED_MAX:
                if members not in fitted:
                    fitted[members] = fit(members)
                # Sets take turns where potentials suit one of them only: the mean of all so far.
                known = known.towards(fitted[members], 1 / (num_mixed + 1))
                look(k, low_s, high_s, weight, known, bound_s, num_mixed + 1)
            elif disk_gap_s <= _SMALL * bound_s or high_s - low_s <= _NARROW * high_s:
                proved[k] = min(proved[k], bound_s)
            else:
                middle_s = (low_s + min(high_s, deal.disk_s)) / 2 if deal.disk_s > low_s else (low_s + high_s) / 2
                look(k, low_s, middle_s, weight, known, bound_s, num_mixed)
                look(k, middle_s, high_s, weight, known, bound_s, num_mixed)
        for interval in heap:
            proved[interval.k] = min(proved[interval.k], interval.bound_s)
        # Slower disks than the best plan's cost allows were never looked at.
        return {k: min(bound_s, best_s) for k, bound_s in proved.items()}

    def _theta_max_s(self, best_s: float) -> float:
        """Whoever reads for longer costs more than the best."""
        weight = self._objective.token + self._objective.slowest
        return best_s / weight if best_s < math.inf else 1e6

    def _bound(
        self, k: int, low_s: float, high_s: float, weight: float, potentials: Potentials
    ) -> tuple[float, float, _Deal] | None:
        """The best bound over a few weights, its weight, and the deal that it is of; None where nothing can be dealt."""
        token, slowest = self._objective.token, self._objective.slowest
        tables = [group.table(k, high_s) for group in self._groups]
        best: tuple[float, float, _Deal] | None = None
        least, most = 0.0, token
        for _ in range(_WEIGHTS_TRIED):
            deal = self._deal(tables, k, weight, potentials)
            if deal is None:
                return None
            bound_s = deal.cost_s + (token - weight + slowest) * low_s
            if best is None or bound_s > best[0]:
                best = bound_s, weight, deal
            # The bound is concave in the weight, and this is its slope.
            if deal.visits_s >= low_s:
                least = weight
            else:
                most = weight
            if most - least <= 0.05 * token or deal.visits_s == low_s:
                break
            weight = (least + most) / 2
        return best

    def _deal(self, tables: Sequence[_Table], k: int, weight: float, potentials: Potentials) -> _Deal | None:
        first = self._objective.first_token
        steps = []
        least = np.full(self._num_layers + 2, math.inf)
        least[0] = 0.0
        for table in tables:
            costs, splits = table.cheapest(first, weight)
            for row, device in enumerate(table.devices):
                passed_s = weight * float(potentials.token[device]) + first * float(potentials.prompt[device])
                cost = costs[row] + k * passed_s
                # A head without layers is passed once, not in each round.
                cost[0] = passed_s if self._terms[device].is_head else 0.0
                cost[0] += costs[row, 0]
                options = least[self._left] + cost[None, :]
                chosen = options.argmin(axis=1)
                least[:-1] = options[np.arange(len(chosen)), chosen]
                steps.append((table, row, device, chosen, splits))
        cost_s = float(least[self._num_layers])
        if not math.isfinite(cost_s):
            return None
        left, parts = self._num_layers, []
        visits_s = hops_cost_s = disk_s = 0.0
        for table, row, device, chosen, splits in reversed(steps):
            count = int(chosen[left])
            left -= count
            is_head = self._terms[device].is_head
            if not count and not is_head:
                continue
            split = int(splits[row, count])
            visits_s += float(table.visits_s[row, count, split])
            passes = k if count else 1
            visits_s += passes * float(potentials.token[device])
            hops_cost_s += passes * (weight * float(potentials.token[device]) + first * float(potentials.prompt[device]))
            part = Dealt(
                device,
                count - split,
                split,
                float(table.ring[row, count, split]),
                float(table.streamed[row, count, split]),
            )
            disk_s = max(disk_s, part.streamed / self._terms[device].read_rate if part.streamed else 0.0)
            parts.append(part)
        return _Deal(cost_s, visits_s, hops_cost_s, disk_s, tuple(parts))


class _Table(NamedTuple):
    """Of some devices, by how many layers they have in all, and on their accelerators: [devices, layers, accelerator]."""

    devices: Sequence[int]
    visits_s: Floats
    prompt_s: Floats
    ring: Floats
    streamed: Floats
    is_possible: npt.NDArray[np.bool_]

    def cheapest(self, first: float, weight: float) -> tuple[Floats, npt.NDArray[np.int64]]:
        """By layers in all: the least weighted cost, and the split that has it."""
        costs = np.where(self.is_possible, first * self.prompt_s + weight * self.visits_s, math.inf)
        splits = costs.argmin(axis=2)
        return np.take_along_axis(costs, splits[:, :, None], axis=2)[:, :, 0], splits


class _Group:
    """Devices whose tables have one shape."""

    def __init__(self, dealing: Dealing, devices: Sequence[int]) -> None:
        terms = [dealing._terms[device] for device in devices]
        self._devices = devices
        self._slowest = dealing._objective.slowest > 0

        def column(values: Iterable[float]) -> Floats:
            return np.array(list(values), dtype=np.float64)[:, None, None]

        fast_max = max(term.num_accelerator_layers_max for term in terms)
        layers, fast = np.arange(dealing._num_layers + 1)[:, None], np.arange(fast_max + 1)[None, :]
        slow = (layers - fast)[None]
        self._layers = layers[None]
        self._is_head = column(term.is_head for term in terms)
        self._read_rate = column(term.read_rate for term in terms)
        self._room = column(term.room for term in terms)
        self._ring_min = column(term.ring_min for term in terms)
        self._most = column(term.layers_max for term in terms)
        self._copies_s = column(term.copy_s for term in terms) * (fast[None] > 0)
        each = dealing._layer + dealing._cache
        output = column(term.output for term in terms)
        self._weights = slow * dealing._layer
        self._streamable = self._weights + output
        self._need = slow * each + output + column(term.shares_memory * each for term in terms) * fast[None]
        output_s = column(term.output_s for term in terms)
        self._compute_s = (
            slow * column(term.layer_s for term in terms)
            + fast[None] * column(term.accelerator_layer_s for term in terms)
            + output_s
        )
        self._prompt_s = (
            slow * column(term.prompt_layer_s for term in terms)
            + fast[None] * column(term.accelerator_prompt_layer_s for term in terms)
            + output_s
        )
        self._is_possible = (slow >= 0) & (slow <= column(term.num_layers_max for term in terms))
        self._is_possible &= fast[None] <= column(term.num_accelerator_layers_max for term in terms)
        is_nothing = (self._layers == 0) & (fast[None] == 0) & (self._is_head == 0)
        self._stays = (self._need <= self._room + 1e-12) | is_nothing

    def table(self, k: int, theta_s: float) -> _Table:
        """Where no disk may take longer than `theta_s` per token."""
        is_possible = self._is_possible & ((self._layers == 0) | ((self._layers >= k) & (self._most >= k)))
        can_stream = ((self._most >= k) | (self._is_head > 0)) & (self._read_rate > 0) & (self._room > self._ring_min)
        rate = np.where(self._read_rate > 0, self._read_rate, 1.0)
        compute_s, prompt_s = self._compute_s + k * self._copies_s, self._prompt_s + k * self._copies_s
        excess = self._need - self._room
        ring_max = np.minimum(np.minimum(self._room, self._streamable - excess), theta_s * rate - excess)
        streams = ~self._stays & can_stream & (ring_max >= self._ring_min)
        enough = (excess - rate * compute_s) / (k - 1) if k > 1 else np.zeros_like(excess)
        ring = np.where(streams, np.minimum(np.maximum(enough, self._ring_min), ring_max), 0.0)
        streamed = np.where(streams, excess + ring, 0.0)
        # What of the output projection is streamed is needed in one visit.
        read_s = np.maximum(streamed - k * ring, self._is_head * (streamed - self._weights - ring)) / rate
        visits_s, prompt_s = np.maximum(compute_s, read_s), np.maximum(prompt_s, read_s)
        is_possible = is_possible & (self._stays | streams)
        if self._slowest:
            is_possible &= visits_s <= theta_s
        is_used = (self._layers > 0) | (self._is_head > 0)
        return _Table(self._devices, visits_s * is_used, prompt_s * is_used, ring, streamed, is_possible)
