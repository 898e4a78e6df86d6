"""`shoal simulate` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli.simulate import names, simulate


def _simulate(scenario: str | None, *, as_json: bool = False, seed: int | None = None, devices: int | None = None) -> None:
    simulate(scenario, devices=devices, seconds=None, changes=None, seed=seed, as_json=as_json)


def test_without_a_scenario_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    _simulate(None)
    text = capsys.readouterr().out
    assert all(name in text for name in names())
    assert "freeze DEVICE" in text


def test_a_scenario_by_name_tells_its_story(capsys: pytest.CaptureFixture[str]) -> None:
    _simulate("two-reboot-together")
    text = capsys.readouterr().out
    assert "b c: power cut" in text
    assert "No invariant was broken" in text


def test_a_scenario_from_a_file_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# mine\ndevices a b\nat 2 crash a\nat 4 start a\nheal 6\n---\nwhat it told is not read\n")
    _simulate(str(path), as_json=True, seed=3)
    told = json.loads(capsys.readouterr().out)
    assert told["failure"] is None
    assert told["seed"] == 3
    assert {"at_s": 2.0, "who": "", "what": "a: process killed"} in told["story"]


def test_a_drawn_plan_is_shown_with_its_story(capsys: pytest.CaptureFixture[str]) -> None:
    _simulate("seed", seed=5)
    assert "seed 5" in capsys.readouterr().out


def test_wrong_names_and_options_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file and no scenario: write a path or one of broken-link"):
        _simulate("nothing-such")
    with pytest.raises(ValueError, match="for `shoal simulate churn`"):
        _simulate("broken-link", devices=5)
    with pytest.raises(ValueError, match="3 to 1000"):
        _simulate("churn", devices=5000)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text"):
        _simulate(str(binary))
