"""The swarm: many seeds, every state meets every fault; and planted bugs, which it must find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from shoal.node.core import NodeCore
from shoal.simulation.actions import Action
from shoal.simulation.plan import Plan, parse_plan, run_plan
from shoal.simulation.swarm import COVERING_SEEDS, draw_plan, explain, missing_pairs, shrink
from tests.simulation import planted


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hundreds_of_seeds_break_no_invariant_and_every_state_meets_every_fault() -> None:
    coverage: Counter[tuple[str, str, str]] = Counter()
    for seed in range(COVERING_SEEDS):
        if seed >= 600 and not missing_pairs(coverage):
            break
        outcome = run_plan(draw_plan(seed))
        assert outcome.failure is None, f"seed {seed}: {explain(shrink(outcome))}"
        coverage.update(outcome.checkers.coverage)
    assert missing_pairs(coverage) == []


def _forgetful(plan: Plan) -> Plan:
    """Every start is one without the file of votes."""
    actions = tuple(
        Action(action.at_s, "start", (action.arguments[0], "losing", "votes")) if action.verb == "start" else action
        for action in plan.actions
    )
    return msgspec.structs.replace(plan, actions=actions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_node", "checkers", "seeds_max", "change"),
    [
        (planted.with_group(planted.StaleTimer), {"calm", "settles (I8, I10)"}, 20, None),
        (planted.with_group(planted.DoubleVote), {"one leader", "one child (I1)"}, 1500, None),
        (planted.with_group(planted.LostCommit), {"one child (I1)", "one leader", "step once (I2)"}, 400, None),
        (
            planted.with_group(planted.VoteWithoutFile),
            {"one child (I1)", "one leader", "step once (I2)", "quorum"},
            600,
            _forgetful,
        ),
        (planted.with_roster(planted.ForgetsRemovals), {"removed"}, 400, None),
    ],
    ids=["stale timer", "double vote", "lost commit", "vote without its file", "removal forgotten"],
)
def test_the_swarm_finds_planted_bugs(
    make_node: Callable[..., NodeCore], checkers: set[str], seeds_max: int, change: Callable[[Plan], Plan] | None
) -> None:
    for seed in range(seeds_max):
        plan = draw_plan(seed)
        outcome = run_plan(change(plan) if change else plan, make_node=make_node)
        if outcome.failure is not None and outcome.failure.checker in checkers:
            return
    pytest.fail(f"not found in {seeds_max} seeds")


def test_a_failure_is_made_small_and_its_text_fails_again() -> None:
    make_node = planted.with_group(planted.StaleTimer)
    for seed in range(50):
        outcome = run_plan(draw_plan(seed), make_node=make_node)
        if outcome.failure is not None and outcome.failure.checker == "calm" and len(outcome.plan.actions) > 6:
            break
    else:
        pytest.fail("no failure to shrink")
    small = shrink(outcome, make_node=make_node)
    assert len(small.plan.actions) < len(outcome.plan.actions)
    again = run_plan(parse_plan(str(small.plan)), make_node=make_node)
    assert again.failure is not None
    assert again.failure.checker == "calm"
    assert str(again.story) == str(small.story)
    text = explain(small)
    assert f"seed {outcome.plan.settings.seed}" in text
    assert "Its story" in text
