"""`shoal doctor`: what keeps this device's cluster from working, and what to do about it."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console

from shoal.compute.backend import compute_devices
from shoal.errors import DeviceUnreachable
from shoal.runtime.channel import split_address
from shoal.runtime.node.links import DEFAULT_PORT
from shoal.runtime.node.owner import AskCluster, ClusterStatus, MemberStatus, OwnerLink
from shoal.units import format_age, format_bytes

DISK_BYTES_MIN = 64 << 20
ANSWER_S_MAX = 0.5
_CLOCK_FROM_S = 1_735_689_600.0
"""2025: before it, no clock is right."""
_LOOPBACK = ("127.", "[::1]")


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. `advice` is empty where all is well."""

    subject: str
    text: str
    advice: str = ""

    @property
    def is_fine(self) -> bool:
        return not self.advice


def doctor(state: Path, *, as_json: bool) -> bool:
    """Looks, prints, and says whether all is well."""
    findings = list(examine(state))
    if as_json:
        print(msgspec.json.encode(findings).decode())  # noqa: T201
    else:
        console = Console(highlight=False)
        for each in findings:
            console.print(
                f"[green]ok[/]    {each.subject}: {each.text}"
                if each.is_fine
                else f"[red]wrong[/] {each.subject}: {each.text}"
            )
            if not each.is_fine:
                console.print(f"      {each.advice}")
    return all(each.is_fine for each in findings)


def examine(state: Path) -> Iterator[Finding]:
    """This device first, then its cluster as its agent sees it."""
    yield _disk(state)
    yield _clock(time.time())
    yield _compute()
    began_s = time.monotonic()
    try:
        with OwnerLink(state, timeout_s=10.0) as owner:
            cluster = owner.ask(AskCluster(), ClusterStatus)
    except DeviceUnreachable as error:
        yield Finding("agent", str(error), "Start `shoal up` and look again: the rest can only be seen from inside.")
        return
    took_s = time.monotonic() - began_s
    slow = "It is busy or out of memory: members may take it for frozen." if took_s > ANSWER_S_MAX else ""
    yield Finding("agent", f"answers in {took_s * 1e3:.0f} ms", slow)
    yield from (_door(address) for address in cluster.addresses)
    yield from judge(cluster)


def _disk(state: Path) -> Finding:
    folder = state
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    advice = "" if free_bytes >= DISK_BYTES_MIN else "Make room: a device that cannot write acknowledges nothing, and stops."
    return Finding("disk", f"{format_bytes(free_bytes)} free at {state}", advice)


def _compute() -> Finding:
    """With what this device can compute; `--device` takes the names."""
    found = [
        f"{device.name} ({device.description.strip()}"
        + (f", {format_bytes(device.memory_total_bytes)})" if device.kind != "cpu" else ")")
        for device in compute_devices()
    ]
    return Finding("compute", ", ".join(found))


def _clock(since_1970_s: float) -> Finding:
    day = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(since_1970_s))
    advice = "" if since_1970_s >= _CLOCK_FROM_S else "Set the date: invitations and stamps run out by it."
    return Finding("clock", day, advice)


def _door(address: str) -> Finding:
    """Whether this device answers where it says that it does; a firewall may still keep others out."""
    try:
        host, port = split_address(address, default_port=DEFAULT_PORT)
        socket.create_connection((host, port), timeout=3.0).close()
    except (OSError, ValueError) as error:
        return Finding(
            "address", f"{address} is told to members, and does not answer ({error})",
            "Start `shoal up` with the right --advertise HOST:PORT, or with --dial-only where nobody can reach it.",
        )  # fmt: skip
    return Finding("address", f"{address} answers from here")


def judge(cluster: ClusterStatus) -> Iterator[Finding]:
    """What is wrong in a cluster as one of its devices sees it; a function of the status alone."""
    if cluster.is_removed:
        yield Finding("cluster", "this device was removed", "Ask a member for `shoal invite`, and `shoal join` anew.")
        return
    if not cluster.cluster:
        yield Finding(
            "cluster", "this device is in none", "`shoal invite` here starts one; `shoal join TOKEN` enters another's."
        )
        return
    yield Finding("cluster", f"{cluster.cluster[:8]}, {len(cluster.members)} devices")
    if cluster.discovery not in ("on", "off"):
        yield Finding(
            "multicast", f"no mDNS here: {cluster.discovery}",
            "Members are found by the addresses they had; let UDP port 5353 through, or start `shoal up --no-discovery`.",
        )  # fmt: skip
    elif cluster.discovery == "on":
        yield Finding("multicast", "members on this network are found by mDNS")
    others = [member for member in cluster.members if member.node != cluster.me]
    if others and cluster.addresses and all(address.startswith(_LOOPBACK) for address in cluster.addresses):
        yield Finding(
            "address", "members are told loopback addresses only",
            "Devices elsewhere cannot dial this one: start `shoal up --members 0.0.0.0:7434`.",
        )  # fmt: skip
    for member in others:
        yield _member(member, others_have_no_address=not cluster.addresses)
    names = {member.node: member.name for member in cluster.members}
    for link in cluster.links:
        if link.state == "down":
            yield Finding(
                f"link {names.get(link.source, link.source[:8])} -> {names.get(link.target, link.target[:8])}",
                "nothing comes through, though both are here",
                "Control goes by a third device; look at firewalls and routes between the two, in this direction.",
            )
    for nodes in cluster.waiting.values():
        yield Finding(
            "invitation", f"{len(nodes)} devices came by one invitation that is for fewer",
            f"`shoal confirm` the right ones of {', '.join(node[:8] for node in nodes)}, `shoal remove` the others.",
        )  # fmt: skip
    for problem in cluster.problems:
        yield Finding(
            "state", problem, "Other members bring what is missing; where groups lost their votes, join them again."
        )


def _member(member: MemberStatus, *, others_have_no_address: bool) -> Finding:
    subject = f"member {member.name or member.node[:8]}"
    since = f" for {format_age(member.since_s)}" if member.since_s is not None else ""
    if member.link and member.is_trusted:
        return Finding(subject, f"{member.presence}{since}, link {member.link}")
    if member.link:
        return Finding(
            subject, "there is a link, and no trust yet",
            "It was away for more than a week, or this device was: let either meet a third member first.",
        )  # fmt: skip
    if member.presence.startswith("here"):
        return Finding(subject, f"{member.presence}{since}, but not over a link of ours: {member.problem}", _REACH)
    if not member.addresses and others_have_no_address:
        return Finding(
            subject, "neither of us has an address", "One of the two must be reachable: `shoal up --advertise HOST:PORT`."
        )
    return Finding(
        subject, f"{member.presence}{since} ({member.problem or 'not dialled yet'})",
        "Is it on, and does `shoal up` run there? " + _REACH,
    )  # fmt: skip


_REACH = (
    "Look whether a firewall lets TCP through to the port of --members (7434) on either of the two: one direction is enough."
)
