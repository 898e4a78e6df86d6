"""What a real device was told gives the same in a new core: journals replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.lab.member_cluster import make_group, member_cluster
from shoal.node.journal import replay
from shoal.runtime.node.interpreter import make_core
from shoal.transport.identity import DeviceKeys

pytestmark = pytest.mark.slow


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
