"""Who is not to be trusted: let in to say why it comes, or not at all; counted, bounded, and never in the members' way."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from shoal.errors import DeviceRefused, DeviceUnreachable, LinkError, ShoalError
from shoal.membership.timing import Timing
from shoal.node import wire
from shoal.node.trust import Trusted
from shoal.runtime.node import links as links_module
from shoal.runtime.node.interpreter import TIMING, Interpreter, NodeOptions
from shoal.runtime.node.links import HALF_OPEN_MAX, STRANGERS_MAX, message_frame
from shoal.runtime.node.owner import (
    AskCluster,
    ClusterStatus,
    Done,
    Invitation,
    JoinCluster,
    Joined,
    MakeInvitation,
    OwnerDesk,
    OwnerLink,
    RemoveDevice,
)
from shoal.runtime.node.state import DeviceState
from shoal.runtime.node.token import SECRET_BYTES, print_token, read_token
from shoal.transport.control import AS_MEMBER, AS_STRANGER, HEAD, PREFACE_MAGIC, FrameKind
from shoal.transport.identity import DeviceKeys
from shoal.transport.secure import TrustStore


@contextmanager
def device(folder: Path, name: str, timing: Timing = TIMING) -> Iterator[Interpreter]:
    """A device in this process, with its own thread."""
    state = DeviceState(folder / name)
    node = Interpreter(state, NodeOptions(name, listen=("127.0.0.1", 0), timing=timing))
    OwnerDesk(node)
    state.announce_agent(f"127.0.0.1:{node.port}")
    node.start()
    try:
        yield node
    finally:
        node.stop()
        assert node.failure is None


@contextmanager
def pair(folder: Path) -> Iterator[tuple[Interpreter, Interpreter]]:
    """Two devices in one cluster."""
    with device(folder, "desk") as desk, device(folder, "lap") as lap:
        token = invite(folder, "desk")
        with OwnerLink(folder / "lap") as owner:
            assert owner.ask(JoinCluster(token), Joined).devices == ("desk",)
        yield desk, lap


def invite(folder: Path, name: str, **changes: float) -> str:
    with OwnerLink(folder / name) as owner:
        return owner.ask(MakeInvitation(**changes), Invitation).token  # type: ignore[arg-type]


def join(folder: Path, name: str, token: str) -> str:
    """What comes of it, in one line."""
    try:
        with OwnerLink(folder / name) as owner:
            return "joined with " + ", ".join(owner.ask(JoinCluster(token), Joined).devices)
    except ShoalError as error:
        return str(error)


def status(folder: Path, name: str) -> ClusterStatus:
    with OwnerLink(folder / name) as owner:
        return owner.ask(AskCluster(), ClusterStatus)


def wait_until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def dial(node: Interpreter, keys: DeviceKeys, *, as_stranger: bool) -> socket.socket:
    """A device that speaks the protocol and is up to no good."""
    sock = socket.create_connection(("127.0.0.1", node.port), timeout=5.0)
    sock.sendall(PREFACE_MAGIC + (AS_STRANGER + keys.public_key if as_stranger else AS_MEMBER))
    return TrustStore(keys, [node.state.keys.public_key]).dial(sock, node.me)


def hear(sock: socket.socket) -> int:
    """The kind of the first frame; 0 where the other end closes instead."""
    with suppress(OSError):
        data = sock.recv(4096)
        if len(data) >= HEAD.size:
            return int(HEAD.unpack_from(data)[1])
    return 0


def is_closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_garbage_and_oversized_frames_are_counted_and_cut_off(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, lap):
        before = status(tmp_path, "desk").counters["num_malformed"]
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)), b"shoal\x02M" + b"x" * 100):
            with socket.create_connection(("127.0.0.1", desk.port), timeout=5.0) as sock:
                sock.sendall(garbage)
                assert is_closed(sock)
        stranger = DeviceKeys.generate()
        for frame in (
            HEAD.pack(300_000, FrameKind.MESSAGE),  # more than a stranger may say
            message_frame(b"\xc1 no MessagePack"),
            HEAD.pack(10, 99),
            HEAD.pack(0, FrameKind.OWNER),  # it is not the owner
        ):
            with dial(desk, stranger, as_stranger=True) as sock:
                assert hear(sock) == FrameKind.WELCOME
                sock.sendall(frame)
                assert is_closed(sock)
        after = status(tmp_path, "desk")
        assert after.counters["num_malformed"] == before + 7
        assert {member.presence for member in after.members} == {"this device", "here"}
        assert lap.me in desk.core.trusted


def test_an_unknown_key_is_no_member_and_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "STRANGER_STAY_S", 0.3)
    with pair(tmp_path) as (desk, _):
        stranger = DeviceKeys.generate()
        with suppress(LinkError), dial(desk, stranger, as_stranger=False) as sock:
            assert hear(sock) == 0, "as a member it does not get past TLS"
        assert status(tmp_path, "desk").counters["num_refused"] >= 1
        with dial(desk, stranger, as_stranger=True) as sock:
            began_s = time.monotonic()
            heard = bytearray()
            with suppress(OSError):
                while data := sock.recv(65536):
                    heard += data
            assert time.monotonic() - began_s < 4.0, "a stranger does not stay"
            messages = []
            offset = 0
            while offset < len(heard):
                size, kind = HEAD.unpack_from(heard, offset)
                if kind == FrameKind.MESSAGE:
                    messages.append(type(wire.decode(bytes(heard[offset + HEAD.size : offset + HEAD.size + size]))).__name__)
                offset += HEAD.size + size
        assert set(messages) <= {"Greeting"}, "it is told nothing of the roster"
        assert stranger.node not in desk.core.trusted
        assert not any(isinstance(fact, Trusted) and fact.peer == stranger.node for _, fact in desk.facts)


def test_tokens_that_do_not_admit(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, _), device(tmp_path, "third"):
        good = read_token(invite(tmp_path, "desk", valid_s=0.2))
        contacts = [(contact.node, contact.addresses) for contact in good.contacts]
        time.sleep(0.3)
        refused = "the member refuses: "
        expired = print_token(good.secret, contacts)
        assert join(tmp_path, "third", expired) == refused + "the invitation has expired: ask for a new one"
        guessed = print_token(b"guess" + bytes(SECRET_BYTES - 5), contacts)
        assert join(tmp_path, "third", guessed).startswith(refused + "no such invitation here")
        other = DeviceKeys.generate().node
        elsewhere = print_token(good.secret, [(other, (f"127.0.0.1:{desk.port}",))])
        assert "device " + desk.me[:8] + " answers where " + other[:8] in join(tmp_path, "third", elsewhere)
        nobody = print_token(good.secret, [(other, ("127.0.0.1:1",))])
        assert "no member that the token names can be reached" in join(tmp_path, "third", nobody)
        fine = invite(tmp_path, "desk")
        assert join(tmp_path, "third", fine) == "joined with desk, lap"
        with device(tmp_path, "fourth"):
            assert "the invitation has been used" in join(tmp_path, "fourth", fine)


def test_a_removed_key_does_not_come_back(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, lap):
        with OwnerLink(tmp_path / "desk") as owner:
            owner.ask(RemoveDevice("lap"), Done)
        wait_until(lambda: lap.me not in desk.core.trusted)
        wait_until(lambda: lap.me in lap.core.roster.roster.removed)
        with suppress(LinkError), dial(desk, lap.state.keys, as_stranger=False) as sock:
            assert hear(sock) == 0
        assert lap.me not in desk.core.trusted


def test_the_owners_door_is_for_the_owner(tmp_path: Path) -> None:
    with device(tmp_path, "desk") as desk:
        other = tmp_path / "other"
        DeviceState(other).close()
        (other / "agent.json").write_bytes((tmp_path / "desk" / "agent.json").read_bytes())
        with pytest.raises((DeviceUnreachable, DeviceRefused), match="is not the agent of"):
            OwnerLink(other)
        with OwnerLink(tmp_path / "desk") as owner:
            assert owner.ask(AskCluster(), ClusterStatus).me == desk.me


def test_connections_that_say_nothing_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """A thousand half-open connections: few are kept, a member and the owner come through, nothing is lost."""
    with pair(tmp_path) as (desk, lap), ExitStack() as stack:
        for _ in range(1000):
            sock = socket.socket()
            stack.enter_context(closing(sock))
            sock.settimeout(5.0)
            sock.connect(("127.0.0.1", desk.port))
        began_s = time.monotonic()
        found = status(tmp_path, "desk")
        assert time.monotonic() - began_s < 1.0
        assert found.counters["num_evicted"] >= 1000 - HALF_OPEN_MAX - 1
        assert len(desk.links._held) <= HALF_OPEN_MAX + 8
        lap.post(lambda: lap.links.hang_up(desk.me))
        wait_until(lambda: lap.me in desk.core.trusted and desk.me in lap.core.trusted)
        gone = [fact for _, fact in desk.facts if type(fact).__name__ == "MemberGone"]
        assert len(gone) <= 1  # by the hang-up, at most


def test_many_strangers_at_a_time_are_few(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, lap), ExitStack() as stack:
        welcomed = 0
        for _ in range(STRANGERS_MAX + 20):
            with suppress(LinkError):
                sock = stack.enter_context(dial(desk, DeviceKeys.generate(), as_stranger=True))
                welcomed += hear(sock) == FrameKind.WELCOME
        assert welcomed <= STRANGERS_MAX + 1
        assert status(tmp_path, "desk").counters["num_refused"] > 0
        assert lap.me in desk.core.trusted


def test_a_clone_is_refused_by_name(tmp_path: Path) -> None:
    """The same key, twice at a time."""
    with pair(tmp_path) as (desk, lap):
        wait_until(lambda: desk.links.describe(lap.me) != "")
        if desk.links.describe(lap.me).startswith("to"):
            pytest.skip("desk dialled, so that a second link of the same key is settled by who dialled")
        with dial(desk, lap.state.keys, as_stranger=False) as sock:
            data = sock.recv(4096)
            assert HEAD.unpack_from(data)[1] == FrameKind.REFUSED
            assert b"the key was cloned" in data
        assert lap.me in desk.core.trusted


def test_members_who_both_moved_meet_again_when_one_is_seen_nearby(tmp_path: Path) -> None:
    with pair(tmp_path):
        pass
    with device(tmp_path, "desk") as desk, device(tmp_path, "lap") as lap:  # at other ports, of which neither knows
        time.sleep(0.5)
        assert not status(tmp_path, "desk").members[0].link
        desk.post(lambda: desk.links.seen_nearby(lap.me, lap.addresses()))
        wait_until(lambda: any(member.link for member in status(tmp_path, "desk").members))
