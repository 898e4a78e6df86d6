"""Devices with names, real keys, and statements signed by them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from shoal.effects import Announce, Commanded, Effect, Event, Fact, Message, Received, Send
from shoal.ids import NodeId
from shoal.membership.messages import Stamp, Statement, StatementKind
from shoal.membership.roster import EMPTY, RosterCore, signed_text
from shoal.membership.timing import Timing
from tests.membership.keys import keys_of, node_of, roster_of

SINCE_1970_S = 1_000_000.0
"""The wall clock of these tests at `now_s` = 0."""

_Fact = TypeVar("_Fact", bound=Fact)
_Message = TypeVar("_Message", bound=Message)


def nodes(*names: str) -> tuple[NodeId, ...]:
    return tuple(node_of(name) for name in names)


def statement(
    kind: StatementKind, signer: str, subject: str | None = None, at_s: float = SINCE_1970_S, **fields: Any
) -> Statement:
    """A signed statement; devices by their names."""
    if kind in ("found", "add"):
        fields.setdefault("public_key", keys_of(subject or signer).public_key)
    bare = Statement(kind, node_of(signer), node_of(subject or signer), at_s, **fields)
    return msgspec.structs.replace(bare, signature=keys_of(signer).sign(signed_text(bare)))


def stamp(signer: str, subject: str, at_s: float = SINCE_1970_S, *, is_sure: bool = True) -> Stamp:
    bare = Stamp(node_of(signer), node_of(subject), at_s, is_sure)
    return msgspec.structs.replace(bare, signature=keys_of(signer).sign(signed_text(bare)))


def cluster(*names: str) -> list[Statement]:
    """The statements of a cluster that the first founded and to which it added the others."""
    return [statement("found", names[0]), *(statement("add", names[0], name) for name in names[1:])]


def roster_core(name: str, known: Iterable[Statement] = (), stored: dict[str, bytes] | None = None) -> RosterCore:
    statements = list(known)
    start = roster_of(*statements) if statements else EMPTY
    return RosterCore(node_of(name), keys_of(name), timing=Timing(), since_1970_s=SINCE_1970_S, roster=start, stored=stored)


def sent(effects: Iterable[Effect], kind: type[_Message]) -> list[_Message]:
    """The messages of this kind among the effects."""
    return [each.message for each in effects if type(each) is Send and type(each.message) is kind]


def sent_kinds(effects: Iterable[Effect]) -> set[type[Message]]:
    return {type(each.message) for each in effects if type(each) is Send}


def announced(effects: Iterable[Effect], kind: type[_Fact]) -> list[_Fact]:
    """The facts of this kind among the effects."""
    return [each.fact for each in effects if type(each) is Announce and type(each.fact) is kind]


class Conversation:
    """Roster cores that talk to each other until nobody has anything to say; every message arrives at once."""

    def __init__(self, **cores: RosterCore) -> None:
        self.cores = {core.me: core for core in cores.values()}
        self.effects: dict[NodeId, list[Effect]] = {me: [] for me in self.cores}
        self.now_s = 0.0

    def tell(self, who: RosterCore, event: Event) -> list[Effect]:
        """Gives `who` an event, and everybody what follows from it; returns the effects at `who`."""
        before = len(self.effects[who.me])
        self._take(who.me, who.step(event, self.now_s))
        return self.effects[who.me][before:]

    def command(self, who: RosterCore, command: Any) -> list[Effect]:
        return self.tell(who, Commanded(command))

    def _take(self, me: NodeId, effects: list[Effect]) -> None:
        queue = [(me, effects)]
        for _ in range(10_000):
            if not queue:
                return
            sender, done = queue.pop(0)
            self.effects[sender] += done
            for effect in done:
                if type(effect) is Send:
                    event = Received(sender, effect.message)
                    queue += [
                        (peer, self.cores[peer].step(event, self.now_s)) for peer in effect.peers if peer in self.cores
                    ]
        raise AssertionError("they never stop talking")

    def exchange(self, one: RosterCore, other: RosterCore) -> None:
        self._take(one.me, [one.exchange(other.me)])
