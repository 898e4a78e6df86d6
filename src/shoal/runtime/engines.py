"""The engines of which this device is the head: made when they are first asked for, and made anew where that is better.

An engine stands over those devices that were here and had the model. When one of them is lost the engine is, and the next
request makes another. When a member comes, or a device computes faster or slower than it was planned with, the planner is
asked again beside the running engine; what it finds moves in between two requests, where it saves a tenth of the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from shoal.errors import DeviceRefused, ModelNotFound, ShoalError, WorkerLost
from shoal.ids import DeviceId, EngineId, ModelHash, NodeId
from shoal.placement.drift import CHANGE, PlanAnew
from shoal.runtime.channel import Channel, connect
from shoal.runtime.deployment import (
    LOAD_TIMEOUT_S,
    Engine,
    LeasedMember,
    OwnMember,
    candidates_of,
    deploy,
    measure,
)
from shoal.runtime.messages import (
    AskSurvey,
    Delivered,
    Embed,
    EngineOptions,
    Finished,
    Generate,
    LoadModel,
    Message,
    ModelFile,
    Progress,
    StartWorker,
    Survey,
    UnloadModel,
)
from shoal.runtime.model_store import ModelStore
from shoal.runtime.node.neighbours import Neighbour
from shoal.runtime.profile import usable_memory_bytes
from shoal.runtime.question import Question
from shoal.runtime.worker_process import WorkerProcess

ENGINES_MAX = 8
NEIGHBOURS_EVERY_S = 3.0
"""How often it is asked who has come."""
SEEN_FOR_S = 600.0
"""How long it is remembered what a layer took on a device: after that it is measured again."""

Key = tuple[ModelHash, bytes]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class AgentOptions:
    """What the owner of this device decides.

    `peers` are (host, port) of the other agents; `memory_limit_bytes` None takes a share of what is free.
    """

    host: str
    port: int
    name: str
    peers: Sequence[tuple[str, int]] = ()
    model_folders: Sequence[Path] = ()
    memory_limit_bytes: int | None = None
    num_threads: int | None = None
    compute_device: str | None = None
    has_plain_frames: bool = False
    """Whether what goes round rings may pass as it is, though its devices could encrypt it: on a wire the owner trusts."""


class Cluster(Protocol):
    """The members of this device's cluster (`node/neighbours.py`)."""

    async def here(self) -> list[Neighbour]:
        """All others that are here."""

    async def connect(self, neighbour: Neighbour) -> Channel:
        """To its agent, both ends proven. Raises DeviceUnreachable or DeviceRefused."""

    @property
    def me(self) -> NodeId:
        """This device."""

    def learn_delivery(self, delivered: Delivered) -> None:
        """A worker here saw how fast its frames reach a member."""


@dataclass
class _Order:
    """What an engine was made for, and which members were here then."""

    path: Path
    model: ModelFile
    options: EngineOptions
    may_stream: bool
    members: set[NodeId] = field(default_factory=set)


@dataclass
class _Guests:
    """Workers of other devices, leased, and what may be used there; those that do not take part, and why."""

    members: list[LeasedMember] = field(default_factory=list)
    memory_bytes: dict[DeviceId, int] = field(default_factory=dict)
    left_out: list[tuple[DeviceId, str]] = field(default_factory=list)

    async def release(self) -> None:
        await asyncio.gather(*(member.release() for member in self.members))


