"""Bugs on purpose: cores that break one rule each, which the swarm must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shoal.effects import Effect, Event, TimerFired
from shoal.ids import NodeId
from shoal.membership.group import GroupCore, Role
from shoal.membership.messages import Record, Statement
from shoal.membership.roster import Roster, RosterCore
from shoal.node.core import NodeCore


class StaleTimer(GroupCore):
    """Stands for leader whenever the timer fires, though the leader was heard since it was set."""

    def step(self, event: Event, now_s: float) -> list[Effect]:
        if isinstance(event, TimerFired) and self.role is Role.FOLLOWING and self.can_vote():
            self._stand_at_s = now_s
        return super().step(event, now_s)

    def _is_time_to_stand(self) -> bool:
        return True


class DoubleVote(GroupCore):
    """Votes for everyone who asks in the term."""

    def _may_vote_for(self, candidate: NodeId) -> bool:
        del candidate
        return True


class LostCommit(GroupCore):
    """Elected, forgets what others acknowledged: it may be committed already."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)

        def unfinished() -> Record | None:
            return None

        self.ballot.unfinished = unfinished  # type: ignore[method-assign]


class VoteWithoutFile(GroupCore):
    """Votes for its former self, though its file is gone."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        ballot = self.ballot

        def can_vote() -> bool:
            return ballot.me in ballot.committed.voters

        ballot.can_vote = can_vote  # type: ignore[method-assign]


class ForgetsRemovals(RosterCore):
    """Takes what is new, and drops the removals it knew."""

    def _joined(self, roster: Roster, new: Mapping[str, Statement]) -> Roster:
        kept = {key: each for key, each in roster.statements.items() if each.kind != "remove"}
        return Roster({**kept, **new})


def with_group(kind: type[GroupCore]) -> Callable[..., NodeCore]:
    """Makes devices whose groups are of this kind."""

    class Mutant(NodeCore):
        group_core = kind

    return Mutant


def with_roster(kind: type[RosterCore]) -> Callable[..., NodeCore]:
    """Makes devices whose rosters are of this kind."""

    def make(*arguments: Any, **named: Any) -> NodeCore:
        node = NodeCore(*arguments, **named)
        node.roster.__class__ = kind
        return node

    return make
