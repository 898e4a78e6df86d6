"""Measuring a link on a connection of its own."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from shoal.errors import LinkClosed, LinkError, RemoteProtocolError
from shoal.ids import NodeId
from shoal.transport.control import AS_PROBE, PREFACE_MAGIC
from shoal.transport.identity import DeviceKeys
from shoal.transport.probe import PROBE_BYTES_MAX, Probe, receive_probe, send_probe
from shoal.transport.secure import TrustStore

MIB = 1 << 20
HERE, THERE, STRANGER = (DeviceKeys.from_seed(bytes([number]) * 32) for number in range(3))


def receive_one(
    act: Callable[[tuple[str, int]], object], *, may_measure: Callable[[NodeId], bool] = lambda _peer: True
) -> tuple[NodeId, Probe | None]:
    """Lets `act` dial; returns or raises what the receiver has of it."""
    trust = TrustStore(HERE, [HERE.public_key, THERE.public_key])
    with closing(socket.create_server(("127.0.0.1", 0))) as door:
        dialler = threading.Thread(target=act, args=(door.getsockname(),))
        dialler.start()
        try:
            sock, _ = door.accept()
            expected = PREFACE_MAGIC + AS_PROBE
            assert sock.recv(len(expected), socket.MSG_WAITALL) == expected
            return receive_probe(sock, trust, may_measure=may_measure)
        finally:
            dialler.join()


def dial(address: tuple[str, int], data: bytes, keys: DeviceKeys = THERE) -> None:
    """What no sender of ours would do."""
    sock = socket.create_connection(address)
    sock.sendall(PREFACE_MAGIC + AS_PROBE)
    try:
        with TrustStore(keys, [HERE.public_key]).dial(sock, HERE.node) as secured:
            secured.sendall(data)
            secured.recv(1)
    except (LinkError, OSError):
        pass  # it is hung up on


def test_the_receiver_measures_all_but_the_first_part() -> None:
    sent: list[int] = []

    def send(address: tuple[str, int]) -> None:
        trust = TrustStore(THERE, [HERE.public_key, THERE.public_key])
        sent.append(send_probe(address, HERE.node, trust, num_bytes_max=4 * MIB, seconds_max=5.0))

    peer, probe = receive_one(send)
    assert peer == THERE.node
    assert sent == [4 * MIB]
    assert probe is not None
    assert 2 * MIB < probe.num_bytes <= 3 * MIB
    assert 0.0 < probe.seconds < 5.0


def test_time_ends_a_probe_before_its_bytes_do() -> None:
    sent: list[int] = []

    def send(address: tuple[str, int]) -> None:
        trust = TrustStore(THERE, [HERE.public_key])
        sent.append(send_probe(address, HERE.node, trust, num_bytes_max=4 * MIB, seconds_max=0.0))

    assert receive_one(send) == (THERE.node, None)
    assert sent == [0]


@pytest.mark.parametrize("announced", [0, PROBE_BYTES_MAX + 1, 2**64 - 1])
def test_more_than_is_allowed_is_not_read(announced: int) -> None:
    with pytest.raises(RemoteProtocolError, match="at most"):
        receive_one(lambda address: dial(address, struct.pack(">Q", announced)))


def test_who_sends_more_than_it_announced_is_not_listened_to() -> None:
    peer, probe = receive_one(lambda address: dial(address, struct.pack(">Q", 1000) + bytes(MIB)))
    assert peer == THERE.node
    assert probe is None or probe.num_bytes < MIB


def test_a_stranger_measures_nothing() -> None:
    with pytest.raises(LinkError):
        receive_one(lambda address: dial(address, bytes(100), keys=STRANGER))


def test_who_comes_is_proven_before_it_is_asked_about() -> None:
    asked: list[NodeId] = []

    def refuse(peer: NodeId) -> bool:
        asked.append(peer)
        return False

    with pytest.raises(LinkClosed, match="too much at a time"):
        receive_one(lambda address: dial(address, struct.pack(">Q", MIB)), may_measure=refuse)
    assert asked == [THERE.node]


def test_nobody_there() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as door:
        address = door.getsockname()
    with pytest.raises(LinkClosed, match="cannot be reached"):
        send_probe(address, HERE.node, TrustStore(THERE, [HERE.public_key]), num_bytes_max=1, seconds_max=1.0)
