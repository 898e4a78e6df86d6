"""A whole run with chance: real group cores agree, member cores decide, exchanges and transfers are played.

A model is the list of samples that were applied to it, step by step, so its bits say all that happened to it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from heapq import heappop, heappush

from shoal.effects import Effect, Event
from shoal.ids import NodeId
from shoal.membership.failure import MemberHere
from shoal.membership.group.facts import Attach, JoinGroup, LeaveGroup, RecordAdopted, ReportProgress, Resumed, Suspended
from shoal.membership.group.table import Standing
from shoal.membership.messages import Attachment
from shoal.network.graph import Link
from shoal.training import member as m
from shoal.training.ledger import CatchUp, Committed, Compute, Entry
from shoal.training.samples import Interval, SampleOrder
from tests.membership.group_world import RUN, Group
from tests.training.invariants import Invariants

Model = list[tuple[int, ...]]
POLL_S = 0.05


class Device:
    """What a device has beside its cores."""

    def __init__(self, core: m.Member, model: Model) -> None:
        self.core = core
        self.model = model
        self.snapshot: tuple[Model, list[Entry]] | None = None
        self.kept: dict[int, tuple[tuple[int, ...], Entry]] = {}
        self.errand = 0
        """Counts what it was told to fetch; what is not of the last errand is not done any more."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.model).encode()).hexdigest()[:16]


class Exchange:
    """Contributions of one epoch."""

    def __init__(self, members: tuple[NodeId, ...]) -> None:
        self.members = members
        self.steps: dict[int, dict[NodeId, tuple[Interval, bool]]] = {}
        self.is_broken = False
        self.rates: dict[Link, float] | None = None


