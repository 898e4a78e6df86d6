"""What a device was told, one line of JSON each; given to a new core, it does the same again.

The first line is what the core was made from, every further line an event, when it came, and a hash of the effects it
had. A journal that
ends in the middle of a line (a power cut) is good up to there. Signatures are part of what was told; the device's own
key is not in it, and
who replays brings keys that sign alike.

The simulator and the real runtime write the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from shoal.effects import (
    Command,
    Commanded,
    Effect,
    Event,
    Fact,
    Learned,
    LinkClosed,
    LinkOpened,
    Observed,
    Received,
    Stored,
    TimerFired,
)
from shoal.errors import RemoteProtocolError
from shoal.ids import NodeId
from shoal.membership.messages import Statement
from shoal.membership.roster import Keys, Roster, statement_key
from shoal.membership.timing import Timing
from shoal.node import wire
from shoal.node.core import NodeCore

VERSION = 1
_PLAIN: tuple[type[msgspec.Struct], ...] = (TimerFired, Stored, LinkOpened, LinkClosed, Observed)
_PLAIN_BY_NAME = {kind.__name__: kind for kind in _PLAIN}


class Head(msgspec.Struct, frozen=True):
    """What the core was made from."""

    version: int
    node: NodeId
    incarnation: int
    timing: Timing
    now_s: float
    since_1970_s: float
    stored: dict[str, bytes]
    statements: tuple[Statement, ...]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event. `fields` are those of the event, the command or the fact that `kind` names; a message is as on the wire."""

    now_s: float
    kind: str
    fields: dict[str, Any] = {}
    message: bytes = b""
    effects: str = ""


class Replayed(NamedTuple):
    """How far a replay agreed. `difference` is the first line that had other effects, counted from 1, with both hashes."""

    num_events: int
    difference: tuple[int, str, str] | None
    core: NodeCore


_encoder = msgspec.json.Encoder()
_head_decoder = msgspec.json.Decoder(Head)
_entry_decoder = msgspec.json.Decoder(Entry)
_effects_encoder = msgspec.msgpack.Encoder(order="deterministic")


def hash_effects(effects: Iterable[Effect]) -> str:
    """Names what a core wanted, in order: 16 hexadecimal digits."""
    text = hashlib.blake2b(digest_size=8)
    for effect in effects:
        text.update(type(effect).__name__.encode())
        inner = getattr(effect, "fact", None)
        text.update(type(inner).__name__.encode() if inner is not None else b"")
        text.update(_effects_encoder.encode(effect))
    return text.hexdigest()


class Journal:
    """Writes one device's journal, from its start to its end.

    Args:
        write: takes one line with its line break.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.lines: list[bytes] = []
        self._write = write

    @classmethod
    def begin(
        cls,
        node: NodeId,
        *,
        incarnation: int,
        timing: Timing,
        now_s: float,
        since_1970_s: float,
        stored: Mapping[str, bytes],
        statements: tuple[Statement, ...] = (),
        write: Callable[[bytes], object] | None = None,
    ) -> Journal:
        """A journal for a core made from these; without `write` it is kept in `lines`."""
        lines: list[bytes] = []
        journal = cls(write or lines.append)
        journal.lines = lines
        head = Head(VERSION, node, incarnation, timing, now_s, since_1970_s, dict(stored), statements)
        journal._write(_encoder.encode(head) + b"\n")
        return journal

    def record(self, event: Event, now_s: float, effects: Iterable[Effect]) -> None:
        """The core took `event` and wanted `effects`."""
        self._write(_encoder.encode(_entry_of(event, now_s, hash_effects(effects))) + b"\n")


def _entry_of(event: Event, now_s: float, effects: str) -> Entry:
    if isinstance(event, Received):
        return Entry(now_s, "Received", {"peer": event.peer}, wire.encode(event.message), effects)
    if isinstance(event, Commanded):
        return Entry(now_s, type(event.command).__name__, msgspec.to_builtins(event.command), effects=effects)
    if isinstance(event, Learned):
        return Entry(now_s, type(event.fact).__name__, msgspec.to_builtins(event.fact), effects=effects)
    return Entry(now_s, type(event).__name__, msgspec.to_builtins(event), effects=effects)


def _named(base: type[Any]) -> dict[str, type[Any]]:
    """All kinds of commands or facts that the imported capabilities define."""
    found: dict[str, type[Any]] = {}
    for kind in base.__subclasses__():
        found[kind.__name__] = kind
        found.update(_named(kind))
    return found


def _event_of(entry: Entry, commands: Mapping[str, type[Any]], facts: Mapping[str, type[Any]]) -> Event:
    kind = entry.kind
    if kind == "Received":
        return Received(NodeId(entry.fields["peer"]), wire.decode(entry.message))
    if kind in _PLAIN_BY_NAME:
        return msgspec.convert(entry.fields, _PLAIN_BY_NAME[kind])  # type: ignore[return-value]
    if kind in commands:
        return Commanded(msgspec.convert(entry.fields, commands[kind]))
    if kind in facts:
        return Learned(msgspec.convert(entry.fields, facts[kind]))
    raise RemoteProtocolError(f"the journal tells of '{kind}', which this version does not know")


def replay(lines: Iterable[bytes], keys: Keys, *, make_node: Callable[..., NodeCore] = NodeCore) -> Replayed:
    """Tells a new core the same again, up to the first line whose effects differ.

    Raises:
        RemoteProtocolError: the lines are no journal, or one of another version.
    """
    commands, facts = _named(Command), _named(Fact)
    core: NodeCore | None = None
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break  # cut off while it was written
        try:
            if core is None:
                core = _core_of(_head_decoder.decode(line), keys, make_node)
                continue
            entry = _entry_decoder.decode(line)
            event = _event_of(entry, commands, facts)
        except msgspec.MsgspecError as error:
            raise RemoteProtocolError(f"line {number} is no line of a journal: {error}") from None
        effects = hash_effects(core.step(event, entry.now_s))
        count += 1
        if effects != entry.effects:
            return Replayed(count, (number, entry.effects, effects), core)
    if core is None:
        raise RemoteProtocolError("the journal is empty")
    return Replayed(count, None, core)


def _core_of(head: Head, keys: Keys, make_node: Callable[..., NodeCore]) -> NodeCore:
    if head.version != VERSION:
        raise RemoteProtocolError(f"the journal has version {head.version}, this program reads {VERSION}")
    return make_node(
        head.node,
        incarnation=head.incarnation,
        keys=keys,
        timing=head.timing,
        now_s=head.now_s,
        since_1970_s=head.since_1970_s,
        stored=head.stored,
        roster=Roster({statement_key(each): each for each in head.statements}),
    )
