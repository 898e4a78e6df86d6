"""The world is one thread and one seed: the same again is the same, to the byte, in any process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shoal.errors import RemoteProtocolError
from shoal.node.journal import replay
from shoal.simulation.actions import FORMS, parse_action
from shoal.simulation.keys import SimulatedKeys
from shoal.simulation.plan import parse_plan, run_plan
from shoal.simulation.swarm import draw_plan

_TELL = """
import sys
from shoal.simulation.plan import run_plan
from shoal.simulation.swarm import draw_plan
for seed in (3, 7, 12, 19, 110):
    outcome = run_plan(draw_plan(seed))
    sys.stdout.write(f"{outcome.plan}\\n{outcome.story}\\n{outcome.num_events} {outcome.num_messages}\\n")
"""

JOURNALS = """
seed 5
devices a b c
settings journals=true drift_max=0.001
network loss=0.05 duplicate=0.05 jitter=0.004
at 0.1 create run a
at 0.3 enter run b; enter run c
at 1 invite t a
at 1 new x
at 1.2 use t x b
at 3 power-cut a
at 4 start a
at 5 remove x c
heal 6
"""


@pytest.mark.slow
def test_a_seed_tells_the_same_story_in_every_process() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", _TELL],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert told[0] == told[1]
    assert len(told[0]) > 2000


def test_messages_as_bytes_tell_the_same_story() -> None:
    plan = parse_plan(JOURNALS)
    as_values = run_plan(plan)
    as_bytes = run_plan(parse_plan(JOURNALS.replace("journals=true", "journals=true encodes=true")))
    assert as_values.failure is None
    assert str(as_values.story) == str(as_bytes.story)


def test_journals_replay_to_the_same_effects() -> None:
    outcome = run_plan(parse_plan(JOURNALS))
    assert outcome.failure is None
    for device in outcome.world.devices.values():
        assert device.journal is not None
        replayed = replay(device.journal.lines, device.keys)
        assert replayed.difference is None
        assert replayed.num_events == len(device.journal.lines) - 1
        assert device.core is not None
        assert replayed.core.roster.roster.digest == device.core.roster.roster.digest


def test_a_journal_that_was_cut_off_or_changed_says_where() -> None:
    outcome = run_plan(parse_plan(JOURNALS))
    journal = outcome.world.devices[next(iter(outcome.world.devices))].journal
    assert journal is not None
    cut_off = [*journal.lines[:20], journal.lines[20][:-9]]
    assert replay(cut_off, SimulatedKeys("a")).num_events == 19
    missing = [*journal.lines[:10], *journal.lines[14:]]
    difference = replay(missing, SimulatedKeys("a")).difference
    assert difference is not None
    assert difference[0] >= 11
    with pytest.raises(RemoteProtocolError, match="line 2"):
        replay([journal.lines[0], b'{"now_s": 1}\n'], SimulatedKeys("a"))
    with pytest.raises(RemoteProtocolError, match="empty"):
        replay([], SimulatedKeys("a"))


def test_both_sides_of_a_cut_keep_their_presence() -> None:
    outcome = run_plan(parse_plan("devices a b c d\nat 3 split a b | c d\nend 12"))
    assert outcome.failure is None
    for name, peers in (("a", {"b"}), ("b", {"a"}), ("c", {"d"}), ("d", {"c"})):
        core = next(device.core for node, device in outcome.world.devices.items() if node == name)
        assert core is not None
        assert {node for node in core.presence.here() if core.presence.is_here(node)} == peers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices a\nat 1 explode a\nheal 2", r"line 2: 'explode' is no action: write one of new, found"),
        ("devices a b\nat 1 cut a b\nheal 2", r"write cut A > B"),
        ("devices a\nat 1 freeze z\nheal 2", r"speaks of 'z', but the devices are a"),
        ("devices a\nat 1 freeze a", r"does not end"),
        ("devices a\nnetwork los=1\nheal 2", r"one of loss, duplicate, delay, jitter"),
        ("devices a\nat soon freeze a\nheal 2", r"line 2: could not convert"),
        ("device a\nheal 2", r"'device' is no line of a plan"),
    ],
)
def test_wrong_plans_say_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_plan(text)


def test_every_verb_has_its_form_and_plans_survive_their_text() -> None:
    for verb, form in FORMS.items():
        assert form.startswith(verb)
    assert str(parse_action(1.0, "cut a > b")) == "at 1.000 cut a > b"
    for seed in range(40):
        plan = draw_plan(seed)
        assert str(parse_plan(str(plan))) == str(plan)
