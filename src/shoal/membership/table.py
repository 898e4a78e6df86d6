"""Transition tables: the specification of a state machine, and the code that runs it.

A table says for every state and every event what state comes next, which messages are sent and which facts are
announced. The cores look up what to do here, the pages in docs/protocols/ are drawn from here, and a pair that is
missing does not get past construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

from shoal.effects import Fact, Message

State = TypeVar("State", bound=StrEnum)


class Impossible(AssertionError):
    """A machine was told of an event that its state rules out: our own error."""


class Outcome(NamedTuple, Generic[State]):
    """What an event does: the next state, the kinds of messages that go out, the kinds of facts that are announced."""

    state: State
    sends: tuple[type[Message], ...] = ()
    announces: tuple[type[Fact], ...] = ()


class Table(Generic[State]):
    """Every (state, event) of one machine.

    Args:
        name: what the machine is, for pages and errors.
        start: the state it begins in.
        entries: what happens. A state may stay as it is and still send.
        unmoved: pairs that change nothing and say nothing.
        impossible: pairs that cannot come up; they raise.
        meanings: one line for every state.
    """

    def __init__(
        self,
        name: str,
        start: State,
        entries: Mapping[tuple[State, str], Outcome[State]],
        *,
        meanings: Mapping[State, str],
        unmoved: frozenset[tuple[State, str]] = frozenset(),
        impossible: frozenset[tuple[State, str]] = frozenset(),
    ) -> None:
        self.name = name
        self.start = start
        self.entries = dict(entries)
        self.unmoved = unmoved
        self.impossible = impossible
        self.meanings = dict(meanings)
        self.states: tuple[State, ...] = tuple(type(start))
        self.events = tuple(dict.fromkeys(event for _, event in [*self.entries, *sorted(unmoved), *sorted(impossible)]))
        for state in self.states:
            for event in self.events:
                kinds = [pair for pair in (self.entries, unmoved, impossible) if (state, event) in pair]
                if len(kinds) != 1:
                    raise AssertionError(f"{name}: ({state}, {event}) has {len(kinds)} entries, it must have one")
        if self.meanings.keys() != set(self.states):
            raise AssertionError(f"{name}: every state needs its meaning, and no other")
        self._outcomes = {**self.entries, **{(state, event): Outcome(state) for state, event in unmoved}}

    def __getitem__(self, pair: tuple[State, str]) -> Outcome[State]:
        try:
            return self._outcomes[pair]
        except KeyError:
            raise Impossible(f"{self.name}: {pair[1]!r} cannot happen in state {pair[0]!s}") from None


def pairs(states: tuple[State, ...], *events: str) -> frozenset[tuple[State, str]]:
    """All pairs of these states and events."""
    return frozenset((state, event) for state in states for event in events)
