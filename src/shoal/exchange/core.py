"""What one member does in an all-reduce over trees, chunk by chunk. No bytes pass through here, only where they are.

A member adds its children's sums to its own contribution, always in the same order, and sends the sum to its parent; the
root's sum is the result and goes down. So every member gets the same bits, whatever came first. Devices on a route pass
on at once, whether they have contributed or not.

An **epoch** has one plan. To enter the next one aborts what is open: its sums are discarded, late frames of it dropped, and
nothing of it is added to anything. Frames of an epoch that others entered earlier wait. A member that has finished a step
owes nobody anything in it, so where all have finished the next epoch can begin on the same links.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import msgspec

from shoal.errors import RemoteProtocolError
from shoal.ids import NodeId
from shoal.topology.paths import Route
from shoal.topology.tree import Plan, Tree

STEPS_OPEN_MAX = 8
"""All-reduces that one member may have begun and not finished."""
PARKED_FRAMES_MAX = 4096
"""Frames of a later epoch that may wait until it is entered here."""


class Phase(IntEnum):
    UP = 0
    DOWN = 1


class ChunkHeader(msgspec.Struct, frozen=True, array_like=True):
    """Which chunk of what a frame carries, and where on its way it is.

    `edge` is the index among the plan's members of the edge's end away from the root, `hop` the receiver's place on the
    edge's route, 1 or more.
    """

    epoch: int
    step: int
    chunk: int
    tree: int
    phase: Phase
    edge: int
    hop: int


# ---- events


class Enter(msgspec.Struct, frozen=True):
    """From now on `plan` holds; `epoch` is above all before."""

    epoch: int
    plan: Plan


class Contribute(msgspec.Struct, frozen=True):
    """This member's own data of `step` is there, in `num_chunks` chunks. Steps count from 0 in each epoch, in order."""

    step: int
    num_chunks: int


class Arrived(msgspec.Struct, frozen=True):
    """A frame came; its payload is kept under `slot`, a number used once."""

    header: ChunkHeader
    slot: int


Event = Enter | Contribute | Arrived


# ---- effects, to be carried out in order


class Add(msgspec.Struct, frozen=True):
    """Adds the slot's payload to the step's own chunk; the slot is done with."""

    step: int
    chunk: int
    slot: int


class Store(msgspec.Struct, frozen=True):
    """The slot's payload is the result: it replaces the step's own chunk; the slot is done with."""

    step: int
    chunk: int
    slot: int


class Send(msgspec.Struct, frozen=True):
    """Sends the slot's payload to `peer`, or the step's own chunk where there is no slot.

    A link sends what has the least (step, chunk) first: that is the order in which the trees' shares become due.
    """

    peer: NodeId
    header: ChunkHeader
    slot: int | None = None


class Drop(msgspec.Struct, frozen=True):
    """The slot is done with."""

    slot: int


class Finished(msgspec.Struct, frozen=True):
    """The step has its result here, and what this member owed others in it is sent or asked to be. `seconds` since
    this member contributed."""

    step: int
    seconds: float


class Discard(msgspec.Struct, frozen=True):
    """The step was aborted: its sums are forgotten. The contribution is the caller's, and untouched."""

    step: int


Effect = Add | Store | Send | Drop | Finished | Discard


def deal(shares: Sequence[float], num_chunks: int) -> tuple[int, ...]:
    """The tree of each chunk: as many per tree as its share says, to the chunk, and evenly mixed.

    Chunk c of a tree's n is due at (c + 1/2)/n of the whole, and chunks are numbered as they are due. So a link that
    sends the least number first gives every tree its share at all times.
    """
    exact = [share * num_chunks for share in shares]
    counts = [int(count) for count in exact]
    by_rest = sorted(range(len(shares)), key=lambda tree: (counts[tree] - exact[tree], tree))
    for tree in by_rest[: num_chunks - sum(counts)]:
        counts[tree] += 1
    due = ((((chunk + 0.5) / count), tree) for tree, count in enumerate(counts) for chunk in range(count))
    return tuple(tree for _, tree in sorted(due))


