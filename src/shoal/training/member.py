"""One member of a run: from the group's records to what is computed, applied, pulled and counted.

    OUTSIDE -> PULLING -> REPLAYING -> READY -> WAITING -> ACTIVE -> (WAITING ...) -> GONE
                  ^            (shadow)            |
                  +---------- other bits ----------+

**A record begins where all its members can.** Members of the epoch before finish the step they are at: each contribution
says whether its sender knows a later record, so with the sum all learn of it in the same step, and end the epoch after it.
Where the exchange breaks, they end it at once. Then each tells the others what it has applied, and who has heard all knows
the highest step, K. Members who were in before are at K or one step behind, and get its gradient from one who has it.

**A joiner** is a shadow first: donors keep a snapshot, made at the boundary where it came in, and the gradients since. It
pulls the snapshot, then gradient after gradient, and is ready when there is none left. Nobody waits for it. What it has
replayed may have been lost with the donors that had applied it; then its bits are others than the group's, and it begins
anew.

Without a quorum nothing is applied: a sum that comes waits for the quorum, or is dropped with its epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from shoal.ids import NodeId
from shoal.network.graph import Link
from shoal.training import ledger as ledger_
from shoal.training.ledger import CatchUp, Committed, Compute, Entry, Grouped, Ledger, Reported, Suspend
from shoal.training.samples import SampleOrder

MISSES_MAX = 3
"""A gradient that no donor has so many times is not coming any more."""


class Phase(StrEnum):
    OUTSIDE = "outside"
    PULLING = "pulling"
    REPLAYING = "replaying"
    READY = "ready"
    WAITING = "waiting"
    """Active in the record; its members have not all told what they have."""
    ACTIVE = "active"
    GONE = "gone"


class Status(msgspec.Struct, frozen=True, array_like=True):
    """What a member has as `epoch` begins. `digest` is that of the last applied step, empty before the first; `is_new`: it
    was a shadow until now. `received_bytes_per_s`: how fast others' bytes come to it, where that was measured."""

    epoch: int
    applied: int
    digest: str
    samples_per_s: float
    is_new: bool
    received_bytes_per_s: dict[NodeId, float] = msgspec.field(default_factory=dict)


# ---- events


class Adopted(msgspec.Struct, frozen=True):
    """A later record of the group. Epochs rise over the whole life of a run, restarts from checkpoints included."""

    epoch: int
    actives: tuple[NodeId, ...]
    shadows: tuple[NodeId, ...]


class Heard(msgspec.Struct, frozen=True):
    member: NodeId
    status: Status


class StateHad(msgspec.Struct, frozen=True):
    """The pulled state is loaded: `history` has the entry of every step in it."""

    history: tuple[Entry, ...]


class Replayed(msgspec.Struct, frozen=True):
    """A kept gradient is applied; `digest` is of the bits here, `entry` what the donor had."""

    entry: Entry
    digest: str


class CaughtUp(msgspec.Struct, frozen=True):
    """No donor has a later gradient."""


class Summed(msgspec.Struct, frozen=True):
    """The epoch's exchange has the sum of a step. `is_changing`: a member knows a later record."""

    epoch: int
    step: int
    is_changing: bool
    samples_per_s: dict[NodeId, float] | None = None


class Confirmed(msgspec.Struct, frozen=True):
    """The epoch's members have all contributed to `step`, which nobody computes: the run ends before it."""

    epoch: int
    step: int


class StepApplied(msgspec.Struct, frozen=True):
    """As `Apply` asked."""

    step: int
    digest: str


class Measured(msgspec.Struct, frozen=True):
    """How fast bytes come from others now; told with the next status."""

    received_bytes_per_s: dict[NodeId, float]


class Broken(msgspec.Struct, frozen=True):
    """The epoch's exchange has failed, or a member of it is gone."""

    epoch: int


class Halted(msgspec.Struct, frozen=True):
    """No quorum."""


class Resumed(msgspec.Struct, frozen=True):
    """A quorum."""


class Nudged(msgspec.Struct, frozen=True):
    """Some time has passed, or a link is back: what was not answered is said again."""


Event = (
    Adopted
    | Heard
    | StateHad
    | Replayed
    | CaughtUp
    | Summed
    | Confirmed
    | StepApplied
    | Measured
    | Broken
    | Halted
    | Resumed
    | Nudged
)

# ---- effects; also the ledger's Compute, CatchUp and Committed


class Tell(msgspec.Struct, frozen=True):
    peers: tuple[NodeId, ...]
    status: Status


