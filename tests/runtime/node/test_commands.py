"""The commands, as an owner gives them, to real agents: invite, join, status, remove, leave, and a restart."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import DeviceRefused, ShoalError
from shoal.runtime.node.owner import (
    AskCluster,
    ClusterStatus,
    Done,
    Invitation,
    JoinCluster,
    Joined,
    LeaveCluster,
    MakeInvitation,
    OwnerLink,
    RemoveDevice,
)

pytestmark = pytest.mark.slow


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60.0,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        check=False,
    )


@contextlib.contextmanager
def agent(folder: Path, name: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """`shoal up` with a state folder, until the block ends; yields what it announced."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "shoal", "up", "--json", "--until-eof", "--listen=127.0.0.1:0", "--members=127.0.0.1:0",
            f"--state={folder / name}", f"--name={name}", f"--models={folder}", *arguments,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(10.0)
        process.stdout.close()
    assert process.returncode == 0


def status(folder: Path, name: str) -> ClusterStatus:
    with OwnerLink(folder / name) as owner:
        return owner.ask(AskCluster(), ClusterStatus)


def wait_until(folder: Path, name: str, holds: Callable[[ClusterStatus], bool], *, within_s: float = 5.0) -> ClusterStatus:
    end_s = time.monotonic() + within_s
    while not holds(found := status(folder, name)):
        assert time.monotonic() < end_s, found
        time.sleep(0.02)
    return found


def presence(found: ClusterStatus) -> dict[str, str]:
    return {member.name: member.presence for member in found.members}


def test_two_devices_become_one_cluster_by_one_token(tmp_path: Path) -> None:
    with agent(tmp_path, "desk") as desk, agent(tmp_path, "lap") as lap:
        invited = shoal("invite", f"--state={tmp_path / 'desk'}")
        assert invited.returncode == 0, invited.stderr
        assert "For one device, within 24 h" in invited.stderr
        assert "reached from this machine only" in invited.stderr
        words = invited.stdout.split()
        assert words[:2] == ["shoal", "join"]
        joined = shoal("join", words[2], f"--state={tmp_path / 'lap'}")
        assert joined.returncode == 0, joined.stderr
        assert joined.stdout.endswith("with desk.\n")
        for name in ("desk", "lap"):
            other = {"desk": "lap", "lap": "desk"}[name]
            wait_until(
                tmp_path,
                name,
                lambda found, me=name, other=other: presence(found) == {me: "this device", other: "here"},  # type: ignore[misc]
            )

        again = shoal("join", words[2], f"--state={tmp_path / 'lap'}")
        assert (again.returncode, again.stderr) == (
            1,
            "shoal: this device is in a cluster of 2 devices already, and can be in one only: `shoal leave` first\n",
        )
        used = shoal("join", words[2], f"--state={tmp_path / 'phone'}")
        assert used.returncode == 1
        assert "the invitation has been used" in used.stderr or "is used up" in used.stderr, used.stderr

        wait_until(tmp_path, "lap", lambda found: any(link.round_trip_s for link in found.links))
        shown = shoal("status", f"--state={tmp_path / 'lap'}")
        assert shown.returncode == 0, shown.stderr
        assert "2 devices" in shown.stdout
        assert "desk -> lap" in shown.stdout
        assert "lap -> desk" in shown.stdout
        whole = json.loads(shoal("status", "--json", f"--state={tmp_path / 'lap'}").stdout)
        assert whole["cluster"]["me"] == lap["id"]
        assert {member["node"] for member in whole["cluster"]["members"]} == {desk["id"], lap["id"]}
        measured = [link for link in whole["cluster"]["links"] if link["target"] == lap["id"]]
        assert measured[0]["heard_age_s"] < 5.0
        assert whole["devices"][0]["survey"]["device"] == "lap"


def invite(folder: Path, name: str, uses: int = 1) -> str:
    with OwnerLink(folder / name) as owner:
        return owner.ask(MakeInvitation(uses), Invitation).token


def join(folder: Path, name: str, token: str) -> Joined:
    with OwnerLink(folder / name) as owner:
        return owner.ask(JoinCluster(token), Joined)


def test_a_restart_keeps_identity_and_roster(tmp_path: Path) -> None:
    with agent(tmp_path, "desk") as desk:
        # A device without an agent joins by itself, and is in when one starts.
        joined = shoal("join", invite(tmp_path, "desk"), f"--state={tmp_path / 'lap'}", "--name=lap")
        assert joined.returncode == 0, joined.stderr
        assert "Start `shoal up` here to be part of it." in joined.stdout
        with agent(tmp_path, "lap") as lap:
            before = wait_until(tmp_path, "desk", lambda found: presence(found).get("lap") == "here")
        # It said goodbye.
        wait_until(tmp_path, "desk", lambda found: presence(found)["lap"] in ("absent", "gone"), within_s=2.0)
        with agent(tmp_path, "lap") as again:
            assert again["id"] == lap["id"]
            after = wait_until(tmp_path, "desk", lambda found: presence(found)["lap"] == "here")
            own = wait_until(tmp_path, "lap", lambda found: presence(found)["desk"] == "here")
            assert own.cluster == before.cluster
            assert own.incarnation == 3
            assert {member.node: member.incarnation for member in after.members} == {desk["id"]: 1, lap["id"]: 3}


def test_removed_devices_stay_out_until_invited_anew(tmp_path: Path) -> None:
    with agent(tmp_path, "desk"), agent(tmp_path, "lap") as lap, agent(tmp_path, "phone"):
        token = invite(tmp_path, "desk", 2)
        join(tmp_path, "lap", token)
        join(tmp_path, "phone", token)
        wait_until(tmp_path, "phone", lambda found: sorted(presence(found).values()) == ["here", "here", "this device"])
        with OwnerLink(tmp_path / "phone") as owner:
            with pytest.raises(ShoalError, match=r"'toaster' is no device of this cluster: desk \("):
                owner.ask(RemoveDevice("toaster"), Done)
            with pytest.raises(DeviceRefused, match="`shoal leave` takes it out"):
                owner.ask(RemoveDevice("phone"), Done)
            assert owner.ask(RemoveDevice("lap"), Done).text.startswith("lap (")
        for name in ("desk", "phone"):
            wait_until(tmp_path, name, lambda found: set(presence(found)) == {"desk", "phone"})
        wait_until(tmp_path, "lap", lambda found: found.is_removed)
        with pytest.raises(DeviceRefused, match="has no say there"):
            invite(tmp_path, "lap")
        # The old token is void since the removal; a new one makes it a member with a new key.
        with pytest.raises(DeviceRefused, match="no such invitation here"):
            join(tmp_path, "lap", token)
        join(tmp_path, "lap", invite(tmp_path, "desk"))
        back = wait_until(tmp_path, "desk", lambda found: presence(found).get("lap") == "here")
        assert lap["id"] not in {member.node for member in back.members}

        with OwnerLink(tmp_path / "phone") as owner:
            assert owner.ask(LeaveCluster(), Done).text.startswith("left;")
        for name in ("desk", "lap"):
            wait_until(tmp_path, name, lambda found: set(presence(found)) == {"desk", "lap"})
        gone = wait_until(tmp_path, "phone", lambda found: not found.cluster)
        assert gone.members == ()
