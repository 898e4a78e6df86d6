"""What a run says in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from shoal.runs.progress import Progress
from shoal.runs.run import StepDone


class Begun(NamedTuple):
    """What is asked of a run that begins."""

    num_restored: int
    peers: tuple[str, ...] = ()
    address: str = "127.0.0.1:7500"


def test_times_are_medians_and_the_first_step_tells_nothing_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("test", num_steps=5, folder=None)
    progress.show(StepDone(0, 2.0, 3, 0.01, 0.01, 90.0))
    assert capsys.readouterr().err == "test: step 1/5, loss 2.0000, 3 devices\n"
    for step, exchange_s in ((1, 0.01), (2, 0.03)):
        progress.show(StepDone(step, 1.0, 1, 0.07, exchange_s, 0.1))
    assert progress.line(progress.done[-1]) == (
        "test: step 3/5, loss 1.0000, 1 device, 100 ms a step (20 ms of it to synchronise), 200 ms left"
    )
    progress.show(StepDone(4, 1.0, 1, 0.07, 0.02, 0.1))
    assert capsys.readouterr().err.endswith("(20 ms of it to synchronise)\n"), "there is no time left to tell"
    progress.close(is_finished=False)
    assert capsys.readouterr().err == "test: this device has left after step 5/5\n"


def test_where_a_run_goes_on_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("test", num_steps=5, folder=tmp_path)
    progress.begin(Begun(0), num_wanted=3)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "test: begins when 3 devices are there; others join with --peer 127.0.0.1:7500\n"
    progress.begin(Begun(0, peers=("127.0.0.1:1",)), num_wanted=1)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "test: joins by 127.0.0.1:1\n"
    progress.begin(Begun(3), num_wanted=1)  # type: ignore[arg-type]
    joined, goes_on = capsys.readouterr().err.splitlines()
    assert joined == "test: others join with --peer 127.0.0.1:7500"
    assert goes_on == f"test: goes on after step 3/5, from the checkpoint in {tmp_path}"
    progress.begin(Begun(5), num_wanted=1)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "test: all 5 steps are done already: take another folder, or more steps\n"
    progress.close(is_finished=True)
