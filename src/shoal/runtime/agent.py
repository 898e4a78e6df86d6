"""The agent: one per device, the door through which clients and other agents come in, and the parent of its workers.

It never holds tensors. A worker that crashes is an event here, never the agent's end; when the agent ends, however it
ends, its workers' inputs close and they end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import platform
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil

from shoal import __version__
from shoal.errors import (
    DeviceRefused,
    LinkClosed,
    LinkError,
    ModelNotFound,
    RemoteProtocolError,
    RequestError,
    ShoalError,
    WorkerLost,
)
from shoal.ids import DeviceId, EngineId, NodeId
from shoal.runtime.channel import Channel, check_hello, connect, hello
from shoal.runtime.engines import AgentOptions, Cluster, Engines, Send
from shoal.runtime.errors_by_name import failure
from shoal.runtime.messages import (
    MESSAGE_BYTES_MAX,
    ApplyTemplate,
    AskStatus,
    AskSurvey,
    Delivered,
    Detokenize,
    DeviceStatus,
    Embed,
    EngineLost,
    Generate,
    Hello,
    ListModels,
    LoadModel,
    Message,
    ModelFile,
    Models,
    Ping,
    Pong,
    StartWorker,
    Status,
    Survey,
    Through,
    Tokenize,
    Unloaded,
    UnloadModel,
)
from shoal.runtime.model_store import ModelStore
from shoal.runtime.node.neighbours import Neighbour
from shoal.runtime.profile import num_physical_cores, usable_memory_bytes
from shoal.runtime.refresh import ProfileRefresh
from shoal.runtime.text_workers import TextWorkers
from shoal.runtime.worker_process import WorkerProcess
from shoal.transport.link import listen
from shoal.transport.secure import TrustStore

GREETING_TIMEOUT_S = 5.0
SURVEY_TIMEOUT_S = 5.0
GREETING_MAX = 64
CONNECTIONS_MAX = 256

Request = Generate | Embed | LoadModel | UnloadModel | ListModels | Tokenize | Detokenize | ApplyTemplate
REQUESTS = (Generate, Embed, LoadModel, UnloadModel, ListModels, Tokenize, Detokenize, ApplyTemplate)
"""What `Agent.serve` answers."""


@dataclass
class _Counters:
    refused_frames: int = 0
    connections: int = 0
    leases: dict[EngineId, str] = field(default_factory=dict)


class Agent:
    """Serves until cancelled. `port` is where, once `start` has returned."""

    def __init__(self, options: AgentOptions) -> None:
        self._options = options
        self._device = DeviceId(options.name)
        self._store = ModelStore(list(options.model_folders))
        self._refresh = ProfileRefresh(
            is_free=self._is_free, memory_bytes=lambda: usable_memory_bytes(options.memory_limit_bytes)
        )
        self._engines = Engines(
            options, self._store, cluster=lambda: self.cluster, known=self._known, on_start=self._refresh.note
        )
        self._texts = TextWorkers()
        self._counters = _Counters()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._proven: dict[NodeId, set[Channel]] = {}
        """Conversations with members, to be cut off when one is removed."""
        self._num_greeting = 0
        """Connections whose TLS is under way: anybody may begin one."""
        self.cluster: Cluster | None = None
        """Set by whoever starts the links to members."""
        self.is_paused: Callable[[], bool] = lambda: False
        """Whether the owner wants this device to lend nothing; set by them too."""
        self.port = options.port

    async def start(self) -> None:
        """Opens the door. Raises AddressInUse or DeviceUnreachable."""
        sock = listen(self._options.host, self._options.port)
        self.port = sock.getsockname()[1]
        self._server = await asyncio.start_server(self._welcome, sock=sock, limit=MESSAGE_BYTES_MAX)
        self._engines.start()
        self._keep(self._refresh.run())

    async def stop(self) -> None:
        """Closes the door and ends every engine and worker."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(self._texts.close(), self._engines.close())

    # ---- conversations

    def take_member(self, sock: socket.socket, trust: TrustStore) -> None:
        """Another member's agent, as it says, has dialled the door of the control links; TLS is next."""
        if self._num_greeting >= GREETING_MAX:
            self._counters.refused_frames += 1
            sock.close()
            return
        self._num_greeting += 1  # now, not when its task begins: many may come before that
        self._keep(self._secure(sock, trust))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` beside everything else; it ends with the agent at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def part_from(self, node: NodeId) -> None:
        """It is no member any more: what it lends and what it borrows ends."""
        for channel in list(self._proven.get(node, ())):
            channel.abort()

    async def _secure(self, sock: socket.socket, trust: TrustStore) -> None:
        loop = asyncio.get_running_loop()

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._welcome(reader, writer, node=trust.peer_of(writer.get_extra_info("ssl_object")))

        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=MESSAGE_BYTES_MAX), converse)
        try:
            await loop.connect_accepted_socket(
                lambda: protocol,
                sock,
                ssl=trust.context(server_side=True),
                ssl_handshake_timeout=GREETING_TIMEOUT_S,
            )
        except (OSError, TimeoutError):
            self._counters.refused_frames += 1
            sock.close()
        finally:
            self._num_greeting -= 1

    @contextlib.contextmanager
    def _known(self, channel: Channel) -> Iterator[None]:
        """While it is a conversation with a member, it ends when that member is removed."""
        if channel.node is None:
            yield
            return
        channels = self._proven.setdefault(channel.node, set())
        channels.add(channel)
        try:
            yield
        finally:
            channels.discard(channel)
            if not channels:
                self._proven.pop(channel.node, None)

    async def _welcome(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, node: NodeId | None = None
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        address = writer.get_extra_info("peername")
        channel = Channel(reader, writer, peer=f"{address[0]}:{address[1]}" if address else "a client", node=node)
        try:
            if len(self._tasks) > CONNECTIONS_MAX:
                raise DeviceRefused(f"{CONNECTIONS_MAX} connections are open: close some, then try again")
            await channel.send(hello())
            check_hello(await channel.expect(Hello, timeout_s=GREETING_TIMEOUT_S), peer=channel.peer)
            with self._known(channel):
                await self._converse(channel)
        except RemoteProtocolError as error:
            self._counters.refused_frames += 1
            await _try_send(channel.send, failure(error))
        except (LinkError, asyncio.CancelledError):
            pass
        except ShoalError as error:
            await _try_send(channel.send, failure(error))
        finally:
            self._tasks.discard(task)
            await channel.close()

    async def _converse(self, channel: Channel) -> None:
        while True:
            try:
                request = await channel.receive()
            except LinkClosed:
                return
            if isinstance(request, Ping):
                await channel.send(Pong())
            elif isinstance(request, AskSurvey):
                await channel.send(await self._survey(request.model))
            elif isinstance(request, AskStatus):
                await channel.send(await self._status())
            elif isinstance(request, REQUESTS):
                await self._while_connected(channel, self.serve(request, channel.send))
            elif isinstance(request, StartWorker):
                await self._lease(channel, request)
                return
            elif isinstance(request, Through) and channel.node is None:
                await self._pass_through(channel, request.address)
                return
            else:
                raise RemoteProtocolError(f"{channel.peer} sent {type(request).__name__}, which is no request")

    async def serve(self, request: Request, send: Send) -> None:
        """Answers one request of a client, near or far, by calling `send`; failures are `Failed`. Cancel it to stop."""
        try:
            match request:
                case Generate() | Embed():
                    await self._engines.answer(request, send)
                case LoadModel():
                    await send((await self._engines.load(request, send)).description)
                case UnloadModel():
                    await self._engines.unload(request)
                    await send(Unloaded())
                case ListModels():
                    await send(Models(await asyncio.to_thread(self._store.entries)))
                case Tokenize() | Detokenize() | ApplyTemplate():
                    path = await asyncio.to_thread(self._store.resolve, request.model)
                    await send(await self._texts.ask(path, request))
        except LinkError:
            raise
        except WorkerLost as error:
            await self._engines.sweep()
            await _try_send(send, failure(WorkerLost(f"the answer was cut off: {error}; ask again")))
        except (ShoalError, ValueError) as error:
            await _try_send(send, failure(error))

    async def _pass_through(self, channel: Channel, address: str) -> None:
        """Everything this client says goes to another agent, and back."""
        for each, connecting in await self._doors():
            if each == address:
                far = await connecting()
                break
        else:
            raise RequestError(f"{address} is no device that this agent knows: `shoal status` lists them")
        try:
            await _relay(channel, far)
        finally:
            await far.close()

    async def _doors(self) -> list[tuple[str, Callable[[], Awaitable[Channel]]]]:
        """Other agents: how they are named, and what connects to them."""
        named = [(f"{host}:{port}", functools.partial(connect, host, port)) for host, port in self._options.peers]
        cluster = self.cluster
        if cluster is None:
            return list(named)
        return [*named, *((_where(each), functools.partial(cluster.connect, each)) for each in await cluster.here())]

    async def _while_connected(self, channel: Channel, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`; cancels it when the other side hangs up or speaks out of turn."""
        working = asyncio.create_task(work)
        listening = asyncio.create_task(channel.receive())
        try:
            await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                working.cancel()
                listening.result()  # raises LinkClosed, the usual end
                raise RemoteProtocolError(f"{channel.peer} spoke while it was being answered")
            working.result()
        finally:
            for task in (working, listening):
                task.cancel()
            await asyncio.gather(working, listening, return_exceptions=True)

    # ---- what this device is

    async def _survey(self, model: ModelFile | None) -> Survey:
        found = model is not None and await asyncio.to_thread(self._store.find, model) is not None
        return Survey(
            device=self._device,
            version=__version__,
            system=f"{platform.system()} {platform.machine()}",
            num_cores=num_physical_cores(),
            memory_total_bytes=psutil.virtual_memory().total,
            memory_usable_bytes=usable_memory_bytes(self._options.memory_limit_bytes),
            has_model=found,
            model_folders=[str(folder) for folder in self._store.folders],
            engines=[
                *(f"{name} (head)" for name in self._engines.models()),
                *self._counters.leases.values(),
            ],
            num_refused_frames=self._counters.refused_frames,
            is_paused=self.is_paused(),
        )

    async def _status(self) -> Status:
        own = DeviceStatus(f"{self._options.host}:{self.port}", 0.0, await self._survey(None))
        others = await asyncio.gather(
            *(self._ask_peer(address, connecting()) for address, connecting in await self._doors())
        )
        return Status([own, *others])

    async def _ask_peer(self, address: str, connecting: Awaitable[Channel]) -> DeviceStatus:
        try:
            channel = await connecting
        except ShoalError as error:
            return DeviceStatus(address, None, None, str(error))
        try:
            started_s = time.perf_counter()
            await channel.send(AskSurvey())
            survey = await channel.expect(Survey, timeout_s=SURVEY_TIMEOUT_S)
            return DeviceStatus(address, time.perf_counter() - started_s, survey)
        except ShoalError as error:
            return DeviceStatus(address, None, None, str(error))
        finally:
            await channel.close()

    # ---- as another's member

    def _tell_cluster(self, delivered: Delivered) -> None:
        if self.cluster is not None:
            self.cluster.learn_delivery(delivered)

    def _is_free(self) -> bool:
        """Whether no worker is at work here, for whomever."""
        return self._engines.is_idle() and not self._counters.leases and not self.is_paused()

    async def _lease(self, channel: Channel, start: StartWorker) -> None:
        """Runs a worker for another device's head, for as long as this connection lasts."""
        if self.is_paused():
            raise DeviceRefused(f"{self._device} is paused by its owner: `shoal resume` there ends that")
        path = await asyncio.to_thread(self._store.find, start.model)
        if path is None:
            raise ModelNotFound(f"no model file with SHA-256 {start.model.hash} in {self._store.describe_folders()}")
        worker = await WorkerProcess.start(on_delivered=self._tell_cluster)
        self._counters.leases[start.engine] = f"{path.name} (for {channel.peer})"
        try:
            own_start = msgspec.structs.replace(
                start,
                model_path=str(path),
                num_threads=self._options.num_threads or start.num_threads,
                compute_device=self._options.compute_device,
                ring_host=channel.own_host or self._options.host,
                encrypts=start.encrypts or (channel.node is not None and not self._options.has_plain_frames),
            )
            self._refresh.note(own_start)
            await worker.send(own_start)
            await _relay(channel, worker)
        finally:
            del self._counters.leases[start.engine]
            await worker.stop()


async def _relay(channel: Channel, worker: WorkerProcess | Channel) -> None:
    """Passes messages both ways until either end closes; a lost worker is told to the head."""

    async def to_worker() -> None:
        while True:
            await worker.send(await channel.receive())

    async def to_head() -> None:
        while True:
            await channel.send(await worker.receive())

    tasks = [asyncio.create_task(to_worker()), asyncio.create_task(to_head())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except LinkClosed:
        pass
    except WorkerLost as error:
        await _try_send(channel.send, EngineLost(str(error)))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _try_send(send: Send, message: Message) -> None:
    with contextlib.suppress(LinkClosed):
        await send(message)


def _where(neighbour: Neighbour) -> str:
    return neighbour.addresses[0] if neighbour.addresses else neighbour.name


def default_name() -> str:
    """This device's name among others: the host's, or what SHOAL_NAME says."""
    return os.environ.get("SHOAL_NAME") or platform.node() or "device"
