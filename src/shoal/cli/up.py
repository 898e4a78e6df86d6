"""`shoal up`: this device's agent, in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from shoal import __version__
from shoal.errors import DeviceError, ShoalError
from shoal.runtime.agent import Agent, default_name
from shoal.runtime.channel import split_address
from shoal.runtime.engines import AgentOptions
from shoal.runtime.node.addresses import join_address
from shoal.runtime.node.interpreter import Interpreter, NodeOptions
from shoal.runtime.node.links import DEFAULT_PORT as DEFAULT_MEMBER_PORT
from shoal.runtime.node.metrics import MetricsPage
from shoal.runtime.node.neighbours import Neighbours
from shoal.runtime.node.owner import OwnerDesk
from shoal.runtime.node.priority import why_not_realtime
from shoal.runtime.node.state import DeviceState, default_folder
from shoal.units import format_bytes, parse_bytes

DEFAULT_PORT = 7433
_REACHED = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where this machine reaches itself when it listens everywhere."""
_LOOPBACK = ("127.", "::1", "localhost")


def agent_options(
    listen: str,
    peers: list[str],
    models: list[Path],
    memory: str | None,
    num_threads: int | None,
    compute_device: str | None,
    name: str | None,
    *,
    plain: bool,
    plain_frames: bool = False,
) -> AgentOptions:
    """Checks what was typed. Raises ValueError with one line."""
    host, port = split_address(listen, default_port=DEFAULT_PORT)
    addresses = [split_address(address, default_port=DEFAULT_PORT) for address in peers]
    far = [f"--peer {each}" for each, _ in addresses if not each.startswith(_LOOPBACK)]
    far += [] if host.startswith(_LOOPBACK) else [f"--listen {listen}"]
    if far and not plain:
        raise ValueError(
            f"{far[0]}: agents that meet by address prove nothing about who they are, and what they say can be read. Make "
            "the devices one cluster (`shoal up`, then `shoal invite` on one and `shoal join` on the others), or add "
            "--plain on a network you trust"
        )
    for folder in models:
        if not folder.is_dir():
            raise ValueError(f"--models {folder}: no such folder")
    return AgentOptions(
        host=host,
        port=port,
        name=name or default_name(),
        peers=addresses,
        model_folders=[folder.resolve() for folder in models],
        memory_limit_bytes=parse_bytes(memory) if memory else None,
        num_threads=num_threads,
        compute_device=compute_device,
        has_plain_frames=plain_frames,
    )


@dataclass(frozen=True)
class MemberOptions:
    """Links to members. `is_optional`: nobody asked for them, so the agent does without where they cannot be."""

    state: Path
    node: NodeOptions
    is_durable: bool = False
    is_optional: bool = False
    metrics_port: int | None = None
    """Where figures of the cluster are shown on this machine; 0 takes a free port."""


def member_options(
    state: Path | None,
    listen: str | None,
    *,
    may_default: bool,
    name: str | None,
    advertise: list[str],
    dial_only: bool,
    durable: bool,
    realtime: bool,
    journal: Path | None,
    metrics: int | None = None,
    discovery: bool = True,
) -> MemberOptions | None:
    """What was typed; None for an agent without a cluster. Raises ValueError with one line."""
    is_wanted = state is not None or listen not in (None, "none")
    if listen == "none" or not (is_wanted or may_default):
        if state is not None or advertise or dial_only or journal is not None or metrics is not None:
            raise ValueError(
                "--state, --advertise, --dial-only, --journal and --metrics are about members: leave out --members none"
            )
        return None
    for address in advertise:
        split_address(address, default_port=DEFAULT_MEMBER_PORT)
    return MemberOptions(
        state=state or default_folder(),
        node=NodeOptions(
            name=name or default_name(),
            listen=split_address(listen or f"0.0.0.0:{DEFAULT_MEMBER_PORT}", default_port=DEFAULT_MEMBER_PORT),
            advertise=() if dial_only else tuple(advertise),
            is_hidden=dial_only,
            journal=journal,
            is_realtime=realtime,
            # Whoever listens on loopback only has nobody near.
            is_discoverable=discovery and not (listen or "").startswith(_LOOPBACK),
        ),
        is_durable=durable,
        is_optional=not is_wanted,
        metrics_port=metrics,
    )


