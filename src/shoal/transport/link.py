"""Links of the ring: blocking TCP sockets, each used in one direction, TLS inside where its ends have keys (`RingKeys`).

The token path reads into one preallocated buffer and sends header and payload from another with a single `sendall`.
A frame that a socket's buffer surely takes is sent by the thread that made it, because handing it over would cost a
wake-up; larger ones (prefill) go through a sender thread, so that the next micro-batch is computed meanwhile.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from shoal.errors import AddressInUse, DeviceUnreachable, LinkClosed, PeerNotTrusted, RemoteProtocolError
from shoal.ids import EngineId
from shoal.transport.delivery import BulkWatch, Delivery
from shoal.transport.framing import (
    HEADER,
    HELLO_BYTES_MAX,
    NUM_RECORDS_OFFSET,
    STAGE_RECORD,
    VISITS_MAX,
    FrameHeader,
    FrameKind,
    StageTiming,
    pack_header,
    unpack_header,
)
from shoal.transport.identity import DeviceKeys, identify
from shoal.transport.secure import NO_CALLS, TrustStore, direct_calls

INLINE_BYTES_MAX = 64 * 1024
"""Frames up to this size are sent at once: a socket buffer of the usual 200 kB and more takes them without blocking."""
HELLO_TIMEOUT_S = 5.0
DIAL_TIMEOUT_S = 5.0
_SENDER_END_S = 1.0

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class RingKeys:
    """What one stage proves itself with to its neighbours, and they to it: a key pair for one engine.

    Its public half goes to the head over the agents' own link, and from there to both neighbours. So whoever may hold a
    lease may be in its ring, nobody else, and workers need no device's own key.
    """

    def __init__(self) -> None:
        self._keys = DeviceKeys.generate()

    @property
    def public_key(self) -> bytes:
        return self._keys.public_key

    def accept(self, sock: socket.socket, previous_key: bytes) -> socket.socket:
        """Raises PeerNotTrusted where the dialler is not the previous stage, LinkClosed where it is gone."""
        secured, _ = TrustStore(self._keys, [previous_key]).accept(sock)
        return secured

    def dial(self, sock: socket.socket, next_key: bytes) -> socket.socket:
        """Raises PeerNotTrusted where the next stage is another, LinkClosed where it is gone."""
        return TrustStore(self._keys, [next_key]).dial(sock, identify(next_key))


class FrameShape(NamedTuple):
    """What is the same for all frames of an engine: most tokens, their width, and how often a stage works on each."""

    micro_batch: int
    hidden_size: int
    num_visits: int


class Frame:
    """Room for the largest frame of an engine: header, hidden states and stage records in one buffer.

    A stage receives into a frame, computes, writes its output over its input, and sends the same frame on.

    Between two tokens this is all the Python there is, and runs with cold caches: it keeps to few calls and objects.
    """

    def __init__(self, shape: FrameShape) -> None:
        micro_batch, hidden_size, self._num_visits = shape
        if self._num_visits > VISITS_MAX:
            raise ValueError(f"a token visits stages {self._num_visits} times; at most {VISITS_MAX} are allowed")
        self._token_bytes = hidden_size * 4
        self._record_bytes = self._num_visits * STAGE_RECORD.size
        self.payload_bytes_max = micro_batch * self._token_bytes + self._record_bytes
        self.num_bytes_min = HEADER.size + self._token_bytes + self._record_bytes
        memory = np.zeros(HEADER.size + self.payload_bytes_max, dtype=np.uint8)
        self.buffer = memoryview(memory)  # type: ignore[arg-type]  # numpy arrays export buffers
        states = memory[HEADER.size : HEADER.size + micro_batch * self._token_bytes]
        self._states_BD: FloatArray = states.view(np.float32).reshape(micro_batch, hidden_size)
        self.header = FrameHeader(FrameKind.FORWARD, 0, EngineId(0), 0, 0, 0)
        self.num_bytes = self.num_bytes_min

    @property
    def hidden_states(self) -> FloatArray:
        """The payload as [tokens, hidden size]; a view."""
        return self._states_BD[: self.header.num_tokens]

    @property
    def timings(self) -> list[StageTiming]:
        """What the stages before spent on this frame, in ring order."""
        offset = self.num_bytes - self._record_bytes
        stop = offset + self.buffer[NUM_RECORDS_OFFSET] * STAGE_RECORD.size
        records = STAGE_RECORD.iter_unpack(self.buffer[offset:stop])
        return [StageTiming(*(part_ns * 1e-9 for part_ns in record)) for record in records]

    def begin(
        self, engine: EngineId, position: int, num_tokens: int, *, num_visits: int = 0, more: bool = False
    ) -> FloatArray:
        """Makes this the frame of a micro-batch that starts its way, or a further round, after so many visits to stages.

        Returns:
            Its hidden states, to fill in.
        """
        payload_bytes = num_tokens * self._token_bytes + self._record_bytes
        kind = FrameKind.FORWARD_MORE if more else FrameKind.FORWARD
        self.header = FrameHeader(kind, num_visits, engine, position, num_tokens, payload_bytes)
        self.num_bytes = HEADER.size + payload_bytes
        pack_header(self.buffer, self.header)
        return self._states_BD[:num_tokens]

    def continue_with(self, x_BD: FloatArray, *, compute_ns: int, disk_ns: int, held_ns: int) -> None:
        """Replaces the hidden states by a stage's output, and adds what it spent."""
        num_records = self.buffer[NUM_RECORDS_OFFSET]
        self._states_BD[: self.header.num_tokens] = x_BD
        offset = self.num_bytes - self._record_bytes + num_records * STAGE_RECORD.size
        STAGE_RECORD.pack_into(self.buffer, offset, compute_ns, disk_ns, held_ns)
        self.buffer[NUM_RECORDS_OFFSET] = num_records + 1

    def read_header(self, engine: EngineId) -> None:
        """Takes the header from the buffer. Raises RemoteProtocolError unless it fits this engine and itself."""
        self.header = header = unpack_header(self.buffer, payload_bytes_max=self.payload_bytes_max)
        kind, num_records, of_engine, _, num_tokens, payload_bytes = header
        self.num_bytes = HEADER.size + payload_bytes
        if of_engine != engine:
            raise RemoteProtocolError("a frame belongs to another engine")
        if kind < FrameKind.FORWARD or num_tokens == 0:
            raise RemoteProtocolError(f"a frame of kind {kind} with {num_tokens} tokens in the ring")
        if num_tokens * self._token_bytes + self._record_bytes != payload_bytes:
            raise RemoteProtocolError(f"a frame of {num_tokens} tokens has {payload_bytes} bytes")
        if num_records >= self._num_visits:
            raise RemoteProtocolError(
                f"a frame comes after {num_records} visits to stages, {self._num_visits} are all there are"
            )


