"""One control connection: messages in both directions over a pair of asyncio streams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec

from shoal import __version__
from shoal.errors import DeviceRefused, DeviceUnreachable, LinkClosed, RemoteProtocolError, ShoalError, WorkerLost
from shoal.ids import NodeId
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
from shoal.transport.control import AS_AGENT, PREFACE_MAGIC
from shoal.transport.secure import TrustStore, explain
from shoal.units import KIB

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
_PINGS = 4
_LOADS_BYTES = (32 * KIB, 64 * KIB, 384 * KIB)
_LOAD_LONG_S = 0.05
LINK_BYTES_PER_S_MAX = 1e10
"""More than this is taken for this: what two processes of one machine say to each other."""

Answer = TypeVar("Answer", bound=Message)


class Distance(NamedTuple):
    """Between two agents: a small message there and back, and what one direction carries."""

    round_trip_s: float
    bytes_per_s: float


HERE = Distance(0.0, LINK_BYTES_PER_S_MAX)


class Channel:
    """Messages over a stream. Not for two readers at a time."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, peer: str, node: NodeId | None = None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.node = node
        """The member at the other end, where its key was proven."""
        self._size: int | None = None
        """Of the message whose head has been read; whoever stops waiting for the rest leaves it to the next reader."""
        self.peer = peer

    @property
    def peer_host(self) -> str:
        """Where the other side was reached, or came from."""
        address = self._writer.get_extra_info("peername")
        return str(address[0]) if address else ""

    @property
    def own_host(self) -> str:
        """Where the other side reaches this device."""
        address = self._writer.get_extra_info("sockname")
        return str(address[0]) if address else ""

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

    async def distance(self, *, known_bytes_per_s: float | None = None) -> Distance:
        """How far the agent at the other end is, and what gets there: half a megabyte at most is sent, less where that takes
        long, and nothing where it is known."""
        # The least of a few tries: what is longer waited for a processor.
        round_trip_s = min([await self._ping_s(0) for _ in range(_PINGS)])
        if known_bytes_per_s is not None:
            return Distance(round_trip_s, min(known_bytes_per_s, LINK_BYTES_PER_S_MAX))
        bytes_per_s = 0.0
        for num_bytes in _LOADS_BYTES:  # the first ones open TCP's window
            carried_s = await self._ping_s(num_bytes) - round_trip_s
            bytes_per_s = num_bytes / max(carried_s, num_bytes / LINK_BYTES_PER_S_MAX)
            if carried_s > _LOAD_LONG_S:
                break
        return Distance(round_trip_s, bytes_per_s)

    async def _ping_s(self, num_bytes: int) -> float:
        started_s = time.perf_counter()
        await self.send(Ping(bytes(num_bytes)))
        await self.expect(Pong)
        return time.perf_counter() - started_s

    def abort(self) -> None:
        """Cuts it off; who waits here learns of it as of a peer that is gone."""
        self._writer.transport.abort()

    async def wait_closed(self) -> None:
        """Returns once the connection has ended, at either end."""
        with contextlib.suppress(ConnectionError, OSError):
            # Shielded: all who wait share one future of the stream's, and whoever is cancelled would cancel it for all.
            await asyncio.shield(asyncio.ensure_future(self._writer.wait_closed()))

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
    return await _greeted(Channel(reader, writer, peer=peer))


async def connect_member(node: NodeId, addresses: Sequence[str], trust: TrustStore, *, default_port: int) -> Channel:
    """Opens a control connection to the agent of a member, at the first address that answers; both ends are proven.

    Raises:
        DeviceUnreachable: nobody answers, or another device than `node`.
        DeviceRefused: another version of shoal.
    """
    problem = "no address of it is known: it only dials out"
    for address in addresses:
        sock: socket.socket | None = None
        try:
            host, port = split_address(address, default_port=default_port)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                sock = await _dial_agent(host, port)
                reader, writer = await asyncio.open_connection(
                    sock=sock,
                    ssl=trust.context(server_side=False),
                    server_hostname="",
                    limit=MESSAGE_BYTES_MAX,
                )
        except (OSError, TimeoutError, ValueError) as error:
            if sock is not None:
                sock.close()
            problem = f"{address}: {'timed out' if isinstance(error, TimeoutError) else explain_error(error)}"
            continue
        found = trust.peer_of(writer.get_extra_info("ssl_object"))
        channel = Channel(reader, writer, peer=address, node=found)
        if found == node:
            return await _greeted(channel)
        await channel.close()
        problem = f"{address}: device {found[:8]} answers where {node[:8]} is expected"
    raise DeviceUnreachable(f"member {node[:8]} cannot be reached ({problem})")


async def _dial_agent(host: str, port: int) -> socket.socket:
    """A connection whose other end is told that an agent comes; TLS is next."""
    loop = asyncio.get_running_loop()
    family, _, _, _, place = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, place)
        await loop.sock_sendall(sock, PREFACE_MAGIC + AS_AGENT)
    except BaseException:
        sock.close()
        raise
    return sock


async def _greeted(channel: Channel) -> Channel:
    """The channel once both sides have said which shoal they are. Raises DeviceUnreachable or DeviceRefused."""
    try:
        await channel.send(hello())
        check_hello(await channel.expect(Hello), peer=channel.peer)
    except RemoteProtocolError as error:
        await channel.close()
        raise DeviceUnreachable(f"what answers at {channel.peer} is no shoal: {error}") from error
    except ShoalError:
        await channel.close()
        raise
    return channel


def explain_error(error: Exception) -> str:
    """Why a connection did not come about, in words."""
    if isinstance(error, ssl.SSLError):
        return str(explain(error))
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
