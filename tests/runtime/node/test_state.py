"""What a device remembers: over a restart, a torn write, a damaged file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from shoal.effects import Commanded
from shoal.errors import CannotWrite, DamagedFile, DeviceError, DeviceUnreachable
from shoal.membership.roster import Found, RosterCore, statement_key
from shoal.membership.timing import Timing
from shoal.runtime.node import disk as disk_module
from shoal.runtime.node.disk import Disk
from shoal.runtime.node.state import DeviceState, find_agent
from shoal.runtime.node.token import print_token, read_token
from shoal.transport.identity import DeviceKeys


def nothing() -> None:
    pass


def write(path: Path, *pairs: tuple[str, bytes], is_durable: bool = False) -> None:
    disk = Disk(path, is_durable=is_durable)
    for key, value in pairs:
        disk.store(key, value, nothing)
    disk.close()


def read(path: Path) -> dict[str, bytes]:
    disk = Disk(path)
    disk.close()
    return disk.values


def test_the_newest_value_of_each_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, ("group/a", b"1"), ("roster/x", b"x" * 1000), ("group/a", b""), ("group/a", b"3"))
    assert read(path) == {"group/a": b"3", "roster/x": b"x" * 1000}
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("is_durable", [False, True])
def test_nothing_is_answered_for_before_it_is_written(tmp_path: Path, is_durable: bool) -> None:
    path = tmp_path / "log"
    disk = Disk(path, is_durable=is_durable)
    seen: list[bytes] = []
    for number in range(20):
        value = b"value %d" % number
        disk.store("group/a", value, lambda value=value: seen.append(value if value in path.read_bytes() else b"missing"))  # type: ignore[misc]
    disk.close()
    assert seen == [b"value %d" % number for number in range(20)]


def test_a_write_cut_off_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, ("group/a", b"first"), ("group/a", b"second"))
    whole = path.read_bytes()
    for length in range(len(whole) - 1, len(whole) // 2, -1):
        path.write_bytes(whole[:length])
        disk = Disk(path)
        disk.close()
        assert disk.values == {"group/a": b"first"}, length
        assert disk.problem == ""


def test_a_damaged_file_costs_votes_not_the_device(tmp_path: Path) -> None:
    """What comes after the damage is lost, so no promise may be taken for the last one, and a removal may be missing."""
    path = tmp_path / "log"
    keys = DeviceKeys.generate()
    roster = RosterCore(keys.node, keys, timing=Timing(), since_1970_s=1e9)
    roster.step(Commanded(Found("a")), 1.0)
    pairs = [(f"roster/{statement_key(each)}", msgspec.msgpack.encode(each)) for each in roster.roster.statements.values()]
    write(path, *pairs, ("group/a", b"a promise"), ("group/a", b"a later promise"), ("met", b"\x80"))
    data = bytearray(path.read_bytes())
    data[data.index(b"a later")] ^= 1
    path.write_bytes(bytes(data))
    disk = Disk(path)
    disk.close()
    assert "damaged at byte" in disk.problem
    assert disk.values["group/a"] == b""
    again = RosterCore(keys.node, keys, timing=Timing(), since_1970_s=1e9, stored=disk.values)
    assert again.damaged == ["roster/lost"]
    assert keys.node in again.roster.members
    assert (tmp_path / "log.damaged").read_bytes() == bytes(data)


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_SLACK_BYTES", 10_000)
    path = tmp_path / "log"
    disk = Disk(path)
    for number in range(500):
        disk.store("group/a", b"%0200d" % number, nothing)
        assert path.stat().st_size < 11_000
    disk.close()
    assert read(path) == {"group/a": b"%0200d" % 499}


def test_a_full_disk_is_said_and_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    disk = Disk(path)
    disk.store("group/a", b"kept", nothing)
    write_all: Callable[[int, bytes], int] = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write_all(file, data[: len(data) // 2]))
    answered: list[int] = []
    with pytest.raises(CannotWrite, match="is the disk full"):
        disk.store("group/a", b"lost", lambda: answered.append(1))
    monkeypatch.undo()
    disk.close()
    assert answered == []
    assert read(path) == {"group/a": b"kept"}


def test_one_agent_per_folder(tmp_path: Path) -> None:
    state = DeviceState(tmp_path / "a")
    with pytest.raises(DeviceError, match="another agent runs from"):
        DeviceState(tmp_path / "a")
    node = state.keys.node
    assert [state.next_incarnation(), state.next_incarnation(), state.next_incarnation(least=9)] == [1, 2, 9]
    state.announce_agent("127.0.0.1:1")
    assert find_agent(tmp_path / "a")[0] == "127.0.0.1:1"
    state.close()
    with pytest.raises(DeviceUnreachable, match="no agent runs from"):
        find_agent(tmp_path / "a")
    again = DeviceState(tmp_path / "a")
    assert (again.keys.node, again.next_incarnation()) == (node, 10)
    again.forget_cluster()
    assert again.keys.node != node
    assert again.next_incarnation() == 1
    again.close()
    (tmp_path / "a" / "incarnation").write_text("many")
    broken = DeviceState(tmp_path / "a")
    with pytest.raises(DamagedFile, match="holds no number"):
        broken.next_incarnation()
    broken.close()


def test_a_token_is_read_whole_or_not_at_all() -> None:
    node = DeviceKeys.generate().node
    text = print_token(b"s" * 16, [(node, ("192.0.2.1:7434", "[2001:db8::1]:7434"))])
    token = read_token(f" {text[:20]}\n{text[20:]} ")
    assert token.secret == b"s" * 16
    assert token.contacts[0].node == node
    assert token.contacts[0].addresses == ("192.0.2.1:7434", "[2001:db8::1]:7434")
    for wrong in (text[:-1], text[:-8], text + "AAAA", text.replace(text[12], "_", 1), "shoal-", "shoal-????"):
        with pytest.raises(ValueError, match="incomplete or mistyped"):
            read_token(wrong)
    with pytest.raises(ValueError, match="a token begins with"):
        read_token("hello")