class Inbound:
    """The link on which the previous stage's frames arrive."""

    def __init__(self, sock: socket.socket, engine: EngineId) -> None:
        self._socket = sock
        self._calls = direct_calls(sock)
        self._engine = engine
        self.bytes_received = 0

    def receive(self, frame: Frame) -> None:
        """Waits for the next frame and reads it into `frame`.

        Raises:
            LinkClosed: the peer is gone.
            RemoteProtocolError: the frame is malformed; the link is closed.
        """
        # No frame is shorter than one token's, so one call reads a decode step whole and never into the next frame.
        received = self._receive(frame.buffer, 0, HEADER.size, frame.num_bytes_min)
        try:
            frame.read_header(self._engine)
        except RemoteProtocolError:
            self.close()
            raise
        wanted = frame.num_bytes
        if received < wanted:
            received = self._receive(frame.buffer, received, wanted, wanted)
        self.bytes_received += received

    def _receive(self, buffer: memoryview, received: int, least: int, most: int) -> int:
        """Goes on until at least `least` bytes are in the buffer, `most` at most; returns how many are."""
        try:
            while received < least:
                count = self._calls.receive(most - received, buffer[received:])
                if not count:
                    raise LinkClosed("the previous device in the ring is gone (connection closed)")
                received += count
        except OSError as error:
            raise LinkClosed(f"the previous device in the ring is gone ({error})") from error
        return received

    def close(self) -> None:
        self._calls = NO_CALLS
        _close(self._socket)