class RunWorld(Group):
    """A run of `num_steps` steps, founded by the first device."""

    def __init__(self, seed: int, *, num_steps: int, num_devices: int) -> None:
        self.rng = random.Random(seed)
        self.num_steps = num_steps
        self.order = SampleOrder(seed, self.rng.randint(7, 40), self.rng.randint(2, 9))
        self.devices: dict[NodeId, Device] = {}
        self.invariants = Invariants(self.order)
        self.exchanges: dict[int, Exchange] = {}
        self.num_restarts = self.num_redone = self.num_replayed = 0
        self.done: set[NodeId] = set()
        self.applied_at_s: list[float] = []
        self.transfer_s: float | None = None
        """How long pulling a state takes; by chance, if None."""
        self._own: list[tuple[float, int, Callable[[], None]]] = []
        self._num_named = num_devices
        self._lives: dict[NodeId, int] = {}
        names = [f"d{index:02}" for index in range(num_devices)]
        super().__init__(*names)
        for index, name in enumerate(self.names):
            core = m.Member(name, self.order, history=() if index == 0 else None, members_min=1 + seed % num_devices)
            self.devices[name] = Device(core, [])
        self.create(names[0])
        for name in self.names[1:]:
            self.command(name, JoinGroup(RUN))
        for name in self.names:
            self._nudge(name)

    @property
    def committed(self) -> dict[int, Entry]:
        """What some device knows to count, by step."""
        return self.invariants.committed

    # ---- faults

    def start(self) -> NodeId:
        """A device that was not there before joins."""
        name = NodeId(f"d{self._num_named:02}")
        self._num_named += 1
        self.disks[name] = {}
        self.devices[name] = Device(m.Member(name, self.order), [])
        self.cores[name] = self.new_core(name, now_s=self.now_s)
        for other in list(self.cores):
            if other != name and not self._is_cut(name, other):
                self.learn(name, MemberHere(other, 1))
                self.learn(other, MemberHere(name, 1))
        self.command(name, JoinGroup(RUN))
        self._nudge(name)
        return name

    def die(self, name: NodeId) -> None:
        del self.devices[name]
        self._break(name)
        self.kill(name)

    def come_back(self, name: NodeId) -> None:
        """One that died does, as a later incarnation with the file of its group; its state is lost."""
        self._lives[name] = self._lives.get(name, 1) + 1
        device = Device(m.Member(name, self.order), [])
        device.errand = self._lives[name] << 32  # what its former life was told to fetch is not done any more
        self.devices[name] = device
        self.restart(name, self._lives[name])
        self.command(name, JoinGroup(RUN))
        self._nudge(name)

    def leave(self, name: NodeId) -> None:
        self.command(name, LeaveGroup(RUN))

    def part(self, side: set[NodeId], seconds: float) -> None:
        """A cut network, which heals."""
        rest = set(self.cores) - side
        for exchange in self.exchanges.values():
            if side & set(exchange.members) and rest & set(exchange.members):
                self._break(next(iter(side & set(exchange.members))))
        for one in side:
            for other in rest:
                self.cut(one, other)
        self.run(1.8)
        for one in side & set(self.cores):
            self.lose(one, by=[other for other in rest if other in self.cores])
        for other in rest & set(self.cores):
            self.lose(other, by=[one for one in side if one in self.cores])
        self.run(seconds)
        self.heal()

    def veterans(self) -> list[NodeId]:
        """Who could carry on alone."""
        found = [name for name, device in self.devices.items() if device.core.phase in (m.Phase.ACTIVE, m.Phase.WAITING)]
        return [name for name in found if self.devices[name].core.ledger is not None]

    def _is_cut(self, one: NodeId, other: NodeId) -> bool:
        return (one, other) in self.cuts

    def _break(self, name: NodeId) -> None:
        for epoch, exchange in self.exchanges.items():
            if name in exchange.members and not exchange.is_broken:
                exchange.is_broken = True
                for member in exchange.members:
                    self.later(lambda member=member, epoch=epoch: self.say(member, m.Broken(epoch)), 0.05)  # type: ignore[misc]

    # ---- time

    def later(self, call: Callable[[], None], mean_s: float) -> None:
        self.at(self.now_s + self.rng.expovariate(1.0 / mean_s), call)

    def at(self, at_s: float, call: Callable[[], None]) -> None:
        heappush(self._own, (at_s, next(self._order), call))

    def run(self, seconds: float) -> None:
        """What is the world's own comes in between what devices do."""
        until_s = self.now_s + seconds
        while self._own and self._own[0][0] <= until_s:
            at_s, _, call = heappop(self._own)
            super().run(max(0.0, at_s - self.now_s))
            call()
        super().run(until_s - self.now_s)

    def _nudge(self, name: NodeId) -> None:
        if name in self.devices:
            self.say(name, m.Nudged())
            self.later(lambda: self._nudge(name), 0.3)

    # ---- devices

    def _step(self, node: NodeId, event: Event) -> list[Effect]:
        first = len(self.facts)
        effects = super()._step(node, event)
        for who, _, fact in self.facts[first:]:
            if who != node:
                continue
            if isinstance(fact, RecordAdopted):
                self.invariants.adopted(fact.record)
                parts = {
                    part: tuple(each.node for each in fact.record.members if each.part == part)
                    for part in ("active", "shadow")
                }
                self.say(node, m.Adopted(fact.record.epoch, parts["active"], parts["shadow"]))
            elif isinstance(fact, Suspended):
                self.say(node, m.Halted())
            elif isinstance(fact, Resumed):
                self.say(node, m.Resumed())
        return effects

    def say(self, name: NodeId, event: m.Event) -> None:
        if name in self.devices:
            for effect in self.devices[name].core.step(event, self.now_s):
                self._carry_out(name, effect)
            self._check()

    def _check(self) -> None:
        by_epoch: dict[int, list[int]] = {}
        for device in self.devices.values():
            if device.core.open_epoch is not None:
                by_epoch.setdefault(device.core.open_epoch, []).append(device.core.applied)
        for epoch, applied in by_epoch.items():
            self.invariants.apart(epoch, applied)

    def _carry_out(self, name: NodeId, effect: m.Effect) -> None:
        device = self.devices[name]
        if isinstance(effect, m.Tell):
            for peer in effect.peers:
                if not self._is_cut(name, peer):
                    self.later(lambda peer=peer: self.say(peer, m.Heard(name, effect.status)), 0.002)  # type: ignore[misc]
        elif isinstance(effect, m.Report):
            self.command(name, ReportProgress(RUN, effect.applied, effect.has_state, effect.is_ready))
        elif isinstance(effect, m.Open):
            device.errand += 1
            self.invariants.opened(device.core.applied, device.digest)
            exchange = self.exchanges.setdefault(effect.epoch, Exchange(effect.members))
            assert exchange.rates in (None, effect.rates), "members of an epoch would plan from different rates"
            exchange.rates = effect.rates
            lost = any(peer not in self.devices or self._is_cut(name, peer) for peer in effect.members)
            if lost or exchange.is_broken:
                exchange.is_broken = True  # it cannot be dialled
                self.later(lambda: self.say(name, m.Broken(effect.epoch)), 0.05)
        elif isinstance(effect, Compute):
            self.later(lambda: self._contribute(name, effect), 0.1)
        elif isinstance(effect, m.Apply):
            self._apply(name, effect.step)
        elif isinstance(effect, Committed):
            is_running = self[name].standing is Standing.RUNNING or len(self.exchanges) == 0
            self.invariants.says_committed(effect.entry, self.now_s, is_running=is_running)
        elif isinstance(effect, m.Snapshot):
            device.snapshot = (list(device.model), device.core.entries) if effect.num_donors else None
        elif isinstance(effect, m.PullState):
            device.errand += 1
            self._pull(name, effect, device.errand)
        elif isinstance(effect, m.Follow):
            device.errand += 1
            self._follow(name, effect.donors, device.errand)
        elif isinstance(effect, CatchUp):
            self._follow(name, (effect.donor,), device.errand)
        elif isinstance(effect, m.AskRecord):
            self.command(name, Attach(RUN, Attachment("exchange", str(effect.epoch), b"")))
        else:
            self.num_restarts += 1
            self.later(lambda: self._begin_anew(name), 0.01)

    def _begin_anew(self, name: NodeId) -> None:
        if name in self.devices:
            self.die(name)
            self.start()

    def _contribute(self, name: NodeId, effect: Compute) -> None:
        device = self.devices.get(name)
        if device is None or device.core.open_epoch != effect.epoch or device.core.applied != effect.step - 1:
            return
        exchange = self.exchanges[effect.epoch]
        if exchange.is_broken:
            return
        parts = exchange.steps.setdefault(effect.step, {})
        assert name not in parts, "a member contributed twice"
        parts[name] = (effect.part, device.core.knows_later_record)
        self.say(name, m.Measured({peer: 1.0 + self.now_s for peer in exchange.members if peer != name}))
        if set(parts) == set(exchange.members):
            others = [each for epoch, each in self.exchanges.items() if epoch < effect.epoch]
            self.num_redone += any(effect.step in each.steps for each in others)
            for member in exchange.members:
                self.later(lambda member=member: self._sum(member, effect.epoch, effect.step), 0.01)  # type: ignore[misc]

    def _sum(self, name: NodeId, epoch: int, step: int) -> None:
        device = self.devices.get(name)
        if device is None or device.core.open_epoch != epoch:
            return
        parts = self.exchanges[epoch].steps[step]
        if step >= self.num_steps:
            self.say(name, m.Confirmed(epoch, step))
            self.done.add(name)
            return
        is_changing = any(changing for _, changing in parts.values())
        self.say(name, m.Summed(epoch, step, is_changing))

    def _apply(self, name: NodeId, step: int) -> None:
        device = self.devices[name]
        epoch = device.core.open_epoch
        assert epoch is not None
        parts = sorted(part for part, _ in self.exchanges[epoch].steps[step].values())
        samples = tuple(sample for part in parts for sample in self.order.samples(part))
        device.model.append(samples)
        self.invariants.applied(epoch, step, device.digest, is_running=self[name].standing is Standing.RUNNING)
        self.applied_at_s.append(self.now_s)
        self.say(name, m.StepApplied(step, device.digest))
        self._keep(device, step, samples)

    def _keep(self, device: Device, step: int, samples: tuple[int, ...]) -> None:
        if device.core.applied >= step:
            device.kept[step] = (samples, device.core.entries[step])
            oldest = step - 1 if device.snapshot is None else len(device.snapshot[0])
            device.kept = {number: each for number, each in device.kept.items() if number >= min(oldest, step - 1)}

    def _pull(self, name: NodeId, effect: m.PullState, errand: int) -> None:
        def arrive() -> None:
            device = self.devices.get(name)
            if device is None or device.errand != errand:
                return
            donors = [
                self.devices[donor] for donor in effect.donors if donor in self.devices and not self._is_cut(name, donor)
            ]
            found = [donor.snapshot for donor in donors if donor.snapshot is not None]
            if not found:
                self.later(arrive, POLL_S)
                return
            model, entries = self.rng.choice(found)
            device.model = list(model)
            self.say(name, m.StateHad(tuple(entries)))

        if self.transfer_s is None:
            self.later(arrive, 0.3)
        else:
            self.at(self.now_s + self.transfer_s, arrive)

    def _follow(self, name: NodeId, donors: tuple[NodeId, ...], errand: int) -> None:
        def poll() -> None:
            device = self.devices.get(name)
            if device is None or device.errand != errand:
                return
            step = device.core.applied + 1
            for donor in donors:
                if donor in self.devices and not self._is_cut(name, donor) and step in self.devices[donor].kept:
                    samples, entry = self.devices[donor].kept[step]
                    device.model.append(samples)
                    self.num_replayed += 1
                    self.later(poll, POLL_S / 2)
                    self.say(name, m.Replayed(entry, device.digest))
                    if name in self.devices and self.devices[name] is device:
                        self._keep(device, step, samples)
                    return
            self.later(poll, POLL_S)
            self.say(name, m.CaughtUp())

        self.later(poll, POLL_S / 2)
