"""Links of the ring: blocking TCP sockets, each used in one direction.

The token path reads into one preallocated buffer and sends header and payload from another with a single `sendall`.
A frame that a socket's buffer surely takes is sent by the thread that made it, because handing it over would cost a
wake-up; larger ones (prefill) go through a sender thread, so that the next micro-batch is computed meanwhile.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import threading
import time
from typing import Any

import numpy as np

from shoal.errors import AddressInUse, DeviceUnreachable, LinkClosed, RemoteProtocolError
from shoal.ids import EngineId
from shoal.transport.framing import (
    HEADER,
    HELLO_BYTES_MAX,
    STAGE_RECORD,
    FrameHeader,
    FrameKind,
    StageTiming,
    append_record,
    pack_header,
    read_records,
    unpack_header,
)

STAGES_MAX = 64
"""Most stages in a ring; bounds the stage records of a frame."""
INLINE_BYTES_MAX = 64 * 1024
"""Frames up to this size are sent at once: a socket buffer of the usual 200 kB and more takes them without blocking."""
HELLO_TIMEOUT_S = 5.0
DIAL_TIMEOUT_S = 5.0

_LOOK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class Frame:
    """Room for the largest frame of an engine: header, hidden states and records in one buffer."""

    def __init__(self, *, micro_batch: int, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.payload_bytes_max = micro_batch * hidden_size * 4 + STAGES_MAX * STAGE_RECORD.size
        self._bytes = np.zeros(HEADER.size + self.payload_bytes_max, dtype=np.uint8)
        self.buffer = memoryview(self._bytes)  # type: ignore[arg-type]  # numpy arrays export buffers
        self._floats = self._bytes[HEADER.size : HEADER.size + micro_batch * hidden_size * 4].view(np.float32)
        self.header = FrameHeader(FrameKind.FORWARD, 0, EngineId(0), 0, 0, 0, 0)
        self.num_bytes = 0

    @property
    def hidden_states(self) -> FloatArray:
        """The payload as [tokens, hidden size]; a view."""
        num_tokens = self.header.num_tokens
        return self._floats[: num_tokens * self.hidden_size].reshape(num_tokens, self.hidden_size)

    @property
    def timings(self) -> list[StageTiming]:
        """What the stages before spent on this frame."""
        offset = HEADER.size + self.header.num_tokens * self.hidden_size * 4
        return read_records(self.buffer, offset, self.header.num_records)

    def fill(self, header: FrameHeader, x_BD: FloatArray, timings: list[StageTiming]) -> None:
        """Makes this a FORWARD frame of `x_BD` with these stage records."""
        payload_bytes = x_BD.nbytes + len(timings) * STAGE_RECORD.size
        self.header = header._replace(num_records=len(timings), payload_bytes=payload_bytes)
        pack_header(self.buffer, self.header)
        self.hidden_states[...] = x_BD
        offset = HEADER.size + x_BD.nbytes
        for timing in timings:
            offset = append_record(self.buffer, offset, timing)
        self.num_bytes = offset

    def check(self) -> None:
        """Raises RemoteProtocolError unless header and payload agree."""
        expected = self.header.num_tokens * self.hidden_size * 4 + self.header.num_records * STAGE_RECORD.size
        if self.header.kind is not FrameKind.FORWARD or self.header.num_tokens == 0:
            raise RemoteProtocolError(f"a {self.header.kind.name} frame of {self.header.num_tokens} tokens in the ring")
        if self.header.num_records >= STAGES_MAX or expected != self.header.payload_bytes:
            raise RemoteProtocolError(f"a frame of {self.header.num_tokens} tokens has {self.header.payload_bytes} bytes")


class Inbound:
    """The link on which the previous stage's frames arrive."""

    def __init__(self, sock: socket.socket, engine: EngineId) -> None:
        self._socket = sock
        self._engine = engine
        self._usual_wait_s = 0.0
        self.bytes_received = 0

    def receive(self, frame: Frame, *, spin_s: float = 0.0) -> None:
        """Waits for the next frame and reads it into `frame`.

        Args:
            spin_s: how long to ask the socket again and again before sleeping: waking up an idle processor takes
                longer than most hops, but a spinning one is lost to others.

        Raises:
            LinkClosed: the peer is gone.
            RemoteProtocolError: the frame is malformed; the link is closed.
        """
        if spin_s > 0.0:
            self._wait(spin_s)
        try:
            _receive_exactly(self._socket, frame.buffer[: HEADER.size])
            frame.header = unpack_header(frame.buffer, payload_bytes_max=frame.payload_bytes_max)
            if frame.header.engine != self._engine:
                raise RemoteProtocolError("a frame belongs to another engine")
            _receive_exactly(self._socket, frame.buffer[HEADER.size : HEADER.size + frame.header.payload_bytes])
            frame.check()
        except RemoteProtocolError:
            self.close()
            raise
        self.bytes_received += HEADER.size + frame.header.payload_bytes

    def _wait(self, spin_s: float) -> None:
        """Sleeps until shortly before the next frame is due, and then asks again and again.

        Frames of a decoding ring arrive at a steady pace, so the last wait tells the next. Waking up an idle processor
        takes longer than the rest of a hop; waking up early hides that, for `spin_s` of one core before each frame.
        """
        began_s = time.perf_counter()
        sleep_s = self._usual_wait_s - spin_s
        if sleep_s > 0.0:
            select.select((self._socket,), (), (), sleep_s)
        give_up_s = began_s + max(0.0, sleep_s) + 2.0 * spin_s
        peek = bytearray(1)
        while time.perf_counter() < give_up_s:
            try:
                self._socket.recv_into(peek, 1, _LOOK)
                break
            except BlockingIOError:
                continue
            except OSError:
                return
        else:
            select.select((self._socket,), (), ())
        self._usual_wait_s = time.perf_counter() - began_s

    def close(self) -> None:
        _close(self._socket)


