"""Real agents with real workers on loopback, for tests that kill them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from shoal.cli.client import OwnAgent, open_channel
from shoal.cli.run import Answer, ask
from shoal.compute.model import Model
from shoal.errors import ShoalError
from shoal.runtime.messages import AskStatus, EngineOptions, Generate, Sampling, Status


@dataclass
class Cluster:
    """Agents by index; the first is the head and knows the others."""

    agents: list[OwnAgent]

    @property
    def head(self) -> OwnAgent:
        return self.agents[0]

    async def ask(self, request: Generate, *, on_text: Callable[[str], None] = lambda _: None) -> Answer:
        """Where the request leaves open who holds what, all agents take part: planned, so small a model stays on one."""
        num_devices, options = len(self.agents), request.options
        if num_devices > 1 and options.layer_counts is None and options.placement == "planned":
            counts = _even_counts(Path(request.model), num_devices)
            request = msgspec.structs.replace(request, options=msgspec.structs.replace(options, layer_counts=counts))
        return await ask(self.head.address, request, show=on_text, status=lambda _: None)

    async def status(self, index: int = 0) -> Status:
        channel = await open_channel(self.agents[index].address)
        try:
            await channel.send(AskStatus())
            return await channel.expect(Status, timeout_s=10.0)
        finally:
            await channel.close()

    def workers(self, index: int) -> list[psutil.Process]:
        """Worker processes of one agent."""
        try:
            return psutil.Process(self.agents[index].pid).children()
        except psutil.NoSuchProcess:
            return []


def _even_counts(path: Path, num_devices: int) -> list[int] | None:
    """None for what is no model."""
    if not path.is_file():
        return None
    with contextlib.suppress(ShoalError), contextlib.closing(Model(path)) as model:
        num_layers = model.shape.num_layers
        return [num_layers * (1 + index) // num_devices - num_layers * index // num_devices for index in range(num_devices)]
    return None


@contextlib.asynccontextmanager
async def cluster(
    num_devices: int, folder: Path, *arguments: str, own: dict[int, list[str]] | None = None
) -> AsyncGenerator[Cluster, None]:
    """`arguments` go to every agent, `own[index]` to one."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    async with contextlib.AsyncExitStack() as stack:
        agents: list[OwnAgent] = []
        peers: list[str] = []
        for index in reversed(range(num_devices)):
            peer_arguments = [f"--peer={address}" for address in peers] if index == 0 else []
            particular = (own or {}).get(index, [f"--models={folder}"])
            agent = await OwnAgent.start([f"--name=device-{index}", *arguments, *peer_arguments, *particular])
            stack.push_async_callback(agent.stop)
            peers.insert(0, agent.address)
            agents.insert(0, agent)
        yield Cluster(agents)


def request(path: Path, *, tokens: int = 16, **changes: object) -> Generate:
    """A greedy continuation of a fixed text that never ends early."""
    fields: dict[str, object] = {
        "model": str(path),
        "prompt": "The sea is the old friend of the sailor",
        "max_tokens": tokens,
        "ignore_end": True,
        "sampling": Sampling(temperature=0.0),
        "options": EngineOptions(num_threads=1),
        **changes,
    }
    return Generate(**fields)  # type: ignore[arg-type]


async def wait_until(condition: Callable[[], bool], *, within_s: float) -> float:
    """Seconds until `condition` held; fails when it does not in time."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - started_s


def ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or only waits to be reaped."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
