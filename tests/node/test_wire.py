"""What comes over a control link is a message of the union or refused, and nothing else."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.effects import Message
from shoal.errors import RemoteProtocolError
from shoal.ids import NodeId
from shoal.membership import messages as m
from shoal.node import wire
from tests.membership.test_messages import GOLDEN, SCOPE


def test_a_heartbeat_is_small() -> None:
    """Ids have 32 characters; what a device says to eight neighbours when nothing happens is a fraction of a packet."""
    heard = tuple(NodeId(character * 32) for character in "abcdefgh")
    assert len(wire.encode(m.Heartbeat(2**40, 3, 10**6, heard, 2**55))) < 320


def test_fields_that_an_earlier_version_did_not_have_get_their_defaults() -> None:
    scope = ["g", 1, 2, 3]
    assert wire.decode(msgspec.msgpack.encode(["vo", scope, False, True])) == m.Vote(SCOPE, is_trial=False, granted=True)
    assert wire.decode(msgspec.msgpack.encode(["rs", []])) == m.RosterStatements(())


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        "hb",
        ["no such tag", 1],
        ["pr"],
        ["pr", "seven"],
        ["pr", 7.5],
        ["aj", ["run", 1, 5, 9], ["c", 1, "leader"], -1],
        ["rk", ["00ff", 7], True],
        ["gh", ["run", 1, 5], 1],
    ],
)
def test_what_is_no_message_is_refused(value: object) -> None:
    with pytest.raises(RemoteProtocolError, match="not a control message"):
        wire.decode(msgspec.msgpack.encode(value))


@given(st.sampled_from(list(GOLDEN)), st.data())
def test_damaged_bytes_are_a_message_or_refused_and_nothing_else(golden: str, data: st.DataObject) -> None:
    damaged = bytearray(bytes.fromhex(golden))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for number_kept in (len(damaged), data.draw(st.integers(0, len(damaged)))):
        try:
            decoded = wire.decode(bytes(damaged[:number_kept]))
        except RemoteProtocolError:
            continue
        assert isinstance(decoded, Message)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode(b"\x91" * 100_000)