class PullState(msgspec.Struct, frozen=True):
    """Whatever state is here is given up; that of the donors is wanted, then `StateHad`."""

    donors: tuple[NodeId, ...]


class Follow(msgspec.Struct, frozen=True):
    """From now on each gradient after the last one is fetched from these and applied, until `Open` or `PullState`."""

    donors: tuple[NodeId, ...]


class Open(msgspec.Struct, frozen=True):
    """An exchange among the members of an epoch begins. `rates` (bytes/s) of links between them, where they were measured:
    what all told, so they are the same everywhere."""

    epoch: int
    members: tuple[NodeId, ...]
    rates: dict[Link, float]


class Apply(msgspec.Struct, frozen=True):
    """The sum counts: apply it, then `StepApplied`."""

    step: int


class Snapshot(msgspec.Struct, frozen=True):
    """Shadows are there. The state as it is now, and each gradient from now on, is kept for them, if none is yet.

    None: nobody needs it any more.
    """

    num_donors: int | None


class Report(msgspec.Struct, frozen=True):
    """To the group's core."""

    applied: int
    has_state: bool
    is_ready: bool


class AskRecord(msgspec.Struct, frozen=True):
    """The epoch's exchange broke, and all its members are still there: the group should agree on a new record."""

    epoch: int


class Restart(msgspec.Struct, frozen=True):
    """This member's bits are others than the group's: it must leave, and join anew."""

    reason: str


Effect = Tell | PullState | Follow | Open | Apply | Snapshot | Report | AskRecord | Restart | Compute | CatchUp | Committed


