"""Decides how an answer reaches its HTTP client: at once or as events, in time, and never at the ring's expense.

Producing and sending are two tasks with a buffer between them. A client that reads slowly fills its own buffer and
delays nobody: the ring goes on, and is free for the next request as soon as the answer is complete. While a client
keeps up, its buffer is empty, and an event is written to its connection within the call that brings it. A buffer that is
full ends that one answer; so does a client that takes nothing for a minute, which the connection notices
(`connection.py`). A client that leaves ends it at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from shoal.serving.connection import WRITE_CHUNK
from shoal.serving.failures import ApiError, from_error

KEEP_ALIVE_S = 10.0
BUFFER_BYTES_MAX = 8 << 20
"""An answer of 30 000 tokens in chunks. More than that has not been read for a long time."""
_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect events
]

Report = Callable[[Exception], None]


Write = Callable[[bytes], bool]
"""Sends more of a reply at once; False where it cannot."""


class Outbox:
    """What one client has still to be sent. `write` is the short way to a client that keeps up."""

    def __init__(self, write: Write | None = None) -> None:
        self._write = write
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._waiting: asyncio.Future[None] | None = None
        self.last_taken_s = time.monotonic()
        self.has_started = False
        self.is_closed = False
        self.status = "waiting"
        """What is being done before the first event, for comments."""

    def put(self, data: bytes) -> None:
        """Adds an event.

        Raises:
            ApiError: the client does not read.
        """
        self._add(b"data: " + data + b"\n\n")

    def comment(self, text: str) -> None:
        """Says what is being done, once the reply has begun; clients skip it."""
        self.status = text
        if self.has_started:
            self._add(f": {text}\n\n".encode())

    def close(self) -> None:
        self.is_closed = True
        self.nudge()

    async def take(self) -> bytes:
        """Everything there is, as soon as there is something, it was closed or `nudge` was called."""
        if not self._chunks and not self.is_closed:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        self.last_taken_s = time.monotonic()
        taken = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._num_bytes = 0
        return taken

    def nudge(self) -> None:
        """Ends waiting, for whatever reason there is."""
        if self._is_awaited:
            assert self._waiting is not None
            self._waiting.set_result(None)

    @property
    def _is_awaited(self) -> bool:
        """Whether all before has been sent, and more is waited for."""
        return self._waiting is not None and not self._waiting.done()

    def _add(self, data: bytes) -> None:
        if self._is_awaited and self.has_started and self._write is not None and self._write(data):
            self.last_taken_s = time.monotonic()
            return
        if self._num_bytes + len(data) > BUFFER_BYTES_MAX:
            raise ApiError(408, "the answer was cut off: the client does not read it", code="client_too_slow")
        self._chunks.append(data)
        self._num_bytes += len(data)
        self.nudge()


class EventStream(Response):
    """A reply that is a stream of events.

    Until the first event a failure is a plain reply with its status; afterwards it is an `error` event. While nothing
    comes, a comment every few seconds says what is being done.

    Args:
        produce: fills the outbox; cancelled when the client leaves.
        report: takes what ended `produce`, other than success.
    """

    def __init__(self, produce: Callable[[Outbox], Awaitable[None]], *, report: Report) -> None:
        super().__init__()
        self._produce = produce
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox = Outbox(scope.get("state", {}).get(WRITE_CHUNK))
        producing = asyncio.ensure_future(self._produce(outbox))
        producing.add_done_callback(lambda _: outbox.close())
        leaving = asyncio.ensure_future(_wait_left(receive))
        leaving.add_done_callback(lambda _: outbox.close())
        keeping_alive = asyncio.ensure_future(_keep_alive(outbox))
        try:
            await self._send_all(outbox, producing, leaving, scope, receive, send)
        finally:
            await _end(producing, leaving, keeping_alive)

    async def _send_all(
        self, outbox: Outbox, producing: asyncio.Future[None], leaving: asyncio.Future[None],
        scope: Scope, receive: Receive, send: Send,
    ) -> None:  # fmt: skip
        while not leaving.done():
            data = await outbox.take()
            failure = _failure(producing)
            if failure is not None:
                self._report(failure)
                error = from_error(failure)
                if not outbox.has_started:
                    await error.response()(scope, receive, send)
                    return
                data += b"data: " + error.body + b"\n\n"
            elif producing.done():
                data += _DONE
            if leaving.done():
                return
            if not outbox.has_started:
                outbox.has_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self._all_headers(scope)})
            data = data or f": {outbox.status}\n\n".encode()
            # Looked at again: more may have come while we were sending.
            is_last = producing.done() and (failure is not None or data.endswith(_DONE))
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})
            if is_last:
                return

    def _all_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        del scope
        return [*_HEADERS, *((k, v) for k, v in self.raw_headers if k != b"content-length")]


class WholeReply(Response):
    """A reply that is sent at once, when it is complete. `produce` is cancelled when the client leaves before."""

    def __init__(self, produce: Callable[[], Awaitable[bytes]], *, report: Report) -> None:
        super().__init__()
        self._produce = produce
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producing = asyncio.ensure_future(self._produce())
        leaving = asyncio.ensure_future(_wait_left(receive))
        try:
            await asyncio.wait((producing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not producing.done():
                return
            failure = _failure(producing)
            if failure is None:
                reply = Response(producing.result(), media_type="application/json")
            else:
                self._report(failure)
                reply = from_error(failure).response()
        finally:
            await _end(producing, leaving)
        await reply(scope, receive, send)


async def _keep_alive(outbox: Outbox) -> None:
    """Nudges an outbox that nothing was taken from for `KEEP_ALIVE_S`; one timer per silence, not per event."""
    while True:
        rest_s = outbox.last_taken_s + KEEP_ALIVE_S - time.monotonic()
        if rest_s <= 0:
            outbox.nudge()
            rest_s = KEEP_ALIVE_S
        await asyncio.sleep(rest_s)


def _failure(task: asyncio.Future[Any]) -> Exception | None:
    if not task.done() or task.cancelled():
        return None
    error = task.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return error


async def _wait_left(receive: Receive) -> None:
    """Returns when the client has gone; the request's body has been read."""
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
