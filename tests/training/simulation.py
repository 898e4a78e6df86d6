"""A run with chance: members compute at their own pace, die, leave and join; all die and come back from a checkpoint.

A model is here the list of samples that were applied to it, step by step. The group's agreement is played by the simulation:
when all who are left have suspended, there is a record, which each hears of in its own time.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from heapq import heappop, heappush

import msgspec

from shoal.ids import NodeId
from shoal.training.ledger import (
    Applied,
    CatchUp,
    Committed,
    Compute,
    Effect,
    Entry,
    Event,
    Grouped,
    Ledger,
    Reported,
    Suspend,
)
from shoal.training.samples import Interval, SampleOrder


class Device:
    """A member: its core, its model, and the gradient of the last step, which it keeps for who is behind."""

    def __init__(self, ledger: Ledger, model: list[tuple[int, ...]]) -> None:
        self.ledger = ledger
        self.model = model

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.model).encode()).hexdigest()[:16]


class Run:
    """All devices of one run, up to `num_steps` steps."""

    def __init__(self, seed: int, *, num_steps: int) -> None:
        self.rng = random.Random(seed)
        self.num_steps = num_steps
        self.order = SampleOrder(seed, self.rng.randint(7, 40), self.rng.randint(2, 9))
        self.devices: dict[NodeId, Device] = {}
        self.committed: dict[int, Entry] = {}
        self.num_redone = 0
        self._speeds: dict[NodeId, float] = {}
        self._contributions: dict[tuple[int, int], dict[NodeId, Interval]] = {}
        self._groups: dict[int, Grouped] = {}
        self._given_up: dict[NodeId, int] = {}
        self._epoch = 0
        self._num_named = self._num_due = 0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._joining: list[NodeId] = []
        self.now_s = 0.0
        for _ in range(self.rng.randint(1, 5)):
            name = self._name()
            self.devices[name] = Device(Ledger(name, self.order), [])
        self._record()

    def later(self, call: Callable[[], None], mean_s: float = 1.0) -> None:
        self._num_due += 1
        heappush(self._due, (self.now_s + self.rng.expovariate(1.0 / mean_s), self._num_due, call))

    def play(self) -> None:
        while self._due:
            self.now_s, _, call = heappop(self._due)
            call()
            applied = [device.ledger.applied for device in self.devices.values()]
            assert max(applied) - min(applied) <= 1, "members are more than one step apart"
            for name, device in self.devices.items():
                assert len(device.model) == device.ledger.applied + 1, name
                assert len(device.ledger.pending) <= 1, name

    # ---- faults

    def die(self) -> None:
        """One device is lost, or leaves: but for what it says before, it is the same to the others."""
        if len(self.devices) > 1:
            del self.devices[self.rng.choice(sorted(self.devices))]
            self._suspend_all()

    def join(self) -> None:
        self._joining.append(self._name())
        self._suspend_all()

    def lose_all(self) -> None:
        """Every device ends; some come back from a checkpoint, which has committed steps. The run goes on from there."""
        survivor = self.devices[self.rng.choice(sorted(self.devices))]
        num_steps = self.rng.randint(0, len(survivor.ledger.entries))
        checkpoint = [checked_copy(entry) for entry in survivor.ledger.entries[:num_steps]]
        self.committed = {entry.step: entry for entry in checkpoint}
        self.devices = {}
        for _ in range(self.rng.randint(1, 5)):
            name = self._name()
            self.devices[name] = Device(Ledger(name, self.order, checkpoint), survivor.model[:num_steps])
        self._record()

    # ---- the group

    def _name(self) -> NodeId:
        name = NodeId(f"m{self._num_named:03}")
        self._num_named += 1
        self._speeds[name] = self.rng.uniform(0.5, 5.0)
        return name

    def _suspend_all(self) -> None:
        epoch = self._epoch
        for name in self.devices:
            self.later(lambda name=name: self._suspend(name, epoch), 0.3)  # type: ignore[misc]

    def _suspend(self, name: NodeId, epoch: int) -> None:
        """Who has given up an epoch does not enter it any more, and when all have, there is the next."""
        if epoch < self._epoch:
            return
        if name in self.devices:
            self._given_up[name] = epoch
            self._tell(name, Suspend())
        if all(self._given_up.get(other) == epoch for other in self.devices):
            self._record()

    def _record(self) -> None:
        applied = max(device.ledger.applied for device in self.devices.values())
        donors = [name for name, device in self.devices.items() if device.ledger.applied == applied]
        donor = self.devices[donors[0]]
        for name in self._joining:
            ledger = Ledger(name, self.order, donor.ledger.entries, next(iter(donor.ledger.pending), None))
            self.devices[name] = Device(ledger, list(donor.model))
        self._joining = []
        self._epoch += 1
        speeds = {name: self._speeds[name] for name in self.devices}
        record = self._groups[self._epoch] = Grouped(self._epoch, speeds, applied, donors[0])
        for name in self.devices:
            self.later(lambda name=name: self._hear(name, record), 0.3)  # type: ignore[misc]

    def _hear(self, name: NodeId, record: Grouped) -> None:
        if record.epoch == self._epoch != self._given_up.get(name) and name in self.devices:
            self._tell(name, record)

    # ---- what a device does

    def _tell(self, name: NodeId, event: Event) -> None:
        for effect in self.devices[name].ledger.step(event, self.now_s):
            self._carry_out(name, effect)

    def _carry_out(self, name: NodeId, effect: Effect) -> None:
        if isinstance(effect, Committed):
            known = self.committed.setdefault(effect.entry.step, effect.entry)
            assert known == effect.entry, "a step was committed in two ways"
        elif isinstance(effect, CatchUp):
            self.later(lambda: self._catch_up(name, effect))
        elif effect.step < self.num_steps:
            self.later(lambda: self._contribute(name, effect), 1.0 + len(effect.part) / self._speeds[name])
        else:
            # The last step's report rides on a contribution that is never made.
            self._report(name, effect)

    def _acts_in(self, name: NodeId, epoch: int) -> bool:
        device = self.devices.get(name)
        return device is not None and device.ledger.epoch == epoch and not device.ledger.is_suspended

    def _report(self, name: NodeId, effect: Compute) -> None:
        report = Reported(name, effect.epoch, effect.step - 1)
        for other in self._groups[effect.epoch].samples_per_s:
            self.later(lambda other=other: self._tell(other, report) if other in self.devices else None)  # type: ignore[misc]

    def _contribute(self, name: NodeId, effect: Compute) -> None:
        if not self._acts_in(name, effect.epoch):
            return
        self._report(name, effect)
        parts = self._contributions.setdefault((effect.epoch, effect.step), {})
        assert name not in parts, "a member contributed twice"
        parts[name] = effect.part
        if set(parts) == set(self._groups[effect.epoch].samples_per_s):
            self.num_redone += any(epoch < effect.epoch and step == effect.step for epoch, step in self._contributions)
            samples = tuple(sample for part in sorted(parts.values()) for sample in self.order.samples(part))
            for member in parts:
                self.later(lambda member=member: self._apply(member, effect, samples))  # type: ignore[misc]

    def _apply(self, name: NodeId, effect: Compute, samples: tuple[int, ...]) -> None:
        if self._acts_in(name, effect.epoch):
            device = self.devices[name]
            device.model.append(samples)
            self._tell(name, Applied(effect.step, device.digest))

    def _catch_up(self, name: NodeId, effect: CatchUp) -> None:
        device, donor = self.devices.get(name), self.devices.get(effect.donor)
        if device is None or donor is None or device.ledger.is_suspended or device.ledger.applied >= effect.step:
            return
        device.model.append(donor.model[effect.step])
        known = [*donor.ledger.entries, *donor.ledger.pending][effect.step]
        assert device.digest == known.digest, "what the donor gave leads to other bits"
        self._tell(name, Applied(effect.step, device.digest, known))


def checked_copy(entry: Entry) -> Entry:
    """As another device would read it from a checkpoint."""
    return msgspec.json.decode(msgspec.json.encode(entry), type=Entry)