def up(options: AgentOptions, members: MemberOptions | None, *, as_json: bool, until_eof: bool) -> None:
    """Serves until Ctrl-C, SIGTERM or, where another process owns it, the end of standard input."""
    asyncio.run(_serve(options, members, as_json=as_json, until_eof=until_eof))


def _start_links(
    members: MemberOptions, agent: Agent, address: str, on_end: Callable[[], object]
) -> tuple[Interpreter, MetricsPage | None]:
    """The device's links to members, on a thread of their own, and the page of their figures; the agent works with members
    from then on.

    Raises:
        AddressInUse, DeviceError, CannotWrite: why they cannot be.
    """
    state = DeviceState(members.state, is_durable=members.is_durable)
    try:
        node = Interpreter(state, members.node, on_end=on_end)
    except BaseException:
        state.close()
        raise
    desk = OwnerDesk(node)
    agent.is_paused = lambda: state.is_paused
    agent.cluster = Neighbours(node, on_agent=agent.take_member, on_removed=agent.part_from)
    host = members.node.listen[0] if members.node.listen else "127.0.0.1"
    try:
        page = None if members.metrics_port is None else MetricsPage(members.metrics_port, desk.ask_status)
        state.announce_agent(join_address(_REACHED.get(host, host), node.port), address)
    except BaseException:
        node.stop()
        raise
    node.start()
    return node, page


async def _serve(options: AgentOptions, members: MemberOptions | None, *, as_json: bool, until_eof: bool) -> None:
    agent = Agent(options)
    await agent.start()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    node: Interpreter | None = None
    page: MetricsPage | None = None
    problem = ""
    if members is not None:
        address = join_address(_REACHED.get(options.host, options.host), agent.port)
        try:
            node, page = _start_links(members, agent, address, lambda: loop.call_soon_threadsafe(ended.set))
        except ShoalError as error:
            if not members.is_optional:
                await agent.stop()
                raise
            problem = str(error)
    _announce(options, agent.port, node, problem, page, as_json=as_json)
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
            loop.add_signal_handler(number, ended.set)
    if until_eof:
        watch_eof(loop, ended.set)
    try:
        await ended.wait()
    finally:
        if page is not None:
            page.close()
        if node is not None:
            await asyncio.to_thread(node.stop)
        await agent.stop()
    if node is not None and node.failure is not None:
        raise DeviceError(f"the links to members ended: {node.failure}") from node.failure


def watch_eof(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Calls `call` on the loop once standard input ends."""
    threading.Thread(target=_call_at_eof, args=(loop, call), daemon=True).start()


def _call_at_eof(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    while os.read(0, 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop ended by itself
        loop.call_soon_threadsafe(call)


def _announce(
    options: AgentOptions,
    port: int,
    node: Interpreter | None,
    problem: str,
    page: MetricsPage | None,
    *,
    as_json: bool,
) -> None:
    address = f"{options.host}:{port}"
    if as_json:
        line = {"event": "listening", "address": address, "device": options.name}
        if node is not None:
            line |= {"members": f"{(node.options.listen or ('',))[0]}:{node.port}", "id": node.me}
        if page is not None:
            line["metrics"] = f"127.0.0.1:{page.port}"
        print(json.dumps(line), flush=True)  # noqa: T201
        return
    console = Console(stderr=True)
    console.print(f"shoal {__version__}: [bold]{options.name}[/] listens on [bold]{address}[/]")
    if options.memory_limit_bytes is not None:
        console.print(f"shoal may take {format_bytes(options.memory_limit_bytes)} here")
    if not options.host.startswith(_LOOPBACK):
        console.print(
            "[yellow]plain:[/] whoever reaches this address can use this device, and read what it says to other agents"
        )
    for host, peer_port in options.peers:
        console.print(f"peer {host}:{peer_port}")
    if node is not None:
        known = len(node.core.roster.roster.members)
        cluster = (
            f"in a cluster of {known}" if known else "in no cluster yet: `shoal invite` here, or `shoal join` another's"
        )
        console.print(f"members reach it at {', '.join(node.addresses()) or 'no address, it dials'}; {cluster}")
        if node.options.is_realtime and (refusal := why_not_realtime()):
            console.print(f"[yellow]warning:[/] {refusal}")
    if page is not None:
        console.print(f"figures of the cluster at http://127.0.0.1:{page.port}/metrics")
    if problem:
        console.print(f"[yellow]warning:[/] no links to members: {problem}")
    console.print("Ctrl-C leaves.")
