"""Names of things, as types, so that a session is never passed where a device is meant."""

from __future__ import annotations

from typing import NewType

import msgspec

DeviceId = NewType("DeviceId", str)
"""Who a device is: stable over restarts of its agent."""

NodeId = NewType("NodeId", str)
"""A member of a cluster: a hash of its public key, so nobody can claim another's. See `membership/`."""

GroupId = NewType("GroupId", str)
"""The name of a group of members that act as one, such as a training run."""

ModelHash = NewType("ModelHash", str)
"""SHA-256 of a model file, 64 lower-case hexadecimal digits."""

EngineId = NewType("EngineId", int)
"""One deployment of one model over some devices; every ring frame carries it. 64 bits, never 0."""


class LayerRange(msgspec.Struct, frozen=True, order=True):
    """Consecutive transformer layers [first, stop); empty where `first == stop`."""

    first: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.stop:
            raise ValueError(f"layer range {self.first}..{self.stop} is not ordered")

    def __len__(self) -> int:
        return self.stop - self.first

    def __str__(self) -> str:
        return f"{self.first}-{self.stop - 1}" if len(self) else "none"
