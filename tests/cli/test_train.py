"""`shoal train`, `runs` and `leave` as a user meets them, with the examples as scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.runs import checkpoint as checkpoints
from shoal.runs.progress import losses

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
DIGITS = ROOT / "examples" / "digits.py"
SCRIPT = """
import time, torch
import shoal.pytorch as sp
x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(x)
run = sp.join("slow", model=model, optimizer=optimizer, dataset=data, global_batch=8, steps=10000)
for batch in run:
    time.sleep(0.02)
    run.step(model(batch.x[0]).square().sum())
print("ended with", run.run.members)
"""


def environment(state: Path) -> dict[str, str]:
    return {**os.environ, "SHOAL_STATE": str(state), "NO_COLOR": "1", "COLUMNS": "140", "OMP_NUM_THREADS": "1"}


def shoal(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoal", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment(state), check=False)


@pytest.mark.full
def test_the_digits_are_learned_by_two_devices(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = shoal(tmp_path, "train", "--devices", "2", "--folder", str(folder), str(DIGITS))
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("%")[0]) > 88.0
    assert "digits: step 90/90, loss 0.0" in result.stderr
    assert "2 devices" in result.stderr
    assert len(losses(folder)) == 90
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    found = checkpoints.newest(folder)
    assert found is not None
    assert len(found[0].history) == 90
    assert {len(entry.parts) for entry in found[0].history} == {2}


@pytest.mark.full
def test_runs_are_listed_and_left(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "shoal", "train", "--devices", "2", str(script)]
    process = subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        give_up_s = time.monotonic() + 40
        rows: list[dict[str, object]] = []
        while len(rows) < 2 or min(int(str(row["step"])) for row in rows) < 3:
            assert time.monotonic() < give_up_s, (rows, process.poll())
            time.sleep(0.3)
            rows = json.loads(shoal(tmp_path, "runs", "--json").stdout)
        assert {(row["run"], row["phase"], row["members"]) for row in rows} == {("slow", "active", 2)}
        assert "no run 'other': it is in slow" in shoal(tmp_path, "leave", "other").stderr
        assert "slow" in shoal(tmp_path, "runs").stdout
        again = shoal(tmp_path, "train", str(script))
        assert again.returncode == 1
        assert again.stderr.startswith("shoal: a run 'slow' is under way on this device: take part in it with --peer 127.")
        assert shoal(tmp_path, "leave", "slow").stdout == "left 'slow' with 2 members\n"
        assert process.wait(20) == 0
        assert "no run on this device" in shoal(tmp_path, "runs").stdout
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def listed(state: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(shoal(state, "runs", "--json").stdout)
    return rows


@pytest.mark.full
def test_a_run_whose_majority_is_lost_is_recovered(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "shoal", "train", "--plain"]
    founder = subprocess.Popen([*command, "--wait-for", "2", str(script)], env=environment(tmp_path))
    other: subprocess.Popen[bytes] | None = None
    try:
        give_up_s = time.monotonic() + 60
        while not (rows := listed(tmp_path)):
            assert time.monotonic() < give_up_s
        other = subprocess.Popen([*command, "--peer", str(rows[0]["address"]), str(script)], env=environment(tmp_path))
        node = rows[0]["node"]
        while len(rows := listed(tmp_path)) < 2 or any(row["members"] != 2 for row in rows):
            assert time.monotonic() < give_up_s
        assert shoal(tmp_path, "runs", "recover", "slow").stderr.startswith("shoal: 'slow' has a majority of its members")
        os.kill(json.loads((tmp_path / "runs" / f"{node}.json").read_text())["pid"], signal.SIGKILL)
        while not any(row["is_suspended"] for row in listed(tmp_path)):
            assert time.monotonic() < give_up_s
        assert " suspended " in shoal(tmp_path, "runs").stdout
        told = shoal(tmp_path, "runs", "recover", "slow")
        assert told.returncode == 1
        assert told.stdout.startswith("'slow' waits: 1 of its 2 members answers")
        assert f"lost: member {str(node)[:8]}, and every step after" in told.stdout
        step = int(str(listed(tmp_path)[0]["step"]))
        done = shoal(tmp_path, "runs", "recover", "slow", "--yes")
        assert done.stdout == f"'slow' goes on after step {step + 1} without member {str(node)[:8]}\n"
        while int(str(listed(tmp_path)[0]["step"])) < step + 3:
            assert time.monotonic() < give_up_s
        assert shoal(tmp_path, "leave", "slow").returncode == 0
        assert other.wait(20) == 0
    finally:
        for process in (founder, other):
            if process is not None:
                process.terminate()
                process.wait(20)


@pytest.mark.full
def test_what_a_run_says_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT)
    refused = shoal(tmp_path, "train", "--devices", "2", "--folder", str(script / "inside"), str(script))
    assert refused.returncode == 1
    assert refused.stderr == f"shoal: {script / 'inside'} cannot be written to: Not a directory\n"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    missing = shoal(tmp_path, "train", "nothing.py")
    assert missing.returncode == 2
    assert missing.stderr == "shoal: nothing.py is no file: name a Python script that calls shoal.pytorch.join\n"
    wrong = shoal(tmp_path, "train", "--peer", "nowhere", str(DIGITS))
    assert wrong.stderr == "shoal: 'nowhere' is no address: write HOST:PORT\n"
    alone = shoal(tmp_path, "train", "--peer", "127.0.0.1:1", str(DIGITS))
    assert "members of a run prove who they are: start `shoal up`" in alone.stderr
    open_ = shoal(tmp_path, "train", "--plain", "--listen", "192.0.2.1:7500", str(DIGITS))
    assert "192.0.2.1:7500 is reachable for others" in open_.stderr
