"""The border between deciding and doing: what a core is told, and what it may ask for.

A core has one way to change, `step(event, now_s) -> list[Effect]`. Two interpreters carry the effects out: `runtime/`
with sockets, disks and clocks, `simulation/` with a seed. Neither the cores nor this page know which.

Both unions are generic in their payload: a capability brings its own messages, commands and facts, and `node/core.py` closes
the unions. `now_s` is the device's own clock: monotonic, and running on while the device sleeps.
"""

from __future__ import annotations

import msgspec

from shoal.ids import NodeId


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all that goes over a control link. Fields are only ever appended, with a default."""


class Fact(msgspec.Struct, frozen=True):
    """Base of what a core tells its owner: other cores, the agent, the log."""


class Command(msgspec.Struct, frozen=True):
    """Base of what the owner or another core asks of a core."""


# ---- events: what a core is told


class Received(msgspec.Struct, frozen=True):
    """A message came over the link from `peer`, whose key that link has proven."""

    peer: NodeId
    message: Message


class TimerFired(msgspec.Struct, frozen=True):
    """The timer `key` is due. It may be late, or meant for a state long gone: a core checks its own deadline."""

    key: str


class Stored(msgspec.Struct, frozen=True):
    """Write `number` of `key` and all before it are on disk, and survive a power cut."""

    key: str
    number: int


class LinkOpened(msgspec.Struct, frozen=True):
    """A link to `peer` stands."""

    peer: NodeId


class LinkClosed(msgspec.Struct, frozen=True):
    """The link to `peer` was closed: its process ended, or said goodbye."""

    peer: NodeId


class Commanded(msgspec.Struct, frozen=True):
    """The owner or another core wants something."""

    command: Command


class Learned(msgspec.Struct, frozen=True):
    """Another core of this device announced `fact`."""

    fact: Fact


class Observed(msgspec.Struct, frozen=True):
    """A transfer measured the directed link `source` -> `target`: `num_bytes` in `seconds`, receiver's clock.

    `saturated` is False where the sender had nothing more to send, so that the rate is only a lower bound.
    """

    source: NodeId
    target: NodeId
    num_bytes: int
    seconds: float
    saturated: bool = True


Event = Received | TimerFired | Stored | LinkOpened | LinkClosed | Commanded | Learned | Observed


# ---- effects: what a core asks for


class Send(msgspec.Struct, frozen=True):
    """One message to each of `peers`. It may be lost; nothing tells the core."""

    peers: tuple[NodeId, ...]
    message: Message


class SetTimer(msgspec.Struct, frozen=True):
    """Fire `key` at `at_s`, instead of whenever it was set to fire before."""

    key: str
    at_s: float


class Store(msgspec.Struct, frozen=True):
    """Put `value` on disk under `key`, all of it or nothing, in order per key; answered by `Stored(key, number)`."""

    key: str
    number: int
    value: bytes


class Announce(msgspec.Struct, frozen=True):
    """Something the owner, other cores or the log should know."""

    fact: Fact


class Watch(msgspec.Struct, frozen=True):
    """Keep links to exactly these peers, dialling them where they are missing."""

    peers: frozenset[NodeId]


class Hangup(msgspec.Struct, frozen=True):
    """Close the link to `peer`; `reason` is one line for its owner."""

    peer: NodeId
    reason: str


class MeasureLink(msgspec.Struct, frozen=True):
    """Send to `peer`, back to back, until either bound is reached: something useful if there is, else padding.

    `peer` then has an `Observed` to tell its cores; nothing comes back here but its report.
    """

    peer: NodeId
    num_bytes_max: int
    seconds_max: float


Effect = Send | SetTimer | Store | Announce | Watch | Hangup | MeasureLink
