"""However a lab ends, nothing stays behind, or `shoal lab clean` finds and removes it, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.errors import LabError, LabUnavailable
from shoal.lab import records, requirements, scenario
from shoal.lab.cluster import Lab
from shoal.lab.process_identity import ProcessIdentity, boot_id
from tests.lab.fixture import MakeLab, traces

pytestmark = pytest.mark.slow

MINE = """
seconds_max = 60
[devices.one]
command = ["sh", "-c", "sleep 300 & exec sleep 300"]
memory_mib = 64
[devices.two]
command = ["sleep", "300"]
[[links]]
between = ["one", "two"]
rate_mbit_s = 50
"""


def shoal(*arguments: str, columns: int = 200, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "shoal", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


class Begun:
    """A `shoal lab ...` under way in a process of its own, and what it has written down."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said = ""

    @property
    def record(self) -> records.LabRecord:
        (found,) = [record for record in records.all_records() if record.owner.pid == self.process.pid]
        return found

    def wait_for(self, condition: Callable[[records.LabRecord], bool], *, within_s: float = 30.0) -> records.LabRecord:
        give_up_s = time.monotonic() + within_s
        while True:
            found = [record for record in records.all_records() if record.owner.pid == self.process.pid]
            if found and condition(found[0]):
                return found[0]
            if self.process.poll() is not None:
                pytest.fail(f"it ended: {self.process.communicate()[1]}")
            assert time.monotonic() < give_up_s, "not in time"
            time.sleep(0.005)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        self.said = self.process.communicate(timeout=30)[1]
        return self.process.returncode


def is_running(record: records.LabRecord) -> bool:
    """All three commands are on their devices."""
    return record.state == "ready" and [len(records.members(record, name)) for name in record.groups] == [2, 1]


@pytest.fixture
def mine(tmp_path: Path, lab_folder: Path) -> Path:
    assert lab_folder.is_dir()
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    return path


def test_a_killed_lab_is_found_and_removed_wholly(mine: Path, lab: MakeLab) -> None:
    other = lab({"devices": {"one": {}}})
    begun = Begun("lab", "up", str(mine))
    record = begun.wait_for(is_running)
    own = [process for name in record.groups for process in records.members(record, name)]
    assert begun.end(signal.SIGKILL) == -signal.SIGKILL
    assert record.is_orphan
    assert traces(record) != [], "commands, namespaces and groups outlive a killed lab"
    assert all(process.is_running() for process in own)
    warned = shoal("lab", "run", str(mine), "--seconds", "0.1")
    assert f"{record.id} ended without cleaning up: `shoal lab clean` does it" in " ".join(warned.stderr.split())
    cleaned = shoal("lab", "clean")
    assert cleaned.returncode == 0, cleaned.stderr
    assert f"removed {record.id}" in cleaned.stderr
    assert f"{other.id} is running" in " ".join(cleaned.stderr.split())
    assert traces(record) == []
    assert not any(process.is_running() for process in own)
    assert other.run("one", ["true"])[0] == 0, "a lab that is up is left alone"


@pytest.mark.parametrize(
    "stage", ["places", *(pytest.param(stage, marks=pytest.mark.full) for stage in ("namespaces", "router"))]
)
def test_a_lab_killed_while_it_is_made_leaves_nothing_that_is_not_found(mine: Path, stage: str) -> None:
    begun = Begun("lab", "up", str(mine))
    record = begun.wait_for(lambda record: bool(getattr(record, stage)))
    begun.end(signal.SIGKILL)
    cleaned = shoal("lab", "clean")
    assert cleaned.returncode == 0, cleaned.stderr
    assert traces(record) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_a_lab_that_is_told_to_end_takes_everything_down(mine: Path, number: signal.Signals) -> None:
    begun = Begun("lab", "run", str(mine))
    record = begun.wait_for(is_running)
    assert begun.end(number) == 130
    assert traces(record) == []
    assert "Traceback" not in begun.said


def test_the_workload_beside_the_devices_is_removed_too(lab_folder: Path) -> None:
    assert lab_folder.is_dir()
    begun = Begun("lab", "run", "pair-wan")
    record = begun.wait_for(lambda record: bool(record.helpers))
    begun.end(signal.SIGKILL)
    assert shoal("lab", "clean").returncode == 0
    assert traces(record) == []


def test_an_exception_takes_the_lab_down(lab_folder: Path) -> None:
    assert lab_folder.is_dir()
    wanted = scenario.parse({"devices": {"one": {}}}, label="test")
    found: list[records.LabRecord] = []

    def fail() -> None:
        with Lab(wanted) as network:
            found.append(network.record)
            network.start("one", ["sleep", "300"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert traces(found[0]) == []


def test_what_cannot_be_made_leaves_nothing_and_names_the_device(lab_folder: Path) -> None:
    before = sorted(path.name for path in (lab_folder / "labs").iterdir())
    wanted = scenario.parse({"devices": {"one": {}, "two": {"core_set": "4000"}}}, label="test")
    with pytest.raises(LabError, match=r"^devices.two: cannot limit the cores: '4000'"), Lab(wanted):
        pass
    assert sorted(path.name for path in (lab_folder / "labs").iterdir()) == before


def test_a_lost_router_ends_the_run_and_says_so(mine: Path) -> None:
    begun = Begun("lab", "run", str(mine))
    record = begun.wait_for(is_running)
    assert record.router is not None
    record.router.send(signal.SIGKILL)
    begun.said = begun.process.communicate(timeout=30)[1]
    assert begun.process.returncode == 1
    assert "router" in begun.said
    assert "Traceback" not in begun.said
    assert traces(record) == []


def test_an_id_that_is_used_again_is_nobody_elses(lab_folder: Path) -> None:
    assert lab_folder.is_dir()
    with subprocess.Popen(["sleep", "300"]) as bystander:
        try:
            identity = ProcessIdentity.of(bystander.pid)
            assert identity is not None
            earlier = ProcessIdentity(identity.pid, identity.start_ticks - 1)
            record = records.LabRecord(id="test-000000", scenario="test", boot=boot_id(), owner=earlier, router=earlier)
            records.save(record)
            assert record.is_orphan
            assert records.remove(record) == []
            assert identity.is_running()
            assert not records.folder_of(record.id).exists()
        finally:
            bystander.kill()


def test_without_what_it_takes_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "root: use sudo" in requirements.missing()
    with pytest.raises(LabUnavailable, match=r"^this machine cannot be a lab; it lacks .*root: use sudo"):
        requirements.require()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert requirements.missing() == ["Linux (this is darwin): use a Linux machine or a virtual one"]
