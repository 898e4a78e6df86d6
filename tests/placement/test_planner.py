"""Plans over drawn scenarios: everything placed once, memory kept, no slower than the published ways, and reasons given."""

from __future__ import annotations

import random

import msgspec
import pytest

from shoal.errors import InfeasiblePlacement
from shoal.placement.baselines import BASELINES
from shoal.placement.planner import Plan, _deal, _fill, make_plan, plan_baseline
from shoal.placement.scenario import SHAPES, draw_scenario

SEEDS = range(8)


def plan_of(seed: int) -> Plan | None:
    scenario = draw_scenario(random.Random(seed), shape=SHAPES[seed % 3], num_devices=2 + seed % 4)
    try:
        return make_plan(scenario.cluster, scenario.model)
    except InfeasiblePlacement:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_plans_hold_what_they_promise(seed: int) -> None:
    scenario = draw_scenario(random.Random(seed), shape=SHAPES[seed % 3], num_devices=2 + seed % 4)
    plan = plan_of(seed)
    assert plan is not None
    # Every layer once, in the order in which a token passes.
    passed = [
        layer
        for window in range(plan.num_rounds)
        for stage in plan.stages
        for layer in range(stage.windows[window].first, stage.windows[window].stop)
    ]
    assert passed == list(range(scenario.model.num_layers))
    assert plan.head.device == scenario.cluster.head.id
    for stage in plan.stages:
        sizes = [len(window) for window in stage.windows]
        assert max(sizes) - min(sizes) <= 1
        assert all(0 <= fast <= size for fast, size in zip(stage.accelerator_layers, sizes, strict=True))
        assert stage.life.memory_left_bytes >= 0
        assert stage.life.accelerator_left_bytes >= 0
        assert stage.binding
    named = {stage.device for stage in plan.stages} | {left.device for left in plan.left_out}
    assert named == {device.id for device in scenario.cluster.devices}
    for name in BASELINES:
        try:
            other = plan_baseline(name, scenario.cluster, scenario.model)
        except InfeasiblePlacement:
            continue
        assert plan.cost_s <= other.cost_s * 1.005, name
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_plans_are_the_same_for_the_same_question() -> None:
    assert plan_of(2) == plan_of(2)


@pytest.mark.parametrize(("count", "rounds"), [(7, 3), (2, 5), (80, 9), (5, 5), (0, 4)])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_windows_are_dealt_evenly(count: int, rounds: int, offset: int) -> None:
    dealt = _deal(count, rounds, offset=offset)
    assert sum(dealt) == count
    assert max(dealt) - min(dealt) <= 1
    for fast in range(count + 1):
        filled = _fill(dealt, fast)
        assert sum(filled) == fast
        assert all(0 <= here <= size for here, size in zip(filled, dealt, strict=True))


def test_who_is_left_out_is_told_why() -> None:
    scenario = draw_scenario(random.Random(8), scarcity="ample", num_devices=4, shape=SHAPES[0])
    plan = make_plan(scenario.cluster, scenario.model)
    assert plan.left_out
    for left in plan.left_out:
        assert left.token_s is None or left.token_s > 0
        assert left.reason


def test_a_device_more_is_asked_for_where_nothing_fits() -> None:
    scenario = draw_scenario(random.Random(1), scarcity="short", num_devices=2, shape=SHAPES[3])
    devices = tuple(
        msgspec.structs.replace(
            device, limit_bytes=device.runtime_bytes + scenario.model.stage_bytes + (40 << 20), accelerator=None
        )
        for device in scenario.cluster.devices
    )
    cluster = msgspec.structs.replace(scenario.cluster, devices=devices)
    with pytest.raises(InfeasiblePlacement, match=r"missing|lacks"):
        make_plan(cluster, scenario.model)
