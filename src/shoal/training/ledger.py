"""When a step counts: the core that one member keeps of a run.

**Step k is committed when every member of the group has applied it.** A contribution to k + 1 says so of its member; whoever
has the sum of all of them knows that k is committed, and a report says it earlier, or at the end. Before that k may be lost
with the members that applied it, and is then computed again under the next record, by whoever is there. What is committed
stays: every member has it, so every later group does.

A group's record names the highest step that any of its members has applied. Who is one step behind applies the kept gradient
of that step; nobody is further behind, since a step takes a contribution from everybody. After `Suspend` nothing of the old
epoch is applied, so what a member says it has applied, when it signs, stays true until the record comes.

An entry carries the epoch in which its gradient was summed, not that in which somebody learned of its commit. So no step
is in the ledgers of two epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.ids import NodeId
from shoal.training.samples import Interval, SampleOrder, split


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A committed step: the group's epoch in which it was summed, who computed what, and the gradient's digest."""

    step: int
    epoch: int
    parts: tuple[tuple[NodeId, Interval], ...]
    digest: str


# ---- events


class Grouped(msgspec.Struct, frozen=True):
    """A record: who is in and how fast each computes, the highest step that one of them has applied (-1: none), and who."""

    epoch: int
    samples_per_s: dict[NodeId, float]
    applied: int
    donor: NodeId


class Suspend(msgspec.Struct, frozen=True):
    """The epoch is over: a member was lost, or others come or go. What comes next is a record."""


class Applied(msgspec.Struct, frozen=True):
    """This member has applied a step's gradient: its own epoch's, or `entry` as the donor gave it with the gradient.

    `samples_per_s` of all members, from the step's sum, so that all split the next steps alike; None: as before.
    """

    step: int
    digest: str
    entry: Entry | None = None
    samples_per_s: dict[NodeId, float] | None = None


class Reported(msgspec.Struct, frozen=True):
    """A member of the group says, in this epoch, up to where it has applied."""

    member: NodeId
    epoch: int
    applied: int


Event = Grouped | Suspend | Applied | Reported

# ---- effects


class Compute(msgspec.Struct, frozen=True):
    """This member's part of the step is to be computed and contributed in `epoch`. That says: `step` - 1 is applied here."""

    epoch: int
    step: int
    part: Interval


class CatchUp(msgspec.Struct, frozen=True):
    """The step's gradient, and its entry, are to be had from `donor` and applied; then `Applied` with the entry."""

    step: int
    donor: NodeId


class Committed(msgspec.Struct, frozen=True):
    entry: Entry


Effect = Compute | CatchUp | Committed


class Ledger:
    """One member's.

    Args:
        committed: what counts already, from step 0 on: of a checkpoint, or of the donor of a member that joins.
        pending: the entry of the step after those, where that is applied and not known to be committed.
    """

    def __init__(
        self, me: NodeId, order: SampleOrder, committed: Sequence[Entry] = (), pending: Entry | None = None
    ) -> None:
        self.me = me
        self.order = order
        self.entries = list(committed)
        self.pending: list[Entry] = [pending] if pending is not None else []  # at most one: the next commits it
        self.epoch = -1
        self._group: Grouped | None = None  # None while suspended
        self._reported: dict[NodeId, tuple[int, int]] = {}  # (epoch, applied), the latest; also of an epoch to come

    @property
    def is_suspended(self) -> bool:
        """Between two records: nothing may be applied."""
        return self._group is None

    @property
    def applied(self) -> int:
        """The last step whose gradient is in this member's model; -1: none."""
        return len(self.entries) + len(self.pending) - 1

    def step(self, event: Event, now_s: float) -> list[Effect]:  # noqa: ARG002
        """Takes an event. Raises ValueError where the caller's is out of order: a step twice, a record from before."""
        if isinstance(event, Grouped):
            return self._grouped(event)
        if isinstance(event, Suspend):
            self._group = None
            return []
        if isinstance(event, Applied):
            return self._applied(event)
        self._hear(event.member, event.epoch, event.applied)
        return self._commit() if self._group is not None else []

    def _hear(self, member: NodeId, epoch: int, applied: int) -> None:
        self._reported[member] = max(self._reported.get(member, (-1, -1)), (epoch, applied))

    def _grouped(self, event: Grouped) -> list[Effect]:
        if event.epoch <= self.epoch or self.me not in event.samples_per_s:
            raise ValueError(f"the record of epoch {event.epoch} is not one after {self.epoch} with {self.me} in it")
        if not event.applied - 1 <= self.applied <= event.applied:
            raise ValueError(
                f"step {self.applied} is applied here and {event.applied} in the group: the state must be had first"
            )
        self.epoch, self._group = event.epoch, event
        self._reported = {member: report for member, report in self._reported.items() if member in event.samples_per_s}
        if self.applied < event.applied:
            return [CatchUp(event.applied, event.donor)]
        return self._go_on()

    def _applied(self, event: Applied) -> list[Effect]:
        if self._group is None or event.step != self.applied + 1:
            state = "nothing may be, between two records" if self._group is None else f"{self.applied + 1} is next"
            raise ValueError(f"step {event.step} is applied where {state}")
        parts = tuple(split(self.order.interval(event.step), self._group.samples_per_s).items())
        self.pending.append(event.entry or Entry(event.step, self.epoch, parts, event.digest))
        # The step's sum has everybody's contribution, and with it the word that all before is applied.
        for member in self._group.samples_per_s:
            self._hear(member, self.epoch, event.step - 1)
        if event.samples_per_s is not None:
            self._group = msgspec.structs.replace(self._group, samples_per_s=event.samples_per_s)
        return self._go_on()

    def _go_on(self) -> list[Effect]:
        assert self._group is not None
        self._hear(self.me, self.epoch, self.applied)
        following = self.applied + 1
        part = split(self.order.interval(following), self._group.samples_per_s)[self.me]
        return [*self._commit(), Compute(self.epoch, following, part)]

    def _commit(self) -> list[Effect]:
        assert self._group is not None
        reports = (self._reported.get(member, (-1, -1)) for member in self._group.samples_per_s)
        everywhere = min(applied if epoch == self.epoch else -1 for epoch, applied in reports)
        effects: list[Effect] = []
        while self.pending and self.pending[0].step <= everywhere:
            self.entries.append(self.pending.pop(0))
            effects.append(Committed(self.entries[-1]))
        return effects
