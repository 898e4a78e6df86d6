"""The agent's hold on one worker process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from shoal.errors import LinkClosed, WorkerLost
from shoal.runtime.channel import Channel
from shoal.runtime.messages import MESSAGE_BYTES_MAX, AnyMessage, Delivered, EngineLost, Message

Answer = TypeVar("Answer", bound=Message)
_END_GRACE_S = 2.0
_NEWS_S = 1.0
_SPINS_PER_BARRIER = "20000"


class WorkerProcess:
    """A running worker. `stop` ends it; so does the end of this process, because its input then ends.

    Args:
        on_delivered: told what its frames showed of the link to a member, where that is news; whoever reads the worker's
            messages is not.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, *, on_delivered: Callable[[Delivered], None] = lambda _: None
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._on_delivered = on_delivered
        self._channel = Channel(process.stdout, process.stdin, peer=f"worker {process.pid}")

    @classmethod
    async def start(cls, *, on_delivered: Callable[[Delivered], None] = lambda _: None) -> WorkerProcess:
        """Starts a worker that waits for its `StartWorker`, or for texts."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "shoal.runtime.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=_environment(),
            limit=MESSAGE_BYTES_MAX,
            **_own_group(),
        )
        return cls(process, on_delivered=on_delivered)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def wait_ended(self) -> None:
        await self._process.wait()

    async def send(self, message: Message) -> None:
        """Raises WorkerLost when it has ended."""
        try:
            await self._channel.send(message)
        except LinkClosed as error:
            raise await self._lost() from error

    async def receive(self) -> AnyMessage:
        """The next message. Raises WorkerLost when it has ended or lost its ring."""
        while True:
            try:
                message = await self._channel.receive()
            except LinkClosed as error:
                raise await self._lost() from error
            if isinstance(message, Delivered):
                # What lay unread since the last answer says nothing of now.
                if time.monotonic() - message.at_s <= _NEWS_S:
                    self._on_delivered(message)
                continue
            if isinstance(message, EngineLost):
                raise WorkerLost(message.text)
            return message

    def interrupt(self, error: WorkerLost) -> None:
        """Ends waiting for the worker's next message, now and from now on, with this error."""
        self._channel.interrupt(error)

    async def expect(self, kind: type[Answer], *, timeout_s: float | None) -> Answer:
        """As `Channel.expect`; a worker that ended is WorkerLost."""
        try:
            return await self._channel.expect(kind, timeout_s=timeout_s)
        except LinkClosed as error:
            raise await self._lost() from error

    async def stop(self) -> None:
        """Ends the process and waits for it. Never fails, and may be called again."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # It holds no state worth saving, and a computing thread would not listen.
                self._process.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _END_GRACE_S)
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _lost(self) -> WorkerLost:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _END_GRACE_S)
        status = self._process.returncode
        if status is not None and status < 0:
            hint = ", perhaps by the system for lack of memory" if status == -9 else ""
            return WorkerLost(f"worker {self.pid} was killed (signal {-status}{hint})")
        return WorkerLost(f"worker {self.pid} ended (status {status})")


def _environment() -> dict[str, str]:
    # OpenMP threads that have finished spin for a while before they sleep, by default far longer than a hop takes, and
    # would keep the processor from the next stage on the same machine.
    return {"GOMP_SPINCOUNT": _SPINS_PER_BARRIER, **os.environ}


def _own_group() -> dict[str, Any]:
    """Ctrl-C in the agent's terminal is for the agent; it ends its workers itself."""
    if sys.platform == "win32":
        import subprocess

        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}
