"""How good plans are over drawn scenarios: by prediction against the program's bound, Halda and shares of memory, and in the
lab (`plan_lab.py`, whose figures are printed as well) by what real rings then do.

plan_s, plan_s_max         seconds of the program for 32 devices and 80 layers, all numbers of rounds together: median,
                           worst; plan_processor_s is the median of processor time, which other work disturbs less
gap, gap_max               cost over the program's bound, less one, of the same: median, worst
refine_s                   seconds of everything else (true sizes, moves, reasons) for a scenario, median
life_over_program          cost under the recurrence over the program's bound, median over scenarios
predicted_vs_halda_p50     how many times as long Halda's plan takes for a prompt of 512 and 128 tokens, median; the worst is
                           predicted_vs_halda_min; where memory is short: predicted_vs_halda_short_p50
predicted_vs_proportional_p50  the same for the memory-proportional plan
predicted_halda_none, ...  scenarios in which they find no plan that keeps to memory; they are in no ratio
predicted_rounds_share     scenarios in which more than one round is chosen; predicted_rounds_gain_p50 is what that gains
                           there over the best plan of one round

Both sides of a predicted ratio come from the same recurrence (`placement/token_life.py`), with the same rings: this says
what a plan is worth if predictions hold; the lab says whether they do. The published splits are among our starts, so that
a predicted ratio below one would be a defect.
"""

from __future__ import annotations

import json
import random
import statistics
import time

from benchmarks.plan_lab import measure_lab
from benchmarks.record import finish, is_quick
from shoal.errors import InfeasiblePlacement
from shoal.placement.baselines import BASELINES, BaselineName
from shoal.placement.planner import Plan, make_plan, plan_baseline, plan_of_rounds
from shoal.placement.program import solve
from shoal.placement.scenario import SHAPES, Scenario, draw_scenario

FIRST_SEED = 0
LARGE_DEVICES = 32
LAB_SCENARIOS = 20


def measure_large(num_seeds: int) -> dict[str, float]:
    """The program alone, on 32 devices and 80 layers."""
    taken, processor, gaps = [], [], []
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        scenario = draw_scenario(random.Random(seed), num_devices=LARGE_DEVICES, shape=SHAPES[-1])
        started_s, processor_s = time.perf_counter(), time.process_time()
        found = solve(scenario.cluster, scenario.model)
        taken.append(time.perf_counter() - started_s)
        processor.append(time.process_time() - processor_s)
        gaps.append(found.gap)
    return {
        "plan_s": statistics.median(taken),
        "plan_s_max": max(taken),
        "plan_processor_s": statistics.median(processor),
        "gap": statistics.median(gaps),
        "gap_max": max(gaps),
    }


def baseline_ratio(name: BaselineName, scenario: Scenario, made: Plan) -> float | None:
    try:
        return plan_baseline(name, scenario.cluster, scenario.model).cost_s / made.cost_s
    except InfeasiblePlacement:
        return None


def measure_scenarios(num_seeds: int) -> dict[str, float]:
    ratios: dict[BaselineName, list[float]] = {name: [] for name in BASELINES}
    none: dict[BaselineName, int] = dict.fromkeys(BASELINES, 0)
    short, over, refine_s, gains, infeasible = [], [], [], [], 0
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        scenario = draw_scenario(random.Random(seed))
        started_s = time.perf_counter()
        try:
            solve(scenario.cluster, scenario.model)
            program_s = time.perf_counter() - started_s
            made = make_plan(scenario.cluster, scenario.model)
        except InfeasiblePlacement:
            infeasible += 1
            continue
        refine_s.append(time.perf_counter() - started_s - 2 * program_s)
        over.append(made.cost_s / made.bound_s)
        row: dict[str, float | str | int | None] = {
            "seed": seed, "scarcity": scenario.scarcity, "model": scenario.model.name,
            "devices": len(scenario.cluster.devices), "rounds": made.num_rounds, "token_s": round(made.token_s, 4),
        }  # fmt: skip
        for name in BASELINES:
            ratio = baseline_ratio(name, scenario, made)
            row[name] = ratio and round(ratio, 3)
            if ratio is None:
                none[name] += 1
                continue
            ratios[name].append(ratio)
            if name == "halda" and scenario.scarcity == "short":
                short.append(ratio)
        if made.num_rounds > 1:
            try:
                once = plan_of_rounds([1], scenario.cluster, scenario.model)
                gains.append(once.cost_s / made.cost_s)
                row["one_round"] = round(gains[-1], 3)
            except InfeasiblePlacement:
                row["one_round"] = None
        print(json.dumps(row))
    counted = num_seeds - infeasible
    figures = {
        "refine_s": statistics.median(refine_s),
        "life_over_program": statistics.median(over),
        "infeasible": float(infeasible),
        "predicted_rounds_share": len(gains) / counted,
        "predicted_rounds_gain_p50": statistics.median(gains) if gains else 1.0,
        "predicted_vs_halda_short_p50": statistics.median(short) if short else 0.0,
    }
    for baseline, values in ratios.items():
        figures[f"predicted_vs_{baseline}_p50"] = statistics.median(values)
        figures[f"predicted_vs_{baseline}_min"] = min(values)
        figures[f"predicted_{baseline}_none"] = float(none[baseline])
    return figures


def main() -> None:
    """Measures, prints one JSON object, and keeps it."""
    figures = measure_large(3 if is_quick() else 10)
    num_scenarios = 8 if is_quick() else 20
    figures |= measure_scenarios(num_scenarios)
    if is_quick():
        figures |= measure_lab(range(FIRST_SEED + 1, FIRST_SEED + 2), ways=("planned",))
    else:
        figures |= measure_lab(range(FIRST_SEED, FIRST_SEED + LAB_SCENARIOS))
    settings = {
        "lab_scenarios": 1 if is_quick() else LAB_SCENARIOS,
        "first_seed": FIRST_SEED,
        "scenarios": num_scenarios,
        "large_devices": LARGE_DEVICES,
    }
    finish("plan", {name: round(figure, 4) for name, figure in figures.items()}, settings)


if __name__ == "__main__":
    main()
