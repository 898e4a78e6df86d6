"""How far another agent is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from shoal.errors import LinkClosed
from shoal.runtime.channel import LINK_BYTES_PER_S_MAX, Channel
from shoal.runtime.messages import MESSAGE_BYTES_MAX, Ping, Pong


@asynccontextmanager
async def to_an_agent(loads: list[int]) -> AsyncGenerator[Channel, None]:
    """A channel whose other end answers pings, and notes how many bytes they carry."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        near = Channel(reader, writer, peer="near")
        try:
            while isinstance(ping := await near.receive(), Ping):
                loads.append(len(ping.load))
                await near.send(Pong())
        except LinkClosed:
            await near.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=MESSAGE_BYTES_MAX)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=MESSAGE_BYTES_MAX)
        far = Channel(reader, writer, peer="far")
        try:
            yield far
        finally:
            await far.close()


def test_a_rate_is_measured_where_it_is_not_known() -> None:
    async def scenario() -> None:
        loads: list[int] = []
        async with to_an_agent(loads) as channel:
            measured = await channel.distance()
            assert max(loads) > 0
            assert 0.0 < measured.bytes_per_s <= LINK_BYTES_PER_S_MAX
            loads.clear()
            known = await channel.distance(known_bytes_per_s=3e6)
            assert known.bytes_per_s == 3e6
            assert 0.0 < known.round_trip_s < 1.0
            assert max(loads) == 0, "nothing is sent to find out what is known"

    asyncio.run(scenario())
