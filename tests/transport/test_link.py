"""Links over real sockets on loopback: frames arrive, strangers are hung up on, the dead are noticed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from shoal.errors import AddressInUse, DeviceUnreachable, LinkClosed, RemoteProtocolError
from shoal.ids import EngineId
from shoal.transport.framing import HEADER, MAGIC, PROTOCOL_VERSION, STAGE_RECORD, FrameKind, StageTiming
from shoal.transport.link import Frame, FrameShape, Inbound, Outbound, RingListener, dial, listen

ENGINE = EngineId(42)
HIDDEN = 16
VISITS = 3
FRAME_BYTES = HIDDEN * 4 + VISITS * STAGE_RECORD.size


def connected(*, frames_max: int = 4, hidden: int = HIDDEN, micro_batch: int = 512) -> tuple[Inbound, Outbound]:
    listener = RingListener("127.0.0.1", engine=ENGINE, version="1")
    accepted: list[Inbound] = []
    accepting = threading.Thread(target=lambda: accepted.append(listener.accept(timeout_s=5.0)))
    accepting.start()
    sock = dial("127.0.0.1", listener.port, engine=ENGINE, version="1")
    accepting.join()
    listener.close()
    return accepted[0], Outbound(sock, FrameShape(micro_batch, hidden, VISITS), frames_max=frames_max)


def header(
    *,
    version: int = PROTOCOL_VERSION,
    kind: FrameKind = FrameKind.FORWARD,
    num_records: int = 0,
    engine: int = ENGINE,
    num_tokens: int = 1,
    payload_bytes: int = FRAME_BYTES,
) -> bytes:
    return HEADER.pack(MAGIC, version, kind, num_records, engine, 0, num_tokens, payload_bytes)


@pytest.fixture
def link() -> Iterator[tuple[Inbound, Outbound]]:
    inbound, outbound = connected()
    yield inbound, outbound
    inbound.close()
    outbound.close()


def test_hidden_states_and_times_arrive_as_they_left(link: tuple[Inbound, Outbound]) -> None:
    inbound, outbound = link
    received, frame = Frame(FrameShape(512, HIDDEN, VISITS)), outbound.free_frame()
    for num_tokens in (1, 2, 512, 1):
        x_BD = np.random.default_rng(num_tokens).standard_normal((num_tokens, HIDDEN), dtype=np.float32)
        frame.begin(ENGINE, 3, num_tokens)[...] = 0.0
        frame.continue_with(np.zeros_like(x_BD), compute_ns=10**9, disk_ns=5 * 10**8, held_ns=2 * 10**9)
        frame.continue_with(x_BD, compute_ns=500_000_000, disk_ns=0, held_ns=750_000_000)
        frame = outbound.send(frame)
        inbound.receive(received)
        assert np.array_equal(received.hidden_states, x_BD)
        assert received.timings == [StageTiming(1.0, 0.5, 2.0), StageTiming(0.5, 0.0, 0.75)]
        assert received.header.position == 3
    assert inbound.bytes_received == outbound.bytes_sent


def test_large_frames_do_not_block_the_sender_and_keep_their_order() -> None:
    # 16 MB are more than the socket's buffers take: the sender thread must wait, the caller must not.
    inbound, outbound = connected(frames_max=6, hidden=8192, micro_batch=128)
    frame, received = outbound.free_frame(), Frame(FrameShape(128, 8192, VISITS))
    for index in range(4):
        frame.begin(ENGINE, index, 128)[...] = index
        frame = outbound.send(frame)
    frame.begin(ENGINE, 4, 1)[...] = 4  # small, and still not ahead of the others
    outbound.send(frame)
    for index in range(5):
        inbound.receive(received)
        assert received.header.position == index
        assert np.all(received.hidden_states == index)
    inbound.close()
    outbound.close()


def test_a_closed_link_is_told_at_once(link: tuple[Inbound, Outbound]) -> None:
    inbound, outbound = link
    outbound.close()
    with pytest.raises(LinkClosed, match="previous device in the ring is gone"):
        inbound.receive(Frame(FrameShape(1, HIDDEN, VISITS)))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b" " * HEADER.size, "no shoal worker"),
        (b"\x00" * HEADER.size, "no shoal worker"),
        (header(version=1), "the peer speaks ring protocol 1"),
        (header(engine=7), "another engine"),
        (header(num_tokens=2), f"2 tokens has {FRAME_BYTES} bytes"),
        (header(num_tokens=0), "0 tokens in the ring"),
        (header(num_records=VISITS), "after 3 visits to stages"),
        (header(kind=FrameKind.HELLO), "a frame of kind 1"),
        (header(payload_bytes=1 << 30), "announces 1073741824 bytes"),
    ],
    ids=["http", "zeros", "version", "engine", "wrong size", "no tokens", "too many records", "late hello", "too large"],
)
def test_a_malformed_frame_closes_its_link(payload: bytes, reason: str) -> None:
    ours, theirs = socket.socketpair()
    inbound = Inbound(ours, ENGINE)
    theirs.sendall(payload)
    with pytest.raises(RemoteProtocolError, match=reason):
        inbound.receive(Frame(FrameShape(4, HIDDEN, VISITS)))
    assert ours.fileno() == -1
    theirs.close()


def test_strangers_are_counted_and_hung_up_on() -> None:
    listener = RingListener("127.0.0.1", engine=ENGINE, version="1")
    accepted: list[Inbound] = []
    accepting = threading.Thread(target=lambda: accepted.append(listener.accept(timeout_s=5.0)))
    accepting.start()
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.sendall(b"x" * HEADER.size)
        assert stranger.recv(1) == b""
    with pytest.raises(RemoteProtocolError, match="hung up on our greeting"):
        dial("127.0.0.1", listener.port, engine=EngineId(7), version="1")
    with pytest.raises(RemoteProtocolError, match="refused: it runs shoal 1, the caller 2"):
        dial("127.0.0.1", listener.port, engine=ENGINE, version="2")
    sock = dial("127.0.0.1", listener.port, engine=ENGINE, version="1")
    accepting.join()
    assert listener.num_refused == 3
    sock.close()
    accepted[0].close()
    listener.close()


def test_nobody_there_is_said_in_one_line() -> None:
    free = listen("127.0.0.1", 0)
    port = free.getsockname()[1]
    with pytest.raises(AddressInUse, match=f"127.0.0.1:{port} is in use: stop the program there or choose another"):
        listen("127.0.0.1", port)
    free.close()
    with pytest.raises(DeviceUnreachable, match=f"no worker answers at 127.0.0.1:{port}"):
        dial("127.0.0.1", port, engine=ENGINE, version="1")
    listener = RingListener("127.0.0.1", engine=ENGINE, version="1")
    with pytest.raises(DeviceUnreachable, match="did not connect"):
        listener.accept(timeout_s=0.05)
    listener.close()
