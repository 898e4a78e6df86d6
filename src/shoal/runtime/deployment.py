"""The head's side of an engine: find the devices, measure, place, load, connect; then pass requests to the head's worker.

Each device that takes part is a `Member`: this one through its worker process, another through a lease, which is a
connection to its agent that lasts as long as its worker. Whoever loses either end, loses the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from shoal.errors import DeviceError, DeviceRefused, LinkClosed, WorkerLost
from shoal.ids import DeviceId, EngineId, ModelHash, NodeId
from shoal.placement.drift import Answered, DriftWatch, PlanAnew
from shoal.placement.planner import Plan
from shoal.runtime.channel import HERE, Channel, Distance
from shoal.runtime.messages import (
    AnyMessage,
    AssignLayers,
    Cancel,
    ConnectRing,
    Embed,
    Embedded,
    EngineDescription,
    EngineLost,
    EngineOptions,
    Failed,
    Finished,
    Generate,
    Message,
    ModelFile,
    Progress,
    RingConnected,
    StageDescription,
    StageReady,
    StartWorker,
    WorkerReport,
)
from shoal.runtime.question import Candidate, Question
from shoal.runtime.worker_process import WorkerProcess

MEASURE_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 900.0
CONNECT_TIMEOUT_S = 70.0

Answer = TypeVar("Answer", bound=Message)
_LAST = (Finished, Embedded, Failed)
"""How the worker's part of an answer ends."""
Report = Callable[[Progress], Awaitable[None]]


class Member(Protocol):
    """A device's worker, near or far."""

    device: DeviceId
    node: NodeId | None
    """Which member it is, where that is known."""
    host: str
    distance: Distance
    """From the head."""
    is_proven: bool
    """Whether it is known to be the member that it says it is."""
    head_host: str
    """Where it reaches the head."""

    async def ask(self, message: Message, kind: type[Answer], *, timeout_s: float) -> Answer:
        """Sends `message` and returns the answer. Raises what the member raised, or DeviceError when it is lost."""

    async def wait_lost(self) -> str:
        """Returns, once the worker has ended, why."""

    async def release(self) -> None:
        """Ends the worker. Never fails."""


class LeasedMember:
    """A worker on another device, held by a connection to its agent."""

    def __init__(self, device: DeviceId, host: str, channel: Channel, distance: Distance) -> None:
        self.device = device
        self.node = channel.node
        self.host = host
        self.head_host = channel.own_host
        self.is_proven = channel.node is not None
        self.distance = distance
        self.channel = channel

    async def ask(self, message: Message, kind: type[Answer], *, timeout_s: float) -> Answer:
        try:
            await self.channel.send(message)
            return await self.channel.expect(kind, timeout_s=timeout_s)
        except LinkClosed as error:
            raise WorkerLost(f"device {self.device} is gone ({error})") from error
        except DeviceError as error:
            raise type(error)(f"device {self.device}: {error}") from error

    async def wait_lost(self) -> str:
        try:
            message = await self.channel.receive()
        except LinkClosed as error:
            return f"device {self.device} is gone ({error})"
        text = message.text if isinstance(message, (EngineLost, Failed)) else f"sent {type(message).__name__}"
        return f"device {self.device}: {text}"

    async def release(self) -> None:
        await self.channel.close()


