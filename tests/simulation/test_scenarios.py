"""Scenarios are text, with the story that they told. With `REWRITE=1` in the environment it is written anew."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import pytest

from shoal.simulation.plan import Outcome, read_plan, run_plan

FOLDER = Path(str(resources.files("shoal.simulation").joinpath("scenarios")))
FILES = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scenarios_tell_the_story_they_told(path: Path) -> None:
    outcome = run_plan(read_plan(path))
    assert outcome.failure is None, outcome.failure
    head, _, told = path.read_text(encoding="utf-8").partition("\n---\n")
    story = f"{outcome.story}\n"
    if os.environ.get("REWRITE"):
        path.write_text(f"{head.rstrip()}\n---\n{story}", encoding="utf-8")
    else:
        assert story == told


def _run(name: str) -> Outcome:
    outcome = run_plan(read_plan(FOLDER / f"{name}.txt"))
    assert outcome.failure is None
    return outcome


def _said(outcome: Outcome, who: str, what: str, since_s: float = 0.0) -> list[float]:
    return [at_s for at_s, by, text in outcome.story.lines if by == who and what in text and at_s >= since_s]


def test_after_a_power_cut_of_all_the_run_goes_on_in_its_generation() -> None:
    outcome = _run("power-cut-of-all")
    assert not _said(outcome, "", "recovers")
    assert _said(outcome, "a", "epoch 8 of generation 1", since_s=9)


def test_alone_and_without_the_first_nobody_goes_on() -> None:
    outcome = _run("the-first-asleep")
    assert _said(outcome, "b", "suspended")
    assert not _said(outcome, "b", "goes on", since_s=4) or _said(outcome, "b", "goes on", since_s=4)[0] > 9
    assert not [at_s for at_s in _said(outcome, "a", "suspended", since_s=14) if at_s < 19]


def test_a_thawed_leader_follows() -> None:
    outcome = _run("frozen-leader")
    (froze_s,) = _said(outcome, "", "a freezes")
    assert any(_said(outcome, name, f"{name} leads", since_s=froze_s) for name in "bcd")
    assert not _said(outcome, "a", "a leads", since_s=froze_s)


def test_of_two_joiners_with_one_token_one_is_confirmed() -> None:
    outcome = _run("two-joiners-one-token")
    for name in "abcd":
        assert _said(outcome, name, "x y wait")
        assert _said(outcome, name, "x is here", since_s=12)
    core = outcome.world.devices[next(node for node in outcome.world.devices if node == "a")].core
    assert core is not None
    assert "x" in core.roster.roster.members


def test_who_slept_through_a_removal_does_not_trust_the_removed() -> None:
    outcome = _run("removed-while-asleep")
    assert _said(outcome, "d", "c refuses: unstamped", since_s=41)
    assert not _said(outcome, "c", "d is here", since_s=41)
