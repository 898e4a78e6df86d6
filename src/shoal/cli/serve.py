"""`shoal serve`: OpenAI's API over HTTP, with this device's agent in the same process, or over one that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import secrets
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from shoal import __version__
from shoal.cli.client import DEFAULT_PORT as AGENT_PORT
from shoal.cli.client import answers, open_channel
from shoal.cli.up import watch_eof
from shoal.errors import AddressInUse, DeviceUnreachable, LinkClosed
from shoal.runtime.agent import Agent, Request
from shoal.runtime.channel import split_address
from shoal.runtime.engines import AgentOptions, Send
from shoal.runtime.messages import (
    Detokenized,
    Embedded,
    EngineDescription,
    EngineOptions,
    Failed,
    Finished,
    LoadModel,
    Message,
    Models,
    Prompt,
    Tokenized,
    Unloaded,
)
from shoal.runtime.node.owner import AskCluster, ClusterStatus, OwnerLink
from shoal.runtime.node.state import default_folder, runs_from
from shoal.serving.app import make_app
from shoal.serving.catalogue import Catalogue, Runtime
from shoal.serving.connection import http_server
from shoal.serving.gate import GateOptions
from shoal.serving.metrics import Metrics
from shoal.serving.service import Service
from shoal.transport.link import listen

DEFAULT_PORT = 8080
_LAST = (Finished, Failed, Embedded, Models, Unloaded, Tokenized, Detokenized, Prompt)


@dataclass(frozen=True)
class Settings:
    """What was typed. `attach` is another agent's address; without it one is started from `agent`."""

    host: str
    port: int
    models: Sequence[str]
    agent: AgentOptions
    attach: str | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    api_keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    keep_alive_s: float | None = None
    queue_max: int = 256
    as_json: bool = False
    until_eof: bool = False


class RemoteAgent:
    """An agent that another process runs; a connection per request, whose end cancels it."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def serve(self, request: Request, send: Send) -> None:
        channel = await open_channel(self._address)
        try:
            await channel.send(request)
            while True:
                message: Message = await channel.receive()
                await send(message)
                if isinstance(message, _LAST) or (isinstance(request, LoadModel) and isinstance(message, EngineDescription)):
                    return
        except LinkClosed as error:
            raise DeviceUnreachable(f"the agent at {self._address} is gone ({error})") from error
        finally:
            await channel.close()


def check_door(host: str, api_keys: Sequence[str]) -> None:
    """Raises ValueError where other devices could come in without a key."""
    if not _is_loopback(host) and not api_keys:
        raise ValueError(
            f"{host} is reached by other devices, so a key is needed: give --api-key or set SHOAL_API_KEY, "
            f"for example to sk-{secrets.token_urlsafe(24)}"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def serve(settings: Settings) -> None:
    """Serves until Ctrl-C, SIGTERM or, where another process owns it, the end of standard input."""
    check_door(settings.host, settings.api_keys)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))])
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
            loop.add_signal_handler(number, ended.set)
    if settings.until_eof:
        watch_eof(loop, ended.set)
    # The door first: an address in use should not cost the loading of a model.
    listener = listen(settings.host, settings.port)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        runtime, agent_address = await stack.enter_async_context(_runtime(settings))
        catalogue = Catalogue(
            runtime,
            settings.models,
            options=settings.engine,
            keep_alive_s=settings.keep_alive_s,
            queue_max=settings.queue_max,
        )
        stack.push_async_callback(catalogue.close)
        await catalogue.start()
        metrics = Metrics()
        metrics.watch(catalogue)
        metrics.watch_cluster(_ask_cluster)
        app = make_app(
            Service(catalogue, metrics),
            GateOptions(api_keys=settings.api_keys, hosts=[settings.host, *settings.hosts], origins=settings.origins),
        )
        await stack.enter_async_context(http_server(app, listener))
        _announce(settings, listener.getsockname()[1], agent_address, catalogue)
        await ended.wait()


def _ask_cluster() -> ClusterStatus | None:
    """What the device that runs here knows of its cluster; None where none runs. Raises a ShoalError as `OwnerLink` does."""
    folder = default_folder()
    if not runs_from(folder):
        return None
    with OwnerLink(folder, timeout_s=2.0) as owner:
        return owner.ask(AskCluster(), ClusterStatus)


@contextlib.asynccontextmanager
async def _runtime(settings: Settings) -> AsyncIterator[tuple[Runtime, str]]:
    """The agent that answers, and its address."""
    if settings.attach is not None:
        channel = await open_channel(settings.attach)
        await channel.close()
        yield RemoteAgent(settings.attach), settings.attach
        return
    agent = Agent(settings.agent)
    try:
        await agent.start()
    except AddressInUse as error:
        address = f"{settings.agent.host}:{settings.agent.port}"
        raise AddressInUse(f"{error}, or, if that is an agent of yours, use it with --agent {address}") from None
    try:
        yield agent, f"{settings.agent.host}:{agent.port}"
    finally:
        await agent.stop()


def agent_of(attach: str | None, *, may_find: bool) -> str | None:
    """The agent to use: the one that was named, or with `may_find` the one that runs here; None to start one.

    Raises:
        ValueError: an address that is none.
    """
    if attach is not None:
        host, port = split_address(attach, default_port=AGENT_PORT)
        return f"{host}:{port}"
    if may_find and asyncio.run(answers("127.0.0.1", AGENT_PORT)):
        return f"127.0.0.1:{AGENT_PORT}"
    return None


def _announce(settings: Settings, port: int, agent_address: str, catalogue: Catalogue) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}"
    names = [model.id for model in catalogue.models]
    if settings.as_json:
        line = {"event": "serving", "url": url, "agent": agent_address, "models": names}
        print(json.dumps(line), flush=True)  # noqa: T201
        return
    console = Console(stderr=True)
    console.print(f"shoal {__version__}: OpenAI's API at [bold]{url}/v1[/]")
    console.print(f"agent at {agent_address}; metrics at {url}/metrics, description at {url}/openapi.json")
    if settings.models:
        console.print(f"loading {escape(', '.join(names))}; {url}/readyz says when it is there")
    elif names:
        console.print(f"models, loaded when asked for: {escape(', '.join(names))}")
    else:
        console.print("[yellow]no models found:[/] give one, or a folder with --models")
    if not _is_loopback(settings.host):
        console.print("[yellow]note:[/] keys and texts pass unencrypted over HTTP: use a network you trust, or a TLS proxy.")
    console.print("Ctrl-C leaves.")