class Outbound:
    """The link on which this stage's frames leave.

    Args:
        frames_max: most frames that may wait for the sender thread; `new_frame` blocks beyond it.
    """

    def __init__(self, sock: socket.socket, *, micro_batch: int, hidden_size: int, frames_max: int) -> None:
        self._socket = sock
        self._free: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self.bytes_sent = 0
        for _ in range(frames_max):
            self._free.put(Frame(micro_batch=micro_batch, hidden_size=hidden_size))
        self._sender = threading.Thread(target=self._send_waiting, name="ring-sender", daemon=True)
        self._sender.start()

    def send(self, header: FrameHeader, x_BD: FloatArray, timings: list[StageTiming]) -> None:
        """Sends a frame; returns when the bytes were copied, not when they arrived.

        Raises:
            LinkClosed: the peer is gone.
        """
        if self._failure is not None:
            raise self._failure
        frame = self._free.get()
        frame.fill(header, x_BD, timings)
        with self._lock:
            inline = self._num_waiting == 0 and frame.num_bytes <= INLINE_BYTES_MAX
            if not inline:
                self._num_waiting += 1
        if not inline:
            self._waiting.put(frame)
            return
        try:
            self._send(frame)
        finally:
            self._free.put(frame)

    def _send(self, frame: Frame) -> None:
        try:
            self._socket.sendall(frame.buffer[: frame.num_bytes])
        except OSError as error:
            raise LinkClosed(f"the next device in the ring is gone ({error})") from error
        self.bytes_sent += frame.num_bytes

    def _send_waiting(self) -> None:
        while (frame := self._waiting.get()) is not None:
            try:
                if self._failure is None:
                    self._send(frame)
            except LinkClosed as error:
                # Announced by the next `send`; whoever waits on the inbound link learns it there.
                self._failure = error
            finally:
                with self._lock:
                    self._num_waiting -= 1
                self._free.put(frame)

    def close(self) -> None:
        _close(self._socket)
        self._waiting.put(None)


