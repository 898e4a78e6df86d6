"""What `shoal invite` prints and `shoal join` reads: a secret, and where members are that must know it.

    shoal-BASE64URL( CRC-32, 4 bytes; MessagePack [version, secret, [[fingerprint, [address, ...]], ...]] )

The roster holds only the secret's hash. A fingerprint is a member's id, so that a joiner knows whom it tells.
"""

from __future__ import annotations

import base64
import binascii
import zlib

import msgspec

from shoal.ids import NodeId

SECRET_BYTES = 16
CONTACTS_MAX = 3
ADDRESSES_MAX = 6
_PREFIX = "shoal-"
_VERSION = 1


class Contact(msgspec.Struct, frozen=True, array_like=True):
    """A member that may admit: 16 bytes of its id, and where it is reached, HOST:PORT each."""

    fingerprint: bytes
    addresses: tuple[str, ...]

    @property
    def node(self) -> NodeId:
        return NodeId(self.fingerprint.hex())


class Token(msgspec.Struct, frozen=True, array_like=True):
    """An invitation in the owner's hand. `contacts` are in the order in which to ask."""

    version: int
    secret: bytes
    contacts: tuple[Contact, ...]


def print_token(secret: bytes, contacts: list[tuple[NodeId, tuple[str, ...]]]) -> str:
    """One word, to be copied."""
    listed = tuple(Contact(bytes.fromhex(node), addresses[:ADDRESSES_MAX]) for node, addresses in contacts[:CONTACTS_MAX])
    body = msgspec.msgpack.encode(Token(_VERSION, secret, listed))
    packed = zlib.crc32(body).to_bytes(4, "big") + body
    return _PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def read_token(text: str) -> Token:
    """The token that was printed.

    Raises:
        ValueError: it is none, or not all of it.
    """
    word = "".join(text.split())
    if not word.startswith(_PREFIX):
        raise ValueError(f"a token begins with '{_PREFIX}': copy the line that `shoal invite` printed")
    encoded = word.removeprefix(_PREFIX)
    try:
        packed = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        if zlib.crc32(packed[4:]) != int.from_bytes(packed[:4], "big"):
            raise ValueError("the checksum is another")
        token = msgspec.msgpack.decode(packed[4:], type=Token)
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        raise ValueError("the token is incomplete or mistyped: copy the whole line that `shoal invite` printed") from None
    if token.version != _VERSION:
        raise ValueError(f"the token is of version {token.version}, this shoal reads {_VERSION}: update it")
    if len(token.secret) != SECRET_BYTES or not token.contacts:
        raise ValueError("the token names nobody to ask: make another with `shoal invite`")
    return token
