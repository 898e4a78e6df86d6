"""Closes the union of control messages: what may come over a control link, as bytes.

MessagePack arrays `[tag, field, ...]`. What is not in the union, or not shaped as it says, raises `RemoteProtocolError` and
nothing else, so that a peer's bytes cannot make a core fail.
"""

from __future__ import annotations

import msgspec

from shoal.effects import Message
from shoal.errors import RemoteProtocolError
from shoal.membership.messages import MembershipMessage
from shoal.network.report import Carried, Report

WireMessage = MembershipMessage | Report | Carried

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[WireMessage] = msgspec.msgpack.Decoder(WireMessage)


def encode(message: Message) -> bytes:
    """The bytes of one message, without a length."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> WireMessage:
    """One message from its bytes.

    Raises:
        RemoteProtocolError: the bytes are no message of this union.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not a control message: {error}") from None
