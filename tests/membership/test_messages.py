"""What goes over the wire stays what it is: fields are only ever appended."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from shoal.effects import Message
from shoal.errors import RemoteProtocolError
from shoal.ids import GroupId, NodeId
from shoal.membership import messages as m
from shoal.node import wire

A, B = NodeId("a"), NodeId("b")
SCOPE = m.Scope(GroupId("g"), 1, 2, 3)
MEMBER = m.Member(A, 1, "active", 2, "h:1")
RECORD = m.Record(GroupId("g"), 1, 2, "p", 3, A, (MEMBER,), (A,), 4, ((A, B),), (m.Attachment("plan", "h", b"v"),))
STATEMENT = m.Statement("add", A, B, 1.5, b"k", "n", ("h:1",), "i", 2.5, 3, ("x",), b"s")
STAMP = m.Stamp(A, B, 1.5, True, b"s")
RUMOUR = m.Rumour(A, 1, 2, True)

_MEMBER = "95a16101a661637469766502a3683a31"
_RECORD = "9ba1670102a17003a16191" + _MEMBER + "91a161049192a161a1629193a4706c616ea168c40176"
_SCOPE = "94a167010203"
GOLDEN: dict[str, Message] = {
    "97a26869a16301029195a161a162cb3ff8000000000000c3c40173c201": m.Greeting("c", 1, 2, (STAMP,), False),
    "93a2726b91a16bc3": m.RosterKeys(("k",), True),
    "93a27273919ca3616464a161a162cb3ff8000000000000c4016ba16e91a3683a31a169cb40040000000000000391a178c40173c2": (
        m.RosterStatements((STATEMENT,))
    ),
    "92a2737495a161a162cb3ff8000000000000c3c40173": m.StampGiven(STAMP),
    "94a26e6fa772656d6f766564a17401": m.Refused("removed", "t", 1),
    "94a26a68a169c4016bc4016e": m.JoinHello("i", b"k", b"n"),
    "94a26a63a169c4016bc4016e": m.JoinChallenge("i", b"k", b"n"),
    "97a26a70a169c4016ba16e91a3683a31c40170c40173": m.JoinProof("i", b"k", "n", ("h:1",), b"p", b"s"),
    "98a2686201020391a162049194a1610102c3c2": m.Heartbeat(1, 2, 3, (B,), 4, (RUMOUR,)),
    "94a272759194a1610102c3c305": m.Rumours((RUMOUR,), True, 5),
    "93a26168a16107": m.AskHeard(A, 7),
    "95a26861a16107c3c2": m.Heard(A, 7, True, False),
    "92a2707201": m.Probe(1),
    "92a362796501": m.Goodbye(1),
    "94a27265a161a162c4016d": m.Relay(A, B, b"m"),
    f"94a26768{_SCOPE}05cb3fe0000000000000": m.GroupHeartbeat(SCOPE, 5, 0.5),
    f"97a26761{_SCOPE}050106c3c3": m.GroupHeartbeatAck(SCOPE, 5, 1, 6, True),
    f"93a27672{_SCOPE}c3": m.VoteRequest(SCOPE, True),
    f"96a2766f{_SCOPE}c2c302{_RECORD}": m.Vote(SCOPE, False, True, 2, RECORD),
    f"93a27070{_SCOPE}{_RECORD}": m.Propose(SCOPE, RECORD),
    f"93a26163{_SCOPE}a168": m.Acknowledge(SCOPE, "h"),
    f"94a2636f{_SCOPE}{_RECORD}cb3fe0000000000000": m.Commit(SCOPE, RECORD, 0.5),
    f"94a2736c{_SCOPE}{_RECORD}a161": m.Stale(SCOPE, RECORD, A),
    f"92a26172{_SCOPE}": m.AskRecord(SCOPE),
    f"94a2616a{_SCOPE}{_MEMBER}04": m.AskJoin(SCOPE, MEMBER, 4),
    f"93a2616c{_SCOPE}01": m.AskLeave(SCOPE, 1),
    f"95a26c72{_SCOPE}a161a162c3": m.LinkReport(SCOPE, A, B, True),
}


@pytest.mark.parametrize(("text", "message"), GOLDEN.items(), ids=[type(each).__name__ for each in GOLDEN.values()])
def test_golden_bytes(text: str, message: Message) -> None:
    assert wire.encode(message).hex() == text
    assert wire.decode(bytes.fromhex(text)) == message


def test_every_membership_message_has_golden_bytes() -> None:
    assert {type(message) for message in GOLDEN.values()} == set(get_args(m.MembershipMessage))


def test_a_later_version_may_append_fields() -> None:
    data = msgspec.msgpack.encode(["pr", 1, "a field of the future"])
    assert wire.decode(data) == m.Probe(1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x92\xa2pr",
        b"\x92\xa2pr\xa1x",
        b"\x91\xa2zz",
        b"\x80",
        b"\x92\xa2pr\x01\x00",
        b"\x91" * 2000,
        b"\x92\xa3by\xff\x01",
    ],
    ids=["empty", "reserved", "cut", "type", "tag", "map", "rest", "deep", "text"],
)
def test_what_is_no_message_is_one_error(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not a control message"):
        wire.decode(data)
