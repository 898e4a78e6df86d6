"""One control connection: messages in both directions over a pair of asyncio streams."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TypeVar

import msgspec

from shoal import __version__
from shoal.errors import DeviceRefused, DeviceUnreachable, LinkClosed, RemoteProtocolError, ShoalError, WorkerLost
from shoal.runtime import errors_by_name
from shoal.runtime.messages import (
    CONTROL_PROTOCOL,
    MESSAGE_BYTES_MAX,
    AnyMessage,
    EngineLost,
    Failed,
    Hello,
    Message,
    Ping,
    Pong,
    decode,
    encode,
)

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
_PINGS = 4

Answer = TypeVar("Answer", bound=Message)


class Channel:
    """Messages over a stream. Not for two readers at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, peer: str) -> None:
        self._reader = reader
        self._writer = writer
        self._size: int | None = None
        """Of the message whose head has been read; whoever stops waiting for the rest leaves it to the next reader."""
        self.peer = peer

    def interrupt(self, error: Exception) -> None:
        """Ends waiting for the next message, now and from now on, with this error."""
        self._reader.set_exception(error)

    async def send(self, message: Message) -> None:
        """Raises LinkClosed when the peer is gone."""
        try:
            self._writer.write(encode(message))
            await self._writer.drain()
        except (ConnectionError, RuntimeError) as error:
            raise LinkClosed(f"{self.peer} is gone ({error})") from error

    async def receive(self) -> AnyMessage:
        """The next message.

        Raises:
            LinkClosed: the peer is gone.
            RemoteProtocolError: what came is no message; the connection is of no more use.
        """
        try:
            if self._size is None:
                self._size = int.from_bytes(await self._reader.readexactly(4), "big")
            if self._size > MESSAGE_BYTES_MAX:
                raise RemoteProtocolError(
                    f"{self.peer} announces a message of {self._size} bytes, {MESSAGE_BYTES_MAX} are allowed"
                )
            payload = await self._reader.readexactly(self._size)
            self._size = None
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise LinkClosed(f"{self.peer} is gone (connection closed)") from error
        try:
            return decode(payload)
        except msgspec.DecodeError as error:
            raise RemoteProtocolError(f"{self.peer} sent no message of ours: {error}") from error

    async def expect(self, kind: type[Answer], *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Answer:
        """The next message, which must be of `kind`.

        Raises:
            ShoalError: what a `Failed` carries, of the class it names.
            DeviceUnreachable: no answer in time.
            RemoteProtocolError: another kind of message.
        """
        try:
            message = await asyncio.wait_for(self.receive(), timeout_s)
        except TimeoutError:
            raise DeviceUnreachable(f"{self.peer} did not answer within {timeout_s:.0f} s") from None
        if isinstance(message, Failed):
            raise errors_by_name.revive(message)
        if isinstance(message, EngineLost):
            raise WorkerLost(message.text)
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"{self.peer} sent {type(message).__name__} where {kind.__name__} is due")
        return message

    async def round_trip_s(self) -> float:
        """How far the agent at the other end is: the least of a few tries, since what is longer waited for a processor."""
        taken = []
        for _ in range(_PINGS):
            started_s = time.perf_counter()
            await self.send(Ping())
            await self.expect(Pong)
            taken.append(time.perf_counter() - started_s)
        return min(taken)

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError, OSError):
            await self._writer.wait_closed()


def hello() -> Hello:
    """This side's greeting."""
    return Hello(protocol=CONTROL_PROTOCOL, version=__version__)


def check_hello(greeting: Hello, *, peer: str) -> None:
    """Raises DeviceRefused where the other side runs another shoal."""
    if greeting.protocol != CONTROL_PROTOCOL or greeting.version != __version__:
        raise DeviceRefused(
            f"{peer} runs shoal {greeting.version} (protocol {greeting.protocol}), this device {__version__} "
            f"(protocol {CONTROL_PROTOCOL}): install the same version on both"
        )


def split_address(address: str, *, default_port: int) -> tuple[str, int]:
    """'host:port', 'host', '[v6]:port' -> (host, port).

    Raises:
        ValueError: names the address and the forms that are understood.
    """
    host, separator, port = address.rpartition(":")
    if not separator or (":" in host and not host.startswith("[")):
        host, port = address, str(default_port)
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"'{address}' is no address: write HOST, HOST:PORT or [IPV6]:PORT")
    return host, int(port)


async def connect(host: str, port: int) -> Channel:
    """Opens a control connection and exchanges greetings.

    Raises:
        DeviceUnreachable: nobody answers.
        DeviceRefused: another version of shoal.
    """
    peer = f"{host}:{port}"
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError) as error:
        reason = "timed out" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        raise DeviceUnreachable(f"no shoal answers at {peer} ({reason}): start one there with `shoal up`") from error
    channel = Channel(reader, writer, peer=peer)
    try:
        await channel.send(hello())
        check_hello(await channel.expect(Hello), peer=peer)
    except RemoteProtocolError as error:
        await channel.close()
        raise DeviceUnreachable(f"what answers at {peer} is no shoal: {error}") from error
    except ShoalError:
        await channel.close()
        raise
    return channel
