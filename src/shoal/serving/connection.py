"""The HTTP server: uvicorn, with an end to connections that say nothing, and to those that read nothing.

uvicorn bounds the size of a request's headers, but waits for ever for them; a few hundred silent connections would then
hold every file descriptor there is. It waits as long for a client that has stopped reading, with the rest of its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from shoal.serving.failures import ApiError

HEADER_TIMEOUT_S = 15.0
HEADER_BYTES_MAX = 32 * 1024
READ_TIMEOUT_S = 60.0
"""How long a client may take nothing of what waits for it."""
KEEP_ALIVE_TIMEOUT_S = 75
WRITE_CHUNK = "write_chunk"
"""In a request's `state`: what sends more of a streamed reply within the call, `Callable[[bytes], bool]`. A message of ASGI
takes a task's turn and five calls for the same, for every token."""
_SHUTDOWN_GRACE_S = 3
_CONNECTIONS_MAX = 2048


def framed(data: bytes) -> bytes:
    """One chunk of HTTP/1.1's chunked encoding; `data` is not empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Parser(h11.Connection):
    """h11's, with a short way for the chunks of a streamed reply: their frame is all that it would add."""

    is_chunked = False
    """Whether a reply has begun that is sent in chunks, and has not ended."""

    def send_with_data_passthrough(self, event: Any) -> Any:
        if type(event) is h11.Data and self.is_chunked:
            return (framed(event.data),) if event.data else ()
        sent = super().send_with_data_passthrough(event)
        if type(event) is h11.Response:
            self.is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in b"".join(sent or ()).lower()
        elif type(event) is h11.EndOfMessage:
            self.is_chunked = False
        return sent


class _Protocol(H11Protocol):
    """uvicorn's, with a time limit from a connection's first byte, or its beginning, to the end of the headers, and one
    for a client that takes nothing."""

    _deadline: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: _Parser = _Parser(h11.SERVER, self.config.h11_max_incomplete_event_size or HEADER_BYTES_MAX)
        # Every request's scope gets a copy of this.
        self.app_state = {**self.app_state, WRITE_CHUNK: self._write_chunk}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def _write_chunk(self, data: bytes) -> bool:
        """Sends more of a reply in chunks; False where none has begun, or its client does not keep up."""
        if not self.conn.is_chunked or self.flow.write_paused or self.transport.is_closing():
            return False
        self.transport.write(framed(data))
        return True

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_clock()
        elif self.conn.trailing_data[0]:
            self._start_clock()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_watching()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read, refused in the shape that clients know."""
        body = ApiError(400, msg).body
        headers = [("content-type", "application/json"), ("connection", "close"), ("content-length", str(len(body)))]
        with contextlib.suppress(h11.LocalProtocolError):
            output = self.conn.send(h11.Response(status_code=400, headers=headers, reason="Bad Request")) or b""
            output += self.conn.send(h11.Data(data=body)) or b""
            output += self.conn.send(h11.EndOfMessage()) or b""
            self.transport.write(output)
        self.transport.close()

    def _watch_reading(self, num_bytes_before: int) -> None:
        # More may have been added meanwhile; a client that reads slower than we write is cut off when its buffer is full.
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes >= num_bytes_before:
            self.transport.abort()
            return
        self._reading = self.loop.call_later(READ_TIMEOUT_S, self._watch_reading, num_bytes)

    def _stop_watching(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _start_clock(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def http_server(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serves `app` on a socket that listens already, and closes it at the end."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        loop="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES_MAX,
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT_S,
        timeout_graceful_shutdown=_SHUTDOWN_GRACE_S,
        limit_concurrency=_CONNECTIONS_MAX,
        backlog=512,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        await serving
        listener.close()