class _Duties:
    """What one member does in one tree."""

    def __init__(self, me: NodeId, tree: Tree, members: Sequence[NodeId]) -> None:
        index_of = {member: index for index, member in enumerate(members)}
        self.up = {index_of[route[0]]: route for route in tree.up}
        self.down = {index_of[route[-1]]: route for route in tree.down}
        self.is_root = me == tree.root
        self.own_edge = index_of[me]
        self.children_up = [edge for edge, route in sorted(self.up.items()) if route[-1] == me]
        self.children_down = [edge for edge, route in sorted(self.down.items()) if route[0] == me]
        self.num_relayed = sum(me in route[1:-1] for route in (*tree.up, *tree.down))

    def route(self, header: ChunkHeader) -> Route:
        routes = self.up if header.phase is Phase.UP else self.down
        return routes.get(header.edge, ())


class _Step:
    """An all-reduce that is not finished here."""

    def __init__(self) -> None:
        self.deal: tuple[int, ...] = ()  # empty until this member contributes
        self.began_s = 0.0
        self.num_to_do = 0
        self.num_done = 0
        self.num_added: list[int] = []
        self.held: dict[tuple[int, int], tuple[int, int]] = {}  # (chunk, edge): (slot, tree)
        self.seen: set[tuple[int, Phase, int]] = set()