class RingListener:
    """Where the previous stage dials in.

    What does not greet correctly is counted in `num_refused` and hung up on; nothing else happens.
    """

    def __init__(self, host: str, *, engine: EngineId, version: str) -> None:
        self._listener = listen(host, 0)
        self._engine = engine
        self._version = version
        self.port: int = self._listener.getsockname()[1]
        self.num_refused = 0

    def accept(self, *, timeout_s: float) -> Inbound:
        """Waits for the one peer that belongs here.

        Raises:
            DeviceUnreachable: nobody came in time.
        """
        give_up_s = time.monotonic() + timeout_s
        while (remaining_s := give_up_s - time.monotonic()) > 0:
            self._listener.settimeout(remaining_s)
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                break
            try:
                sock.settimeout(min(HELLO_TIMEOUT_S, remaining_s))
                self._greet(sock)
            except (RemoteProtocolError, OSError, LinkClosed):
                self.num_refused += 1
                _close(sock)
                continue
            return Inbound(_tuned(sock), self._engine)
        raise DeviceUnreachable(f"the previous device of the ring did not connect within {timeout_s:.0f} s")

    def _greet(self, sock: socket.socket) -> None:
        header, text = _receive_small(sock)
        if header.kind is not FrameKind.HELLO or header.engine != self._engine:
            raise RemoteProtocolError("the caller does not know this engine")
        if text != self._version:
            _send_small(sock, FrameKind.REFUSED, self._engine, f"runs shoal {self._version}, the caller {text}")
            raise RemoteProtocolError(f"the caller runs shoal {text}")
        _send_small(sock, FrameKind.WELCOME, self._engine, self._version)

    def close(self) -> None:
        _close(self._listener)


def dial(host: str, port: int, *, engine: EngineId, version: str) -> socket.socket:
    """Connects to the next stage and greets it.

    Raises:
        DeviceUnreachable: no answer there.
        RemoteProtocolError: it answered, but not as the stage of this engine; the text says why.
    """
    try:
        sock = socket.create_connection((host, port), timeout=DIAL_TIMEOUT_S)
    except OSError as error:
        raise DeviceUnreachable(f"no worker answers at {host}:{port} ({error})") from error
    try:
        _send_small(sock, FrameKind.HELLO, engine, version)
        header, text = _receive_small(sock)
    except (OSError, LinkClosed) as error:
        _close(sock)
        raise RemoteProtocolError(f"the worker at {host}:{port} hung up on our greeting: {error}") from error
    if header.kind is not FrameKind.WELCOME:
        _close(sock)
        raise RemoteProtocolError(f"the worker at {host}:{port} refused: it {text}")
    return _tuned(sock)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        AddressInUse: another program has that port; port 0 takes a free one.
        DeviceUnreachable: this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_REUSEADDR") and not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(16)
    except OSError as error:
        sock.close()
        if error.errno in (98, 48, 10048):  # EADDRINUSE on Linux, macOS, Windows
            raise AddressInUse(f"{host}:{port} is in use: stop the program there or choose another --listen") from error
        raise DeviceUnreachable(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sock


def _tuned(sock: socket.socket) -> socket.socket:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


def _receive_exactly(sock: socket.socket, target: memoryview) -> None:
    received = 0
    while received < len(target):
        try:
            count = sock.recv_into(target[received:])
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkClosed(f"the previous device in the ring is gone ({error})") from error
        if count == 0:
            raise LinkClosed("the previous device in the ring is gone (connection closed)")
        received += count


def _send_small(sock: socket.socket, kind: FrameKind, engine: EngineId, text: str) -> None:
    payload = text.encode()[:HELLO_BYTES_MAX]
    message = bytearray(HEADER.size + len(payload))
    pack_header(memoryview(message), FrameHeader(kind, 0, engine, 0, 0, 0, len(payload)))
    message[HEADER.size :] = payload
    sock.sendall(message)


def _receive_small(sock: socket.socket) -> tuple[FrameHeader, str]:
    head = bytearray(HEADER.size)
    _receive_exactly(sock, memoryview(head))
    header = unpack_header(head, payload_bytes_max=HELLO_BYTES_MAX)
    payload = bytearray(header.payload_bytes)
    _receive_exactly(sock, memoryview(payload))
    return header, payload.decode(errors="replace")


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
