"""Keys that cost nothing: who is who in a simulation is never in doubt, and nobody forges."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from shoal.ids import NodeId

_PREFIX = b"key of "


@lru_cache(maxsize=1 << 16)
def _signature(public_key: bytes, text: bytes) -> bytes:
    return hashlib.blake2b(public_key + text, digest_size=8).digest()


class SimulatedKeys:
    """A device's `Keys`: its id is its name, its signature a hash that anybody could make."""

    def __init__(self, name: str) -> None:
        self.public_key = _PREFIX + name.encode()

    def identify(self, public_key: bytes) -> NodeId:
        return NodeId(public_key.removeprefix(_PREFIX).decode())

    def sign(self, text: bytes) -> bytes:
        return _signature(self.public_key, text)

    def verify(self, public_key: bytes, text: bytes, signature: bytes) -> bool:
        return signature == _signature(public_key, text)
