"""What is dealt is a plan of the program, and what is said to be proved holds for it."""

from __future__ import annotations

import math
import random

import pytest

from shoal.placement.program import OBJECTIVES, ObjectiveName, Problem, solve
from shoal.placement.scenario import SHAPES, draw_scenario

ROUNDS = (1, 2, 3, 5, 8)


@pytest.mark.parametrize("objective", ["latency", "first-token", "throughput"])
@pytest.mark.parametrize("seed", range(4))
def test_no_plan_of_the_program_is_below_the_bound(seed: int, objective: ObjectiveName) -> None:
    chance = random.Random(seed)
    scenario = draw_scenario(chance, num_devices=chance.randint(2, 5), shape=SHAPES[chance.randint(0, 2)])

    def problem() -> Problem:
        return Problem(scenario.cluster, scenario.model, objective=OBJECTIVES[objective], prompt_tokens=512)

    plans, proved = problem().deal(ROUNDS, cutoff_s=math.inf)
    dealt = {plan.num_rounds: plan for plan in plans}
    for k in ROUNDS:
        best, bound_s = problem().solve(k, cutoff_s=math.inf)
        assert proved[k] <= (best.cost_s if best else math.inf) * (1 + 1e-6)
        if k in dealt:
            assert dealt[k].cost_s >= bound_s * (1 - 1e-6)
            assert sum(share.num_layers_total for share in dealt[k].shares) == scenario.model.num_layers


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_many_devices_are_dealt_to_within_the_gap(seed: int) -> None:
    scenario = draw_scenario(random.Random(seed), num_devices=32, shape=SHAPES[-1])
    problem = Problem(scenario.cluster, scenario.model, objective=OBJECTIVES["latency"], prompt_tokens=512)
    plans, proved = problem.deal(range(1, 41), cutoff_s=math.inf)
    best_s = min(plan.cost_s for plan in plans)
    assert min(proved.values()) >= best_s / 1.02
    assert solve(scenario.cluster, scenario.model).best.cost_s <= best_s * (1 + 1e-9)
