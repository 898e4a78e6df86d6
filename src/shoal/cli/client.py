"""The client's side of a conversation with an agent, and an agent of one's own where none runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator

from shoal.errors import DeviceUnreachable
from shoal.runtime.channel import Channel, connect, split_address

DEFAULT_PORT = 7433
_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0


class OwnAgent:
    """An agent that lives as long as this object; its end is the end of its standard input."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, arguments: list[str]) -> OwnAgent:
        """Starts `shoal up` with these arguments on a free loopback port.

        Raises:
            DeviceUnreachable: it did not come up; its own words are on standard error.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "shoal", "up", "--json", "--until-eof", "--listen=127.0.0.1:0", *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=sys.platform != "win32",
        )  # fmt: skip
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)
            return cls(process, json.loads(line)["address"])
        except (TimeoutError, ValueError, KeyError) as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise DeviceUnreachable("the agent on this device did not start") from error

    async def stop(self) -> None:
        """Lets it leave; ends it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@contextlib.asynccontextmanager
async def agent_address(wanted: str | None, own_arguments: list[str]) -> AsyncIterator[str]:
    """The address to talk to: the agent that was named, the one that runs here, or one started for the occasion.

    Arguments for an agent (peers, folders, memory) always start one: a running agent has its own.
    """
    if wanted is not None:
        yield wanted
        return
    if not own_arguments and await answers("127.0.0.1", DEFAULT_PORT):
        yield f"127.0.0.1:{DEFAULT_PORT}"
        return
    agent = await OwnAgent.start(own_arguments)
    try:
        yield agent.address
    finally:
        await agent.stop()


async def open_channel(address: str) -> Channel:
    """Connects to an agent. Raises DeviceUnreachable, DeviceRefused, or ValueError for an address that is none."""
    host, port = split_address(address, default_port=DEFAULT_PORT)
    return await connect(host, port)


async def answers(host: str, port: int) -> bool:
    """Whether an agent is there."""
    try:
        channel = await connect(host, port)
    except DeviceUnreachable:
        return False
    await channel.close()
    return True
