"""`shoal status`: devices, what they have and what they hold; members and links, with the age of each figure."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from shoal.cli.client import open_channel
from shoal.errors import DeviceUnreachable, ShoalError
from shoal.ids import NodeId
from shoal.runtime.messages import AskStatus, DeviceStatus, Status
from shoal.runtime.node.owner import Aged, AskCluster, ClusterStatus, LinkStatus, MemberStatus, OwnerLink
from shoal.runtime.node.state import agent_address
from shoal.units import format_age, format_bytes, format_seconds

WATCH_EVERY_S = 1.0


def status(agent: str | None, state: Path, *, default_agent: str, watch: bool, as_json: bool) -> None:
    """Asks the agent at `agent`, or the one that runs from `state`, or the one at `default_agent`.

    Raises:
        DeviceUnreachable: none answers.
    """
    if not watch:
        _show(*_ask(agent, state, default_agent), as_json=as_json)
        return
    if as_json or not sys.stdout.isatty():
        while True:
            _show(*_ask(agent, state, default_agent), as_json=as_json)
            time.sleep(WATCH_EVERY_S)
    with Live(console=Console(), auto_refresh=False, screen=True) as live:
        while True:
            try:
                live.update(_picture(*_ask(agent, state, default_agent)), refresh=True)
            except ShoalError as error:
                live.update(f"[red]{error}[/]", refresh=True)
            time.sleep(WATCH_EVERY_S)


def _ask(agent: str | None, state: Path, default_agent: str) -> tuple[Status, ClusterStatus | None]:
    cluster = None
    if agent is None:
        try:
            with OwnerLink(state, timeout_s=10.0) as owner:
                cluster = owner.ask(AskCluster(), ClusterStatus)
            agent = agent_address(state)
        except DeviceUnreachable:
            pass
    return asyncio.run(_ask_agent(agent or default_agent)), cluster


async def _ask_agent(address: str) -> Status:
    channel = await open_channel(address)
    try:
        await channel.send(AskStatus())
        return await channel.expect(Status, timeout_s=30.0)
    finally:
        await channel.close()


def _show(answer: Status, cluster: ClusterStatus | None, *, as_json: bool) -> None:
    if as_json:
        whole = msgspec.to_builtins(answer)
        if cluster is not None:
            whole["cluster"] = msgspec.to_builtins(cluster)
        print(msgspec.json.encode(whole).decode(), flush=True)  # noqa: T201
        return
    Console().print(_picture(answer, cluster))


def _picture(answer: Status, cluster: ClusterStatus | None) -> RenderableType:
    table = Table("device", "address", "round trip", "system", "cores", "memory for models", "holds", box=None)
    for device in answer.devices:
        table.add_row(*_row(device))
    return Group(table, *_cluster_parts(cluster)) if cluster is not None else table


def _row(device: DeviceStatus) -> list[str]:
    survey = device.survey
    if survey is None:
        return ["?", device.address, "-", f"[red]{device.problem}[/]", "", "", ""]
    return [
        survey.device,
        device.address,
        format_seconds(device.round_trip_s) if device.round_trip_s else "here",
        survey.system,
        str(survey.num_cores),
        f"{format_bytes(survey.memory_usable_bytes)} of {format_bytes(survey.memory_total_bytes)}",
        ", ".join([*(["paused"] if survey.is_paused else []), *survey.engines]) or "-",
    ]


def _cluster_parts(cluster: ClusterStatus) -> list[RenderableType]:
    parts: list[RenderableType] = [""]
    if cluster.is_removed:
        return [*parts, "[red]this device was removed from its cluster[/]: `shoal join` another by an invitation"]
    if not cluster.cluster:
        return [*parts, "in no cluster: `shoal invite` starts one, `shoal join` enters another's"]
    members = Table("member", "id", "presence", "free memory", "idle", "link", box=None, title_justify="left")
    for member in cluster.members:
        members.add_row(*_member_row(member))
    parts += [f"cluster {cluster.cluster[:8]}, {len(cluster.members)} devices", members]
    if cluster.links:
        names = {member.node: member.name for member in cluster.members}
        links = Table("link", "state", "rate", "round trip", "load", "heard", box=None)
        for link in cluster.links:
            links.add_row(*_link_row(link, names))
        parts += ["", links]
    parts += [f"group {name}: {text}" for name, text in cluster.groups.items()]
    for nodes in cluster.waiting.values():
        waiting = ", ".join(node[:8] for node in nodes)
        parts.append(
            f"[yellow]more devices came by one invitation than it is for[/]: `shoal confirm` the right one: {waiting}"
        )
    parts += [f"[red]{problem}[/]" for problem in cluster.problems]
    return parts


def _member_row(member: MemberStatus) -> list[str]:
    since = f" for {format_age(member.since_s)}" if member.since_s is not None else ""
    idle = member.processor_idle
    return [
        member.name or "?",
        member.node[:8],
        member.presence + since,
        _aged(member.memory_free_bytes, format_bytes),
        f"{idle.value:.0%} ({format_age(idle.age_s)})" if idle is not None else "?",
        member.link or (f"[red]{member.problem}[/]" if member.problem else "-"),
    ]


def _link_row(link: LinkStatus, names: dict[NodeId, str]) -> list[str]:
    return [
        f"{names.get(link.source, link.source[:8])} -> {names.get(link.target, link.target[:8])}",
        link.state,
        _aged(link.rate_bytes_per_s, lambda value: f"{format_bytes(value)}/s"),
        _aged(link.round_trip_s, format_seconds),
        _aged(link.load_bytes_per_s, lambda value: f"{format_bytes(value)}/s"),
        f"{format_age(link.heard_age_s)} ago" if link.heard_age_s is not None else "-",
    ]


def _aged(figure: Aged | None, show: Callable[[float], str]) -> str:
    if figure is None:
        return "?"
    return f"{'at least ' if figure.is_lower_bound else ''}{show(figure.value)} ({format_age(figure.age_s)})"