class Engines:
    """All engines of one agent. Runs until `close`."""

    def __init__(
        self,
        options: AgentOptions,
        store: ModelStore,
        *,
        cluster: Callable[[], Cluster | None],
        known: Callable[[Channel], contextlib.AbstractContextManager[None]],
        on_start: Callable[[StartWorker], None],
    ) -> None:
        """`known` wraps a conversation with a member that ends with its membership; `on_start` is told when a worker is
        about to start on this device."""
        self._options = options
        self._device = DeviceId(options.name)
        self._store = store
        self._cluster = cluster
        self._known = known
        self._on_start = on_start
        self._standing: dict[Key, tuple[Engine, _Order]] = {}
        self._deploying = asyncio.Lock()
        self._replanning = asyncio.Lock()
        self._layer_s: dict[tuple[ModelHash, DeviceId], tuple[float, float]] = {}
        """What a layer was seen to take, and when."""
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begins to look who comes."""
        self._keep(self._watch_members())

    async def close(self) -> None:
        """Ends every engine and its workers."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine, _ in self._standing.values()))
        self._standing.clear()

    def models(self) -> list[str]:
        """Names of the models that are loaded."""
        return [engine.description.model for engine, _ in self._standing.values() if not engine.is_lost]

    def is_idle(self) -> bool:
        """Whether none stands, nor is being made."""
        return not self._deploying.locked() and not self.models()

    async def answer(self, request: Generate | Embed, send: Send) -> None:
        """Sends the engine's description and what its worker says.

        Raises:
            WorkerLost: a device was lost on the way.
            ShoalError: nothing fits, or the request cannot be answered.
        """
        while True:
            key, engine = await self._engine_for(request, send)
            await send(engine.description)
            has_begun = False
            try:
                async with contextlib.aclosing(engine.answer(request)) as messages:
                    async for message in messages:
                        has_begun = True
                        if isinstance(message, Finished) and (anew := engine.observe(message)) is not None:
                            self._keep(self._replan(key, engine, anew=anew))
                        await send(message)
                return
            except WorkerLost:
                if has_begun or not engine.is_closing:
                    raise  # else another has taken its place before our turn came

    async def load(self, request: LoadModel, send: Send) -> Engine:
        """The engine for a model. Raises ShoalError where there can be none."""
        return (await self._engine_for(request, send))[1]

    async def unload(self, request: UnloadModel) -> None:
        """Ends the engine, once those who wait for it are answered."""
        path = self._store.resolve(request.model)
        model = await asyncio.to_thread(self._store.identify, path)
        if standing := self._standing.pop(_key_of(model, request.options), None):
            await standing[0].close_when_idle()

    async def sweep(self) -> None:
        """Ends what is left of engines that lost a device."""
        for key, (engine, _) in list(self._standing.items()):
            if engine.is_lost:
                del self._standing[key]
                await engine.close()

    async def _engine_for(self, request: Generate | Embed | LoadModel, report: Send) -> tuple[Key, Engine]:
        path = self._store.resolve(request.model)
        await report(Progress(f"reading {path.name}"))
        model = await asyncio.to_thread(self._store.identify, path)
        key = _key_of(model, request.options)
        async with self._deploying:
            await self.sweep()
            if key not in self._standing:
                while len(self._standing) >= ENGINES_MAX:
                    await self._standing.pop(next(iter(self._standing)))[0].close()
                may_stream = not isinstance(request, LoadModel) or request.may_stream
                await self._make(key, _Order(path, model, request.options, may_stream), report)
            return key, self._standing[key][0]

    async def _make(self, key: Key, order: _Order, report: Send) -> None:
        engine = await self._deploy(order, report)
        self._standing[key] = engine, order
        self._keep(self._close_when_lost(engine))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` beside everything else; it ends with the agent at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close_when_lost(self, engine: Engine) -> None:
        await engine.wait_idle_and_lost()
        await self.sweep()

    # ---- making one

    async def _deploy(self, order: _Order, report: Send) -> Engine:
        options = msgspec.structs.replace(
            order.options,
            num_threads=order.options.num_threads or self._options.num_threads,
            compute_device=order.options.compute_device or self._options.compute_device,
            encrypts=False if self._options.has_plain_frames else order.options.encrypts,
        )
        guests = _Guests(memory_bytes={self._device: usable_memory_bytes(self._options.memory_limit_bytes)})
        try:
            for host, port in self._options.peers:
                await report(Progress(f"calling {host}:{port}"))
                member, usable_bytes = await _lease_from(connect(host, port), order.model, order.path)
                guests.members.append(member)
                if member.device in guests.memory_bytes:
                    raise DeviceRefused(f"two devices call themselves {member.device}: start one with another --name")
                guests.memory_bytes[member.device] = usable_bytes
            neighbours = await self._neighbours()
            order.members = {neighbour.node for neighbour in neighbours}
            await self._lease_from_members(order, neighbours, guests, report)
            worker = await WorkerProcess.start(on_delivered=self._tell_cluster)
        except BaseException:
            await guests.release()
            raise
        node = cluster.me if (cluster := self._cluster()) is not None else None
        own = _OwnMember(
            self._device, self._ring_host(guests.members), worker, order.path, node=node, on_start=self._on_start
        )
        return await deploy(
            [own, *guests.members],
            own,
            engine=_new_engine_id(),
            model=order.model,
            options=options,
            memory_bytes=guests.memory_bytes,
            may_stream=order.may_stream,
            left_out=guests.left_out,
            layer_s=self._seen(order.model.hash),
            report=report,
        )

    def _tell_cluster(self, delivered: Delivered) -> None:
        if (cluster := self._cluster()) is not None:
            cluster.learn_delivery(delivered)

    async def _neighbours(self) -> list[Neighbour]:
        cluster = self._cluster()
        return await cluster.here() if cluster is not None else []

    async def _lease_from_members(
        self, order: _Order, neighbours: Sequence[Neighbour], guests: _Guests, report: Send
    ) -> None:
        """Adds those members that have the model to `guests`."""
        cluster = self._cluster()
        if cluster is None or not neighbours:
            return
        await report(Progress(f"calling {', '.join(neighbour.name for neighbour in neighbours)}"))
        leases = await asyncio.gather(
            *(
                _lease_from(cluster.connect(neighbour), order.model, order.path, known_bytes_per_s=neighbour.bytes_per_s)
                for neighbour in neighbours
            ),
            return_exceptions=True,
        )
        failure: BaseException | None = None
        for neighbour, lease in zip(neighbours, leases, strict=True):
            if isinstance(lease, ShoalError):
                guests.left_out.append((DeviceId(neighbour.name), str(lease)))
            elif isinstance(lease, BaseException):
                failure = lease
            else:
                member, usable_bytes = lease
                if member.device in guests.memory_bytes:
                    member.device = DeviceId(f"{member.device}-{neighbour.node[:4]}")
                guests.members.append(member)
                guests.memory_bytes[member.device] = usable_bytes
                self._keep(self._hold(member))
        if failure is not None:
            raise failure

    async def _hold(self, member: LeasedMember) -> None:
        """As long as a lease lasts, the member's removal ends it."""
        with self._known(member.channel):
            await member.channel.wait_closed()

    def _ring_host(self, others: Sequence[LeasedMember]) -> str:
        """Where the ring's last stage reaches this device: all addresses, where not all reach it at the same."""
        hosts = {member.head_host for member in others}
        return hosts.pop() if len(hosts) == 1 else ("0.0.0.0" if hosts else self._options.host)

    # ---- making one anew

    async def _watch_members(self) -> None:
        """Asks the planner again when a member has come. Whoever has gone took the engine along, if it was part of it."""
        while True:
            await asyncio.sleep(NEIGHBOURS_EVERY_S)
            if not self._standing:
                continue
            here = {neighbour.node: neighbour for neighbour in await self._neighbours()}
            for key, (engine, order) in list(self._standing.items()):
                newcomers = [neighbour for node, neighbour in here.items() if node not in order.members]
                order.members = set(here)
                if newcomers and engine.question.is_open:
                    await self._replan(key, engine, newcomers=newcomers)

    async def _replan(
        self, key: Key, engine: Engine, *, newcomers: Sequence[Neighbour] = (), anew: PlanAnew | None = None
    ) -> None:
        """Plans beside the running engine, with members that have come or speeds that have changed, and moves."""
        standing = self._standing.get(key)
        if standing is None or standing[0] is not engine or engine.is_lost:
            return
        order = standing[1]
        question = engine.question
        if anew is not None:
            self._remember(order.model.hash, question, anew.slower_by)
        async with self._replanning:
            question = question.seen(self._seen(order.model.hash))
            with contextlib.suppress(ShoalError):  # then it stays as it is
                if newcomers:
                    question = await self._joined_by(newcomers, order, question)
                if await asyncio.to_thread(_is_worth, question, engine):
                    await self._move(key, engine, order)

    async def _joined_by(self, newcomers: Sequence[Neighbour], order: _Order, question: Question) -> Question:
        """The question with those devices that have come, which are measured for it. Raises ShoalError."""
        guests = _Guests(memory_bytes={each.device: each.memory_bytes for each in question.candidates})
        try:
            await self._lease_from_members(order, newcomers, guests, _say_nothing)
            reports = await measure(
                guests.members, _new_engine_id(), order.model, question.options, guests.memory_bytes, _say_nothing
            )
            return question.joined_by(candidates_of(guests.members, reports, guests.memory_bytes))
        finally:
            await guests.release()

    async def _move(self, key: Key, engine: Engine, order: _Order) -> None:
        """Lets those finish who are being answered, and makes the engine again; who comes meanwhile waits for it."""
        async with self._deploying:
            if self._standing.get(key) != (engine, order) or engine.is_lost:
                return
            await engine.close_when_idle()
            del self._standing[key]
            await self._make(key, order, _say_nothing)

    def _remember(self, model: ModelHash, question: Question, slower_by: Mapping[DeviceId, float]) -> None:
        for candidate in question.candidates:
            if candidate.device in slower_by:
                seconds = candidate.report.layer_s * slower_by[candidate.device]
                self._layer_s[model, candidate.device] = seconds, time.monotonic()

    def _seen(self, model: ModelHash) -> dict[DeviceId, float]:
        """What layers were seen to take lately."""
        oldest_s = time.monotonic() - SEEN_FOR_S
        self._layer_s = {which: seen for which, seen in self._layer_s.items() if seen[1] >= oldest_s}
        return {device: layer_s for (of, device), (layer_s, _) in self._layer_s.items() if of == model}


def _is_worth(question: Question, engine: Engine) -> bool:
    """Whether another plan saves a tenth of what the engine's costs, by the question's figures."""
    found, _ = question.answer()
    return found.cost_s < (1 - CHANGE) * question.cost_s(engine.plan, engine.micro_batch)


async def _say_nothing(_message: Message) -> None:
    pass


def _new_engine_id() -> EngineId:
    return EngineId(secrets.randbits(63) | 1)


def _key_of(model: ModelFile, options: EngineOptions) -> Key:
    return model.hash, msgspec.json.encode(options)


class _OwnMember(OwnMember):
    """This device's worker, which is told the path of the model that others know by its hash."""

    def __init__(
        self,
        device: DeviceId,
        host: str,
        worker: WorkerProcess,
        path: Path,
        *,
        node: NodeId | None,
        on_start: Callable[[StartWorker], None],
    ) -> None:
        super().__init__(device, host, worker, node=node)
        self._path, self._on_start = path, on_start

    async def ask(self, message: Message, kind: type[Any], *, timeout_s: float) -> Any:
        if isinstance(message, StartWorker):
            message = msgspec.structs.replace(message, model_path=str(self._path), ring_host=self.host)
            self._on_start(message)
        return await super().ask(message, kind, timeout_s=timeout_s)


async def _lease_from(
    connecting: Awaitable[Channel], model: ModelFile, path: Path, *, known_bytes_per_s: float | None = None
) -> tuple[LeasedMember, int]:
    """Connects to a peer and makes sure that it has the model. What the link there carries is measured unless it is known.

    Raises:
        DeviceUnreachable: no answer.
        ModelNotFound: with the command that copies the file there.
    """
    channel = await connecting
    host = channel.peer_host
    try:
        await channel.send(AskSurvey(model))
        # A peer that has not seen its files before hashes them now.
        survey = await channel.expect(Survey, timeout_s=LOAD_TIMEOUT_S)
        if survey.is_paused:
            raise DeviceRefused(f"{survey.device} is paused by its owner: `shoal resume` there ends that")
        if not survey.has_model:
            raise ModelNotFound(
                f"device {survey.device} ({channel.peer}) lacks {path.name} (SHA-256 {model.hash[:12]}...): copy it, "
                f"for example with `scp {path} {host}:{survey.model_folders[0]}/`"
            )
        distance = await channel.distance(known_bytes_per_s=known_bytes_per_s)
    except BaseException:
        await channel.close()
        raise
    return LeasedMember(survey.device, host, channel, distance), survey.memory_usable_bytes