class AllReduce:
    """The core of one member."""

    def __init__(self, me: NodeId) -> None:
        self.me = me
        self.epoch = -1
        self._plan: Plan | None = None
        self._duties: list[_Duties] = []
        self._steps: dict[int, _Step] = {}
        self._finished: set[int] = set()  # of those from `_first_open` on
        self._first_open = 0
        self._num_contributed = 0
        self._parked: list[Arrived] = []

    @property
    def num_held(self) -> int:
        """Slots that are kept here for later."""
        return len(self._parked) + sum(len(step.held) for step in self._steps.values())

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Takes an event.

        Raises:
            RemoteProtocolError: a frame does not fit the plan.
            ValueError: the caller's event is out of order.
        """
        if isinstance(event, Arrived):
            return self._arrived(event, now_s)
        if isinstance(event, Contribute):
            return self._contribute(event, now_s)
        return self._enter(event, now_s)

    def _enter(self, event: Enter, now_s: float) -> list[Effect]:
        if event.epoch <= self.epoch:
            raise ValueError(f"epoch {event.epoch} does not follow {self.epoch}")
        if self.me not in event.plan.members:
            raise ValueError(f"{self.me} is not among the plan's members {', '.join(event.plan.members)}")
        effects: list[Effect] = [Drop(slot) for step in self._steps.values() for slot, _ in step.held.values()]
        effects += [Discard(number) for number, step in self._steps.items() if step.deal]
        self.epoch, self._plan = event.epoch, event.plan
        self._duties = [_Duties(self.me, tree, event.plan.members) for tree in event.plan.trees]
        self._steps, self._finished, self._first_open, self._num_contributed = {}, set(), 0, 0
        parked, self._parked = self._parked, []
        for frame in parked:
            effects += self._arrived(frame, now_s)
        return effects

    def _contribute(self, event: Contribute, now_s: float) -> list[Effect]:
        if self._plan is None:
            raise ValueError("no epoch was entered yet")
        if event.step != self._num_contributed or event.num_chunks < 1:
            raise ValueError(f"step {event.step} of {event.num_chunks} chunks, where step {self._num_contributed} is next")
        if sum(bool(step.deal) for step in self._steps.values()) >= STEPS_OPEN_MAX:
            raise ValueError(f"{STEPS_OPEN_MAX} all-reduces are open: wait for one to finish")
        self._num_contributed += 1
        step = self._steps.setdefault(event.step, _Step())
        step.deal = deal(self._plan.shares, event.num_chunks)
        step.began_s = now_s
        step.num_to_do = sum(1 + self._duties[tree].num_relayed for tree in step.deal)
        step.num_added = [0] * event.num_chunks
        for (chunk, _), (_, tree) in step.held.items():
            self._check_deal(step, chunk, tree)
        effects: list[Effect] = []
        for chunk in range(event.num_chunks):
            effects += self._add(event.step, step, chunk)
        return effects + self._finish(event.step, step, now_s)

    def _arrived(self, event: Arrived, now_s: float) -> list[Effect]:
        header = event.header
        if header.epoch > self.epoch:
            if len(self._parked) >= PARKED_FRAMES_MAX:
                raise RemoteProtocolError(f"{PARKED_FRAMES_MAX} frames of epoch {header.epoch}, which nobody entered here")
            self._parked.append(event)
            return []
        if header.epoch < self.epoch or header.step < self._first_open or header.step in self._finished:
            return [Drop(event.slot)]
        if header.step >= self._num_contributed + STEPS_OPEN_MAX:
            raise RemoteProtocolError(f"a frame of step {header.step}, where {self._num_contributed} is the next to begin")
        if not 0 <= header.tree < len(self._duties):
            raise RemoteProtocolError(f"a frame for tree {header.tree} of {len(self._duties)}")
        duties = self._duties[header.tree]
        route = duties.route(header)
        if not 1 <= header.hop < len(route) or route[header.hop] != self.me:
            raise RemoteProtocolError(f"a frame whose route leads elsewhere: {header}")
        step = self._steps.setdefault(header.step, _Step())
        if step.deal:
            self._check_deal(step, header.chunk, header.tree)
        key = (header.chunk, header.phase, header.edge)
        if key in step.seen:
            return [Drop(event.slot)]
        step.seen.add(key)
        effects: list[Effect] = []
        if header.hop < len(route) - 1:
            onward = msgspec.structs.replace(header, hop=header.hop + 1)
            effects += [Send(route[header.hop + 1], onward, event.slot), Drop(event.slot)]
            step.num_done += 1
        elif header.phase is Phase.UP:
            step.held[header.chunk, header.edge] = (event.slot, header.tree)
            if step.deal:
                effects += self._add(header.step, step, header.chunk)
        else:
            if not step.deal or step.num_added[header.chunk] < len(duties.children_up):
                raise RemoteProtocolError(f"a result that this member has not contributed to yet: {header}")
            effects.append(Store(header.step, header.chunk, event.slot))
            effects += self._send_down(header.step, step, header.chunk)
        return effects + self._finish(header.step, step, now_s)

    def _check_deal(self, step: _Step, chunk: int, tree: int) -> None:
        if not 0 <= chunk < len(step.deal) or step.deal[chunk] != tree:
            raise RemoteProtocolError(
                f"chunk {chunk} on tree {tree}: the members contribute different sizes, or plans differ"
            )

    def _add(self, number: int, step: _Step, chunk: int) -> list[Effect]:
        """Adds what is there, up to the first child that is missing; after the last one the sum moves on."""
        tree = step.deal[chunk]
        duties = self._duties[tree]
        effects: list[Effect] = []
        for edge in duties.children_up[step.num_added[chunk] :]:
            if (chunk, edge) not in step.held:
                return effects
            slot, _ = step.held.pop((chunk, edge))
            effects.append(Add(number, chunk, slot))
            step.num_added[chunk] += 1
        if duties.is_root:
            return effects + self._send_down(number, step, chunk)
        header = ChunkHeader(self.epoch, number, chunk, tree, Phase.UP, duties.own_edge, 1)
        return [*effects, Send(duties.up[duties.own_edge][1], header)]

    def _send_down(self, number: int, step: _Step, chunk: int) -> list[Effect]:
        tree = step.deal[chunk]
        duties = self._duties[tree]
        step.num_done += 1
        return [
            Send(duties.down[edge][1], ChunkHeader(self.epoch, number, chunk, tree, Phase.DOWN, edge, 1))
            for edge in duties.children_down
        ]

    def _finish(self, number: int, step: _Step, now_s: float) -> list[Effect]:
        if not step.deal or step.num_done < step.num_to_do:
            return []
        del self._steps[number]
        self._finished.add(number)
        while self._first_open in self._finished:
            self._finished.remove(self._first_open)
            self._first_open += 1
        return [Finished(number, now_s - step.began_s)]
