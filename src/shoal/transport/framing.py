"""Frames of the ring: a fixed header, then raw bytes.

    offset  size  field
    0       4     magic, b"SHOA"
    4       2     protocol version
    6       1     kind
    7       1     number of stage records
    8       8     engine: which deployment this frame belongs to
    16      4     position of the first token
    20      4     number of tokens
    24      4     payload bytes

little endian. A payload is the hidden states, [tokens, hidden size] float32, followed by room for one record per visit to
a stage, of which those are filled that have been: the nanoseconds it computed, waited for its disk, and held the frame. So a
frame has one size all the way, and a receiver knows that of a single token's. A hello's payload is the text of the sender's
shoal version.

Every length is checked against a bound before memory is taken. Pure: bytes in, values out.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from shoal.errors import LocalProtocolError, RemoteProtocolError
from shoal.ids import EngineId

MAGIC = b"SHOA"
PROTOCOL_VERSION = 2
HEADER = struct.Struct("<4sHBBQIII")
STAGE_RECORD = struct.Struct("<QQQ")
VISITS_MAX = 255
"""Most visits of a frame to stages: rounds times stages."""
NUM_RECORDS_OFFSET = 7
HELLO_BYTES_MAX = 256


class FrameKind(IntEnum):
    """What a frame is for."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    FORWARD = 4
    FORWARD_MORE = 5
    """As `FORWARD`; the next frame is for the same window."""


_KINDS = frozenset(int(kind) for kind in FrameKind)


class FrameHeader(NamedTuple):
    """The header's fields; see the module's table. `kind` is a `FrameKind`."""

    kind: int
    num_records: int
    engine: EngineId
    position: int
    num_tokens: int
    payload_bytes: int


class StageTiming(NamedTuple):
    """What a stage spent on a frame in one visit, seconds: computing, waiting for its disk, and holding it in all."""

    compute_s: float
    disk_s: float
    held_s: float


def pack_header(buffer: memoryview | bytearray, header: FrameHeader) -> None:
    """Writes the header at the start of `buffer`.

    Raises:
        LocalProtocolError: a field does not fit.
    """
    kind, num_records, engine, position, num_tokens, payload_bytes = header
    try:
        HEADER.pack_into(
            buffer, 0, MAGIC, PROTOCOL_VERSION, kind, num_records, engine,
            position, num_tokens, payload_bytes,
        )  # fmt: skip
    except struct.error as error:
        raise LocalProtocolError(f"a frame's header does not fit its fields: {error}") from error


def unpack_header(buffer: memoryview | bytes | bytearray, *, payload_bytes_max: int) -> FrameHeader:
    """Reads a header and checks it.

    Raises:
        RemoteProtocolError: wrong magic, version or kind, or a payload above `payload_bytes_max`.
    """
    magic, version, kind, *rest = HEADER.unpack_from(buffer)
    header = FrameHeader(kind, *rest)
    if magic != MAGIC:
        raise RemoteProtocolError(f"a frame starts with {magic!r} instead of {MAGIC!r}: the peer is no shoal worker")
    if version != PROTOCOL_VERSION:
        raise RemoteProtocolError(
            f"the peer speaks ring protocol {version}, this device {PROTOCOL_VERSION}: install the same shoal on both"
        )
    if kind not in _KINDS:
        raise RemoteProtocolError(f"a frame is of unknown kind {kind}")
    if header.payload_bytes > payload_bytes_max:
        raise RemoteProtocolError(f"a frame announces {header.payload_bytes} bytes, at most {payload_bytes_max} are allowed")
    return header
