"""Links of a run that prove who is at their other end."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.errors import DamagedFile, DeviceRefused, DeviceUnreachable
from shoal.ids import NodeId
from shoal.runs import run as run_module
from shoal.runs.port import Hello, Port, dial, receive_message
from shoal.runs.trust import Trust, check_plain, device_of
from shoal.transport.identity import DeviceKeys
from tests.runs.members import Member, wait

KEYS = [DeviceKeys.from_seed(bytes([number]) * 32) for number in range(4)]
PUBLIC = [keys.public_key for keys in KEYS]


def trust(number: int, *, members: int = 3) -> Trust:
    return Trust(KEYS[number], PUBLIC[:members])


@pytest.mark.slow
def test_members_of_a_cluster_train_and_one_dies() -> None:
    founder = Member(members_min=3, num_steps=40, compute_s=0.03, padding=50_000, trust=trust(0))
    others = [
        Member(peers=(founder.run.address,), num_steps=40, compute_s=0.03, padding=50_000, trust=trust(number))
        for number in (1, 2)
    ]
    founder.wait_step(8)
    assert [device_of(node) for node in founder.run.members] == sorted(keys.node for keys in KEYS[:3])
    others[1].crash()
    for member in (founder, others[0]):
        member.end()
    assert founder.run.entries == others[0].run.entries
    assert founder.trainee.digest() == others[0].trainee.digest()


@pytest.mark.slow
def test_a_member_comes_back_on_its_own_device_only(tmp_path: Path) -> None:
    founder = Member(num_steps=1000, compute_s=0.02, trust=trust(0))
    nodes = []
    for number in (1, 1, 2):
        member = Member(peers=(founder.run.address,), num_steps=1000, trust=trust(number), folder=tmp_path)
        wait(lambda member=member: member.run.me in founder.run.members)  # type: ignore[misc]
        nodes.append(member.run.me)
        member.crash()
    assert nodes[0] == nodes[1]
    assert device_of(nodes[2]) == KEYS[2].node, "what another device promised is not its own"
    founder.run.leave()
    founder.end()


@pytest.mark.slow
def test_who_is_no_member_of_the_cluster_does_not_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "JOIN_S", 1.0)
    founder = Member(num_steps=1000, compute_s=0.05, trust=trust(0))
    stranger = Member(peers=(founder.run.address,), num_steps=1000, trust=trust(3, members=4))
    plain = Member(peers=(founder.run.address,), num_steps=1000)
    for member in (stranger, plain):
        member.thread.join(10.0)
        assert isinstance(member.error, DeviceUnreachable)
    assert len(founder.run.members) == 1
    founder.run.leave()
    founder.end()


def test_no_device_speaks_as_a_member_of_another() -> None:
    came: list[Hello] = []

    def take(sock: socket.socket, hello: Hello) -> None:
        came.append(hello)
        sock.close()

    port = Port("127.0.0.1:0", take, trust=trust(0))
    own = trust(1)
    with dial(port.address, Hello("test", "chunks", trust(2).new_node()), trust=own) as sock:
        assert sock.recv(1) == b"", "hung up"
    with dial(port.address, Hello("test", "chunks", own.new_node()), trust=own, node=trust(0).new_node()):
        wait(lambda: len(came) == 1)
    with pytest.raises(DeviceUnreachable, match="answers where"):
        dial(port.address, Hello("test", "chunks", own.new_node()), trust=own, node=trust(2).new_node())
    port.close()
    assert device_of(came[0].node) == KEYS[1].node


def test_both_directions_at_once_and_a_shutdown_in_the_middle() -> None:
    taken: list[socket.socket] = []
    port = Port("127.0.0.1:0", lambda sock, _: taken.append(sock), trust=trust(0))
    ours = dial(port.address, Hello("test", "chunks", trust(1).new_node()), trust=trust(1))
    wait(lambda: bool(taken))
    theirs = taken[0]
    data = [os.urandom(24 << 20) for _ in range(2)]

    def read(sock: socket.socket) -> str:
        whole, view = hashlib.sha256(), memoryview(bytearray(100_000))
        left = len(data[0])
        while left and (count := sock.recv_into(view[: min(left, len(view))])):
            whole.update(view[:count])
            left -= count
        return whole.hexdigest()

    with ThreadPoolExecutor(4) as pool:
        received = [pool.submit(read, sock) for sock in (theirs, ours)]
        sent = [pool.submit(sock.sendall, each) for sock, each in zip((ours, theirs), data, strict=True)]
        assert [future.result(30.0) for future in received] == [hashlib.sha256(each).hexdigest() for each in data]
        for future in sent:
            future.result(1.0)
    ended: list[int] = []
    reader = threading.Thread(target=lambda: ended.append(ours.recv_into(bytearray(10))))
    reader.start()
    ours.shutdown(socket.SHUT_RDWR)
    reader.join(5.0)
    assert ended == [0]
    theirs.settimeout(5.0)
    assert theirs.recv(10) == b""
    for sock in (ours, theirs):
        sock.close()
    port.close()
    with pytest.raises(OSError):
        theirs.recv(1)


def test_a_silent_peer_is_a_timeout() -> None:
    taken: list[socket.socket] = []
    port = Port("127.0.0.1:0", lambda sock, _: taken.append(sock), trust=trust(0))
    with dial(port.address, Hello("test", "chunks", trust(1).new_node()), trust=trust(1)) as sock:
        sock.settimeout(0.05)
        with pytest.raises(Exception, match="said nothing in time"):
            receive_message(sock)
    wait(lambda: bool(taken))
    taken[0].close()
    port.close()


def test_a_file_says_whom_a_member_trusts(tmp_path: Path) -> None:
    DeviceKeys.load_or_create(tmp_path / "key")
    Trust.write(tmp_path / "trust", tmp_path / "key", PUBLIC)
    found = Trust.read(tmp_path / "trust")
    assert device_of(found.new_node()) == DeviceKeys.load_or_create(tmp_path / "key").node
    assert found.new_node() != found.new_node()
    (tmp_path / "trust").write_bytes(b"{}")
    with pytest.raises(DamagedFile, match="start it again"):
        Trust.read(tmp_path / "trust")


def test_plain_links_stay_on_this_machine() -> None:
    check_plain("127.0.0.1:0")
    check_plain("[::1]:5")
    with pytest.raises(DeviceRefused, match="reachable for others"):
        check_plain("192.0.2.1:7500")
    assert device_of(NodeId("0123")) == "0123"