class Outbound:
    """The link on which this stage's frames leave.

    Args:
        frames_max: most frames that may wait for the sender thread; `send` blocks beyond it.
        on_delivery: told by that thread how fast larger frames arrive, where the system knows it; must not raise.
    """

    def __init__(
        self,
        sock: socket.socket,
        shape: FrameShape,
        *,
        frames_max: int,
        on_delivery: Callable[[Delivery], None] = lambda _: None,
    ) -> None:
        self._socket = sock
        self._watch = BulkWatch(sock, on_delivery, now_s=time.monotonic())
        self._calls = direct_calls(sock)
        self._free: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        # Each is written by one thread only: what was handed to the sender thread, and what it has sent.
        self._num_queued = self._num_dequeued = 0
        self._failure: LinkClosed | None = None
        self.bytes_sent = 0
        for _ in range(frames_max):
            self._free.put(Frame(shape))
        self._sender = threading.Thread(target=self._send_waiting, name="ring-sender", daemon=True)
        self._sender.start()

    def free_frame(self) -> Frame:
        """A frame to fill. Waits for one where all are on their way."""
        return self._free.get()

    def send(self, frame: Frame) -> Frame:
        """Sends a frame, which is the link's from now on.

        Returns:
            A frame for the next time: often the same one.

        Raises:
            LinkClosed: the peer is gone.
        """
        if self._failure is not None:
            raise self._failure
        if frame.num_bytes <= INLINE_BYTES_MAX and self._num_queued == self._num_dequeued:
            self._send(frame)
            return frame
        self._num_queued += 1
        self._waiting.put(frame)
        return self._free.get()

    def _send(self, frame: Frame) -> None:
        try:
            rest = frame.buffer[: frame.num_bytes]
            while (sent := self._calls.send(rest)) < len(rest):  # a decode step leaves in one call
                rest = rest[sent:]
        except OSError as error:
            raise LinkClosed(f"the next device in the ring is gone ({error})") from error
        self.bytes_sent += frame.num_bytes

    def _send_waiting(self) -> None:
        while (frame := self._next_waiting()) is not None:
            try:
                if self._failure is None:
                    self._watch.sends(time.monotonic())
                    self._send(frame)
                    self._watch.look(time.monotonic())
            except LinkClosed as error:
                # Announced by the next `send`; whoever waits on the inbound link learns it there.
                self._failure = error
            finally:
                self._num_dequeued += 1
                self._free.put(frame)

    def _next_waiting(self) -> Frame | None:
        """Waits for it, and meanwhile sees the last one arrive."""
        while True:
            try:
                return self._waiting.get(timeout=self._watch.wait_s(time.monotonic()))
            except queue.Empty:
                self._watch.look(time.monotonic())

    def close(self) -> None:
        self._calls = NO_CALLS
        _close(self._socket)
        self._waiting.put(None)
        # It cannot be blocked any more: its socket is closed.
        self._sender.join(_SENDER_END_S)


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

    def accept(self, *, timeout_s: float, keys: RingKeys | None = None, previous_key: bytes = b"") -> Inbound:
        """Waits for the one peer that belongs here: with `keys`, the one that holds the private half of `previous_key`.

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
                if keys is not None:
                    sock = keys.accept(sock, previous_key)
                self._greet(sock)
            except (RemoteProtocolError, PeerNotTrusted, OSError, LinkClosed):
                self.num_refused += 1
                _close(sock)
                continue
            return Inbound(_tuned(sock), self._engine)
        raise DeviceUnreachable(f"the previous device of the ring did not connect within {timeout_s:.0f} s")

    def _greet(self, sock: socket.socket) -> None:
        header, text = _receive_small(sock)
        if header.kind != FrameKind.HELLO or header.engine != self._engine:
            raise RemoteProtocolError("the caller does not know this engine")
        if text != self._version:
            _send_small(sock, FrameKind.REFUSED, self._engine, f"runs shoal {self._version}, the caller {text}")
            raise RemoteProtocolError(f"the caller runs shoal {text}")
        _send_small(sock, FrameKind.WELCOME, self._engine, self._version)

    def close(self) -> None:
        _close(self._listener)


def dial(
    host: str, port: int, *, engine: EngineId, version: str, keys: RingKeys | None = None, next_key: bytes = b""
) -> socket.socket:
    """Connects to the next stage and greets it; with `keys`, only the one that holds the private half of `next_key`.

    Raises:
        DeviceUnreachable: no answer there.
        PeerNotTrusted: another one answers there.
        RemoteProtocolError: it answered, but not as the stage of this engine; the text says why.
    """
    try:
        sock = socket.create_connection((host, port), timeout=DIAL_TIMEOUT_S)
    except OSError as error:
        raise DeviceUnreachable(f"no worker answers at {host}:{port} ({error})") from error
    try:
        if keys is not None:
            sock = keys.dial(sock, next_key)
        _send_small(sock, FrameKind.HELLO, engine, version)
        header, text = _receive_small(sock)
    except (OSError, LinkClosed) as error:
        _close(sock)
        raise RemoteProtocolError(f"the worker at {host}:{port} hung up on our greeting: {error}") from error
    if header.kind != FrameKind.WELCOME:
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


def _receive_some(sock: socket.socket, target: memoryview) -> int:
    """Reads at least one byte. Raises LinkClosed at the end, TimeoutError where the socket has a limit."""
    try:
        count = sock.recv_into(target)
    except TimeoutError:
        raise
    except OSError as error:
        raise LinkClosed(f"the previous device in the ring is gone ({error})") from error
    if count == 0:
        raise LinkClosed("the previous device in the ring is gone (connection closed)")
    return count


def _receive_exactly(sock: socket.socket, target: memoryview) -> None:
    received = 0
    while received < len(target):
        received += _receive_some(sock, target[received:])


def _send_small(sock: socket.socket, kind: FrameKind, engine: EngineId, text: str) -> None:
    payload = text.encode()[:HELLO_BYTES_MAX]
    message = bytearray(HEADER.size + len(payload))
    pack_header(memoryview(message), FrameHeader(kind, 0, engine, 0, 0, len(payload)))
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
        # Not `sock.shutdown`: with TLS that forgets the keys first, and who waits would get what is left as it is.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    sock.close()