class OwnMember:
    """This device's worker. Its messages after the ring stands belong to `Engine`, so it does not wait for its end."""

    distance = HERE
    is_proven = True

    def __init__(self, device: DeviceId, host: str, worker: WorkerProcess, *, node: NodeId | None = None) -> None:
        self.device, self.node = device, node
        self.host = self.head_host = host
        self.worker = worker

    async def ask(self, message: Message, kind: type[Answer], *, timeout_s: float) -> Answer:
        await self.worker.send(message)
        return await self.worker.expect(kind, timeout_s=timeout_s)

    async def wait_lost(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def release(self) -> None:
        await self.worker.stop()


class Engine:
    """A model that stands ready over some devices. One request at a time, first come, first served.

    `question` is what its `plan` answers.
    """

    def __init__(
        self,
        members: Sequence[Member],
        own: OwnMember,
        description: EngineDescription,
        question: Question,
        plan: Plan,
        *,
        micro_batch: int,
    ) -> None:
        self._members = members
        self._own = own
        self.description = description
        self.question, self.plan, self.micro_batch = question, plan, micro_batch
        self.is_closing = False
        """Whether it makes way for another, which who comes now should wait for."""
        self._drift = DriftWatch({stage.device: stage.life.compute_s for stage in plan.stages})
        self._turn = asyncio.Lock()
        self._leaving: asyncio.Task[None] | None = None  # one at a time, since it has the turn
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # Whoever waits for the worker's next word learns of a loss at once, without a task per token to listen for it.
        self._lost.add_done_callback(lambda lost: own.worker.interrupt(WorkerLost(lost.result())))
        self._watchers = [asyncio.create_task(self._watch(member)) for member in members]

    def observe(self, finished: Finished) -> PlanAnew | None:
        """Says whether, after this answer, the devices are no longer what the plan was made for."""
        if not self.question.is_open or not finished.stages:
            return None
        seen_s = {stage.device: times.compute_s for stage, times in zip(self.plan.stages, finished.stages, strict=True)}
        return self._drift.step(Answered(len(finished.token_ids) - 1, seen_s), time.monotonic())

    @property
    def is_lost(self) -> bool:
        return self._lost.done() or self._own.worker.has_ended

    async def answer(self, request: Generate | Embed) -> AsyncGenerator[Message, None]:
        """What the head's worker says, at last `Finished`, `Embedded` or `Failed`. Leaving the loop early cancels it.

        Raises:
            WorkerLost: a device was lost before the end.
        """
        await self._turn.acquire()
        ended = True
        try:
            if self.is_lost:
                raise WorkerLost(self._lost.result() if self._lost.done() else "the worker here has ended")
            ended = False
            await self._own.worker.send(request)
            while not ended:
                message = await self._next()
                ended = isinstance(message, _LAST)
                yield message
        finally:
            if ended:
                self._turn.release()
            else:
                await self._leave()

    async def _next(self) -> AnyMessage:
        """The worker's next message; a device's loss comes first, because the worker may hang on its dead link."""
        try:
            return await self._own.worker.receive()
        except WorkerLost as error:
            # Which of two ends broke first is chance; the other devices' word tells more than our broken link.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._lost), 0.2)
            if not self._lost.done():
                self._lost.set_result(str(error))
            raise WorkerLost(self._lost.result()) from None

    async def _leave(self) -> None:
        """Stops the request under way. It keeps its turn until it has ended, even where whoever waits here is cancelled
        (again): the next request would be answered with what is left of this one."""
        self._leaving = asyncio.create_task(self._cancel())
        self._leaving.add_done_callback(lambda _: self._turn.release())
        await asyncio.shield(self._leaving)

    async def _cancel(self) -> None:
        """Stops the worker's request and reads what it still says, so that the next one starts clean."""
        with contextlib.suppress(DeviceError):
            await self._own.worker.send(Cancel())
            while not isinstance(await self._next(), _LAST):
                pass

    async def wait_idle_and_lost(self) -> None:
        """Returns once the engine is lost and nobody is being answered any more: then it can be closed."""
        ending = asyncio.ensure_future(self._own.worker.wait_ended())
        try:
            await asyncio.wait((ending, self._lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
        async with self._turn:
            return

    async def _watch(self, member: Member) -> None:
        reason = await member.wait_lost()
        if not self._lost.done():
            self._lost.set_result(reason)

    async def close_when_idle(self) -> None:
        """Lets those finish who are being answered or wait for it, then closes."""
        self.is_closing = True
        async with self._turn:
            await self.close()

    async def close(self) -> None:
        """Ends every worker of this engine, here and elsewhere."""
        for watcher in self._watchers:
            watcher.cancel()
        if not self._lost.done():
            self._lost.set_result("the engine was stopped")
        await asyncio.gather(*(member.release() for member in self._members))


async def deploy(
    members: Sequence[Member],
    own: OwnMember,
    *,
    engine: EngineId,
    model: ModelFile,
    options: EngineOptions,
    memory_bytes: dict[DeviceId, int],
    may_stream: bool,
    left_out: Sequence[tuple[DeviceId, str]] = (),
    layer_s: Mapping[DeviceId, float],
    report: Report,
) -> Engine:
    """Makes an engine of these devices.

    Args:
        members: the head (`own`) first, then the others in the order in which the ring visits them. On failure they are
            released here.
        left_out: devices that were asked and do not take part, and why.
        may_stream: whether weights that do not fit are read from disk for every token; else the model is refused.
        layer_s: what a layer was seen to take lately, by device; others are measured.

    Raises:
        ShoalError: what a device refused or lost, or InfeasiblePlacement.
    """
    try:
        reports = await measure(members, engine, model, options, memory_bytes, report)
        question = Question(candidates_of(members, reports, memory_bytes), options, may_stream).seen(layer_s)
        await report(Progress("planning"))
        plan, micro_batch = await asyncio.to_thread(question.answer)
        stages = await _load(members, plan, options, memory_bytes, micro_batch=micro_batch, report=report)
        used = _in_ring_order(members, plan)
        for member in members:
            if member not in used:
                await member.release()
        await _connect(used, stages)
        description = _describe(plan, members, reports, stages, model.hash)
        description = msgspec.structs.replace(description, left_out=[*left_out, *description.left_out])
        return Engine(used, own, description, question, plan, micro_batch=micro_batch)
    except BaseException:
        await asyncio.gather(*(member.release() for member in members))
        raise


async def measure(
    members: Sequence[Member],
    engine: EngineId,
    model: ModelFile,
    options: EngineOptions,
    memory_bytes: dict[DeviceId, int],
    report: Report,
) -> list[WorkerReport]:
    """What the members' workers are and can do. One device after the other: several of them may share one machine, where
    they would measure each other.

    Raises:
        ShoalError: what a device refused or lost.
    """
    encrypts = all(member.is_proven for member in members) if options.encrypts is None else options.encrypts
    reports = []
    for index, member in enumerate(members):
        await report(Progress(f"measuring {member.device}", index, len(members)))
        start = StartWorker(
            engine=engine,
            model=model,
            num_threads=options.num_threads,
            compute_device=options.compute_device,
            repack=options.repack,
            memory_bytes=memory_bytes[member.device],
            head=isinstance(member, OwnMember),
            encrypts=encrypts,
        )
        reports.append(await member.ask(start, WorkerReport, timeout_s=MEASURE_TIMEOUT_S))
    return reports


def candidates_of(
    members: Sequence[Member], reports: Sequence[WorkerReport], memory_bytes: Mapping[DeviceId, int]
) -> tuple[Candidate, ...]:
    """The members for the planner, in their order."""
    return tuple(
        Candidate(member.device, measured, memory_bytes[member.device], member.distance)
        for member, measured in zip(members, reports, strict=True)
    )


def _in_ring_order(members: Sequence[Member], plan: Plan) -> list[Member]:
    by_device = {member.device: member for member in members}
    return [by_device[stage.device] for stage in plan.stages]


async def _load(
    members: Sequence[Member],
    plan: Plan,
    options: EngineOptions,
    memory_bytes: dict[DeviceId, int],
    *,
    micro_batch: int,
    report: Report,
) -> list[StageReady]:
    await report(Progress("loading layers"))

    async def load(member: Member, index: int) -> StageReady:
        stage, life = plan.stages[index], plan.stages[index].life
        assign = AssignLayers(
            windows=list(stage.windows),
            context=plan.context,
            micro_batch=micro_batch,
            num_stages=len(plan.stages),
            head=stage is plan.head,
            memory_bytes=memory_bytes[stage.device] if life.streamed_bytes else None,
            idle_s=plan.token_s - life.compute_s - life.disk_wait_s,
            ring_bytes=life.ring_bytes if len(plan.stages) > 1 else 0,
            residency=options.residency,
            window_layers=options.window_layers,
            accelerator_layers=list(stage.accelerator_layers) if any(stage.accelerator_layers) else [],
        )
        return await member.ask(assign, StageReady, timeout_s=LOAD_TIMEOUT_S)

    ring = _in_ring_order(members, plan)
    return list(await asyncio.gather(*(load(member, index) for index, member in enumerate(ring))))


async def _connect(ring: Sequence[Member], stages: Sequence[StageReady]) -> None:
    """Every stage dials the next; the last one, the head, dials the first. A head alone only gets ready."""
    holds_windows = all(stage.holds_windows for stage in stages)
    if len({bool(stage.ring_key) for stage in stages}) > 1:
        strict = ", ".join(member.device for member, stage in zip(ring, stages, strict=True) if stage.ring_key)
        raise DeviceRefused(
            f"{strict}: takes no frames that are not encrypted; leave out --plain-frames, or give it there too"
        )

    async def connect(member: Member, index: int) -> None:
        next_index = (index + 1) % len(ring)
        following = ring[next_index]
        message = ConnectRing(
            next_host=member.head_host if following is ring[-1] else following.host,
            next_port=stages[next_index].port,
            holds_windows=holds_windows,
            next_key=stages[next_index].ring_key,
            previous_key=stages[index - 1].ring_key,
            next_node=following.node,
        )
        await member.ask(message, RingConnected, timeout_s=CONNECT_TIMEOUT_S)

    await asyncio.gather(*(connect(member, index) for index, member in enumerate(ring)))


def _describe(
    plan: Plan,
    members: Sequence[Member],
    reports: Sequence[WorkerReport],
    stages: Sequence[StageReady],
    model_hash: ModelHash,
) -> EngineDescription:
    measured = {member.device: report for member, report in zip(members, reports, strict=True)}
    return EngineDescription(
        model=reports[0].model_name,
        model_hash=model_hash,
        stages=[
            StageDescription(
                device=stage.device,
                windows=list(stage.windows),
                num_threads=measured[stage.device].num_threads,
                memory_bytes=(
                    ready.mapped_bytes + ready.copied_bytes + ready.ring_bytes + ready.cache_bytes + ready.activation_bytes
                ),
                head=stage is plan.head,
                streamed_bytes=ready.streamed_bytes,
            )
            for stage, ready in zip(plan.stages, stages, strict=True)
        ],
        context=plan.context,
        token_s=plan.token_s,
        left_out=[(left.device, left.reason) for left in plan.left_out],
        hidden_size=reports[0].hidden_size,
        encrypts=len(stages) > 1 and all(stage.ring_key for stage in stages),
    )
