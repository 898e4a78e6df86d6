"""Orders of a ring: the best of few, good ones of many, and bounds that no order undercuts."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from shoal.placement.ring_order import Floats, best_order, cycle_potentials


def drawn_hops(seed: int, num_devices: int) -> Floats:
    """Mostly what both ends cost, as links at home, and some chance."""
    chance = random.Random(seed)
    ends = [chance.uniform(0.0002, 0.005) for _ in range(num_devices)]
    hops = np.array([[left + right + chance.uniform(0, 0.002) for right in ends] for left in ends])
    np.fill_diagonal(hops, 0.0)
    return hops


def walked_s(order: tuple[int, ...], k: int, hops: Floats, *, head_holds_layers: bool) -> float:
    """Hop by hop."""
    walk = [0, *((*order, 0) * k if head_holds_layers else (*order * k, 0))]
    return float(sum(hops[left, right] for left, right in itertools.pairwise(walk)))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("head_holds_layers", [True, False])
def test_the_best_of_every_order(k: int, head_holds_layers: bool) -> None:
    for seed in range(5):
        hops, prompt_hops = drawn_hops(seed, 5), drawn_hops(seed + 100, 5)
        order, decode_s, prompt_s, least = best_order(
            [1, 2, 3, 4], k, head_holds_layers=head_holds_layers, hops=hops, prompt_hops=prompt_hops, weights=(128.0, 1.0)
        )
        every = {
            each: [walked_s(each, k, cost, head_holds_layers=head_holds_layers) for cost in (hops, prompt_hops)]
            for each in itertools.permutations([1, 2, 3, 4])
        }
        assert every[order] == pytest.approx([decode_s, prompt_s])
        assert 128 * decode_s + prompt_s == pytest.approx(min(128 * decode + prompt for decode, prompt in every.values()))
        assert least == pytest.approx([min(each[index] for each in every.values()) for index in (0, 1)])


def test_potentials_bound_every_cycle_of_every_set() -> None:
    for seed in range(5):
        hops = drawn_hops(seed, 6)
        for members in (range(6), (0, 1, 2), (3, 5)):
            potentials = cycle_potentials(hops, frozenset(members))
            for size in (2, 3, 4):
                for cycle in itertools.permutations(range(6), size):
                    around = sum(hops[left, right] for left, right in zip(cycle, (*cycle[1:], cycle[0]), strict=True))
                    assert sum(potentials[list(cycle)]) <= around + 1e-12


def test_potentials_are_close_for_their_set() -> None:
    hops = drawn_hops(3, 6)
    potentials = cycle_potentials(hops, frozenset({0, 2, 4}))
    least = min(walked_s(order, 1, hops, head_holds_layers=True) for order in ((2, 4), (4, 2)))
    assert sum(potentials[[0, 2, 4]]) > 0.9 * least


def test_many_devices_get_a_good_order() -> None:
    hops = drawn_hops(7, 24)
    order, decode_s, _, _ = best_order(
        list(range(1, 24)), 1, head_holds_layers=True, hops=hops, prompt_hops=hops, weights=(1.0, 1.0)
    )
    assert sorted(order) == list(range(1, 24))
    assert decode_s <= 1.05 * sum(cycle_potentials(hops, frozenset(range(24))))
