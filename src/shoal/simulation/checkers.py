"""What may never happen, checked after every step; and what must have happened once faults stop.

The names I1 to I10 are the project's invariants of elastic training, each as far as membership answers for it; the
stand-in for training in
`world.py` supplies the steps. The checkers see everything at once, disks included, which no device can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from shoal.effects import Effect, Event, Fact
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import Peer
from shoal.membership.group import (
    Decided,
    GroupCore,
    LeaderChanged,
    RecordAdopted,
    Role,
    Standing,
    is_quorum,
    record_hash,
)
from shoal.membership.group.ballot import read_file
from shoal.membership.messages import Record
from shoal.membership.presence import EVERYONE_MAX, RINGS
from shoal.membership.roster import EMPTY
from shoal.simulation.device import Device, Power
from shoal.simulation.world import Failure, Watcher, World, is_leading

EpochId = tuple[GroupId, int, int]
FELLOWS_MAX = 128
"""A group's members watch each other, beside the rings."""


class Checkers(Watcher):
    """All of them, over one world.

    one child (I1)        of every (group, generation, epoch) at most one record is committed
    step once (I2)        once an epoch has applied a step, no earlier one applies any, unless the two have no active
                          member in common: then the earlier one's, all dropped, may act on until suspended (see I4)
    same record (I3)      who says the same (group, generation, epoch) holds the same bytes
    acting late (I4)      no device acts in an epoch longer than a suspension's time after the next was decided
    no gap (I5)           an epoch's first step is at most one beyond the last applied, so no samples are left out
    activation (I6)       an active member was active before, or caught up as a shadow, in this same incarnation
    suspended (I7)        a suspended device decides nothing and applies no step
    settles (I8, I10)     when faults stop, everything settles within a bound, whether a joiner catches up or not
    chain (I9)            every record names the hash of its parent
    one leader            one per (group, generation, term)
    quorum                at a decision, a quorum of the parent's voters has the record on disk
    forgetting            a device's epoch never goes back while its disk is kept
    removed               who knows of a removal does not trust the removed device, whatever comes
    presence              after a settled cut, each side has all of its own and none of the other
    calm                  without faults nothing changes among those who belong: no leader, no record, no suspension,
                          nobody gone
    bounded               a device watches a bounded number of peers
    """

    def __init__(self, world: World | None = None) -> None:
        self.world: World = world  # type: ignore[assignment]
        self.coverage: Counter[tuple[str, str, str]] = Counter()
        """(machine, state, fault): how often a fault met a device in this state."""
        self.committed: dict[EpochId, tuple[str, Record]] = {}
        self._decided_s: dict[EpochId, float] = {}
        self._on_disk: dict[tuple[GroupId, str], set[NodeId]] = {}
        self._leaders: dict[tuple[GroupId, int, int], NodeId] = {}
        self._trained: dict[tuple[GroupId, int], tuple[int, frozenset[NodeId]]] = {}
        """The last epoch of each generation that applied a step, and its active members."""
        self._last_step: dict[GroupId, int] = {}
        self._epochs: dict[tuple[NodeId, int, GroupId], tuple[int, int]] = {}
        self._removals: dict[tuple[NodeId, int], frozenset[NodeId]] = {}
        self.is_calm = False
        self.most_watched = 0

    def _fail(self, checker: str, text: str) -> None:
        raise Failure(checker, text)

    # ---- after every step

    def stepped(self, device: Device, event: Event, effects: list[Effect]) -> None:
        del event, effects
        core = device.core
        if core is None:
            return
        removed = core.roster.roster.removed
        if removed:
            self._removals[device.node, device.boots] = removed
        elif self._removals:
            removed = self._removals.get((device.node, device.boots), removed)
        if removed and not removed.isdisjoint(core.trusted):
            who = ", ".join(sorted(removed & core.trusted.keys()))
            self._fail("removed", f"{device.node} knew that {who} was removed, and trusts it")
        num_watched = len(core.presence.watched)
        if num_watched > self.most_watched:
            self.most_watched = num_watched
            fellows = max((len(group.committed.members) for group in core.groups.values()), default=0)
            if num_watched > max(2 * RINGS, EVERYONE_MAX - 1) + min(FELLOWS_MAX, fellows) * len(core.groups):
                self._fail("bounded", f"{device.node} watches {num_watched} peers")

    def announced(self, device: Device, fact: Fact) -> None:
        if isinstance(fact, RecordAdopted):
            self._on_record(device, fact.record)
        elif isinstance(fact, Decided):
            self._on_decided(device, fact)
        elif isinstance(fact, LeaderChanged) and fact.leader == device.node:
            self._on_leader(device, fact)
        is_news_only = isinstance(fact, RecordAdopted) and not fact.is_member  # those outside are told at leisure
        is_change = self.is_calm and type(fact).__name__ in _CHANGES and not is_news_only
        # A removed device may notice late that nobody answers; settling does not wait for it either.
        if is_change and device.node not in self.removed():
            self._fail("calm", f"{device.node}: {fact}")

    def _on_leader(self, device: Device, fact: LeaderChanged) -> None:
        core = self._group(device, fact.group)
        if core is None:
            return
        key = (fact.group, core.committed.generation, fact.term)
        other = self._leaders.setdefault(key, device.node)
        if other != device.node:
            self._fail("one leader", f"{other} and {device.node} both lead {fact.group} in term {fact.term}")

    def _on_record(self, device: Device, record: Record) -> None:
        key = (record.group, record.generation, record.epoch)
        digest = record_hash(record)
        known = self.committed.setdefault(key, (digest, record))
        if known[0] != digest:
            self._fail(
                "one child (I1)",
                f"{device.node} holds another epoch {record.epoch} of {record.group}: {record}, not {known[1]}",
            )
        if known[1] is not record and known[1] != record:
            self._fail("same record (I3)", f"{device.node} holds other bytes for epoch {record.epoch}")
        seat = (device.node, device.boots, record.group)
        before = self._epochs.get(seat, (0, 0))
        if (record.generation, record.epoch) < before:
            self._fail("forgetting", f"{device.node} went back from epoch {before[1]} to {record.epoch}")
        self._epochs[seat] = (record.generation, record.epoch)
        parent = self.committed.get((record.group, record.generation, record.epoch - 1))
        if parent is not None:
            self._check_child(record, *parent)

    def _check_child(self, record: Record, parent_hash: str, parent: Record) -> None:
        if record.parent != parent_hash:
            self._fail("chain (I9)", f"epoch {record.epoch} of {record.group} names another parent")
        last = self._last_step.get(record.group, 0)
        if record.first_step > last + 1:
            self._fail("no gap (I5)", f"epoch {record.epoch} begins at step {record.first_step}, the last applied is {last}")
        before = {member.node: member for member in parent.members}
        for member in record.members:
            was = before.get(member.node)
            if member.part != "active" or (was is not None and was.part == "active"):
                continue
            trainer = self.world.devices[member.node].trainer(record.group)
            if was is None or was.incarnation != member.incarnation or trainer.ready_as < member.incarnation:
                self._fail("activation (I6)", f"{member.node} is active in epoch {record.epoch} and never caught up")

    def _on_decided(self, device: Device, fact: Decided) -> None:
        core = self._group(device, fact.group)
        if core is None:
            return
        if core.standing is not Standing.RUNNING:
            self._fail("suspended (I7)", f"{device.node} decided epoch {fact.epoch} of {fact.group} while suspended")
        generation = core.committed.generation
        found = self.committed.get((fact.group, generation, fact.epoch))
        parent = self.committed.get((fact.group, generation, fact.epoch - 1))
        if found is None:
            # Announced before the record: take it from the core, which adopts it in the same step.
            self.world.call_at(self.world.now_s, self._check_quorum, fact.group, generation, fact.epoch)
        elif parent is not None:
            self._check_quorum(fact.group, generation, fact.epoch)

    def _check_quorum(self, group: GroupId, generation: int, epoch: int) -> None:
        found = self.committed.get((group, generation, epoch))
        parent = self.committed.get((group, generation, epoch - 1))
        if found is None or parent is None:
            return
        self._decided_s.setdefault((group, generation, epoch), self.world.now_s)
        holders = self._on_disk.get((group, found[0]), set())
        if not is_quorum(parent[1], holders):
            have = " ".join(sorted(holders)) or "nobody"
            self._fail(
                "quorum", f"epoch {epoch} of {group} was decided, but only {have} of {' '.join(parent[1].voters)} have it"
            )

    def written(self, device: Device, key: str, value: bytes) -> None:
        if not key.startswith("group/"):
            return
        file = read_file(value)
        group = GroupId(key.removeprefix("group/"))
        for record in (file.accepted, file.committed):
            if record is not None and record.epoch > 0:
                self._on_disk.setdefault((group, record_hash(record)), set()).add(device.node)

    # ---- training

    def trained(self, record: Record, step: int, devices: list[Device]) -> None:
        group, generation = record.group, record.generation
        if step < record.first_step:
            self._fail("no gap (I5)", f"step {step} of {group} is before the first of epoch {record.epoch}")
        active = frozenset(device.node for device in devices)
        last_epoch, last_active = self._trained.get((group, generation), (0, active))
        if record.epoch < last_epoch and not active.isdisjoint(last_active):
            text = f"{group} applied step {step} in epoch {record.epoch}, after steps of epoch {last_epoch}"
            self._fail("step once (I2)", text)
        if record.epoch >= last_epoch:
            self._trained[group, generation] = (record.epoch, active)
        self._last_step[group] = max(step, self._last_step.get(group, -1))
        timing = self.world.settings.timing
        later_s = self._decided_s.get((group, generation, record.epoch + 1))
        network = self.world.network
        bound_s = 1.02 * timing.suspend_s + 4 * (network.delay + network.jitter) + 0.1
        if later_s is not None and self.world.now_s - later_s > bound_s:
            self._fail(
                "acting late (I4)",
                f"epoch {record.epoch} of {group} applied a step {self.world.now_s - later_s:.2f} s "
                "after its child was decided",
            )
        for device in devices:
            core = self._group(device, group)
            if core is not None and core.standing is not Standing.RUNNING:
                self._fail("suspended (I7)", f"{device.node} applied step {step} of {group} while suspended")

    # ---- coverage

    def disrupted(self, fault: str, devices: list[Device]) -> None:
        for device in devices:
            core = device.core
            if core is None:
                continue
            for group in core.groups.values():
                self.coverage["role", group.role.value, fault] += 1
                self.coverage["standing", group.standing.value, fault] += 1
            for watched in core.presence.watched.values():
                self.coverage["peer", watched.state.value, fault] += 1
            # How others see it is a state that the fault meets as well.
            for other in self.world.devices.values():
                if other.core is not None and (seen := other.core.presence.watched.get(device.node)) is not None:
                    self.coverage["peer", seen.state.value, fault] += 1

    # ---- when faults have stopped

    def unsettled(self) -> str:
        """Why the world is not settled yet; empty when it is. Every device that is not kept off must be running."""
        running = {
            node: device
            for node, device in self.world.devices.items()
            if device.core is not None and not device.is_kept_off and device.power is Power.RUNNING
        }
        alive: dict[NodeId, Device] = {}
        for side in self._sides(running):
            members = self._members_of(side)
            alive.update({node: running[node] for node in members})
            problem = self._unsettled_presence(running, members)
            if problem:
                return problem
        if self.world.blocked:
            return ""
        for device in self.strangers()[0]:
            if device.node not in alive:
                return f"roster: {device.node} does not belong"
        for group in dict.fromkeys(group for device in alive.values() for group in device.groups):
            problem = self._unsettled_group(group, alive)
            if problem:
                return problem
        return ""

    def _members_of(self, nodes: Iterable[NodeId]) -> list[NodeId]:
        """Those of `nodes` that belong, by the roster that most of them hold, and of equals the one that removes most.

        Whoever does not belong by its own roster has no say.
        """
        cores = {node: core for node in nodes if (core := self.world.devices[node].core) is not None}
        rosters = [core.roster.roster for node, core in cores.items() if core.roster.is_member(node)]
        counts = Counter(roster.digest for roster in rosters)
        best = max(
            rosters, key=lambda roster: (counts[roster.digest], len(roster.removed), len(roster.statements)), default=EMPTY
        )
        members = []
        for node in nodes:
            core = self.world.devices[node].core
            if node in best.members and core is not None and core.roster.is_member(node):
                members.append(node)
        return members

    def strangers(self) -> tuple[list[Device], list[Device]]:
        """Devices that could belong and do not, and those that do. Removed ones are neither."""
        nodes = [node for node, device in self.world.devices.items() if device.core is not None and not device.is_kept_off]
        members = [self.world.devices[node] for node in self._members_of(nodes)]
        removed = self.removed()
        return [self.world.devices[node] for node in nodes if node not in removed], members

    def removed(self) -> frozenset[NodeId]:
        """Who is removed: by those who belong, or by its own roster, which those that lost their disks may have lost."""
        cores = {node: device.core for node, device in self.world.devices.items() if device.core is not None}
        by_itself = {node for node, core in cores.items() if node in core.roster.roster.removed}
        return frozenset(by_itself).union(*(cores[node].roster.roster.removed for node in self._members_of(cores)))

    def _sides(self, running: dict[NodeId, Device]) -> list[list[NodeId]]:
        """The parts of the network that are whole within themselves."""
        sides: list[list[NodeId]] = []
        for node in running:
            for side in sides:
                if all(self.world.can_pass(node, other) and self.world.can_pass(other, node) for other in side):
                    side.append(node)
                    break
            else:
                sides.append([node])
        return sides

    def _unsettled_presence(self, running: dict[NodeId, Device], side: list[NodeId]) -> str:
        digests = set()
        for node in side:
            core = running[node].core
            assert core is not None
            digests.add(core.roster.roster.digest)
            here = {other for other in core.presence.here() if core.presence.is_here(other)}
            if here != set(side) - {node}:
                missing, extra = sorted(set(side) - {node} - here), sorted(here - set(side))
                return f"presence: {node} misses {missing} and believes in {extra}"
        return "roster: members hold different rosters" if len(digests) > 1 else ""

    def _unsettled_group(self, group: GroupId, alive: dict[NodeId, Device]) -> str:
        wanting = {node for node, device in alive.items() if group in device.groups}
        cores = {node: core for node in wanting if (core := self._group(alive[node], group)) is not None}
        if len(cores) < len(wanting):
            return f"{group}: some do not know it yet"
        records = {record_hash(core.committed): core.committed for core in cores.values()}
        if len(records) != 1:
            return f"{group}: members hold different records"
        (record,) = records.values()
        leaders = [node for node, core in cores.items() if is_leading(core.role)]
        if len(leaders) != 1 or any(core.leader != leaders[0] for core in cores.values()):
            return f"{group}: leaders are {leaders}"
        if cores[leaders[0]].role is not Role.LEADING:
            return f"{group}: {leaders[0]} has not decided yet what it proposed"
        listed = {member.node: member for member in record.members}
        if listed.keys() != wanting:
            return f"{group}: the record lists {sorted(listed)}, and {sorted(wanting)} want to be in"
        for node, member in listed.items():
            device = alive[node]
            is_slow = node in self.world.slow
            if member.incarnation != device.incarnation:
                return f"{group}: {node} is listed as a former self"
            if member.part == "shadow" and not is_slow and self.world.settings.trains:
                return f"{group}: {node} is still a shadow"
            if not cores[node].is_running(device.clock(self.world.now_s)):
                return f"{group}: {node} does not run"
        if set(record.voters) != wanting:
            return f"{group}: voters are {record.voters}"
        if record.cut_links:
            return f"{group}: avoids {record.cut_links}"
        return ""

    def lost_groups(self) -> dict[GroupId, NodeId]:
        """Groups that no protocol can save, each with the device that the owner should recover it at."""
        found: dict[GroupId, NodeId] = {}
        for group in dict.fromkeys(group for device in self.world.devices.values() for group in device.groups):
            cores = {}
            for node, device in self.world.devices.items():
                core = self._group(device, group)
                if core is None or node in self.removed() or device.power is not Power.RUNNING:
                    continue
                if core.committed.members:
                    cores[node] = core
            if not cores:
                continue
            newest = max((core.committed.generation, core.committed.epoch) for core in cores.values())
            holders = {
                node: core for node, core in cores.items() if (core.committed.generation, core.committed.epoch) == newest
            }
            record = next(iter(holders.values())).committed
            able = [node for node, core in cores.items() if self._could_vote(core, record)]
            if not is_quorum(record, able) or not any(
                member.part == "active" and member.node in cores for member in record.members
            ):
                steps = {node: self.world.devices[node].trainer(group).step for node in holders}
                found[group] = max(sorted(holders), key=lambda node: steps[node])
        return found

    def vanished_groups(self) -> dict[GroupId, NodeId]:
        """Groups of which every record was lost with the disks, each with a device that wants it."""
        found: dict[GroupId, NodeId] = {}
        known: set[GroupId] = set()
        for node, device in self.world.devices.items():
            if device.core is None or device.is_kept_off or node in self.removed():
                continue
            for group in device.groups:
                found.setdefault(group, node)
            known.update(name for name, core in device.core.groups.items() if core.committed.members)
        return {group: node for group, node in found.items() if group not in known}

    def forget_group(self, group: GroupId) -> None:
        """It starts anew. Where nobody remembers it, what was agreed on under this name counts no more."""
        cores = [device.core for device in self.world.devices.values() if device.core is not None]
        if any(core.groups[group].committed.epoch > 0 for core in cores if group in core.groups):
            return
        self.committed = _without(self.committed, group)
        self._decided_s = _without(self._decided_s, group)
        self._on_disk = {key: nodes for key, nodes in self._on_disk.items() if key[0] != group}
        self._leaders = _without(self._leaders, group)
        self._trained = {key: each for key, each in self._trained.items() if key[0] != group}
        self._last_step.pop(group, None)
        for seat in [seat for seat in self._epochs if seat[2] == group]:
            del self._epochs[seat]

    def _could_vote(self, core: GroupCore, record: Record) -> bool:
        listed = {member.node: member.incarnation for member in record.members}
        if (core.committed.generation, core.committed.epoch) == (record.generation, record.epoch):
            return core.can_vote()
        return core.me in record.voters and listed.get(core.me) in (core.ballot.voter_incarnation, core.incarnation)

    @staticmethod
    def _group(device: Device, group: GroupId) -> GroupCore | None:
        return device.core.groups.get(group) if device.core is not None else None


_Kept = TypeVar("_Kept")


def _without(table: dict[EpochId, _Kept], group: GroupId) -> dict[EpochId, _Kept]:
    return {key: value for key, value in table.items() if key[0] != group}


_CHANGES = frozenset(
    {"LeaderChanged", "RecordAdopted", "Suspended", "MemberGone", "LinkChanged", "Woke", "Doubted", "Outranked"}
)

STATES = {
    "role": tuple(role.value for role in Role),
    "standing": tuple(standing.value for standing in Standing),
    "peer": tuple(peer.value for peer in Peer),
}
"""Every state of the transition tables."""
