"""Frames of control links: the same however they are cut, and never more memory than is allowed."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import LinkClosed, RemoteProtocolError
from shoal.transport.control import (
    FRAME_BYTES_MAX,
    HEAD,
    PREFACE_MAGIC,
    QUEUE_BYTES_MAX,
    ControlLink,
    Frame,
    FrameKind,
    Stage,
    frame,
)


def pair() -> tuple[ControlLink, socket.socket]:
    """A link past its handshake, without the TLS, and the other end of it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    link = ControlLink(ours, is_dialled=False, address="a test")
    link.stage = Stage.OPEN
    return link, theirs


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(FrameKind)), st.binary(max_size=300)), max_size=6),
    st.lists(st.integers(1, 200), min_size=1, max_size=20),
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    frames: list[tuple[FrameKind, bytes]], cuts: list[int]
) -> None:
    data = b"".join(frame(kind, payload) for kind, payload in frames)
    link, theirs = pair()
    found: list[Frame] = []
    with closing(theirs), closing(link):
        offset = 0
        while offset < len(data):
            size = cuts[offset % len(cuts)]
            theirs.sendall(data[offset : offset + size])
            found += link.receive()
            offset += size
    assert found == [(int(kind), payload) for kind, payload in frames]


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=2000))
def test_garbage_is_an_error_of_the_peers_or_waits_for_more(data: bytes) -> None:
    link, theirs = pair()
    with closing(theirs), closing(link):
        theirs.sendall(data)
        try:
            for each in link.receive():
                assert each.kind in set(FrameKind)
        except RemoteProtocolError:
            assert link.stage is Stage.CLOSED


def test_an_oversized_frame_is_refused_by_its_head_alone() -> None:
    link, theirs = pair()
    with closing(theirs):
        theirs.sendall(HEAD.pack(FRAME_BYTES_MAX + 1, FrameKind.MESSAGE))
        with pytest.raises(RemoteProtocolError, match="at most 4194304 are allowed"):
            link.receive()
    assert link.stage is Stage.CLOSED


def test_a_reader_that_stops_costs_bounded_memory() -> None:
    link, theirs = pair()
    with closing(theirs), closing(link):
        data = frame(FrameKind.MESSAGE, b"x" * (1 << 20))
        taken = [link.send(data) for _ in range(12)]
        assert taken == [True] * 7 + [False] * 5
        assert link.num_dropped == 5
        link.flush()
        assert link.wants_write
        assert link.num_queued < QUEUE_BYTES_MAX
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkClosed, match="connection closed"):
            link.receive()


def _read_whole_preface(link: ControlLink) -> None:
    while not link.read_preface():
        pass


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (b"GET / HTTP/1.1\r\n", "no link of shoal's"),
        (b"shoal\x09M", "another version"),
        (PREFACE_MAGIC + b"X", "neither as a member nor as a stranger"),
        (b"", "left before it said anything"),
    ],
)
def test_what_is_no_preface_ends_at_once(sent: bytes, text: str) -> None:
    link, theirs = pair()
    link.stage = Stage.PREFACE
    with closing(theirs):
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((RemoteProtocolError, LinkClosed), match=text):
            _read_whole_preface(link)


def test_a_preface_is_read_to_its_end_and_no_further() -> None:
    link, theirs = pair()
    link.stage = Stage.PREFACE
    key = bytes(range(32))
    with closing(theirs), closing(link):
        for byte in PREFACE_MAGIC + b"S" + key[:31]:
            theirs.sendall(bytes([byte]))
            assert not link.read_preface()
        theirs.sendall(key[31:] + b"TLS begins here")
        assert link.read_preface()
        assert (link.claimed_key, link.is_stranger) == (key, True)
        assert link.socket.recv(64) == b"TLS begins here"
