"""Real processes on loopback: who is here, who went, who leads. The figures are measured by `make bench-members`; here are
bounds that hold on a busy machine too."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from shoal.lab.member_cluster import MemberProcess, make_group, member_cluster, wait_active
from shoal.runtime.node import clock

pytestmark = pytest.mark.slow


def gone(witness: MemberProcess, lost: MemberProcess, since: int, *, within_s: float = 5.0) -> float:
    """When the witness found that it is gone, on the clock of all."""
    found = witness.wait_for(
        lambda line: line["is"] == "MemberGone" and line["node"] == lost.node, since=since, within_s=within_s
    )
    return float(found["at_s"])


def test_a_killed_process_is_known_at_once_and_another_leads(tmp_path: Path) -> None:
    with member_cluster(tmp_path, 4) as devices:
        make_group(devices, "run")
        leader, *others = devices
        marks = [len(device.lines) for device in others]
        killed_s = clock.now_s()
        leader.kill()
        noticed = [gone(device, leader, mark) - killed_s for device, mark in zip(others, marks, strict=True)]
        # A closed connection, not silence (0.5 s): 50 ms is the promise, a busy machine gets some grace.
        assert max(noticed) < 0.25
        for device, mark in zip(others, marks, strict=True):
            led = device.wait_for(
                lambda line: line["is"] == "LeaderChanged" and line["leader"] not in (None, leader.node), since=mark
            )
            assert led["at_s"] - killed_s < 1.0
            wait_active(device, "run", others, since=mark)
        assert len({line["leader"] for device in others for line in device.told("RecordAdopted")[-1:]}) == 1

        # It comes back from its disk: the same device, known as a later incarnation.
        again = MemberProcess(leader.folder, leader.name)
        devices.append(again)
        assert (again.node, again.incarnation) == (leader.node, leader.incarnation + 1)
        for device in others:
            device.wait_for(
                lambda line: line["is"] == "MemberHere" and line["node"] == leader.node and line["incarnation"] == 2
            )
        status = again.ask("status", answer="status")
        assert {member["node"] for member in status["members"]} == {device.node for device in devices}


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be frozen by a signal there")
def test_a_frozen_process_is_known_within_a_second_and_forgiven(tmp_path: Path) -> None:
    with member_cluster(tmp_path, 3) as devices:
        make_group(devices, "run")
        frozen, *others = devices
        marks = [len(device.lines) for device in others]
        frozen_s = clock.now_s()
        os.kill(frozen.process.pid, signal.SIGSTOP)
        try:
            noticed = [gone(device, frozen, mark) - frozen_s for device, mark in zip(others, marks, strict=True)]
            assert 0.2 < max(noticed) < 1.0
            for device, mark in zip(others, marks, strict=True):
                wait_active(device, "run", others, since=mark)
        finally:
            os.kill(frozen.process.pid, signal.SIGCONT)
        for device, mark in zip(others, marks, strict=True):
            device.wait_for(lambda line: line["is"] == "MemberHere" and line["node"] == frozen.node, since=mark)


def test_who_leaves_politely_is_not_searched_for(tmp_path: Path) -> None:
    with member_cluster(tmp_path, 3) as devices:
        *others, leaver = devices
        marks = [len(device.lines) for device in others]
        left_s = clock.now_s()
        leaver.stop()
        for device, mark in zip(others, marks, strict=True):
            assert gone(device, leaver, mark) - left_s < 1.0


def test_a_group_decides_over_real_links(tmp_path: Path) -> None:
    """All events of a group, and what they cost: more than the network's own time is a defect."""
    with member_cluster(tmp_path, 3, "--link-hold=0.05") as devices:
        make_group(devices, "run")
        leader, second, third = devices
        first = mark = len(leader.lines)
        second.say("link", "run", third.node, "down")
        cut = [third.node, second.node]
        leader.wait_for(lambda line: line["is"] == "RecordAdopted" and cut in line["cut_links"], since=mark)
        mark = len(leader.lines)
        second.say("link", "run", third.node, "up")
        leader.wait_for(lambda line: line["is"] == "RecordAdopted" and not line["cut_links"], since=mark)
        mark = len(leader.lines)
        third.say("exit", "run")
        wait_active(leader, "run", [leader, second], since=mark)
        mark = len(leader.lines)
        third.say("enter", "run")
        wait_active(leader, "run", devices, since=mark)
        decided = [line["decide_s"] for line in leader.told("Decided", since=first)]
        assert len(decided) >= 5
        assert sorted(decided)[len(decided) // 2] < 0.02


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="so many sockets need a limit that can be raised")
def test_ten_thousand_connections_that_say_nothing_cost_little_and_keep_nobody_from_deciding(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 11_000:
        pytest.skip(f"this user may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 11_000), hard))
    silent: list[socket.socket] = []
    try:
        with member_cluster(tmp_path, 3) as devices:
            make_group(devices, "run")
            leader, _, last = devices
            port = leader.told("here")[0]["port"]
            process = psutil.Process(leader.process.pid)
            before_bytes = process.memory_info().rss
            for _ in range(10_000):
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", port))
                silent.append(sock)
            mark = len(leader.lines)
            last.say("exit", "run")
            wait_active(leader, "run", devices[:2], since=mark)
            mark = len(leader.lines)
            last.say("enter", "run")
            wait_active(leader, "run", devices, since=mark)
            counters = leader.ask("status", answer="status")["counters"]
            assert not leader.told("MemberGone")
            assert process.num_fds() < 1000
            assert process.memory_info().rss - before_bytes < 32e6
            assert counters["num_evicted"] > 0
    finally:
        for sock in silent:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
