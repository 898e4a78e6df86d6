"""What a real device was told gives the same in a new core: journals replay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shoal.lab.member_cluster import make_group, member_cluster
from shoal.node.journal import replay
from shoal.runtime.node.interpreter import make_core
from shoal.transport.identity import DeviceKeys

pytestmark = pytest.mark.slow


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], capture_output=True, text=True, timeout=60.0, check=False
    )


def test_the_journal_of_a_real_device_replays(tmp_path: Path) -> None:
    with member_cluster(tmp_path, 2, f"--journal={tmp_path}/journal") as devices:
        make_group(devices, "run")
        keys = [DeviceKeys.load_or_create(device.folder / "key") for device in devices]
    journals = sorted(tmp_path.glob("journal-*"))
    assert len(journals) == 2
    for path, key in zip(journals, sorted(keys, key=lambda each: each.node), strict=True):
        with path.open("rb") as file:
            replayed = replay(file, key, make_node=make_core)
        assert replayed.difference is None
        assert replayed.num_events > 20
        assert len(replayed.core.groups) == 1
        assert len(replayed.core.roster.roster.members) == 2

    journal, folder = journals[0], next(device.folder for device in devices if device.node[:8] in journals[0].name)
    told = shoal("simulate", str(journal), f"--state={folder}")
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1].endswith("events, the same effects as then")
    assert "run: " in told.stdout
    lines = journal.read_bytes().splitlines(keepends=True)
    other = tmp_path / "other"
    other.write_bytes(b"".join(line for line in lines if b'"Received"' not in line))
    differs = shoal("simulate", str(other), f"--state={folder}")
    assert differs.returncode == 1
    assert "had effects" in differs.stderr
