"""Decides in which order a token visits devices, and bounds from below what any order costs.

Few devices: every order. Many: insertion and moves. The bound is the dual of the assignment problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import highspy
import numpy as np
import numpy.typing as npt

from shoal.placement.highs import quiet_highs

EXACT_DEVICES_MAX = 8
"""Up to as many, the head included, every order is tried."""

Floats = npt.NDArray[np.float64]


def cycle_potentials(hops: Floats, members: frozenset[int]) -> Floats:
    """p with sum over S of p <= the cheapest cycle through S, for every set S of two or more, and as high as can be for
    `members`: the dual of the assignment problem, whose relaxation of a tour is close where hops are mostly the sum of what
    their two ends cost."""
    num_devices = len(hops)
    if num_devices < 2:
        return np.zeros(num_devices)
    highs = quiet_highs()
    model = highspy.HighsLp()
    pairs = [(i, j) for i in range(num_devices) for j in range(num_devices) if i != j]
    model.num_col_, model.num_row_ = 2 * num_devices, len(pairs)
    is_member = np.array([float(device in members) for device in range(num_devices)])
    # The others as well, a little: a row of potentials that sink for them bounds nothing.
    model.col_cost_ = -np.tile(is_member + 1e-3, 2)
    model.col_lower_ = np.full(2 * num_devices, -highspy.kHighsInf)
    model.col_upper_ = np.full(2 * num_devices, highspy.kHighsInf)
    model.row_lower_ = np.full(len(pairs), -highspy.kHighsInf)
    model.row_upper_ = np.array([hops[i, j] * 1e3 for i, j in pairs])
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.arange(0, 2 * len(pairs) + 1, 2, dtype=np.int32)
    model.a_matrix_.index_ = np.array([index for i, j in pairs for index in (i, num_devices + j)], dtype=np.int32)
    model.a_matrix_.value_ = np.ones(2 * len(pairs))
    highs.passModel(model)
    highs.run()
    values = np.array(highs.getSolution().col_value) / 1e3
    left, right = values[:num_devices], values[num_devices:]
    # Repairs the solver's tolerance, so that the bound is one.
    excess = max(left[i] + right[j] - hops[i, j] for i, j in pairs)
    return np.asarray(left + right - max(0.0, excess))  # unbounded it is not: each u and v is under every hop's v and u


def best_order(
    others: Sequence[int],
    k: int,
    *,
    head_holds_layers: bool,
    hops: Floats,
    prompt_hops: Floats,
    weights: tuple[float, float],
) -> tuple[tuple[int, ...], float, float, tuple[float, float]]:
    """The order of the devices between two visits of the head (index 0) that costs least by `weights`.

    Returns:
        The order, its hops of a token and of a prompt, and the least that any order has of each.
    """
    orders = np.array(
        list(itertools.permutations(others)) if len(others) < EXACT_DEVICES_MAX else [_insert(others, hops)],
        dtype=np.int64,
    )
    totals = [_cycle_s(orders, k, head_holds_layers=head_holds_layers, hops=each) for each in (hops, prompt_hops)]
    best = int(np.argmin(weights[0] * totals[0] + weights[1] * totals[1]))
    order = tuple(int(index) for index in orders[best])
    return order, float(totals[0][best]), float(totals[1][best]), (float(totals[0].min()), float(totals[1].min()))


def _cycle_s(orders: npt.NDArray[np.int64], k: int, *, head_holds_layers: bool, hops: Floats) -> Floats:
    """Hops of a token, [num_orders]."""
    inner = hops[orders[:, :-1], orders[:, 1:]].sum(axis=1)
    through_head = hops[orders[:, -1], 0] + hops[0, orders[:, 0]]
    past_head = hops[orders[:, -1], orders[:, 0]]
    between = (k - 1) * (through_head if head_holds_layers else past_head)
    return np.asarray(k * inner + between + through_head)


def _insert(others: Sequence[int], hops: Floats) -> list[int]:
    """A good order of many: each inserted where it costs least, then moved as long as that helps."""
    tour = [0]
    for device in others:
        tour = _cheapest_insertion(tour, device, hops)
    for _ in range(len(others)):
        before_s = _tour_s(tour, hops)
        for device in others:
            without = [each for each in tour if each != device]
            tour = _cheapest_insertion(without, device, hops)
        if _tour_s(tour, hops) >= before_s - 1e-12:
            break
    begin = tour.index(0)
    return tour[begin + 1 :] + tour[:begin]


def _cheapest_insertion(tour: list[int], device: int, hops: Floats) -> list[int]:
    extra = [
        hops[left, device] + hops[device, right] - hops[left, right]
        for left, right in zip(tour, [*tour[1:], tour[0]], strict=True)
    ]
    position = int(np.argmin(extra)) + 1
    return [*tour[:position], device, *tour[position:]]


def _tour_s(tour: list[int], hops: Floats) -> float:
    return float(sum(hops[left, right] for left, right in zip(tour, [*tour[1:], tour[0]], strict=True)))
