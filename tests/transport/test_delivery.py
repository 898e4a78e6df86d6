"""What the kernel says of a link's rate is the link's rate, or says that it is only a lower bound."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from shoal.transport.delivery import LOOK_EVERY_S, BulkWatch, Delivery, DeliveryWatch, TcpInfo, delivered, tcp_info

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is Linux's")
_SO_MAX_PACING_RATE = 47
RATE_BYTES_PER_S = 5_000_000


def info(
    num_bytes: int, busy_s: float, *, held_back_s: float = 0.0, is_app_limited: bool = False, trip_s: float | None = 0.01
) -> TcpInfo:
    return TcpInfo(num_bytes, busy_s, held_back_s, is_app_limited, trip_s)


def test_bytes_over_the_time_in_which_they_were_on_their_way() -> None:
    assert delivered(info(1000, 1.0), info(3000, 1.5), elapsed_s=0.5) == Delivery(2000, 0.5, True, 0.01)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (info(0, 0.0), info(1000, 0.5, is_app_limited=True)),
        (info(0, 0.0, is_app_limited=True), info(1000, 0.5)),
        (info(0, 0.0), info(1000, 0.2)),
        (info(0, 0.0), info(1000, 0.5, held_back_s=0.2)),
    ],
    ids=["nothing more to send", "nothing to send before", "bursts", "held back by the receiver or the buffer"],
)
def test_what_the_link_did_not_limit_is_a_lower_bound(before: TcpInfo, now: TcpInfo) -> None:
    found = delivered(before, now, elapsed_s=0.5)
    assert found is not None
    assert (found.seconds, found.is_full) == (0.5, False)


def test_nothing_sent_says_nothing() -> None:
    assert delivered(info(1000, 1.0), info(1000, 1.0), elapsed_s=0.5) is None
    assert delivered(info(1000, 1.0), info(1001, 1.5), elapsed_s=0.0) is None


@contextmanager
def loopback(*, reads_bytes_per_s: float = float("inf")) -> Iterator[socket.socket]:
    """The sending end of a TCP connection whose other end reads at that rate."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        sender = socket.create_connection(door.getsockname())
        receiver, _ = door.accept()

    has_ended = threading.Event()

    def read() -> None:
        piece = memoryview(bytearray(1 << 16))
        while not has_ended.is_set() and (num_bytes := receiver.recv_into(piece)):
            time.sleep(num_bytes / reads_bytes_per_s)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with closing(receiver):
        with closing(sender):
            yield sender
            has_ended.set()
            sender.shutdown(socket.SHUT_RDWR)
        reader.join()


def send_for(sock: socket.socket, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        sock.sendall(bytes(1 << 16))


@linux_only
def test_a_full_link_is_measured_as_it_is() -> None:
    with loopback() as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, RATE_BYTES_PER_S)
        send_for(sock, 0.1)  # TCP begins with a burst
        watch = DeliveryWatch(sock, now_s=time.monotonic())
        send_for(sock, 0.4)
        found = watch.look(time.monotonic())
        assert found is not None
        assert found.is_full
        assert found.num_bytes / found.seconds == pytest.approx(RATE_BYTES_PER_S, rel=0.2)
        assert found.round_trip_min_s is not None
        assert 0.0 < found.round_trip_min_s < 0.1


@linux_only
def test_a_slow_reader_is_no_slow_link() -> None:
    with loopback(reads_bytes_per_s=2e6) as sock:
        send_for(sock, 0.2)
        watch = DeliveryWatch(sock, now_s=time.monotonic())
        send_for(sock, 0.3)
        found = watch.look(time.monotonic())
        assert found is not None
        assert not found.is_full


@linux_only
def test_small_messages_now_and_then_are_a_lower_bound() -> None:
    with loopback() as sock:
        watch = DeliveryWatch(sock, now_s=time.monotonic())
        for _ in range(10):
            sock.sendall(bytes(2000))
            time.sleep(0.005)
        found = watch.look(time.monotonic())
        assert found is not None
        assert found.num_bytes == pytest.approx(20_000, abs=1)
        assert not found.is_full


def test_what_is_no_tcp_socket_tells_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert tcp_info(left) is None
        assert DeliveryWatch(left, now_s=0.0).look(1.0) is None
    assert tcp_info(left) is None, "closed"


def test_on_other_systems_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback() as sock:
        monkeypatch.setattr(sys, "platform", "darwin")
        watch = DeliveryWatch(sock, now_s=0.0)
        sock.sendall(bytes(1000))
        assert watch.look(1.0) is None


@linux_only
def test_a_burst_is_followed_until_it_has_arrived() -> None:
    told: list[Delivery] = []
    with loopback() as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, RATE_BYTES_PER_S)
        watch = BulkWatch(sock, told.append, now_s=time.monotonic())
        assert watch.wait_s(time.monotonic()) is None, "nothing to look at"
        sock.sendall(bytes(1000))
        watch.sends(time.monotonic())
        num_bytes = 3 * RATE_BYTES_PER_S // 4
        sock.sendall(bytes(num_bytes))
        while (wait_s := watch.wait_s(time.monotonic())) is not None:
            assert wait_s <= LOOK_EVERY_S
            time.sleep(wait_s)
            watch.look(time.monotonic())
    assert sum(delivery.num_bytes for delivery in told) == pytest.approx(num_bytes, rel=0.01), "the rest went before"
    full = [delivery for delivery in told if delivery.is_full]
    assert full
    for delivery in full:
        assert delivery.num_bytes / delivery.seconds == pytest.approx(RATE_BYTES_PER_S, rel=0.2)
