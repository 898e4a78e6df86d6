"""What the doctor makes of a cluster, and of a device without one."""

from __future__ import annotations

from pathlib import Path

from shoal.cli.doctor import _clock, examine, judge
from shoal.ids import NodeId
from shoal.runtime.node.owner import ClusterStatus, LinkStatus, MemberStatus

ME, LAP, PHONE = (NodeId(letter * 32) for letter in "abc")


def member(node: NodeId, name: str, presence: str, **fields: object) -> MemberStatus:
    return MemberStatus(node, name, presence, 1, 4.0, ("192.0.2.9:7434",), **fields)  # type: ignore[arg-type]


def cluster(*members: MemberStatus, links: tuple[LinkStatus, ...] = (), **fields: object) -> ClusterStatus:
    known = {
        "me": ME, "name": "desk", "cluster": "0123456789abcdef", "is_removed": False, "incarnation": 1,
        "addresses": ("192.0.2.1:7434",), "waiting": {}, "groups": {}, "counters": {}, **fields,
    }  # fmt: skip
    return ClusterStatus(members=(member(ME, "desk", "this device"), *members), links=links, **known)  # type: ignore[arg-type]


def wrong(status: ClusterStatus) -> list[str]:
    return [f"{each.subject}: {each.text}" for each in judge(status) if not each.is_fine]


def test_a_cluster_in_order() -> None:
    assert wrong(cluster(member(LAP, "lap", "here", link="to 192.0.2.9:7434", is_trusted=True))) == []


def test_each_trouble_has_its_line() -> None:
    down = LinkStatus(LAP, PHONE, "down", None, None, None)
    status = cluster(
        member(LAP, "lap", "gone", problem="192.0.2.9:7434 cannot be reached (No route to host)"),
        member(PHONE, "phone", "here, link cut", problem="timed out"),
        links=(down,),
        addresses=("127.0.0.1:7434",),
        waiting={"x": (LAP, PHONE)},
        problems=("log is damaged",),
    )
    assert wrong(status) == [
        "address: members are told loopback addresses only",
        "member lap: gone for 4.0 s (192.0.2.9:7434 cannot be reached (No route to host))",
        "member phone: here, link cut for 4.0 s, but not over a link of ours: timed out",
        "link lap -> phone: nothing comes through, though both are here",
        "invitation: 2 devices came by one invitation that is for fewer",
        "state: log is damaged",
    ]


def test_devices_that_are_in_none() -> None:
    assert wrong(cluster(cluster="")) == ["cluster: this device is in none"]
    assert wrong(cluster(is_removed=True)) == ["cluster: this device was removed"]


def test_without_an_agent_it_says_so(tmp_path: Path) -> None:
    found = {each.subject: each for each in examine(tmp_path / "nowhere")}
    assert found["disk"].is_fine
    assert "no agent runs from" in found["agent"].text
    assert not _clock(0.0).is_fine
