"""`shoal up`: this device's agent, in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from shoal import __version__
from shoal.runtime.agent import Agent, AgentOptions, default_name
from shoal.runtime.channel import split_address
from shoal.units import format_bytes, parse_bytes

DEFAULT_PORT = 7433
_LOOPBACK = ("127.", "::1", "localhost")


def agent_options(
    listen: str,
    peers: list[str],
    models: list[Path],
    memory: str | None,
    num_threads: int | None,
    compute_device: str | None,
    name: str | None,
) -> AgentOptions:
    """Checks what was typed. Raises ValueError with one line."""
    host, port = split_address(listen, default_port=DEFAULT_PORT)
    for folder in models:
        if not folder.is_dir():
            raise ValueError(f"--models {folder}: no such folder")
    return AgentOptions(
        host=host,
        port=port,
        name=name or default_name(),
        peers=[split_address(address, default_port=DEFAULT_PORT) for address in peers],
        model_folders=[folder.resolve() for folder in models],
        memory_limit_bytes=parse_bytes(memory) if memory else None,
        num_threads=num_threads,
        compute_device=compute_device,
    )


def up(options: AgentOptions, *, as_json: bool, until_eof: bool) -> None:
    """Serves until Ctrl-C, SIGTERM or, where another process owns it, the end of standard input."""
    asyncio.run(_serve(options, as_json=as_json, until_eof=until_eof))


async def _serve(options: AgentOptions, *, as_json: bool, until_eof: bool) -> None:
    agent = Agent(options)
    await agent.start()
    _announce(options, agent.port, as_json=as_json)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
            loop.add_signal_handler(number, ended.set)
    if until_eof:
        watch_eof(loop, ended.set)
    try:
        await ended.wait()
    finally:
        await agent.stop()


def watch_eof(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Calls `call` on the loop once standard input ends."""
    threading.Thread(target=_call_at_eof, args=(loop, call), daemon=True).start()


def _call_at_eof(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    while os.read(0, 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop ended by itself
        loop.call_soon_threadsafe(call)


def _announce(options: AgentOptions, port: int, *, as_json: bool) -> None:
    address = f"{options.host}:{port}"
    if as_json:
        print(json.dumps({"event": "listening", "address": address, "device": options.name}), flush=True)  # noqa: T201
        return
    console = Console(stderr=True)
    console.print(f"shoal {__version__}: [bold]{options.name}[/] listens on [bold]{address}[/]")
    if options.memory_limit_bytes is not None:
        console.print(f"shoal may take {format_bytes(options.memory_limit_bytes)} here")
    if not options.host.startswith(_LOOPBACK):
        console.print(
            "[yellow]warning:[/] links are not authenticated or encrypted yet: whoever reaches this address can use this "
            "device and read what passes. Listen only on a network you trust."
        )
    for host, peer_port in options.peers:
        console.print(f"peer {host}:{peer_port}")
    console.print("Ctrl-C leaves.")