class Member:
    """The core of one member.

    Args:
        history: entries of all steps in the state that is here, all committed; None: there is none.
        members_min: a founder's first epoch waits for so many.
    """

    def __init__(
        self,
        me: NodeId,
        order: SampleOrder,
        *,
        history: Sequence[Entry] | None = None,
        members_min: int = 1,
        samples_per_s: float = 1.0,
    ) -> None:
        self.me = me
        self.order = order
        self.phase = Phase.OUTSIDE
        self.samples_per_s = samples_per_s
        self.ledger: Ledger | None = Ledger(me, order, history) if history is not None else None
        self._history: list[Entry] | None = None
        """Of a shadow: what it has replayed. A member has its ledger."""
        self._members_min = members_min
        self._record: Adopted | None = None
        self._statuses: dict[NodeId, Status] = {}
        self._open: int | None = None
        self._opened: tuple[NodeId, ...] = ()
        self._ended = -1
        """The last epoch that was open here, and is over."""
        self._is_changing = self._is_halted = False
        self._held: Summed | None = None
        self._is_behind = False
        """Everybody has told, and there are steps that this joiner has not."""
        self._misses = 0
        self._has_snapshot = False
        self._speeds: dict[NodeId, float] | None = None
        self._received_bytes_per_s: dict[NodeId, float] = {}

    # ---- what others ask

    @property
    def has_state(self) -> bool:
        return self.ledger is not None or self._history is not None

    @property
    def applied(self) -> int:
        """The last step in the state that is here; -1: none."""
        if self.ledger is not None:
            return self.ledger.applied
        return len(self._history) - 1 if self._history is not None else -1

    @property
    def entries(self) -> list[Entry]:
        """Of all steps applied here; the last one may not be committed yet."""
        if self.ledger is not None:
            return [*self.ledger.entries, *self.ledger.pending]
        return list(self._history or ())

    @property
    def knows_later_record(self) -> bool:
        """To be said with every contribution."""
        return self._record is not None and self._open is not None and self._record.epoch > self._open

    @property
    def open_epoch(self) -> int | None:
        return self._open

    @property
    def record(self) -> Adopted | None:
        return self._record

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Takes an event."""
        if isinstance(event, Adopted):
            return self._adopted(event, now_s)
        if isinstance(event, Heard):
            return self._heard(event, now_s)
        if isinstance(event, StateHad):
            self._history = list(event.history)
            self.phase = Phase.REPLAYING
            return [Follow(self._donors()), *self._enter(now_s), *self._report()]
        if isinstance(event, Replayed):
            return self._replayed(event, now_s)
        if isinstance(event, CaughtUp):
            return self._caught_up()
        if isinstance(event, Summed):
            return self._summed(event)
        if isinstance(event, Confirmed):
            return self._confirmed(event, now_s)
        if isinstance(event, StepApplied):
            return self._applied(event, now_s)
        if isinstance(event, Measured):
            self._received_bytes_per_s = event.received_bytes_per_s
            return []
        if isinstance(event, Broken):
            return self._end_epoch(now_s) if event.epoch == self._open else []
        if isinstance(event, Halted):
            self._is_halted = True
            return []
        if isinstance(event, Resumed):
            self._is_halted = False
            held, self._held = self._held, None
            return self._summed(held) if held is not None else []
        return self._tell_again(now_s)

    def _caught_up(self) -> list[Effect]:
        if self.phase is Phase.REPLAYING and self._record is not None and self.me in self._record.shadows:
            self.phase = Phase.READY
            return self._report()
        if self.phase is Phase.WAITING and self._is_behind:
            self._misses += 1
            if self._misses >= MISSES_MAX:
                return self._restart(f"nobody keeps the gradient of step {self.applied + 1} any more")
        return []

    # ---- records

    def _adopted(self, event: Adopted, now_s: float) -> list[Effect]:
        if self._record is not None and event.epoch <= self._record.epoch:
            return []
        self._record = event
        self._is_behind, self._misses = False, 0
        self._statuses = {member: status for member, status in self._statuses.items() if status.epoch >= event.epoch}
        if self._open is not None:
            return []  # the epoch ends with a step in which all know it, or breaks
        return self._enter(now_s)

    def _donors(self) -> tuple[NodeId, ...]:
        assert self._record is not None
        return tuple(member for member in self._record.actives if member != self.me)

    def _enter(self, now_s: float) -> list[Effect]:
        """Takes this member's place in the newest record; no epoch is open."""
        record = self._record
        if record is None:
            return []
        if self.me in record.actives and self.has_state:
            self.phase = Phase.WAITING
            return [*self._report(), *self._tell(), *self._settle(now_s)]
        if self.me in record.shadows and self._history is not None:
            return [Follow(self._donors())]
        if self.me in record.shadows or self.me in record.actives:
            # What was applied here and not there is not known, so all of it is given up.
            self.ledger = self._history = None
            self._has_snapshot = False
            self.phase = Phase.PULLING
            return [*self._report(), Snapshot(None), PullState(self._donors())]
        # Out. The state that is here stays for those who pull it, until this device wants in again.
        self.phase = Phase.GONE if self.has_state else Phase.OUTSIDE
        if self.ledger is None:
            self._history = None
        return []

    def _status(self) -> Status:
        assert self._record is not None
        entries = self.entries
        return Status(
            self._record.epoch,
            self.applied,
            entries[-1].digest if entries else "",
            self.samples_per_s,
            self.ledger is None,
            self._received_bytes_per_s,
        )

    def _tell(self) -> list[Effect]:
        assert self._record is not None
        if self.me not in self._statuses or self._statuses[self.me].epoch < self._record.epoch:
            self._statuses[self.me] = self._status()
        # Members of the epoch before may still be waiting for this one there.
        others = {*self._record.actives, *self._opened} - {self.me}
        return [Tell(tuple(sorted(others)), self._statuses[self.me])] if others else []

    def _tell_again(self, now_s: float) -> list[Effect]:
        if self._open is None and self.phase is Phase.WAITING and self._record is not None:
            if self._record.epoch <= self._ended:
                return [AskRecord(self._ended)]
            return [*self._tell(), *self._settle(now_s)]
        if self._record is not None and self._open == self._record.epoch and self.me in self._statuses:
            # Somebody may not have heard, and cannot open the exchange without.
            return self._tell()
        return []

    def _heard(self, event: Heard, now_s: float) -> list[Effect]:
        known = self._statuses.get(event.member)
        if known is None or event.status.epoch > known.epoch:
            self._statuses[event.member] = event.status
        if self._open is not None:
            # It went on to a later record without this epoch's next step, which will never have its part.
            has_left = event.status.epoch > self._open and event.status.applied <= self.applied
            return self._end_epoch(now_s) if has_left and event.member in self._opened else []
        return self._settle(now_s) if self.phase is Phase.WAITING else []

    def _settle(self, now_s: float) -> list[Effect]:
        """Opens the epoch if all its members have told what they have, and this one has what it takes."""
        record = self._record
        assert record is not None
        if record.epoch <= self._ended:
            return []
        told = {member: self._statuses.get(member) for member in record.actives}
        statuses = {member: status for member, status in told.items() if status is not None and status.epoch == record.epoch}
        if len(statuses) < len(record.actives):
            return []
        old = {member: status for member, status in statuses.items() if not status.is_new} or statuses
        highest = max(status.applied for status in old.values())
        donors = tuple(sorted(member for member, status in old.items() if status.applied == highest))
        if self.ledger is None:
            assert self._history is not None
            if self.applied > highest or (
                self.applied == highest and statuses[donors[0]].digest != (self._history[-1].digest if self._history else "")
            ):
                return self._restart(f"step {self.applied} is applied here, and not in the group")
            if self.applied < highest:
                self._is_behind = True
                return [Follow(donors)]
        if self._ended < 0 and len(record.actives) < self._members_min:
            return self._snapshot()
        if self._history is not None:
            committed, pending = self._history[:-1], self._history[-1] if self._history else None
            self.ledger, self._history = Ledger(self.me, self.order, committed, pending), None
        assert self.ledger is not None
        if self.ledger.applied < highest - 1:
            return self._restart(f"step {self.ledger.applied} is applied here, {highest} in the group")
        # Who is behind makes its snapshot when it has caught up: all are of the same step.
        effects = self._snapshot() if self.ledger.applied == highest else []
        self._open, self._opened, self._is_changing, self._held = record.epoch, record.actives, False, None
        self.phase = Phase.ACTIVE
        # Nobody has measured a joiner: it begins with half of what the slowest does.
        slowest = min(status.samples_per_s for status in old.values())
        speeds = {member: status.samples_per_s if member in old else slowest / 2 for member, status in statuses.items()}
        grouped = self.ledger.step(Grouped(record.epoch, speeds, highest, donors[0]), now_s)
        rates = {
            Link(source, target): rate
            for target, status in sorted(statuses.items())
            for source, rate in sorted(status.received_bytes_per_s.items())
            if source in statuses
        }
        return [*effects, Open(record.epoch, record.actives, rates), *grouped]

    def _snapshot(self) -> list[Effect]:
        assert self._record is not None
        if self._record.shadows and not self._has_snapshot and self.ledger is not None:
            self._has_snapshot = True
            return [Snapshot(len(self._record.actives))]
        if not self._record.shadows and self._has_snapshot:
            self._has_snapshot = False
            return [Snapshot(None)]
        return []

    def _restart(self, reason: str) -> list[Effect]:
        self.ledger = self._history = None
        self._open, self.phase = None, Phase.OUTSIDE
        return [*self._report(), Restart(reason)]

    def _report(self) -> list[Effect]:
        return [Report(self.applied, self.has_state, self.phase in (Phase.READY, Phase.WAITING, Phase.ACTIVE))]

    # ---- steps

    def _replayed(self, event: Replayed, now_s: float) -> list[Effect]:
        if event.entry.step != self.applied + 1:
            return []
        if event.digest != event.entry.digest:
            return self._restart(f"step {event.entry.step} leads to other bits here than at its donor")
        if self._history is not None:
            self._history.append(event.entry)
            self._misses = 0
            return self._settle(now_s) if self.phase is Phase.WAITING else []
        if self.ledger is None or self.ledger.is_suspended:
            return []
        applied = ledger_.Applied(event.entry.step, event.digest, event.entry)
        effects: list[Effect] = [*self._snapshot(), *self._report()]
        return [*self.ledger.step(applied, now_s), *effects]

    def _summed(self, event: Summed) -> list[Effect]:
        if self._open is None or event.epoch != self._open or event.step != self.applied + 1:
            return []
        if self._is_halted:
            self._held = event
            return []
        self._is_changing |= event.is_changing
        self._speeds = event.samples_per_s
        return [Apply(event.step)]

    def _confirmed(self, event: Confirmed, now_s: float) -> list[Effect]:
        if event.epoch != self._open or self.ledger is None:
            return []
        effects: list[Effect] = []
        for member in self._opened:
            effects += self.ledger.step(Reported(member, event.epoch, event.step - 1), now_s)
        return effects

    def _applied(self, event: StepApplied, now_s: float) -> list[Effect]:
        assert self.ledger is not None
        applied = ledger_.Applied(event.step, event.digest, samples_per_s=self._speeds)
        effects: list[Effect] = [*self.ledger.step(applied, now_s)]
        if self._speeds is not None:
            self.samples_per_s = self._speeds[self.me]
        if not self._is_changing:
            return [*effects, *self._report()]
        effects = [effect for effect in effects if not isinstance(effect, Compute)]
        return [*effects, *self._report(), *self._end_epoch(now_s)]

    def _end_epoch(self, now_s: float) -> list[Effect]:
        assert self.ledger is not None
        assert self._record is not None
        assert self._open is not None
        self._ended, self._open, self._held, self._speeds = self._open, None, None, None
        self._is_changing = False
        self.ledger.step(Suspend(), now_s)
        self.phase = Phase.WAITING
        return self._enter(now_s) if self._record.epoch > self._ended else []
