"""Frames survive the way there; what is no frame of ours is named, and never makes us take memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import LocalProtocolError, RemoteProtocolError
from shoal.ids import EngineId
from shoal.transport.framing import (
    HEADER,
    FrameHeader,
    FrameKind,
    pack_header,
    unpack_header,
)

UINT32 = st.integers(0, 2**32 - 1)


@given(st.sampled_from(FrameKind), st.integers(0, 255), st.integers(0, 2**64 - 1), st.tuples(UINT32, UINT32, UINT32))
def test_a_header_comes_out_as_it_went_in(
    kind: FrameKind, num_records: int, engine: int, numbers: tuple[int, int, int]
) -> None:
    header = FrameHeader(kind, num_records, EngineId(engine), *numbers)
    buffer = bytearray(HEADER.size)
    pack_header(memoryview(buffer), header)
    assert unpack_header(buffer, payload_bytes_max=2**32) == header


def test_the_bytes_of_a_header_never_change() -> None:
    buffer = bytearray(HEADER.size)
    pack_header(memoryview(buffer), FrameHeader(FrameKind.FORWARD, 2, EngineId(0x1122334455667788), 7, 1, 2304))
    assert buffer.hex() == "53484f4102000402887766554433221107000000" + "01000000" + "00090000"


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack_header(data, payload_bytes_max=2**32)


def test_a_large_length_is_refused_before_memory_is_taken() -> None:
    buffer = bytearray(HEADER.size)
    pack_header(memoryview(buffer), FrameHeader(FrameKind.FORWARD, 0, EngineId(1), 0, 1, 2**32 - 1))
    with pytest.raises(RemoteProtocolError, match="announces 4294967295 bytes, at most 4096 are allowed"):
        unpack_header(buffer, payload_bytes_max=4096)


def test_another_protocol_version_says_what_to_do() -> None:
    buffer = bytearray(HEADER.size)
    pack_header(memoryview(buffer), FrameHeader(FrameKind.FORWARD, 0, EngineId(1), 0, 1, 0))
    buffer[4] = 9
    with pytest.raises(RemoteProtocolError, match=r"speaks ring protocol 9, this device 2: install the same shoal"):
        unpack_header(buffer, payload_bytes_max=4096)


def test_a_field_that_does_not_fit_is_our_fault() -> None:
    with pytest.raises(LocalProtocolError):
        pack_header(memoryview(bytearray(HEADER.size)), FrameHeader(FrameKind.FORWARD, 0, EngineId(1), -1, 1, 0))
